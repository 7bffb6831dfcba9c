"""LoRA terms of many adapters added to one batch: y[row] += sum over the row's adapters of scale * B (A x[row]).

A *group* is a list of adapters, and the rows that have it; a base row is in no group and its memory is not touched.
The sum is taken in fp32 (fp64 for fp64) and rounded once, into y. A row's term has the same bits whatever other rows
there are: see :mod:`fused_lora.ops.invariant`. Groups whose factors are alike and lie at equal distances in one memory
share a batched product, without a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_lora.ops.invariant import LEAST, aligned, row_tiles, stacks

_CHUNK = 512  # rows whose term is held in memory at a time: a multiple of every tile
_KEEP = 64  # chunks of at most this many rows keep their buffers for the next layer
_STACKED = 16  # rows of a group up to which it shares a product: above, each fills one of its own

Factors = tuple[Tensor, Tensor, float]  # A^T [K, r], B^T [r, N], scale
Heights = Mapping[tuple[int, ...], tuple[int, ...]]  # of the tiles, by the ranks of a group's adapters


class Terms:
    """What each group adds at one layer.

    Args:
        factors: A^T [K, r], B^T [r, N] and the scale of each adapter, by group; all of one floating dtype, starting at
            multiples of 64 bytes. They are added up in this order. Groups that add nothing are left out, or have an
            empty list.

    Attributes:
        groups: their numbers, ascending. runs: the groups again, neighbours together that may share a product.
        signature: what decides how rows are cut for these terms.
    """

    def __init__(self, factors: Mapping[int, Sequence[Factors]]):
        self.factors = {g: factors[g] for g in sorted(factors) if factors[g]}
        self.groups = tuple(self.factors)
        self.ranks = {g: tuple(A_t.shape[1] for A_t, _, _ in self.factors[g]) for g in self.groups}
        self.dtype = self.factors[self.groups[0]][0][0].dtype if self.groups else None
        self._stacked: dict[tuple[int, ...], Factors] = {}
        runs: list[tuple[int, ...]] = []
        for g in self.groups:
            together = (*runs[-1], g) if runs else ()
            if together and self._evenly_spaced(together):
                runs[-1] = together
            else:
                runs.append((g,))
        self.runs = tuple(runs)
        self.signature = self.runs, tuple(self.ranks.items())

    def stacked(self, groups: tuple[int, ...]) -> Factors:
        """A^T [n, K, r], B^T [n, r, N] and the scale of a run, or of a part of one: views of the same memory."""
        if groups not in self._stacked:
            (A_t, B_t, scale), (next_A, next_B, _) = (self.factors[g][0] for g in groups[:2])
            tensors = (
                t.as_strided((len(groups), *t.shape), (u.storage_offset() - t.storage_offset(), *t.stride()))
                for t, u in ((A_t, next_A), (B_t, next_B))
            )
            self._stacked[groups] = (*tensors, scale)
        return self._stacked[groups]

    def _evenly_spaced(self, groups: tuple[int, ...]) -> bool:
        """Whether the last group continues the run of the others."""
        *_, before, last = (self.factors[g] for g in groups)
        if len(last) > 1 or len(before) > 1 or last[0][2] != before[0][2]:
            return False
        for i in (0, 1):
            u, v = before[0][i], last[0][i]
            distance = v.storage_offset() - u.storage_offset()
            if u.shape != v.shape or u.stride() != v.stride() or distance <= 0:
                return False
            if u.untyped_storage().data_ptr() != v.untyped_storage().data_ptr():
                return False
            if len(groups) > 2:
                t = self.factors[groups[-3]][0][i]
                if u.storage_offset() - t.storage_offset() != distance:
                    return False
        return True


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
        self._chunks: dict[tuple[int, ...], list[_Chunk]] = {}

    def chunks(self, groups: tuple[int, ...]) -> list[_Chunk]:
        """The rows of ``groups`` (ascending; those without rows are left out) in pieces of about ``_CHUNK``."""
        if groups not in self._chunks:
            self._chunks[groups] = [_Chunk(pieces, self._device) for pieces in self._cut(groups)]
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
                height += _filled(len(piece))
        if pieces:
            yield pieces


class _Step(NamedTuple):
    """Consecutive groups of one height, and their tiles: (first row within the group, rows)."""

    groups: tuple[int, ...]
    start: int
    height: int
    tiles: tuple[tuple[int, int], ...]

    def views(self, whole: Tensor) -> list[Tensor]:
        """Each tile of all groups in a buffer: [rows, columns], or [groups, rows, columns] for several."""
        n = len(self.groups)
        rows = whole[self.start : self.start + n * self.height]
        if n == 1:
            return [rows[first : first + h] for first, h in self.tiles]
        rows = rows.unflatten(0, (n, self.height))
        return [rows[:, first : first + h] for first, h in self.tiles]


class _Chunk:
    """Some rows by group, each group filled up to whole tiles, and buffers for them."""

    def __init__(self, pieces: list[tuple[int, np.ndarray]], device: torch.device):
        counts = [len(rows) for _, rows in pieces]
        self.groups, self._heights = [g for g, _ in pieces], [_filled(n) for n in counts]
        self._height = sum(self._heights)
        starts = np.cumsum([0, *self._heights[:-1]])
        rows = np.concatenate([rows for _, rows in pieces])
        places = np.concatenate([s + np.arange(n) for s, n in zip(starts, counts, strict=True)])
        gather = np.repeat(rows[np.cumsum(counts) - 1], self._heights)  # the last row of a group fills it up
        gather[places] = rows
        in_order = np.argsort(rows)
        first, end = rows[in_order[0]], rows[in_order[-1]] + 1
        self._span = None
        if end - first == len(rows):
            self._span, places = slice(int(first), int(end)), places[in_order]
        self._straight = self._span is not None and np.array_equal(places, np.arange(self._height))
        self._rows, self._gather, self._places = (torch.from_numpy(i).to(device) for i in (rows, gather, places))
        self._buffers: dict[tuple, tuple[Tensor, list[list[Tensor]]]] = {}
        self._steps: dict[tuple, tuple[_Step, ...]] = {}
        self._plans: dict[tuple[_Step, ...], tuple[_Step, ...]] = {}

    def add(self, y: Tensor, x: Tensor, terms: Terms, tiles: Heights) -> None:
        """y [rows, N] += the terms of x [rows, K]; ``tiles``: heights that suit a group of these ranks."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, terms.dtype), torch.float32)
        shape = (x.shape[1], y.shape[1], dtype, x.device, torch.get_num_threads())
        key = terms.signature, shape
        steps = self._steps.get(key)
        if steps is None:
            steps = self._steps[key] = self._plan(terms, tiles, shape)
        inputs, x_tiles = self._buffer(x.shape[1], dtype, steps, "x")
        if dtype == x.dtype and inputs.is_contiguous():
            torch.index_select(x, 0, self._gather, out=inputs)
        else:
            inputs.copy_(x.index_select(0, self._gather))
        term, y_tiles = self._buffer(y.shape[1], dtype, steps, "y")
        for step, inputs_of, terms_of in zip(steps, x_tiles, y_tiles, strict=True):
            if len(step.groups) > 1:
                A_t, B_t, scale = terms.stacked(step.groups)
                A_t, B_t = A_t.to(dtype), B_t.to(dtype)
                for a, b in zip(inputs_of, terms_of, strict=True):
                    torch.baddbmm(b, torch.bmm(a, A_t), B_t, beta=0, alpha=scale, out=b)
                continue
            for i, (A_t, B_t, scale) in enumerate(terms.factors[step.groups[0]]):
                A_t, B_t = A_t.to(dtype), B_t.to(dtype)
                for a, b in zip(inputs_of, terms_of, strict=True):
                    torch.addmm(b, torch.mm(a, A_t), B_t, beta=int(i > 0), alpha=scale, out=b)
        self._scatter(y, term)

    def _scatter(self, y: Tensor, term: Tensor) -> None:
        if not self._straight:
            term = term.index_select(0, self._places)
        if y.dtype == term.dtype and self._span is not None:
            y[self._span].add_(term)
        elif y.dtype == term.dtype:
            y.index_add_(0, self._rows, term)
        elif self._span is not None:
            y[self._span] = (y[self._span] + term).to(y.dtype)
        else:
            y.index_copy_(0, self._rows, (y.index_select(0, self._rows) + term).to(y.dtype))

    def _plan(self, terms: Terms, tiles: Heights, shape: tuple) -> tuple[_Step, ...]:
        """What to multiply with what: neighbours of a run that are present and of one height share a product."""
        K, N, *rest = shape
        places = {g: (run, i) for run in terms.runs for i, g in enumerate(run)}
        together: list[list[tuple[int, int]]] = []  # (group, height)
        for g, height in zip(self.groups, self._heights, strict=True):
            run, i = places[g]
            before = together[-1][-1] if together else None
            if before is not None and i > 0 and before == (run[i - 1], height) and height <= _STACKED:
                together[-1].append((g, height))
            else:
                together.append([(g, height)])
        steps, start = [], 0
        for members in together:
            groups, height = tuple(g for g, _ in members), members[0][1]
            cut = tuple(_tiles(height, tiles[terms.ranks[groups[0]]]))
            r, n = terms.ranks[groups[0]][0], len(groups)
            if n > 1 and all(stacks(n, h, K, r, N, *rest) for h in {h for _, h in cut}):
                steps.append(_Step(groups, start, height, cut))
            else:
                steps += [_Step((g,), start + i * height, height, cut) for i, g in enumerate(groups)]
            start += n * height
        # one object for equal plans, so that layers of other shapes find the same buffers
        return self._plans.setdefault(tuple(steps), tuple(steps))

    def _buffer(self, columns: int, dtype: torch.dtype, steps: tuple[_Step, ...], side: str):
        """A buffer for all rows (side "x" or "y"), and the tiles of each step; a small one is kept for other layers."""
        # an inference tensor cannot be written outside that mode, and threads may share a layout
        key = (side, columns, dtype, id(steps), torch.is_inference_mode_enabled(), threading.get_ident())
        found = self._buffers.get(key)
        if found is None:
            whole = aligned(self._height, columns, dtype=dtype, device=self._rows.device)
            found = whole, [step.views(whole) for step in steps]
            if self._height <= _KEEP:
                self._buffers[key] = found
        return found


