"""The Triton path of the LoRA linear: the kernels' launchers under the signature that the eager path has.

A launch whose configuration runs for the first time in a process is tried on a small tile and compared with the eager
path; one that does not compile, fails or differs is dropped with one warning, and the eager path does the work from
then on. ``FUSED_LORA_CHECK=0`` skips the comparison, ``FUSED_LORA_PLAN=eager`` switches all kernels off.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence

import torch

from fused_lora.ops import cpu

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_state: dict[tuple, bool] = {}  # (operation, variant, dtypes, ...) -> whether it passed its check


def usable(device: torch.device) -> bool:
    """Whether kernels may run on this device at all: CUDA with Triton, not switched off."""
    return device.type == "cuda" and _HAS_TRITON and os.environ.get("FUSED_LORA_PLAN") != "eager"


def fits(x: torch.Tensor, lora_A: Sequence[torch.Tensor], lora_B: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels compute these dtypes."""
    return all(t.dtype in _DTYPES for t in (x, *lora_A, *lora_B))


def lora_linear(variant: str) -> Callable:
    """(y, S) by the kernels, with this variant of the forward ("recompute", "publish", "split" or "cublas")."""

    def run(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds):
        from fused_lora.kernels.lora_linear import lora_linear_forward
        from fused_lora.kernels.lora_shrink import lora_shrink

        if variant != "cublas":
            return lora_linear_forward(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds, variant=variant)
        S = lora_shrink(x, lora_A, [cpu.keep_scale(p) for p in dropout], dropout, seeds)
        return _after_shrink(S, x, weight.t(), bias, [B.t() for B in lora_B], scaling), S

    return run


def lora_linear_backward(variant: str) -> Callable:
    """The gradients by the kernels; ``variant`` is that of the input gradient."""

    def run(
        g, x, weight, lora_A, lora_B, S, scaling, dropout, seeds, need_x, need_A, need_B, need_weight, need_bias
    ):  # fmt: skip
        from fused_lora.kernels.lora_grad import lora_linear_weight_grad
        from fused_lora.kernels.lora_linear import lora_linear_input_grad
        from fused_lora.kernels.lora_shrink import lora_shrink

        dx = dS = None
        B_t = [B.t() for B in lora_B]
        if need_x and variant != "cublas":
            dx, dS = lora_linear_input_grad(g, weight, lora_A, lora_B, scaling, dropout, seeds, variant=variant)
        elif need_x or any(need_A):
            dS = lora_shrink(g, B_t, scaling, [0.0] * len(B_t))
            if need_x:
                dx = _after_shrink(dS, g, weight, None, lora_A, [1.0] * len(lora_A))
        dA, dB = [None] * len(lora_A), [None] * len(lora_A)
        if any(need_A) or any(need_B):
            dS = torch.zeros_like(S) if dS is None else dS
            ranks, dtype = [A.shape[0] for A in lora_A], torch.promote_types(lora_A[0].dtype, lora_B[0].dtype)
            sums = lora_linear_weight_grad(g, x, S, dS, scaling, dropout, seeds, ranks, dtype)
            # one buffer holds all adapters' sums; gradients must not share memory
            dA = [_own(t, A, len(ranks)) if need else None for t, A, need in zip(sums[0], lora_A, need_A, strict=True)]
            dB = [_own(t, B, len(ranks)) if need else None for t, B, need in zip(sums[1], lora_B, need_B, strict=True)]
        dW = g.t() @ x if need_weight else None
        db = g.sum(0, dtype=torch.float32) if need_bias else None
        return dx, dA, dB, dW, db

    return run


def _own(gradient: torch.Tensor, parameter: torch.Tensor, adapters: int) -> torch.Tensor:
    gradient = gradient.to(parameter.dtype)
    return gradient if adapters == 1 else gradient.clone()


def _after_shrink(S, x, w, bias, Q, scales) -> torch.Tensor:
    """y = x w + bias + sum_i scales_i S_i Q_i with library GEMMs that accumulate: y is written, then read once."""
    y, column = None, 0
    for matrix, scale in zip(Q, scales, strict=True):
        part = (S[:, column : column + matrix.shape[0]] * scale).to(x.dtype)
        column += matrix.shape[0]
        if y is None:
            y = part @ matrix.to(x.dtype) if bias is None else torch.addmm(bias.to(x.dtype), part, matrix.to(x.dtype))
        else:
            y.addmm_(part, matrix.to(x.dtype))
    return y.addmm_(x, w)


def guarded(key: tuple, run: Callable, eager: Callable, check: Callable[[], str | None]) -> Callable:
    """``run`` once ``check`` has passed for ``key``, ``eager`` after any failure (with one warning per key).

    ``check`` returns None or what is wrong. An out-of-memory error is no reason to drop a configuration.
    """

    def call(*args):
        if _state.get(key) is False:
            return eager(*args)
        try:
            if key not in _state and os.environ.get("FUSED_LORA_CHECK") != "0":
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    return eager(*args)  # a comparison would break the capture; warm-up runs come before it
                wrong = check()
                if wrong is not None:
                    raise RuntimeError(wrong)
            _state[key] = True
            return run(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises
            _state[key] = False
            warnings.warn(f"fused_lora: {key} is dropped, the eager path takes over: {error}", stacklevel=2)
            return eager(*args)

    return call


def small_case(
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
    ranks: Sequence[int],
    dropout: Sequence[float],
    bias: bool,
) -> tuple:
    """Arguments of a forward that crosses tile borders and gets the tiles of ``rows`` rows; no generator is touched."""
    M = next((small for small, most in ((13, 16), (50, 64), (130, 512)) if rows <= most), 577)
    K, N = 144, 80

    def numbers(*shape, dtype, scale=1.0):
        n = 1
        for size in shape:
            n *= size
        line = torch.arange(n, device=device, dtype=torch.float32)
        return (torch.sin(line * 12.9898 + len(shape)) * scale).reshape(shape).to(dtype)

    A = [numbers(r, K, dtype=t, scale=0.2) for r, (t, _) in zip(ranks, adapter_dtypes, strict=True)]
    B = [numbers(N, r, dtype=t, scale=0.2) for r, (_, t) in zip(ranks, adapter_dtypes, strict=True)]
    b = numbers(N, dtype=torch.float32) if bias else None
    seeds = torch.arange(7, 7 + len(ranks), device=device) if any(dropout) else None
    x, W = numbers(M, K, dtype=dtype), numbers(N, K, dtype=dtype, scale=0.2)
    return x, W, b, A, B, [0.5] * len(ranks), list(dropout), seeds


def compare(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], dtype: torch.dtype) -> str | None:
    """None if two results agree to the precision of ``dtype``, else what differs."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = a.float(), b.float()
        size = b.abs().max().item()
        error = (a - b).abs().max().item()
        if not error <= max(16 * torch.finfo(dtype).eps, 1e-5) * max(size, 1e-3):
            return f"result {i} is off by {error:.2e} of {size:.2e} on a small tile"
    return None
