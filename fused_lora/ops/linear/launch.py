"""The Triton path of the LoRA linear: the launches of a plan, under the signature that the eager path has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_lora.reference import keep_scale

if TYPE_CHECKING:
    from fused_lora.kernels.config import LaunchConfig

LIBRARY = ("library", "passes")  # variants whose y or dx is written by a library GEMM, in TF32 where torch is set to it


@dataclass(frozen=True)
class Plan:
    """The variant of one call and the configurations of its launches; each launch without one picks its own."""

    variant: str
    product: LaunchConfig | None = None
    shrink: LaunchConfig | None = None
    weight_grad: LaunchConfig | None = None


def lora_linear(
    chosen: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: Tensor | None = None,
) -> Callable:
    """The function of these arguments that returns (y, S), for tensors of these shapes, strides and dtypes.

    It keeps scaling and dropout. Variants: "recompute", "split" or "library".
    """
    from fused_lora.kernels.lora_expand import prepare_expand
    from fused_lora.kernels.lora_linear import prepare_linear
    from fused_lora.kernels.lora_shrink import prepare_shrink

    drop = any(dropout)
    if chosen.variant != "library":
        configs = chosen.product, chosen.variant, chosen.shrink
        launch = prepare_linear(x, weight, bias, lora_A, lora_B, scaling, dropout, drop, *configs)
        return lambda x, weight, bias, lora_A, lora_B, scaling, dropout, seeds: launch(
            x, weight, bias, lora_A, lora_B, seeds
        )
    shrink = prepare_shrink(x, lora_A, [keep_scale(p) for p in dropout], dropout, drop, chosen.shrink)
    kinds = len(x), [B.t() for B in lora_B], scaling, dropout, False, False, x.dtype, chosen.product
    expand = prepare_expand(*kinds, by_columns=True, onto=bias is not None)
    cast = bias is not None and bias.dtype != x.dtype

    def onto_term(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds):
        S = shrink(x, lora_A, seeds)
        return expand(S, lora_B, None, None).addmm_(x, weight.t()), S

    def onto_product(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds):
        S, bias = shrink(x, lora_A, seeds), bias.to(x.dtype) if cast else bias
        return expand(S, lora_B, None, None, torch.addmm(bias, x, weight.t())), S

    # a bias is rounded with the product, as eager's is, and not before: the two may cancel
    return onto_term if bias is None else onto_product


def lora_linear_backward(
    chosen: Plan,
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    S: Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: Tensor | None,
    need_x: bool,
    need_A: Sequence[bool],
    need_B: Sequence[bool],
    need_weight: bool,
    need_bias: bool,
) -> Callable:
    """The function of these arguments (without the plan) that returns the gradients, as :func:`lora_linear`.

    Variants: "passes" (one over g, one over x, for one adapter and all of its gradients) or "library" (a launch for
    each result, for any adapters and any of their gradients). g W is the library's; without a weight dx is the LoRA
    term alone.
    """
    from fused_lora.kernels.lora_backward import prepare_backward_g, prepare_backward_x
    from fused_lora.kernels.lora_expand import prepare_expand
    from fused_lora.kernels.lora_grad import prepare_weight_grad
    from fused_lora.kernels.lora_shrink import prepare_shrink

    drop, count = any(dropout), len(lora_A)
    if chosen.variant == "passes":
        over_g, room_g = prepare_backward_g(g, lora_B[0], scaling[0], chosen.shrink)
        over_x, room_x = prepare_backward_x(x, lora_A[0], dropout[0], drop, chosen.product)
        room = max(room_g, room_x)

        def passes(g, x, weight, lora_A, lora_B, S, scaling, dropout, seeds, *_):
            planes = S.new_empty(room)
            dS, dB = over_g(g, S, lora_B[0], planes)
            dx, dA = over_x(x, dS, lora_A[0], seeds, planes)
            return dx if weight is None else dx.addmm_(g, weight), [dA], [dB], None, None

        adapters = passes
    else:
        none, scales = [0.0] * count, [keep_scale(p) for p in dropout]
        shrink = expand = weight_grad = None
        if need_x or any(need_A):
            B_t = [B.t() for B in lora_B]
            shrink = prepare_shrink(g, B_t, scaling, none, False, chosen.shrink, by_columns=True)
        if need_x:
            expand = prepare_expand(len(g), lora_A, scales, dropout, drop, False, g.dtype, chosen.product)
        if any(need_A) or any(need_B):
            # of all adapters: one buffer holds the sums of 16-bit and fp32 ones
            ranks = [A.shape[0] for A in lora_A]
            dtype = reduce(torch.promote_types, [t.dtype for t in (*lora_A, *lora_B)])
            weight_grad = prepare_weight_grad(g, x, scaling, dropout, drop, ranks, dtype, chosen.weight_grad)

        def each(g, x, weight, lora_A, lora_B, S, scaling, dropout, seeds, *_):
            dx, dA, dB = None, [None] * count, [None] * count
            dS = shrink(g, lora_B, None) if shrink else torch.zeros_like(S)
            if expand:
                dx = expand(dS, lora_A, seeds, None)
                dx = dx if weight is None else dx.addmm_(g, weight)
            if weight_grad:
                dA, dB = weight_grad(g, x, S, dS, seeds)
                # one buffer holds all adapters' sums; gradients must not share memory
                dA = [_own(t, A, count) if need else None for t, A, need in zip(dA, lora_A, need_A, strict=True)]
                dB = [_own(t, B, count) if need else None for t, B, need in zip(dB, lora_B, need_B, strict=True)]
            return dx, dA, dB, None, None

        adapters = each
    if not need_weight and not need_bias:
        return adapters

    def run(g, x, *others):
        dx, dA, dB, _, _ = adapters(g, x, *others)
        dW = g.t() @ x if need_weight else None
        db = g.sum(0, dtype=torch.float32) if need_bias else None
        return dx, dA, dB, dW, db

    return run


def lora_term(
    chosen: Plan,
    y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: Tensor | None = None,
) -> Callable:
    """The function of these arguments (without the plan) that returns (y + bias + the terms, S)."""
    from fused_lora.kernels.lora_expand import prepare_expand
    from fused_lora.kernels.lora_shrink import prepare_shrink

    scales, B_t = [keep_scale(p) for p in dropout], [B.t() for B in lora_B]
    base = y if y.stride(1) == 1 else y.contiguous()
    shrink = prepare_shrink(x, lora_A, scales, dropout, any(dropout), chosen.shrink)
    kinds = False, bias is not None, y.dtype, chosen.product
    expand = prepare_expand(len(x), B_t, scaling, dropout, *kinds, by_columns=True, base=base)

    def run(y, x, bias, lora_A, lora_B, scaling, dropout, seeds):
        S = shrink(x, lora_A, seeds)
        return expand(S, lora_B, None, bias, y if y.stride(1) == 1 else y.contiguous()), S

    return run


def _own(gradient: Tensor, parameter: Tensor, adapters: int) -> Tensor:
    gradient = gradient if gradient.dtype is parameter.dtype else gradient.to(parameter.dtype)
    return gradient if adapters == 1 else gradient.clone()