def lora_grouped_(y: Tensor, x: Tensor, layout: RowLayout, terms: Terms) -> Tensor:
    """y[m] += sum_i scale_i * (x[m] A_i^T) B_i^T over the factors of the row's group, in place.

    Args:
        y: [M, N], fp64, fp32, bf16 or fp16; rows without factors keep their bits.
        x: [M, K], floating. layout: which row is in which group. terms: the factors of the groups.

    Returns:
        y. The sum is taken in fp32, or in fp64 if x or the factors are, and rounded into y once.

    Raises:
        ValueError: x, y and the layout differ in their rows.
    """
    if not len(x) == len(y) == layout.rows:
        raise ValueError(f"x, y: expected {layout.rows} rows as in the layout, got {len(x)} and {len(y)}")
    if not terms.groups:
        return y
    dtype = torch.promote_types(torch.promote_types(x.dtype, terms.dtype), torch.float32)
    rest = (y.shape[1], dtype, x.device, torch.get_num_threads())
    tiles = {ranks: _common([row_tiles(x.shape[1], r, *rest) for r in ranks]) for ranks in set(terms.ranks.values())}
    for chunk in layout.chunks(terms.groups):
        chunk.add(y, x, terms, tiles)
    return y


def _common(sizes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Tile heights that suit all."""
    return tuple(h for h in sizes[0] if all(h in other for other in sizes)) or (1,)


def _tiles(height: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = 0
    for h in sizes:
        while height - first >= h:
            yield first, h
            first += h


def _filled(rows: int) -> int:
    return -(-rows // LEAST) * LEAST
