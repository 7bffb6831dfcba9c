"""The Triton path of the LoRA linear: the kernels' launchers under the signature that the eager path has.

``guarded`` and ``passes`` let nothing run that has not been tried once in the process; what fails is dropped with one
warning, and the eager path does the work from then on. ``FUSED_LORA_CHECK=0`` skips the trial,
``FUSED_LORA_PLAN=eager`` switches all kernels off. Both are read when a shape is used for the first time.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from fused_lora.ops.linear import eager as cpu

if TYPE_CHECKING:
    from fused_lora.ops.linear.plan import Plan

DTYPES = {torch.float32, torch.bfloat16, torch.float16}
LIBRARY = ("library", "passes")  # variants whose y or dx is written by a library GEMM, in TF32 where torch is set to it
DEVICE = "cuda"  # type of the devices that kernels run on
HAS_TRITON = importlib.util.find_spec("triton") is not None
_state: dict[tuple, bool] = {}  # what was used -> whether it passed
_drops = 0  # how often something was dropped
# for trials and first runs: Triton publishes a kernel before it has loaded it, and another thread would launch nothing
_first_use = threading.RLock()


class Case(NamedTuple):
    """Sizes, dtypes and strides of a layer: of a call, or of the small layer that its plan is tried on."""

    rows: int
    outputs: int
    inputs: int
    device: torch.device
    dtype: torch.dtype
    adapters: tuple[tuple[int, torch.dtype, torch.dtype], ...]  # (rank, dtype of A, dtype of B)
    dropout: tuple[float, ...]
    bias: torch.dtype | None
    x_by_rows: bool = True
    weight_by_rows: bool = True


def usable(device: torch.device) -> bool:
    """Whether kernels may run on this device at all: CUDA with Triton, not switched off."""
    return device.type == DEVICE and HAS_TRITON and os.environ.get("FUSED_LORA_PLAN") != "eager"


def fits(x: torch.Tensor, lora_A: Sequence[torch.Tensor], lora_B: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels compute these dtypes."""
    return all(t.dtype in DTYPES for t in (x, *lora_A, *lora_B))


def lora_linear(variant: str, chosen: Plan | None = None) -> Callable:
    """(y, S) by the kernels, with this variant of the forward ("recompute", "split" or "library").

    chosen: a plan, for the configurations of its launches; without one each launch picks its own.
    """
    product, shrink = (None, None) if chosen is None else (chosen.product, chosen.shrink)

    def run(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds):
        from fused_lora.kernels.lora_expand import lora_expand
        from fused_lora.kernels.lora_linear import lora_linear_forward
        from fused_lora.kernels.lora_shrink import lora_shrink

        if variant != "library":
            adapters = lora_A, lora_B, scaling, dropout, seeds
            return lora_linear_forward(x, weight, bias, *adapters, product, variant, shrink)
        S = lora_shrink(x, lora_A, [cpu.keep_scale(p) for p in dropout], dropout, seeds, shrink)
        y = lora_expand(S, [B.t() for B in lora_B], scaling, dropout, None, bias, x.dtype, product)
        return y.addmm_(x, weight.t()), S

    return run


def lora_linear_backward(variant: str, chosen: Plan | None = None) -> Callable:
    """The gradients by the kernels and the library's g W; ``chosen`` as in :func:`lora_linear`.

    variant: "passes" (one over g, one over x, for one adapter and all of its gradients) or "library" (a launch for each
    result, for any adapters and any of their gradients). Without a weight dx is the LoRA term alone.
    """
    product, shrink, weight_grad = (
        (None, None, None) if chosen is None else (chosen.product, chosen.shrink, chosen.weight_grad)
    )

    def passes(g, x, weight, lora_A, lora_B, S, scaling, dropout, seeds):
        from fused_lora.kernels.lora_backward import lora_backward_g, lora_backward_x

        dS, dB = lora_backward_g(g, S, lora_B[0], scaling[0], shrink)
        dx, dA = lora_backward_x(x, dS, lora_A[0], dropout[0], seeds, product)
        return dx if weight is None else dx.addmm_(g, weight), [dA], [dB]

    def each(g, x, weight, lora_A, lora_B, S, scaling, dropout, seeds, need_x, need_A, need_B):
        from fused_lora.kernels.lora_expand import lora_expand
        from fused_lora.kernels.lora_grad import lora_linear_weight_grad
        from fused_lora.kernels.lora_shrink import lora_shrink

        dx = dS = None
        if need_x or any(need_A):
            dS = lora_shrink(g, [B.t() for B in lora_B], scaling, [0.0] * len(lora_B), config=shrink)
        if need_x:
            scales = [cpu.keep_scale(p) for p in dropout]
            dx = lora_expand(dS, lora_A, scales, dropout, seeds, None, g.dtype, product)
            dx = dx if weight is None else dx.addmm_(g, weight)
        dA, dB = [None] * len(lora_A), [None] * len(lora_A)
        if any(need_A) or any(need_B):
            dS = torch.zeros_like(S) if dS is None else dS
            ranks, dtype = [A.shape[0] for A in lora_A], torch.promote_types(lora_A[0].dtype, lora_B[0].dtype)
            sums = lora_linear_weight_grad(g, x, S, dS, scaling, dropout, seeds, ranks, dtype, weight_grad)
            # one buffer holds all adapters' sums; gradients must not share memory
            dA = [_own(t, A, len(ranks)) if need else None for t, A, need in zip(sums[0], lora_A, need_A, strict=True)]
            dB = [_own(t, B, len(ranks)) if need else None for t, B, need in zip(sums[1], lora_B, need_B, strict=True)]
        return dx, dA, dB

    def run(
        g, x, weight, lora_A, lora_B, S, scaling, dropout, seeds, need_x, need_A, need_B, need_weight, need_bias
    ):  # fmt: skip
        arguments = g, x, weight, lora_A, lora_B, S, scaling, dropout, seeds
        dx, dA, dB = passes(*arguments) if variant == "passes" else each(*arguments, need_x, need_A, need_B)
        dW = g.t() @ x if need_weight else None
        db = g.sum(0, dtype=torch.float32) if need_bias else None
        return dx, dA, dB, dW, db

    return run


