"""The LoRA term on some rows of y: the others keep their bits.

    out = y, and out[rows] = lora_term(y[rows], x[rows], ...)

Bytes over the term of those rows alone: one copy of y, and a gather of x[rows] and y[rows]. The gradient of y is that
of the result itself, no copy of it; so there is no operator of its own, and derivatives of any order exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora.ops.linear.op import _rows, without_autocast
from fused_lora.ops.term.op import lora_term


def lora_term_on_rows(
    y: Tensor,
    x: Tensor,
    rows: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float] | None = None,
    bias: Tensor | None = None,
    term: Callable[..., Tensor] = lora_term,
) -> Tensor:
    """:func:`lora_term` for the rows of y [..., N] with these numbers; the others, and their bits, are y's.

    Args:
        rows: int64 [n], different numbers of rows, counted over all dimensions of y but the last. Without any, the
            gradients of the adapters are zeros. The rest as for :func:`lora_term`; the dropout mask is that of x[rows].
        term: ``known_term``, where a call with such tensors has passed.
    """
    flat = _rows(y)
    put = _Put.apply if torch.is_grad_enabled() else _put
    # the gradient of y[rows] goes to y by _Put, as a part of that of all rows
    old, own = flat.detach().index_select(0, rows), _rows(x).index_select(0, rows)
    return put(flat, rows, term(old, own, lora_A, lora_B, scaling, dropout, bias=bias)).reshape(y.shape)


def _put(y: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    with without_autocast(y):  # a CPU's takes no index_copy of the other 16-bit dtype
        return y.index_copy(0, rows, new)


class _Put(torch.autograd.Function):
    """y with other rows in it, that hold the values of y's rows plus something: y's gradient is the result's."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, new: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return _put(y, rows, new)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor | None]:
        [g], [rows] = gradients, ctx.saved_tensors
        return g, None, g[rows] if ctx.needs_input_grad[2] else None
