"""The products behind a mixed batch on a CPU: which share a call, and the buffers they read and write.

Rows of one group are filled up to whole tiles, so that every product has a height in which a row's bits do not depend
on its neighbours (:mod:`fused_lora.ops.invariant`). Products of one shape whose factors lie at equal distances in one
memory are one batched product, without a copy: those of several groups at one layer, or else those of several layers
that read the same input for one group.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_lora.ops.grouped_terms import Joint, stacked
from fused_lora.ops.invariant import LEAST, aligned, row_tiles, stacks

_KEEP = 64  # chunks of at most this many rows keep their products for the next time
_STACKED = 16  # rows of a group up to which it shares a product: above, each fills one of its own

Item = tuple[int, int]  # number of a layer among those that share an input, group


class _Step(NamedTuple):
    """Items of one shape in one product: their first rows in the buffer of inputs and in that of N columns, their
    height, and the tiles: (first row within an item, rows)."""

    items: tuple[Item, ...]
    first: int
    start: int
    height: int
    tiles: tuple[tuple[int, int], ...]


class _Workspace:
    """Buffers that products of several layers take in turn; ``turn`` says whose results are in them."""

    def __init__(self):
        self.turn = 0
        self._buffers: dict[tuple, Tensor] = {}

    def buffer(self, side: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = side, rows, columns, dtype
        if key not in self._buffers:
            self._buffers[key] = aligned(rows, columns, dtype=dtype, device=device)
        return self._buffers[key]


class Chunk:
    """Some rows by group, each group filled up to whole tiles.

    Args:
        pieces: the group and its row numbers. rows: how many rows the batch has.
    """

    def __init__(self, pieces: Sequence[tuple[int, np.ndarray]], rows: int, device: torch.device):
        self.rows, self.device = dict(pieces), device
        self.batch_rows = rows
        self.heights = {g: filled(len(numbers)) for g, numbers in pieces}
        self.height = sum(self.heights.values())
        # the last row of a group fills it up
        gather = [np.pad(numbers, (0, self.heights[g] - len(numbers)), mode="edge") for g, numbers in pieces]
        self.gather = torch.from_numpy(np.concatenate(gather)).to(device)
        self._plans: dict[tuple, tuple[tuple[_Step, ...], list[_Target]]] = {}
        self._frames: dict[tuple, _Frame] = {}
        self._products: dict[tuple, Products] = {}
        self._workspaces: dict[tuple, _Workspace] = {}

    def products(self, joint: Joint, dtype: torch.dtype) -> Products:
        """The products of these layers for these rows, on inputs of this dtype; small ones are made once."""
        # an inference tensor cannot be written outside that mode, and threads may share a chunk
        mine = threading.get_ident(), torch.is_inference_mode_enabled(), torch.get_num_threads()
        key = joint, dtype, *mine
        found = self._products.get(key)
        if found is None:
            accumulate = torch.promote_types(torch.promote_types(dtype, joint.dtype), torch.float32)
            found = Products(joint, self._frame(joint, accumulate, mine))
            if self.height <= _KEEP:
                self._products[key] = found
        return found

    def _frame(self, joint: Joint, dtype: torch.dtype, mine: tuple) -> _Frame:
        """The buffers for layers of these sizes: those of one thread take turns with them."""
        sizes = joint.signature, joint.K, dtype, mine[-1]
        plan = self._plans.get(sizes)
        if plan is None:
            steps = tuple(_steps(self, joint, (dtype, self.device, mine[-1])))
            plan = self._plans[sizes] = steps, [_Target(self, steps, i) for i in range(len(joint.terms))]
        if self.height > _KEEP:
            return _Frame(self, joint, *plan, dtype, _Workspace())
        key = *sizes, *mine
        if key not in self._frames:
            workspace = self._workspaces.setdefault(mine, _Workspace())
            self._frames[key] = _Frame(self, joint, *plan, dtype, workspace)
        return self._frames[key]


class _Frame:
    """The buffers of a plan: for each step the tiles of its inputs and of its results; for each layer its results."""

    def __init__(
        self,
        chunk: Chunk,
        joint: Joint,
        steps: Sequence[_Step],
        targets: list[_Target],
        dtype: torch.dtype,
        workspace: _Workspace,
    ):
        self.steps, self.targets, self.dtype, self.workspace = steps, targets, dtype, workspace
        self.gather = chunk.gather
        self.inputs = workspace.buffer("x", chunk.height, joint.K, dtype, chunk.device)
        ends = dict.fromkeys(joint.N, 0)
        for step in steps:
            ends[joint.N[step.items[0][0]]] += len(step.items) * step.height
        widths = {n: workspace.buffer("y", rows, n, dtype, chunk.device) for n, rows in ends.items() if rows}
        self.tiles = [self._views(step, widths[joint.N[step.items[0][0]]]) for step in steps]
        self.results = [widths.get(n) for n in joint.N]

    def _views(self, step: _Step, results: Tensor) -> list[tuple[Tensor, Tensor]]:
        n, h = len(step.items), step.height
        rows = results[step.start : step.start + n * h]
        if n == 1:
            inputs = self.inputs[step.first : step.first + h]
            return [(inputs[first : first + k], rows[first : first + k]) for first, k in step.tiles]
        same_input = step.items[0][1] == step.items[1][1]
        inputs = self.inputs[step.first : step.first + (h if same_input else n * h)]
        inputs = inputs.expand(n, *inputs.shape) if same_input else inputs.unflatten(0, (n, h))
        rows = rows.unflatten(0, (n, h))
        return [(inputs[:, first : first + k], rows[:, first : first + k]) for first, k in step.tiles]


class Products:
    """What is multiplied with what, bound to the tensors: nothing is looked up when it runs."""

    def __init__(self, joint: Joint, frame: _Frame):
        self._frame, self._dtype = frame, frame.dtype
        self._convert, self._direct = joint.dtype != frame.dtype, frame.inputs.is_contiguous()
        self._single: list[tuple[Tensor, Tensor, Tensor, Tensor, float, int]] = []
        self._batched: list[tuple[Tensor, Tensor, Tensor, Tensor, float]] = []
        for step, tiles in zip(frame.steps, frame.tiles, strict=True):
            factors = [joint.terms[i].factors[g] for i, g in step.items]
            if len(factors) > 1:
                A_t, B_t, scale = stacked([f[0] for f in factors])
                self._batched += [(a, A_t, b, B_t, scale) for a, b in tiles]
            for j, (A_t, B_t, scale) in enumerate(factors[0] if len(factors) == 1 else ()):
                self._single += [(a, A_t, b, B_t, scale, int(j > 0)) for a, b in tiles]
        self.turn = -1

    def run(self, x: Tensor) -> Products:
        """Form the terms of x [rows, K] at all layers."""
        frame = self._frame
        if self._direct and x.dtype == self._dtype:
            torch.index_select(x, 0, frame.gather, out=frame.inputs)
        else:
            frame.inputs.copy_(x.index_select(0, frame.gather))
        for a, A_t, b, B_t, scale, beta in self._single:
            if self._convert:
                A_t, B_t = A_t.to(self._dtype), B_t.to(self._dtype)
            torch.addmm(b, torch.mm(a, A_t), B_t, beta=beta, alpha=scale, out=b)
        for a, A_t, b, B_t, scale in self._batched:
            if self._convert:
                A_t, B_t = A_t.to(self._dtype), B_t.to(self._dtype)
            torch.baddbmm(b, torch.bmm(a, A_t), B_t, beta=0, alpha=scale, out=b)
        frame.workspace.turn += 1
        self.turn = frame.workspace.turn
        return self

    def hold(self, turn: int) -> bool:
        """Whether the terms of that run are still there."""
        return self.turn == turn == self._frame.workspace.turn

    def add(self, layer: int, y: Tensor) -> None:
        """y [rows, N] += the terms of the layer of this number."""
        self._frame.targets[layer].add(y, self._frame.results[layer])


class _Target:
    """Where the terms of one layer lie and which rows of y they belong to."""

    def __init__(self, chunk: Chunk, steps: Sequence[_Step], layer: int):
        rows, places = [], []
        for step in steps:
            for k, (i, g) in enumerate(step.items):
                if i == layer:
                    rows.append(chunk.rows[g])
                    places.append(step.start + k * step.height + np.arange(len(chunk.rows[g])))
        self._empty, self._even, self._places, self._rows, self._span = not rows, None, None, None, None
        if not rows:
            return
        rows, places = np.concatenate(rows), np.concatenate(places)
        order = np.argsort(rows)
        rows, places = rows[order], places[order]
        strides = np.unique(np.diff(places))
        if len(strides) <= 1 and (strides > 0).all():
            self._even = slice(int(places[0]), int(places[-1]) + 1, int((*strides, 1)[0]))
        else:
            self._places = torch.from_numpy(places).to(chunk.device)
        if rows[-1] + 1 - rows[0] != len(rows):
            self._rows = torch.from_numpy(rows).to(chunk.device)
        elif len(rows) < chunk.batch_rows:
            self._span = slice(int(rows[0]), int(rows[-1]) + 1)

    def add(self, y: Tensor, results: Tensor | None) -> None:
        """y [rows, N] += the layer's share of ``results``, in one rounding."""
        if self._empty:
            return
        term = results[self._even] if self._places is None else results.index_select(0, self._places)
        if self._rows is None:
            y = y if self._span is None else y[self._span]
            if y.dtype == term.dtype:
                y.add_(term)
            else:
                y.copy_(y + term)
        elif y.dtype == term.dtype:
            y.index_add_(0, self._rows, term)
        else:
            y.index_copy_(0, self._rows, (y.index_select(0, self._rows) + term).to(y.dtype))


