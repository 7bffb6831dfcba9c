"""The backward of the LoRA linear and term in operations that autograd can follow: for gradients of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_lora.ops.linear.eager import accumulate_dtype, keep_scale
from fused_lora.reference import dropout_mask


def lora_linear_backward(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: Tensor | None,
    bias_dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients that ``needs`` asks for, in the order x, lora_A, lora_B, weight, bias; None for the others.

    Without a weight: those of the LoRA term alone.

        dx = g W + sum_i D_i(s_i g B_i A_i)    dA = s (g B)^T D(x)    dB = s g^T D(x) A^T    dW = g^T x    db = sum g

    Raises:
        RuntimeError: x was not saved, because lora_A is frozen, and is needed.
    """
    n, need_x = len(lora_A), needs[0]
    if x is None and any(needs[n + 1 : 2 * n + 1]):
        raise RuntimeError("second derivatives need lora_A to require a gradient: with a frozen lora_A x is not kept")
    shape = (g.shape[0], lora_A[0].shape[1])
    acc = accumulate_dtype(g, lora_A)
    G, rows = g.to(acc), None if x is None else x.to(acc)
    dx = None if not need_x else G.new_zeros(shape) if weight is None else G @ weight.to(acc)
    dA, dB = [], []
    for i, (A, B, s, p) in enumerate(zip(lora_A, lora_B, scaling, dropout, strict=True)):
        keep = dropout_mask(seeds[i], shape, p, g.device) * keep_scale(p) if p else 1.0
        dS = (G @ B.to(acc)) * s
        if need_x:
            dx = dx + (dS @ A.to(acc)) * keep
        dA.append((dS.t() @ (rows * keep)).to(A.dtype) if needs[1 + i] else None)
        S = (rows * keep) @ A.to(acc).t() if needs[1 + n + i] else None
        dB.append(None if S is None else ((G.t() @ S) * s).to(B.dtype))
    dW = (G.t() @ rows).to(weight.dtype) if needs[2 * n + 1] else None
    db = G.sum(0).to(bias_dtype) if needs[2 * n + 2] else None
    return [dx.to(g.dtype) if need_x else None, *dA, *dB, dW, db]
