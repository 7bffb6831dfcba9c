"""LoRA terms of many adapters added to one batch: y[row] += sum over the row's adapters of scale * B (A x[row]).

A *group* is a list of adapters, and the rows that have it; a base row is in no group and its memory is not touched.
The sum is taken in fp32 (fp64 for fp64) and rounded once, into y. A row's term has the same bits whatever other rows
there are, and whether the layer is computed alone or together with others that read the same input: see
:mod:`fused_lora.ops.grouped.invariant`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fused_lora.ops.grouped.plan import filled
from fused_lora.ops.grouped.products import Chunk, Products
from fused_lora.ops.grouped.terms import Joint, Terms

__all__ = ["Joint", "RowLayout", "Terms", "form_terms", "lora_grouped_"]

_CHUNK = 512  # rows whose term is held in memory at a time: a multiple of every tile


class RowLayout:
    """Rows sorted by group and cut into tiles: made once for a batch, used by all of its layers.

    Args:
        group_of_row: integers [rows]: number of the row's group, or -1 for a base row.
        device: where the rows are.

    Attributes:
        rows: how many there are. groups: numbers of the groups that have rows, ascending.

    Raises:
        ValueError: group_of_row is not one-dimensional.
    """

    def __init__(self, group_of_row: np.ndarray, device: torch.device):
        if group_of_row.ndim != 1:
            raise ValueError(f"group_of_row: expected one dimension, got shape {group_of_row.shape}")
        self.rows, self._device = len(group_of_row), device
        order = np.argsort(group_of_row, kind="stable")
        order = order[np.searchsorted(group_of_row[order], 0) :]
        present, counts = np.unique(group_of_row[order], return_counts=True)
        self.groups, ends = tuple(present.tolist()), np.cumsum(counts)
        self._rows = {g: order[end - n : end] for g, n, end in zip(self.groups, counts, ends, strict=True)}
        self._chunks: dict[tuple[int, ...], list[Chunk]] = {}
        self._numbers: dict[int, Tensor] = {}

    def rows_of(self, group: int) -> Tensor | None:
        """The numbers of a group's rows, int64; None where it has none."""
        if group not in self._numbers and group in self._rows:
            self._numbers[group] = torch.from_numpy(self._rows[group]).to(self._device)
        return self._numbers.get(group)

    def chunks(self, groups: tuple[int, ...]) -> list[Chunk]:
        """The rows of ``groups`` (ascending; those without rows are left out) in pieces of about ``_CHUNK``."""
        if groups not in self._chunks:
            self._chunks[groups] = [Chunk(pieces, self._device) for pieces in self._cut(groups)]
        return self._chunks[groups]

    def _cut(self, groups: tuple[int, ...]) -> Iterator[list[tuple[int, np.ndarray]]]:
        pieces, height = [], 0
        for g in groups:
            rows = self._rows.get(g, ())
            for start in range(0, len(rows), _CHUNK):
                piece = rows[start : start + _CHUNK]
                if height + len(piece) > _CHUNK:
                    yield pieces
                    pieces, height = [], 0
                pieces.append((g, piece))
                height += filled(len(piece))
        if pieces:
            yield pieces


def form_terms(x: Tensor, layout: RowLayout, joint: Joint) -> Products | None:
    """The terms of x [rows, K] at several layers that read it, to be added by ``add(layer, y)``.

    None if the rows with adapters are too many to hold the terms of, or none.
    """
    chunks = layout.chunks(joint.groups)
    return chunks[0].products(joint, x.dtype).run(x) if len(chunks) == 1 else None


def lora_grouped_(
    y: Tensor | Sequence[Tensor], x: Tensor, layout: RowLayout, terms: Terms | Joint
) -> Tensor | Sequence[Tensor]:
    """y[m] += sum_i scale_i * (x[m] A_i^T) B_i^T over the factors of the row's group, in place.

    Args:
        y: [M, N], fp64, fp32, bf16 or fp16; rows without factors keep their bits. For a :class:`Joint` of several
            layers a sequence, the output of each.
        x: [M, K], floating. layout: which row is in which group. terms: the factors of the groups; as a
            :class:`Joint`, what is worked out from them is kept for the next call.

    Returns:
        y. The sum is taken in fp32, or in fp64 if x or the factors are, and rounded into y once.

    Raises:
        ValueError: x, y and the layout differ in their rows.
    """
    outputs = [y] if isinstance(y, Tensor) else y
    for output in outputs:
        if not len(x) == len(output) == layout.rows:
            raise ValueError(f"x, y: expected {layout.rows} rows as in the layout, got {len(x)} and {len(output)}")
    joint = terms if isinstance(terms, Joint) else Joint([terms])
    for chunk in layout.chunks(joint.groups):
        products = chunk.products(joint, x.dtype, keep=joint is terms).run(x)
        for layer, output in enumerate(outputs):
            products.add(layer, output)
    return y
