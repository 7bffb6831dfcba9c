"""What to multiply with what: groups of rows at layers that read the same input, cut into tiles and put into products.

Products of one shape whose factors lie at equal distances in one memory are one batched product, without a copy: those
of several groups at one layer, or else those of several layers for one group, or else several tiles of one group.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_lora.ops.grouped.invariant import LEAST, row_tiles, stacks
from fused_lora.ops.grouped.terms import Joint

_COUNTS = (8, 4, 2, 1)  # tiles of a group in one product: few numbers, for each is tried on its first use
_PIECE = 16  # rows that pieces of a layer's rows have on average, if they are added one by one
_STACKED = 16  # rows of a group up to which it shares a product: above, each fills one of its own
Item = tuple[int, int]  # number of a layer among those that share an input, group


class Step(NamedTuple):
    """Items of one shape in one product: their first rows in the buffer of inputs and in that of N columns, their
    height, and the tiles: (first row within an item, how many, rows of each); several only where there is one item."""

    items: tuple[Item, ...]
    first: int
    start: int
    height: int
    tiles: tuple[tuple[int, int, int], ...]

    def result(self, first: int) -> int:
        """Where the results of the tile that begins at this row of the items lie: one piece of memory for all items."""
        return self.start + len(self.items) * first

    def places(self, item: int) -> np.ndarray:
        """Where the result of each row of an item lies."""
        tiles = ((self.result(first) + item * count * h, count * h) for first, count, h in self.tiles)
        return np.concatenate([start + np.arange(rows) for start, rows in tiles])


class Target:
    """Where the terms of one layer lie and which rows of y they belong to."""

    def __init__(
        self,
        steps: Sequence[Step],
        layer: int,
        rows_of: Mapping[int, np.ndarray],
        device: torch.device,
    ):
        rows, places = [], []
        for step in steps:
            for k, (i, g) in enumerate(step.items):
                if i == layer:
                    rows.append(rows_of[g])
                    places.append(step.places(k)[: len(rows_of[g])])
        self._pieces: list[tuple[slice, slice]] | None = []  # rows of y and where their terms lie
        if not rows:
            return
        rows, places = np.concatenate(rows), np.concatenate(places)
        order = np.argsort(rows)
        rows, places = rows[order], places[order]
        strides = np.unique(np.diff(places))
        even = len(strides) <= 1 and (strides > 0).all()
        ends = np.flatnonzero((np.diff(rows) != 1) | (False if even else np.diff(places) != 1)) + 1
        if len(ends) * _PIECE <= len(rows):
            step = int((*strides, 1)[0]) if even else 1
            firsts, lasts = [0, *ends.tolist()], [*(ends - 1).tolist(), -1]
            self._pieces = [
                (_span(rows[a], rows[b]), _span(places[a], places[b], step)) for a, b in zip(firsts, lasts, strict=True)
            ]
            return
        self._pieces, self._rows = None, torch.from_numpy(rows).to(device)
        self._places = _span(places[0], places[-1], int(strides[0])) if even else torch.from_numpy(places).to(device)

    def add(self, y: Tensor, results: Any) -> None:
        """y [rows, N] += the layer's share of ``results``, in one rounding; None where it has none."""
        if self._pieces is not None:
            for rows, places in self._pieces:
                part, term = y[rows], results[places]
                if y.dtype == term.dtype:
                    part.add_(term)
                else:
                    part.copy_(part + term)
            return
        term = results[self._places] if isinstance(self._places, slice) else results.index_select(0, self._places)
        if y.dtype == term.dtype:
            y.index_add_(0, self._rows, term)
        else:
            y.index_copy_(0, self._rows, (y.index_select(0, self._rows) + term).to(y.dtype))


def _span(first: Any, last: Any, step: int = 1) -> slice:
    return slice(int(first), int(last) + 1, step)


