"""Which implementation runs: the one place where a kernel takes over from the eager path.

``choose`` and ``plan`` are pure functions of shape, dtype and chip, so every run of a program makes the same choice:
one launch for few rows; else a shrink and the library's GEMM, which adds to the LoRA term, or on sm_90 a fused GEMM
where that was measured to be faster (docs/performance.md). The input gradient is the library's GEMM at every size.

A plan that runs for the first time in a process is tried on a small layer: the same tiles, the same classes of sizes
and strides, and so the same binary. One that does not compile, fails or differs is dropped with one warning, and the
eager path does the work from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from fused_lora import reference
from fused_lora.ops.linear import eager as cpu
from fused_lora.ops.linear import launch as kernel

if TYPE_CHECKING:
    from fused_lora.kernels.config import LaunchConfig

# contraction up to which the fused GEMM loses less to the library's than a pass over y costs, and rows from which
_LONG, _FUSED_ROWS = 4096, 2048


@dataclass(frozen=True)
class Plan:
    """The variant of one call and the configurations of its launches, None for those that it has not."""

    variant: str
    product: LaunchConfig | None = None
    shrink: LaunchConfig | None = None
    weight_grad: LaunchConfig | None = None


def choose(
    op: str,
    M: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    dropout: bool,
    upcast: bool,
    adapters: int,
    capability: int,
    whole: bool = True,
) -> str:
    """The variant of ``op`` ("linear" or "backward") at M rows and a contraction of K.

    capability: 10 * major + minor of an NVIDIA chip, 0 for any other. upcast: adapters wider than x. whole: all
    gradients of x and of the adapters are wanted.

    Returns:
        "linear": "recompute" (one launch), "split" (shrink, then a GEMM with the expand in it), "library" (shrink,
        expand, then the library's GEMM adds to it) or "eager".
        "backward": "passes" (one over g, one over x, then the library's GEMM), "library" (shrink, expand, the library's
        GEMM, weight gradients) or "eager".
    """
    from fused_lora.kernels.config import PASS_RANKS, variants

    if capability < 80:
        return "eager"  # untried chips keep to the library
    if op == "backward":
        return "passes" if whole and adapters == 1 and r <= PASS_RANKS else "library"
    if variants(M, r, dtype, dropout, upcast, adapters)[-1] == "recompute":
        return "recompute"
    fused = capability == 90 and dtype.itemsize == 2 and not upcast and K <= _LONG and M >= _FUSED_ROWS
    return "split" if fused else "library"


def plan(
    op: str,
    M: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    dropout: bool,
    upcast: bool,
    adapters: int,
    capability: int,
    whole: bool = True,
) -> Plan:
    """Variant and configurations of ``op`` at M rows, N results a row and a contraction of K.

    "backward" stands for all gradients; its N are a layer's in_features.
    """
    variant = choose(op, M, K, r, dtype, dropout, upcast, adapters, capability, whole)
    if variant == "eager":
        return Plan("eager")
    rest = capability, upcast
    if variant == "passes":
        return Plan(
            variant,
            _pick("backward_x", M, N, 0, r, dtype, dropout, *rest),
            _pick("backward_g", M, K, 0, r, dtype, False, *rest),
        )
    backward = op == "backward"
    if variant == "library":
        product = _pick("expand", M, N, 0, r, dtype, dropout and backward, *rest)
    else:
        product = _pick(op, M, N, K, r, dtype, dropout, *rest, adapters, variant)
    shrink = None if variant == "recompute" else _pick("shrink", M, 0, K, r, dtype, dropout and not backward, *rest)
    weight_grad = _pick("weight_grad", M, K, N, r, dtype, dropout, *rest) if backward else None
    return Plan(variant, product, shrink, weight_grad)


@lru_cache(maxsize=4096)
def _pick(*arguments) -> LaunchConfig:
    from fused_lora.kernels.config import pick

    return pick(*arguments)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    dropout: Sequence[float],
) -> Callable:
    """The function that computes (y, S) for these arguments; all candidates share one signature."""
    if x.device.type != kernel.DEVICE:
        return cpu.lora_linear
    return _forward(_case_of(x, weight, bias, lora_A, lora_B, dropout))


def backward(
    g: torch.Tensor,
    weight: torch.Tensor,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    dropout: Sequence[float],
    whole: bool = True,
) -> Callable:
    """The function that computes (dx, dA, dB, dW, db) for these arguments.

    whole: dx and every dA and dB are wanted; without it the function takes any of them.
    """
    if g.device.type != kernel.DEVICE:
        return cpu.lora_linear_backward
    return _backward(_case_of(g, weight, None, lora_A, lora_B, dropout), whole)


def forget() -> None:
    """Plan all shapes anew, after a change of ``FUSED_LORA_PLAN``; what has failed stays dropped."""
    for kept in KEPT:
        kept.cache_clear()


def _case_of(x, weight, bias, lora_A, lora_B, dropout) -> kernel.Case:
    """All that a plan depends on; ``x`` is the gradient of y in the backward."""
    return kernel.Case(
        x.shape[0],
        *weight.shape,
        x.device,
        x.dtype,
        tuple([(A.shape[0], A.dtype, B.dtype) for A, B in zip(lora_A, lora_B, strict=True)]),
        tuple(dropout),
        None if bias is None else bias.dtype,
        x.stride(1) == 1,
        weight.stride(1) == 1,
    )


@lru_cache(maxsize=4096)
def _forward(call: kernel.Case) -> Callable:
    chosen = _plan("linear", call, call.outputs, call.inputs)
    if chosen.variant == "eager":
        return cpu.lora_linear
    run, case = kernel.lora_linear(chosen.variant, chosen), _small_case(chosen, call)

    def check() -> str | None:
        args = kernel.small_case(case)
        exact = reference.lora_linear(*args)
        return kernel.compare(run(*args), exact, case.dtype, chosen.variant in kernel.LIBRARY)

    return kernel.guarded(("linear", chosen, case), run, cpu.lora_linear, check)


@lru_cache(maxsize=4096)
def _backward(call: kernel.Case, whole: bool) -> Callable:
    chosen = _plan("backward", call, call.inputs, call.outputs, whole)
    if chosen.variant == "eager":
        return cpu.lora_linear_backward
    run, case = kernel.lora_linear_backward(chosen.variant, chosen), _small_case(chosen, call)

    def check() -> str | None:
        x, W, _, A, B, scaling, p, seeds = kernel.small_case(case)
        y, S = reference.lora_linear(x, W, None, A, B, scaling, p, seeds)
        g, needed = y.to(x.dtype), [True] * len(A)
        dx, dA, dB, _, _ = run(g, x, W, A, B, S.float(), scaling, p, seeds, True, needed, needed, False, False)
        exact_dx, exact_dA, exact_dB, _, _ = reference.lora_linear_backward(g, x, W, A, B, scaling, p, seeds)
        exact = [exact_dx, *exact_dA, *exact_dB]
        return kernel.compare([dx, *dA, *dB], exact, x.dtype, chosen.variant in kernel.LIBRARY)

    return kernel.guarded(("backward", chosen, case), run, cpu.lora_linear_backward, check)


KEPT = [_forward, _backward]  # what forget() forgets; the LoRA term adds its own


def _plan(op: str, call: kernel.Case, N: int, K: int, whole: bool = True) -> Plan:
    dtypes = {dtype for _, *both in call.adapters for dtype in both}
    if not call.rows or not kernel.usable(call.device) or not {call.dtype, *dtypes} <= kernel.DTYPES:
        return Plan("eager")
    from fused_lora.kernels.config import capability

    r, upcast, chip = max(r for r, *_ in call.adapters), dtypes != {call.dtype}, capability(call.device)
    return plan(op, call.rows, N, K, r, call.dtype, any(call.dropout), upcast, len(call.adapters), chip, whole)


def _small_case(chosen: Plan, call: kernel.Case) -> kernel.Case:
    """The smallest layer that crosses a border of every tile of the plan and compiles to the binaries of this call."""
    product, shrink, weight_grad = chosen.product, chosen.shrink, chosen.weight_grad
    if chosen.variant == "passes":
        rows, outputs, inputs = max(product.BLOCK_M, shrink.BLOCK_M), shrink.BLOCK_N, product.BLOCK_N
    else:
        tiles = [t for t in (product, shrink) if t is not None]
        rows, columns = max(t.BLOCK_M for t in tiles), max(64, *(t.BLOCK_N for t in tiles))
        contraction = max(t.BLOCK_K * t.SPLIT_K for t in tiles)
        outputs, inputs = columns, contraction
        if weight_grad is not None:
            rows = max(rows, weight_grad.BLOCK_K)
            outputs, inputs = max(contraction, weight_grad.BLOCK_M), max(columns, weight_grad.BLOCK_M)
    return call._replace(
        rows=_small(call.rows, rows), outputs=_small(call.outputs, outputs), inputs=_small(call.inputs, inputs)
    )


def _small(size: int, block: int) -> int:
    """Beyond one tile, and compiled as ``size`` is: Triton specialises 1 and multiples of 16, 16-bit rows of a multiple
    of 8 have descriptors."""
    return 1 if size == 1 else block + next((n for n in (16, 8) if size % n == 0), 13)
