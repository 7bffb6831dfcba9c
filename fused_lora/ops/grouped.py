"""LoRA terms of many adapters added to one batch: y[row] += sum over the row's adapters of scale * B (A x[row]).

A *group* is a list of adapters, and the rows that have it; a base row is in no group and its memory is not touched.
The sum is taken in fp32 (fp64 for fp64) and rounded once, into y.

**Batch invariance.** A GEMM of another height may sum in another order, so a row's bits would depend on its neighbours.
Here every product is cut into tiles of ``LEAST`` rows, the last one filled up with copies of a row, through calls of
one shape; larger tiles are used where :func:`row_tiles` has found that they give every row the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

LEAST = 4  # rows of the smallest tile: fewer take other code in a BLAS, more are waste in a decode step
SIZES = (128, 16, LEAST)
_CHUNK = 512  # rows whose term is held in memory at a time: a multiple of every tile
_KEEP = 64  # chunks of at most this many rows keep their buffers for the next layer

Factors = tuple[Tensor, Tensor, float]  # A^T [K, r], B^T [r, N], scale


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
        present, starts = np.unique(group_of_row[order], return_index=True)
        self.groups = tuple(present.tolist())
        self._rows = dict(zip(self.groups, np.split(order, starts[1:]), strict=True))
        self._chunks: dict[tuple[int, ...], list[_Chunk]] = {}

    def chunks(self, groups: tuple[int, ...]) -> list[_Chunk]:
        """The rows of ``groups`` (ascending, a part of ``self.groups``) in pieces of about ``_CHUNK``."""
        if groups not in self._chunks:
            self._chunks[groups] = [_Chunk(pieces, self._device) for pieces in self._cut(groups)]
        return self._chunks[groups]

    def _cut(self, groups: tuple[int, ...]) -> Iterator[list[tuple[int, np.ndarray]]]:
        pieces, height = [], 0
        for g in groups:
            rows = self._rows[g]
            for start in range(0, len(rows), _CHUNK):
                piece = rows[start : start + _CHUNK]
                if height + len(piece) > _CHUNK:
                    yield pieces
                    pieces, height = [], 0
                pieces.append((g, piece))
                height += _filled(len(piece))
        if pieces:
            yield pieces


class _Chunk:
    """Some rows by group, each group filled up to whole tiles, and buffers for them."""

    def __init__(self, pieces: list[tuple[int, np.ndarray]], device: torch.device):
        self._groups = [g for g, _ in pieces]
        counts = [len(rows) for _, rows in pieces]
        self._heights = [_filled(n) for n in counts]
        self._height, rows = sum(self._heights), np.concatenate([rows for _, rows in pieces])
        filled = self._height != len(rows)
        in_order = not filled and (np.diff(rows) == 1).all()
        self._span = slice(int(rows[0]), int(rows[-1]) + 1) if in_order else None
        self._rows = torch.from_numpy(rows).to(device)
        self._gather, self._places = self._rows, None
        if filled:
            starts = np.cumsum([0, *self._heights[:-1]])
            places = np.concatenate([s + np.arange(n) for s, n in zip(starts, counts, strict=True)])
            gather = [
                np.pad(rows, (0, height - len(rows)), "edge")
                for (_, rows), height in zip(pieces, self._heights, strict=True)
            ]
            self._gather = torch.from_numpy(np.concatenate(gather)).to(device)
            self._places = torch.from_numpy(places).to(device)
        self._buffers: dict[tuple, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._tiles: dict[tuple, tuple[list[int], list[int]]] = {}

    def add(self, y: Tensor, x: Tensor, factors: dict[int, Sequence[Factors]], sizes: dict[int, tuple[int, ...]]):
        """y [rows, N] += the terms of x [rows, K] under ``factors`` by group, group g with tiles of ``sizes[g]``."""
        dtype = accumulate_dtype(x, next(iter(factors.values()))[0][0])
        key = tuple(map(sizes.__getitem__, self._groups))
        groups, heights = self._cut(key)
        inputs, x_tiles = self._buffer(("x", x.shape[1], dtype, key), heights)
        if dtype == x.dtype:
            torch.index_select(x, 0, self._gather, out=inputs)
        else:
            inputs.copy_(x.index_select(0, self._gather))
        term, tiles = self._buffer(("y", y.shape[1], dtype, key), heights)
        for g, x_tile, tile in zip(groups, x_tiles, tiles, strict=True):
            beta = 0
            for A_t, B_t, scale in factors[g]:
                if A_t.dtype != dtype:
                    A_t, B_t = A_t.to(dtype), B_t.to(dtype)
                torch.addmm(tile, torch.mm(x_tile, A_t), B_t, beta=beta, alpha=scale, out=tile)
                beta = 1
        if self._places is not None:
            term = term.index_select(0, self._places)
        if y.dtype != dtype:
            y.index_copy_(0, self._rows, (y.index_select(0, self._rows) + term).to(y.dtype))
        elif self._span is not None:
            y[self._span].add_(term)
        else:
            y.index_add_(0, self._rows, term)

    def _cut(self, sizes: tuple[tuple[int, ...], ...]) -> tuple[list[int], list[int]]:
        """(group, height) of every tile, the larger ones first within a group."""
        if sizes not in self._tiles:
            groups, heights = [], []
            for g, height, allowed in zip(self._groups, self._heights, sizes, strict=True):
                for size in allowed:
                    groups += [g] * (height // size)
                    heights += [size] * (height // size)
                    height %= size
            self._tiles[sizes] = groups, heights
        return self._tiles[sizes]

    def _buffer(self, key: tuple, heights: list[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A buffer for all rows, and its tiles; key: (what for, columns, dtype, tiles). A small one is kept."""
        key += (torch.is_inference_mode_enabled(),)  # an inference tensor cannot be written outside that mode
        found = self._buffers.get(key)
        if found is None:
            whole = torch.empty((self._height, key[1]), dtype=key[2], device=self._rows.device)
            found = whole, whole.split(heights)
            if self._height <= _KEEP:
                self._buffers[key] = found
        return found