def filled(rows: int) -> int:
    """Rows of a group with what fills its last tile."""
    return -(-rows // LEAST) * LEAST


def steps_of(heights: Mapping[int, int], joint: Joint, shape: tuple) -> Iterator[Step]:
    """What to multiply with what, and where the results lie: buffers of equal width are one."""
    firsts = dict(zip(heights, np.cumsum([0, *heights.values()]).tolist(), strict=False))
    ends = dict.fromkeys(joint.N, 0)
    for items in _products(heights, joint, shape):
        (i, g), height = items[0], heights[items[0][1]]
        N = joint.N[i]
        tiles = _tiles(height, joint, items[0], shape)
        if len(items) == 1:
            tiles = _together(tiles, joint, items[0], shape)
        yield Step(items, firsts[g], ends[N], height, tiles)
        ends[N] += len(items) * height


def _products(heights: Mapping[int, int], joint: Joint, shape: tuple) -> Iterator[tuple[Item, ...]]:
    """The items in lists that share a product: groups of a layer if they can, layers of a group else, or one alone."""
    alone: dict[int, list[int]] = {g: [] for g in heights}
    for i in range(len(joint.terms)):
        for groups in _neighbours(heights, joint, i):
            items = tuple((i, g) for g in groups)
            if _same_bits(items, joint, heights[groups[0]], shape):
                yield items
            else:
                for g in groups:
                    alone[g].append(i)
    for g, layers in alone.items():
        for run in joint.across.get(g, [(i,) for i in layers]):
            items = tuple((i, g) for i in run)
            if set(run) <= set(layers) and _same_bits(items, joint, heights[g], shape):
                yield items
            else:
                yield from (((i, g),) for i in run if i in layers)


def _neighbours(heights: Mapping[int, int], joint: Joint, layer: int) -> list[list[int]]:
    """The groups of a layer that have rows, those of a run together whose rows are neighbours and equally many."""
    terms, order = joint.terms[layer], list(heights)
    previous = {g: before for run in terms.runs for before, g in zip(run, run[1:], strict=False)}
    found: list[list[int]] = []
    for before, g in zip([None, *order], order, strict=False):
        if g not in terms.factors:
            continue
        if before is not None and previous.get(g) == before and heights[g] == heights[before]:
            found[-1].append(g)
        else:
            found.append([g])
    return found


def _same_bits(items: Sequence[Item], joint: Joint, height: int, shape: tuple) -> bool:
    """Whether these are several that may be one product without a trace in the results."""
    (i, g), n = items[0], len(items)
    if n == 1 or height > _STACKED:
        return False
    sizes, same = (joint.K, joint.terms[i].ranks[g][0], joint.N[i]), "input" if items[1][1] == g else ""
    heights = {h for _, _, h in _tiles(height, joint, items[0], shape)}
    return all(stacks(n, h, *sizes, *shape, same) for h in heights)


def _tiles(height: int, joint: Joint, item: Item, shape: tuple) -> tuple[tuple[int, int, int], ...]:
    """(first row, 1, rows) of the tiles, of heights that suit all adapters of the item."""
    i, g = item
    sizes = [row_tiles(joint.K, r, joint.N[i], *shape) for r in joint.terms[i].ranks[g]]
    found, first = [], 0
    for h in tuple(h for h in sizes[0] if all(h in other for other in sizes)) or (1,):
        while height - first >= h:
            found.append((first, 1, h))
            first += h
    return tuple(found)


def _together(tiles: tuple[tuple[int, int, int], ...], joint: Joint, item: Item, shape: tuple) -> tuple:
    """The small tiles of one item as one product for each height, where that leaves no trace."""
    i, g = item
    found: list[tuple[int, int, int]] = []
    for h, same in itertools.groupby(tiles, lambda tile: tile[2]):
        same = list(same)
        first, left = same[0][0], len(same)
        for count in _COUNTS if h <= _STACKED else (1,):
            sizes = [(count, h, joint.K, r, joint.N[i], *shape, "factors") for r in joint.terms[i].ranks[g]]
            while left >= count and (count == 1 or all(stacks(*size) for size in sizes)):
                found.append((first, count, h))
                first, left = first + count * h, left - count
    return tuple(found)