def filled(rows: int) -> int:
    """Rows of a group with what fills its last tile."""
    return -(-rows // LEAST) * LEAST


def _steps(chunk: Chunk, joint: Joint, shape: tuple) -> Iterator[_Step]:
    """What to multiply with what, and where the results lie: buffers of equal width are one."""
    firsts = dict(zip(chunk.heights, np.cumsum([0, *chunk.heights.values()]).tolist(), strict=False))
    ends = dict.fromkeys(joint.N, 0)
    for items in _products(chunk, joint, shape):
        (i, g), height = items[0], chunk.heights[items[0][1]]
        N = joint.N[i]
        yield _Step(items, firsts[g], ends[N], height, _tiles(height, joint, items[0], shape))
        ends[N] += len(items) * height


def _products(chunk: Chunk, joint: Joint, shape: tuple) -> Iterator[tuple[Item, ...]]:
    """The items in lists that share a product: groups of a layer if they can, layers of a group else, or one alone."""
    alone: dict[int, list[int]] = {g: [] for g in chunk.rows}
    for i in range(len(joint.terms)):
        for groups in _neighbours(chunk, joint, i):
            items = tuple((i, g) for g in groups)
            if _same_bits(items, joint, chunk.heights[groups[0]], shape):
                yield items
            else:
                for g in groups:
                    alone[g].append(i)
    for g, layers in alone.items():
        for run in joint.across.get(g, [(i,) for i in layers]):
            items = tuple((i, g) for i in run)
            if set(run) <= set(layers) and _same_bits(items, joint, chunk.heights[g], shape):
                yield items
            else:
                yield from (((i, g),) for i in run if i in layers)


def _neighbours(chunk: Chunk, joint: Joint, layer: int) -> list[list[int]]:
    """The groups of a layer that have rows, those of a run together whose rows are neighbours and equally many."""
    terms, order = joint.terms[layer], list(chunk.rows)
    previous = {g: before for run in terms.runs for before, g in zip(run, run[1:], strict=False)}
    found: list[list[int]] = []
    for before, g in zip([None, *order], order, strict=False):
        if g not in terms.factors:
            continue
        if before is not None and previous.get(g) == before and chunk.heights[g] == chunk.heights[before]:
            found[-1].append(g)
        else:
            found.append([g])
    return found


def _same_bits(items: Sequence[Item], joint: Joint, height: int, shape: tuple) -> bool:
    """Whether these are several that may be one product without a trace in the results."""
    (i, g), n = items[0], len(items)
    if n == 1 or height > _STACKED:
        return False
    sizes, same_input = (joint.K, joint.terms[i].ranks[g][0], joint.N[i]), items[1][1] == g
    return all(stacks(n, h, *sizes, *shape, same_input) for h in {h for _, h in _tiles(height, joint, items[0], shape)})


def _tiles(height: int, joint: Joint, item: Item, shape: tuple) -> tuple[tuple[int, int], ...]:
    """(first row, rows) of the tiles, of heights that suit all adapters of the item."""
    i, g = item
    sizes = [row_tiles(joint.K, r, joint.N[i], *shape) for r in joint.terms[i].ranks[g]]
    found, first = [], 0
    for h in tuple(h for h in sizes[0] if all(h in other for other in sizes)) or (1,):
        while height - first >= h:
            found.append((first, h))
            first += h
    return tuple(found)
