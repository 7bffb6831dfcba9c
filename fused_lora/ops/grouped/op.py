"""LoRA terms of many adapters added to one batch: y[row] += sum over the row's adapters of scale * B (A x[row]).

The rows of a base model's requests are in no group, and their memory is not touched. The sum is taken in fp32 (fp64 for
fp64) and rounded once, into y. A row's term has the same bits whatever other rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fused_lora.ops.checks import FLOAT_DTYPES, overlaps_itself
from fused_lora.ops.grouped import loops, tiles
from fused_lora.ops.grouped.terms import RowLayout, Terms

__all__ = ["RowLayout", "Terms", "lora_grouped_"]


def lora_grouped_(y: Tensor, x: Tensor, layout: RowLayout, terms: Terms) -> Tensor:
    """y[m] += sum_i scale_i * (x[m] A_i^T) B_i^T over the factors of the row's group, in place. Not differentiable.

    Args:
        y: [M, N], fp64, fp32, bf16 or fp16; rows without factors keep their bits. Of a layer with several outputs they
            lie one beside the other; further columns are not touched.
        x: [M, K], floating. layout: which row is in which group. terms: the factors of the groups; what is worked out
            from them is kept for the next call.

    Returns:
        y. The sum is taken in fp32, or in fp64 if x or the factors are, and rounded into y once. Loops in C take it
        where they can: x and y are in 16 or 32 bits on a CPU, and the rows of A and B^T contiguous. Else torch does.

    Raises:
        ValueError: x or y is no matrix of floating numbers; x, y and the layout differ in their rows, or x or y and the
            factors in their columns, or all of them in their device; y overlaps itself, as an expanded tensor.
        TypeError: not two tensors, a RowLayout and Terms. RuntimeError: x, y or a factor would take a gradient.
    """
    if torch.compiler.is_dynamo_compiling():
        return _untraced(y, x, layout, terms)
    tensors = isinstance(y, Tensor) and isinstance(x, Tensor)
    if not (tensors and isinstance(layout, RowLayout) and isinstance(terms, Terms)):
        got = ", ".join(type(found).__name__ for found in (y, x, layout, terms))
        raise TypeError(f"y, x, layout, terms: expected two tensors, a RowLayout and Terms, got {got}")
    floats = x.dtype in FLOAT_DTYPES and y.dtype in FLOAT_DTYPES and x.layout is y.layout is torch.strided
    if x.dim() != 2 or y.dim() != 2 or not floats:
        found = f"{tuple(x.shape)} in {x.dtype} and {tuple(y.shape)} in {y.dtype}"
        raise ValueError(f"x, y: expected two dimensions of floating numbers, got {found}")
    (rows, K), (y_rows, N) = x.shape, y.shape
    if not rows == y_rows == layout.rows:
        raise ValueError(f"x, y: expected {layout.rows} rows as in the layout, got {rows} and {y_rows}")
    if not layout.groups or terms.dtype is None:
        return y
    if K != terms.K or N < terms.N:
        raise ValueError(f"x, y: expected {terms.K} and {terms.N} columns as the factors have, got {K} and {N}")
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or terms.requires_grad):
        raise RuntimeError("x, y, terms: lora_grouped_ has no gradient: call it under torch.no_grad()")
    if not loops.add_terms_(y, x, layout, terms):
        _check_for_torch(y, x, layout, terms)
        with torch.autocast(x.device.type, enabled=False):  # the sum is taken in fp32 all the same
            tiles.add_terms_(y, x, layout, terms)
    return y


def _check_for_torch(y: Tensor, x: Tensor, layout: RowLayout, terms: Terms) -> None:
    """What C reads has passed this."""
    if x.device != y.device:
        raise ValueError(f"x, y: expected one device, got {x.device} and {y.device}")
    if terms.device != x.device or layout.device.type != x.device.type:  # a layout's may have no number
        raise ValueError(f"terms, layout: expected them on {x.device}, got {terms.device} and {layout.device}")
    if overlaps_itself(y):
        raise ValueError("y: expected memory of its own for every number, got an expanded tensor or the like")


@_disable_dynamo
def _untraced(y: Tensor, x: Tensor, layout: RowLayout, terms: Terms) -> Tensor:
    """Between two graphs: a layout and addresses are no part of one."""
    return lora_grouped_(y, x, layout, terms)