def lora_grouped_(y: Tensor, x: Tensor, layout: RowLayout, factors: dict[int, Sequence[Factors]]) -> Tensor:
    """y[m] += sum_i scale_i * (x[m] A_i^T) B_i^T over the factors of the row's group, in place.

    Args:
        y: [M, N], fp64, fp32, bf16 or fp16; rows without factors keep their bits.
        x: [M, K], floating.
        layout: which row is in which group.
        factors: A^T [K, r], B^T [r, N] (floating) and the scale of each adapter, for the groups that have any here.
            They are added up in this order, in fp32 (fp64 if any of x and A is), and rounded into y once.

    Returns:
        y. A row's term has the same bits whatever other rows there are.

    Raises:
        ValueError: x, y and the layout differ in their rows.
    """
    if not len(x) == len(y) == layout.rows:
        raise ValueError(f"x, y: expected {layout.rows} rows as in the layout, got {len(x)} and {len(y)}")
    groups = tuple(g for g in layout.groups if factors.get(g))
    if not groups:
        return y
    dtype, threads = accumulate_dtype(x, factors[groups[0]][0][0]), torch.get_num_threads()
    ranks = {g: tuple(A_t.shape[1] for A_t, _, _ in factors[g]) for g in groups}
    tiles = {r: _tiles_of(x.shape[1], r, y.shape[1], dtype, x.device, threads) for r in set(ranks.values())}
    sizes = {g: tiles[ranks[g]] for g in groups}
    for chunk in layout.chunks(groups):
        chunk.add(y, x, factors, sizes)
    return y


def _tiles_of(K: int, ranks: tuple[int, ...], N: int, *rest) -> tuple[int, ...]:
    """Heights that suit all ranks of a group."""
    found = [row_tiles(K, r, N, *rest) for r in ranks]
    return found[0] if len(found) == 1 else tuple(size for size in found[0] if all(size in f for f in found)) or (1,)


def accumulate_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """fp32, or fp64 where x or A is."""
    return torch.float64 if torch.float64 in (x.dtype, A.dtype) else torch.float32


@functools.lru_cache(maxsize=4096)
def row_tiles(K: int, r: int, N: int, dtype: torch.dtype, device: torch.device, threads: int) -> tuple[int, ...]:
    """Tile heights, descending, whose products give every row the same bits here, wherever in a tile it lies.

    Tried on random numbers, in the calls that :func:`lora_grouped_` makes. (1,) if a row's place in a tile matters.
    """
    generator = torch.Generator().manual_seed(0)
    x, A, B_t = (torch.randn(s, generator=generator).to(device, dtype) for s in ((SIZES[0], K), (r, K), (r, N)))
    order = torch.randperm(len(x), generator=generator).to(device)

    def product(rows: Tensor, size: int) -> Tensor:
        out = rows.new_empty(len(rows), N)
        for tile, result in zip(rows.split(size), out.split(size), strict=True):
            torch.addmm(result, torch.mm(tile, A.t()), B_t, beta=0, alpha=0.5, out=result)
        return out

    with torch.no_grad():
        least = product(x, LEAST)
        if not torch.equal(product(x[order], LEAST), least[order]):
            return (1,)
        return tuple(size for size in SIZES if size == LEAST or torch.equal(product(x, size), least))


def _filled(rows: int) -> int:
    return -(-rows // LEAST) * LEAST
