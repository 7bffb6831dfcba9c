"""The LoRA term as torch operators: y + bias + sum_i s_i D_i(x) A_i^T B_i^T for a y that somebody else computed.

    fused_lora::lora_term            -> (y [M, N], S [M, sum r_i]), x [M, K]
    fused_lora::lora_term_backward   -> the gradients that are needed, in the order x, lora_A, lora_B, bias

Saved for the backward: x itself, S and the seeds; not y, whose gradient is the gradient of the result. The maths and
the mask are those of ``fused_lora.reference``; what runs and how is shared with ``ops/linear``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_lora.ops.checks import as_numbers, check_lists, check_term, in_order, refuse_sparse, refuse_transforms
from fused_lora.ops.linear import eager, flops
from fused_lora.ops.linear import op as linear
from fused_lora.ops.linear.op import (
    _as_autocast,
    _autocast_dtype,
    _autocasts,
    _of_autocast,
    _rows,
    draw_seeds,
    is_direct,
)
from fused_lora.ops.linear.plan import keeps_x, learns
from fused_lora.ops.term import plan

_unsafe_view = torch.ops.aten._unsafe_view.default  # of memory that nobody else sees


def lora_term(
    y: Tensor,
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float] | None = None,
    seeds: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y + sum_i scaling_i * D_i(x) lora_A_i^T lora_B_i^T, differentiable, for a y that any base layer computed.

    The terms are added to y in fp32 (or wider) and rounded once. y is neither changed nor kept for the backward.

    Args:
        y: [..., N], fp64, fp32, bf16 or fp16: the base layer's output.
        x: [..., K], the same leading dimensions, any of these dtypes. With another dtype than y the eager path runs.
        lora_A: [r_i, K] each; lora_B: [N, r_i] each; any floating dtype.
        scaling: one float per adapter.
        dropout: one probability per adapter (default: 0 everywhere). It acts in units of 2^-16.
        seeds: int64 [adapters] on x's device; drawn from torch's default generator when a dropout is not 0 and none
            are given. ``fused_lora.dropout_mask(seed, x.shape, p)`` is the mask that a seed stands for.
        bias: [N], any floating dtype, or None: added before the one rounding (lora_B with a bias).

    Returns:
        [..., N] in y's dtype, under autocast too: there x takes the autocast dtype.

    Raises:
        ValueError: shapes, devices, dropout or scaling do not fit. TypeError: x or y is no tensor or not floating; a
            tensor is not dense.
    """
    for name, tensor in (("y", y), ("x", x)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    check_lists(lora_A=lora_A, lora_B=lora_B)
    direct = is_direct(y, x, *lora_A, *lora_B, *(() if bias is None else (bias,)))
    if not direct:
        refuse_sparse(y=y, x=x, bias=bias, lora_A=lora_A, lora_B=lora_B)
    scaling = as_numbers("scaling", scaling)
    dropout = [0.0] * len(lora_A) if dropout is None else as_numbers("dropout", dropout)
    seeds = None if seeds is None else in_order(seeds)
    check_term(y, x, bias, lora_A, lora_B, scaling, dropout, seeds)
    if seeds is None and any(dropout):
        seeds = draw_seeds(len(dropout), x.device)
    if not lora_A:
        return y if bias is None else y + bias.to(y.dtype)
    if direct:
        if not _autocasts(x):
            return _direct(y, x, bias, lora_A, lora_B, scaling, dropout, seeds)
        dtype, rounded = _autocast_dtype(x), None
        if dtype is not None:
            x = x.to(dtype)
            lora_A, lora_B, rounded = _of_autocast(lora_A, lora_B, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _direct(y, x, bias, lora_A, lora_B, scaling, dropout, seeds, rounded)
    refuse_transforms("lora_term")
    # reshaped out here: the operator's own result is no view, so that it may be changed in place
    out, _ = _lora_term(_rows(y), _rows(x), bias, list(lora_A), list(lora_B), list(scaling), list(dropout), seeds)
    return out if y.dim() == 2 else out.reshape(y.shape)


def known_term(
    y: Tensor,
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`lora_term` of tensors like those of a call that has passed, which are not asked again."""
    if seeds is None and any(dropout):
        seeds = draw_seeds(len(dropout), x.device)
    return _direct(y, x, bias, lora_A, lora_B, scaling, dropout, seeds)


@torch.library.custom_op("fused_lora::lora_term", mutates_args=())
def _lora_term(
    y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    run = plan.forward(y, x, bias, lora_A, lora_B, scaling, dropout)
    return run(y, x, bias, lora_A, lora_B, scaling, dropout, seeds)


@_lora_term.register_fake
def _(y, x, bias, lora_A, lora_B, scaling, dropout, seeds):
    S = x.new_empty((x.shape[0], sum(A.shape[0] for A in lora_A)), dtype=eager.shrink_dtype(x, lora_A))
    return y.new_empty(y.shape), S


@torch.library.custom_op("fused_lora::lora_term_backward", mutates_args=())
def _lora_term_backward(
    g: Tensor,
    x: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    S: Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: Tensor | None,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    wanted = *needs[:-1], False, needs[-1]
    arguments = g, x, None, lora_A, lora_B, S, scaling, dropout, seeds, bias_dtype, wanted
    dx, dA, dB, _, db = linear._gradients(None, dtype, None, *arguments)
    return [t for t in (dx, *dA, *dB, db) if t is not None]


@_lora_term_backward.register_fake
def _(g, x, lora_A, lora_B, S, scaling, dropout, seeds, dtype, bias_dtype, needs):
    bias = None if bias_dtype is None else g.new_empty((g.shape[1],), dtype=bias_dtype)
    shapes = [g.new_empty((g.shape[0], lora_A[0].shape[1]), dtype=dtype), *lora_A, *lora_B, bias]
    return [t.new_empty(t.shape) for t, need in zip(shapes, needs, strict=True) if need]


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    _, x, bias, lora_A, lora_B, scaling, dropout, seeds = inputs
    _, need_x, need_bias, *rest = ctx.needs_input_grad
    needs = [need_x, *rest[: 2 * len(lora_A)], False, need_bias]
    _keep(ctx, needs, x, bias, lora_A, lora_B, scaling, dropout, seeds, output[1])


def _keep(ctx, needs, x, bias, lora_A, lora_B, scaling, dropout, seeds, S) -> None:
    call = len(lora_A), scaling, dropout, None if bias is None else bias.dtype, needs
    kept = x if keeps_x(len(lora_A), needs) else None
    linear._keep(ctx, call, kept, None, lora_A, lora_B, seeds, S)
    ctx.dtype = x.dtype


def _backward(ctx, g, _):
    n, dtype = ctx.call[0], ctx.dtype
    if g is None:
        return (None, None, None, [None] * n, [None] * n, None, None, None)

    # the operator's own order: torch.compile has cached calls by it
    def operator(g, x, _, *others):
        *others, bias_dtype, needs = others
        return _lora_term_backward(g, x, *others, dtype, bias_dtype, [*needs[:-2], needs[-1]])

    dx, dA, dB, db = _all_gradients(ctx, g, None, partial(linear._by_operator, operator))
    return g, dx, db, dA, dB, None, None, None


def _all_gradients(ctx, g, g_S, compute, rounded=None):
    """dx, dA, dB, db with None for what is not needed, as of a linear layer without a weight."""
    n, *_, needs = ctx.call
    if not any(needs):
        return None, [None] * n, [None] * n, None
    dx, dA, dB, _, db = linear._all_gradients(ctx, g, g_S, compute, ctx.dtype, rounded)
    return dx, dA, dB, db


_lora_term.register_autograd(_backward, setup_context=_setup_context)


def _cast(y, x, bias, lora_A, lora_B, *others):
    """Under autocast x takes its dtype, as in F.linear, and on CUDA the adapters; their gradients keep theirs."""
    dtype = _autocast_dtype(x)
    if dtype is None:
        return y, x, bias, lora_A, lora_B, *others
    return y, x.to(dtype), bias, _as_autocast(lora_A, dtype), _as_autocast(lora_B, dtype), *others


class _Direct(torch.autograd.Function):
    """The same operator past the dispatcher, whose bookkeeping takes longer than a small layer; any dimensions.

    S is a result, so that second derivatives reach x and A through it.
    """

    @staticmethod
    def forward(ctx, y, x, bias, n, scaling, dropout, seeds, rounded, *adapters):
        arguments = bias, adapters[:n], adapters[n:], scaling, dropout, seeds
        out, S = _compute(y, x, *arguments, rounded)
        _, need_x, need_bias, _, _, _, _, _, *need_adapters = ctx.needs_input_grad
        _keep(ctx, [need_x, *need_adapters, False, need_bias], x, *arguments, S)
        ctx.shape, ctx.rounded = x.shape, rounded
        return out, S

    @staticmethod
    @linear._outside_autocast
    def backward(ctx, g, g_S):
        rows = None if g is None else _rows(g)
        compute = partial(linear._gradients, None, ctx.dtype, ctx.rounded)
        dx, dA, dB, db = _all_gradients(ctx, rows, g_S, compute, ctx.rounded)
        return g, None if dx is None else dx.reshape(ctx.shape), db, None, None, None, None, None, *dA, *dB


def _compute(y, x, bias, lora_A, lora_B, scaling, dropout, seeds, rounded) -> tuple[Tensor, Tensor]:
    """y [..., N] and S [M, sum r_i]; y is no view, so that it may be changed in place."""
    shape, y, x = y.shape, _rows(y), _rows(x)
    run = plan.forward(y, x, bias, lora_A, lora_B, scaling, dropout, rounded)
    out, S = run(y, x, bias, lora_A, lora_B, scaling, dropout, seeds)
    return (out if len(shape) == 2 else _unsafe_view(out, shape)), S


def _direct(y, x, bias, lora_A, lora_B, scaling, dropout, seeds, rounded=None) -> Tensor:
    """The result; differentiable. rounded: as of :func:`linear.plan.forward`."""
    if torch.is_grad_enabled():
        for tensor in (y, x, *lora_A, *lora_B, bias):
            if tensor is not None and learns(tensor):
                return _Direct.apply(y, x, bias, len(lora_A), scaling, dropout, seeds, rounded, *lora_A, *lora_B)[0]
    return _compute(y, x, bias, lora_A, lora_B, scaling, dropout, seeds, rounded)[0]


def _flops(y: Sequence[int], x: Sequence[int], bias, lora_A, *_, **__) -> int:
    return 2 * x[0] * (x[1] + y[1]) * sum(A[0] for A in lora_A)


def _flops_backward(g, x, lora_A, lora_B, S, scaling, dropout, seeds, dtype, bias_dtype, needs, **_) -> int:
    n = len(lora_A)
    return flops.of_terms(g[0], lora_A[0][1], g[1], lora_A, needs[0], needs[1 : n + 1], needs[n + 1 : -1])


register_flop_formula(torch.ops.fused_lora.lora_term)(_flops)
register_flop_formula(torch.ops.fused_lora.lora_term_backward)(_flops_backward)
linear._register_autocast("lora_term", _lora_term, _lora_term_backward, _cast)
