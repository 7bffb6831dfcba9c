"""What adapters add behind one product of stacked experts, without W + s B A.

An adapter of a stacked parameter is PEFT's (``target_parameters``): lora_A [experts * r, K], whose slowest part is the
expert, and lora_B [N, r * experts], whose fastest part is the expert. Rows are sorted by expert, and two more products
like that of the experts add the terms to each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.ops.dora.op import dropped
from fused_lora.ops.linear.op import draw_seeds


class ExpertTerm(NamedTuple):
    """One adapter of one stacked parameter: lora_A [experts * r, K], lora_B [N, r * experts], scaling, dropout."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float = 0.0

    def stacks(self, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """lora_A [experts, r, K] and lora_B [experts, N, r] in ``dtype``, r padded to whole 16 bytes."""
        return unpacked(self.lora_A.to(dtype), self.lora_B.to(dtype), experts)


class StackedTerm(ExpertTerm):
    """The same with lora_A [experts, r, K] and lora_B [experts, N, r], r of whole 16 bytes already."""

    def stacks(self, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both in ``dtype``."""
        return self.lora_A.to(dtype), self.lora_B.to(dtype)


class Routed(NamedTuple):
    """Rows sorted by expert, of any number each.

    offsets: int32 [experts], where the rows of each end. order: int64 [rows], which of the rows by token and place
    among its experts each is.
    """

    offsets: Tensor
    order: Tensor
    turned: bool = False

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.offsets.shape[0]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W_e^T for the expert of each row; weight [experts, N, K]."""
        from transformers.integrations.moe import _grouped_mm

        return _grouped_mm(x, weight.transpose(1, 2), offs=self.offsets)

    def dropped(self, x: Tensor, p: float) -> Tensor:
        """D(x), by a mask whose rows are those by token and place."""
        return dropped(x[back(self.order)], draw_seeds(1, x.device), p)[self.order]


class Even(NamedTuple):
    """As many rows for each expert, one expert's after another's.

    turned: an adapter is of W [experts, N, K] as x W reads it, so x meets lora_B first.
    """

    experts: int
    turned: bool = False

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """As of :class:`Routed`."""
        return torch.bmm(x.view(self.experts, -1, x.shape[1]), weight.transpose(1, 2)).flatten(0, 1)

    def dropped(self, x: Tensor, p: float) -> Tensor:
        """D(x), by a mask of x's rows."""
        return dropped(x, draw_seeds(1, x.device), p)


def add_terms(y: Tensor, x: Tensor, terms: Sequence[ExpertTerm], rows: Routed | Even) -> Tensor:
    """y + sum_i s_i D_i(x) A_i^T B_i^T with the A and B of each row's expert, in y's dtype.

    On a CPU rounded once; elsewhere 16-bit products and sums are rounded each, as PEFT's are.
    y: [rows, N], x: [rows, K], sorted by expert as ``rows`` says.
    """
    if not terms:
        return y
    wide = torch.float32 if y.is_cpu else y.dtype  # tensor cores sum 16-bit products in fp32 anyway
    total = y
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(wide, y.dtype if y.dtype is torch.float64 else wide)
        for term in terms:
            A, B = term.stacks(rows.experts, dtype)
            if rows.turned:
                A, B = B.transpose(1, 2), A.transpose(1, 2)
            kept = x.to(dtype)
            if term.dropout:
                kept = rows.dropped(kept, term.dropout)
            total = torch.add(total, rows.product(rows.product(kept, A), B), alpha=term.scaling)
        return total.to(y.dtype)


def back(order: Tensor) -> Tensor:
    """Where each row of before is now: the inverse of a permutation."""
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order), device=order.device)
    return found


def unpacked(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """lora_A [experts, r, K] and lora_B [experts, N, r] of PEFT's packing, r padded to whole 16 bytes."""
    A = lora_A.reshape(experts, -1, lora_A.shape[1])
    B = lora_B.reshape(lora_B.shape[0], -1, experts).permute(2, 0, 1)
    missing = -A.shape[1] % (16 // A.element_size())  # grouped products want rows that begin at 16 bytes
    if missing:
        A, B = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))
    return A.contiguous(), B.contiguous()
