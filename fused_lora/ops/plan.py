"""Which implementation runs: the one place where a kernel takes over from the eager path.

``choose`` is a pure function of shape, dtype and chip, so every run of a program makes the same choice. It holds no
measured numbers: small M takes the single launch, training the split form, and the library GEMM that accumulates where
the contraction is long enough that a slightly slower fused GEMM would lose more than the saved pass over y is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fused_lora.ops import cpu, kernel

_LONG = 4096  # contraction beyond which a GEMM a few percent slower costs more than one pass over y (DRAM-bound)


def choose(
    op: str, M: int, K: int, r: int, dtype: torch.dtype, dropout: bool, upcast: bool, adapters: int, capability: int
) -> str:
    """The variant of ``op`` ("linear" or "input_grad") at M rows and a contraction of K.

    capability: 10 * major + minor of an NVIDIA chip, 0 for any other. upcast: adapters wider than x.

    Returns:
        "recompute" (one launch), "split" (shrink, then GEMM with the expand in it), "cublas" (shrink, then library
        GEMMs that accumulate) or "eager".
    """
    from fused_lora.kernels.config import variants

    if capability < 80:
        return "eager"  # untried chips keep to the library
    masked_output = dropout and op == "input_grad"
    if M <= 512 and "recompute" in variants(op, M, r, dtype, dropout, upcast, adapters):
        return "recompute"
    if not masked_output and not upcast and (dtype == torch.float32 or K > _LONG):
        return "cublas"  # fp32 has no tensor cores to feed: the library's GEMM is the better one
    return "split"


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    dropout: Sequence[float],
) -> Callable:
    """The function that computes (y, S) for these arguments; all candidates share one signature."""
    variant = _variant("linear", x, x.shape[1], lora_A, lora_B, dropout)
    if variant == "eager":
        return cpu.lora_linear
    run = kernel.lora_linear(variant)
    case = _case(x, lora_A, lora_B, dropout, bias is not None)

    def check() -> str | None:
        args = kernel.small_case(*case)
        return kernel.compare(run(*args), cpu.lora_linear(*args), x.dtype)

    return kernel.guarded(_key("linear", variant, case), run, cpu.lora_linear, check)


def backward(
    g: torch.Tensor,
    weight: torch.Tensor,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    dropout: Sequence[float],
) -> Callable:
    """The function that computes (dx, dA, dB, dW, db) for these arguments."""
    variant = _variant("input_grad", g, g.shape[1], lora_A, lora_B, dropout)
    if variant == "eager":
        return cpu.lora_linear_backward
    run = kernel.lora_linear_backward(variant)
    case = _case(g, lora_A, lora_B, dropout, False)

    def check() -> str | None:
        x, W, _, A, B, scaling, p, seeds = kernel.small_case(*case)
        y, S = cpu.lora_linear(x, W, None, A, B, scaling, p, seeds)
        n = len(A)
        args = (y, x, W, A, B, S, scaling, p, seeds, True, [True] * n, [True] * n, False, False)
        results = ([dx, *dA, *dB] for dx, dA, dB, _, _ in (run(*args), cpu.lora_linear_backward(*args)))
        return kernel.compare(*results, g.dtype)

    return kernel.guarded(_key("input_grad", variant, case), run, cpu.lora_linear_backward, check)


def _variant(op: str, x, K: int, lora_A, lora_B, dropout) -> str:
    if not kernel.usable(x.device) or not kernel.fits(x, lora_A, lora_B) or not x.shape[0]:
        return "eager"
    from fused_lora.kernels.config import capability

    upcast = any(t.dtype != x.dtype for t in (*lora_A, *lora_B))
    r = max(A.shape[0] for A in lora_A)
    return choose(op, x.shape[0], K, r, x.dtype, any(dropout), upcast, len(lora_A), capability(x.device))


def _case(x, lora_A, lora_B, dropout, bias: bool) -> tuple:
    dtypes = [(A.dtype, B.dtype) for A, B in zip(lora_A, lora_B, strict=True)]
    return x.shape[0], x.device, x.dtype, dtypes, [A.shape[0] for A in lora_A], dropout, bias


def _key(op: str, variant: str, case: tuple) -> tuple:
    M, device, dtype, dtypes, ranks, dropout, _ = case
    rows = 1 << max(M - 1, 0).bit_length()  # tiles are chosen by the size of M
    return op, variant, str(device), dtype, tuple(dtypes), tuple(ranks), any(dropout), rows
