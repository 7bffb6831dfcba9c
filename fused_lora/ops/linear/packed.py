"""The LoRA linear over a packed weight: quantised values that are dequantised for each product, and never kept.

Saved for the backward are x, S and the seeds, as over a dense weight, and the packed weight itself. A CPU dequantises
it in blocks of rows, in the forward and again in the backward; a GPU whole, into memory that the next layer reuses, but
for a forward of few rows over 4 bits, which its kernel reads by tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from fused_lora.ops import guard
from fused_lora.ops.checks import check_linear
from fused_lora.ops.dequant import FourBit
from fused_lora.ops.linear import eager, plan
from fused_lora.ops.linear.op import (
    _all_gradients,
    _as_autocast,
    _autocast_dtype,
    _autocasts,
    _gradients,
    _keep,
    _outside_autocast,
    _rows,
    draw_seeds,
)


class Packed:
    """A weight [N, K] that is dequantised where it is used; ``dtype`` is what its values are rounded to.

    four_bit: what a kernel reads in its place, where there is one.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    four_bit: FourBit | None = None

    def blocks(self, step: int) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows start to stop as a dense tensor of ``dtype``), about ``step`` rows at a time."""
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> Tensor:
        """The whole weight, rounded to ``self.dtype`` and given in ``dtype``."""
        [(_, _, whole)] = self.blocks(self.shape[0])
        return whole.to(dtype)

    def dim(self) -> int:
        """As of a tensor."""
        return 2


def lora_linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
) -> Tensor:
    """x W^T + b + the terms, as :func:`fused_lora.ops.linear.op.lora_linear`, for at least one adapter.

    Args:
        x: [..., K], fp64, fp32, bf16 or fp16. On a CPU it may have another dtype than the weight: it is not rounded.
            On a GPU it takes the autocast dtype, or the weight's.

    Returns:
        [..., N] in x's dtype, under autocast too, as bitsandbytes returns it.

    Raises:
        ValueError, TypeError: the arguments do not fit.
    """
    check_linear(x, weight, bias, lora_A, lora_B, scaling, dropout, None, weight.dtype)
    if x.is_neg():  # a kernel would not see the sign
        x = x.resolve_neg()
    seeds, inside = draw_seeds(len(lora_A), x.device) if any(dropout) else None, x
    if x.device.type == guard.DEVICE:
        autocast = _autocast_dtype(x)
        inside = x.to(autocast or weight.dtype)
        lora_A, lora_B = (_as_autocast(part, autocast) if autocast else part for part in (lora_A, lora_B))
    # entering it takes as long as a small product
    outside = torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext()
    with outside:
        y = _differentiable(inside, weight, bias, lora_A, lora_B, scaling, dropout, seeds)
    return y.to(x.dtype)


def operand_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype, else that of x."""
    return _autocast_dtype(x) or x.dtype


def _differentiable(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds) -> Tensor:
    if torch.is_grad_enabled():
        for tensor in (x, *lora_A, *lora_B, bias):
            if tensor is not None and tensor.requires_grad:
                return _apply(weight, seeds, scaling, dropout, len(lora_A), x, bias, *lora_A, *lora_B)[0]
    return _compute(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds)[0]


def _compute(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds) -> tuple[Tensor, Tensor]:
    """y [..., N], no view, so that it may be changed in place, and S [M, sum r_i]."""
    rows = _rows(x)
    if x.device.type == guard.DEVICE:
        run = plan.forward_packed(rows, weight, bias, lora_A, lora_B, scaling, dropout)
    else:
        run = eager.lora_linear
    y, S = run(rows, weight, bias, lora_A, lora_B, scaling, dropout, seeds)
    return y.resize_((*x.shape[:-1], y.shape[-1])), S


def _gradients_over(g, x, weight, *rest):
    if g.device.type == guard.DEVICE:
        weight = weight.to(g.dtype)
    return _gradients(None, g, x, weight, *rest)


class _OverPacked(torch.autograd.Function):
    """S is a result, so that second derivatives reach x and A through it."""

    @staticmethod
    def forward(ctx, weight, seeds, scaling, dropout, n, x, bias, *adapters):
        A, B = adapters[:n], adapters[n:]
        y, S = _compute(x, weight, bias, A, B, scaling, dropout, seeds)
        _, _, _, _, _, need_x, need_bias, *needs = ctx.needs_input_grad
        call = n, scaling, dropout, None if bias is None else bias.dtype, (need_x, *needs, False, need_bias)
        _keep(ctx, call, x, None, A, B, seeds, S)
        ctx.packed, ctx.shape, ctx.dtype = weight, x.shape, x.dtype
        return y, S

    @staticmethod
    @_outside_autocast
    def backward(ctx, g, g_S):
        g = None if g is None else _rows(g)
        dx, dA, dB, _, db = _all_gradients(ctx, g, g_S, _gradients_over, ctx.packed, ctx.dtype)
        return None, None, None, None, None, None if dx is None else dx.reshape(ctx.shape), db, *dA, *dB


# past a wrapper that looks for torch.func, inside which no layer takes this way
_apply = super(torch.autograd.Function, _OverPacked).apply
