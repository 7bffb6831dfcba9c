"""The backward of the LoRA linear and term in operations that autograd can follow: for gradients of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora.ops.linear.eager import accumulate_dtype, compute_dtype, keep_scale
from fused_lora.reference import dropout_mask


def lora_linear_backward(
    g: Tensor | None,
    g_S: Tensor | None,
    x: Tensor | None,
    weight: Any,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    S: Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: Tensor | None,
    bias_dtype: torch.dtype | None,
    needs: Sequence[bool],
    dtype: torch.dtype | None = None,
) -> list[Tensor | None]:
    """The gradients that ``needs`` asks for, in the order x, lora_A, lora_B, weight, bias; None for the others.

        dx = g W + sum_i D_i(dS_i A_i)   dA = dS^T D(x)   dB = s g^T S   dW = g^T x   db = sum g   dS = s g B + g_S

    g [M, N] and g_S [M, sum r_i] are the gradients of y and S, either may be None. S is D(x) A^T: with its history, or
    without where x is given or needs no gradient. weight: a tensor [N, K] or a packed weight; None: the gradients of
    the LoRA term. dtype: x's, where it is not the weight's.

    Raises:
        RuntimeError: S has no history, and x was not saved, because lora_A is frozen.
    """
    n, need_x = len(lora_A), needs[0]
    if x is None and need_x and any(needs[n + 1 : 2 * n + 1]) and torch.is_grad_enabled() and not S.requires_grad:
        raise RuntimeError("second derivatives need lora_A to require a gradient: with a frozen lora_A x is not kept")
    like: Any = weight if dtype is None else S.new_empty(0, dtype=dtype)
    shape, acc = (S.shape[0], lora_A[0].shape[1]), accumulate_dtype(like, lora_A)
    if g is not None:
        acc = torch.promote_types(acc, compute_dtype(g.dtype, g.device))
    # what is None below takes part in no gradient that is asked for
    G: Any = None if g is None else g.to(acc)
    rows: Any = None if x is None else x.to(acc)
    numbers: Any = seeds
    dx = G @ weight.to(acc) if need_x and g is not None and weight is not None else None
    dA, dB, column = [], [], 0
    for i, (A, B, s, p) in enumerate(zip(lora_A, lora_B, scaling, dropout, strict=True)):
        own, column = slice(column, column + A.shape[0]), column + A.shape[0]
        need_A, need_B = needs[1 + i], needs[1 + n + i] and g is not None
        keep = dropout_mask(numbers[i], shape, p, S.device).to(acc) * keep_scale(p) if p else 1.0
        terms = [] if g is None else [(G @ B.to(acc)) * s]
        dS: Any = sum(terms if g_S is None else [*terms, g_S[:, own].to(acc)])
        if need_x:
            term = (dS @ A.to(acc)) * keep
            dx = term if dx is None else dx + term
        dA.append((dS.t() @ (rows * keep)).to(A.dtype) if need_A else None)
        if need_B:
            shrunk = S[:, own].to(acc) if S.requires_grad or x is None else (rows * keep) @ A.to(acc).t()
        dB.append(((G.t() @ shrunk) * s).to(B.dtype) if need_B else None)
    dW = (G.t() @ rows).to(weight.dtype) if needs[2 * n + 1] and g is not None else None
    db = G.sum(0).to(bias_dtype) if needs[2 * n + 2] and g is not None else None
    return [dx.to(like.dtype) if need_x else None, *dA, *dB, dW, db]