def _own(gradient: torch.Tensor, parameter: torch.Tensor, adapters: int) -> torch.Tensor:
    gradient = gradient.to(parameter.dtype)
    return gradient if adapters == 1 else gradient.clone()


def passes(key: tuple, check: Callable[[], str | None]) -> bool:
    """Whether ``key`` may run: ``check`` returned None (else it says what is wrong) the first time, in this process.

    An out-of-memory error is no reason to drop anything and passes through.
    """
    passed = _state.get(key)
    if passed is None:
        with _first_use:
            passed = _try(key, check)
            if passed:
                _state[key] = True
    return passed


def _try(key: tuple, check: Callable[[], str | None]) -> bool:
    if key in _state or os.environ.get("FUSED_LORA_CHECK") == "0":
        return _state.get(key, True)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        _warn_of_capture(key)
        return False  # a comparison would break the capture; no verdict: the next use outside tries it
    try:
        wrong = check()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises
        wrong = _text(error)
    if wrong is not None:
        _drop(key, wrong)
    return wrong is None


@functools.cache  # once for a key
def _warn_of_capture(key: tuple) -> None:
    warnings.warn(
        f"fused_lora: {key} is first used while a CUDA graph is captured: the graph gets the eager path. Run a warm-up "
        "step before the capture, and it gets the kernels.",
        stacklevel=4,
    )


def verdicts() -> dict[tuple, bool]:
    """What has been used in this process, and whether it passed."""
    return dict(_state)


def guarded(key: tuple, run: Callable, eager: Callable, check: Callable[[], str | None]) -> Callable:
    """``run`` if ``key`` passes its ``check``, ``eager`` otherwise and after a failure of ``run`` itself."""
    trusted = None  # how much had been dropped when the key passed last: nothing since, and it passes still

    def attempt(*args):
        try:
            return run(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises
            _drop(key, _text(error))
        return eager(*args)

    def call(*args):
        nonlocal trusted
        drops = _drops
        passed = trusted == drops or _state.get(key)
        if passed:
            trusted = drops
            return attempt(*args)
        if passed is None:
            with _first_use:
                if _try(key, check):
                    result = attempt(*args)
                    _state.setdefault(key, True)  # loaded: no lock from here on
                    return result
        return eager(*args)

    return call


def _drop(key: tuple, wrong: str) -> None:
    global _drops
    _state[key] = False
    _drops += 1
    warnings.warn(f"fused_lora: {key} is dropped, the eager path takes over: {wrong}", stacklevel=3)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def small_case(case: Case) -> tuple:
    """Arguments of a forward of this size; the same numbers every time, and no generator is touched."""

    def numbers(*shape, dtype, scale=1.0):
        n = 1
        for size in shape:
            n *= size
        line = torch.arange(n, device=case.device, dtype=torch.float32)
        # digits behind a sine's first ones: a sine itself makes matrices of rank 2, whose products cancel
        noise = torch.frac(torch.sin(line * 12.9898 + len(shape)) * 43758.5453)
        return (noise * scale).reshape(shape).to(dtype)

    A = [numbers(r, case.inputs, dtype=dtype, scale=0.2) for r, dtype, _ in case.adapters]
    B = [numbers(case.outputs, r, dtype=dtype, scale=0.2) for r, _, dtype in case.adapters]
    bias = None if case.bias is None else numbers(case.outputs, dtype=case.bias)
    seeds = torch.arange(7, 7 + len(A), device=case.device) if any(case.dropout) else None
    x = numbers(case.rows, case.inputs, dtype=case.dtype)
    W = numbers(case.outputs, case.inputs, dtype=case.dtype, scale=0.2)
    x = x if case.x_by_rows else x.t().contiguous().t()
    W = W if case.weight_by_rows else W.t().contiguous().t()
    return x, W, bias, A, B, [0.5] * len(A), list(case.dropout), seeds


def compare(
    ours: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], dtype: torch.dtype, library: bool = False
) -> str | None:
    """None if results are exact to the precision of ``dtype``, else what differs.

    library: the first result is of a library GEMM, so that fp32 may have the precision of TF32.
    """
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        a, b = a.float(), b.float()
        tf32 = library and i == 0 and dtype == torch.float32
        size = b.abs().max().item()
        error = (a - b).abs().max().item()
        if not error <= (2**-8 if tf32 else max(2 * torch.finfo(dtype).eps, 2e-5)) * max(size, 1e-3):
            return f"result {i} is off by {error:.2e} of {size:.2e} on a small tile"
    return None
