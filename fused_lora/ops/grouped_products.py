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
        self._plans: dict[tuple, tuple[_Step, ...]] = {}
        self._products: dict[tuple, Products] = {}
        self._workspaces: dict[tuple, _Workspace] = {}

    def products(self, joint: Joint, dtype: torch.dtype) -> Products:
        """The products of these layers for these rows, on inputs of this dtype; small ones are made once."""
        # an inference tensor cannot be written outside that mode, and threads may share a chunk
        mine = threading.get_ident(), torch.is_inference_mode_enabled()
        key = joint, dtype, torch.get_num_threads(), *mine
        found = self._products.get(key)
        if found is None:
            accumulate = torch.promote_types(torch.promote_types(dtype, joint.dtype), torch.float32)
            shape = accumulate, self.device, torch.get_num_threads()
            plan = joint.signature, joint.K, shape
            steps = self._plans.get(plan)
            if steps is None:
                steps = self._plans[plan] = tuple(_plan(self, joint, shape))
            if self.height > _KEEP:
                return Products(self, joint, steps, accumulate, _Workspace())
            workspace = self._workspaces.setdefault(mine, _Workspace())
            found = self._products[key] = Products(self, joint, steps, accumulate, workspace)
        return found


class Products:
    """What is multiplied with what, bound to the tensors: nothing is looked up when it runs."""

    def __init__(self, chunk: Chunk, joint: Joint, steps: Sequence[_Step], dtype: torch.dtype, workspace: _Workspace):
        self._dtype, self._workspace, self._gather = dtype, workspace, chunk.gather
        self._inputs = workspace.buffer("x", chunk.height, joint.K, dtype, chunk.device)
        self._convert = joint.dtype != dtype
        self._direct = self._inputs.is_contiguous()
        filled_rows = dict.fromkeys(joint.N, 0)
        for step in steps:
            filled_rows[joint.N[step.items[0][0]]] += len(step.items) * step.height
        outputs = {n: workspace.buffer("y", rows, n, dtype, chunk.device) for n, rows in filled_rows.items() if rows}
        self._single: list[tuple[Tensor, Tensor, Tensor, Tensor, float, int]] = []
        self._batched: list[tuple[Tensor, Tensor, Tensor, Tensor, float]] = []
        for step in steps:
            self._bind(step, joint, outputs[joint.N[step.items[0][0]]])
        self._targets = [_Target(chunk, steps, i, outputs.get(n)) for i, n in enumerate(joint.N)]
        self.turn = -1

    def _bind(self, step: _Step, joint: Joint, output: Tensor) -> None:
        n, h = len(step.items), step.height
        factors = [joint.terms[i].factors[g] for i, g in step.items]
        rows = output[step.start : step.start + n * h]
        if n == 1:
            inputs = self._inputs[step.first : step.first + h]
            for j, (A_t, B_t, scale) in enumerate(factors[0]):
                for first, height in step.tiles:
                    a, b = inputs[first : first + height], rows[first : first + height]
                    self._single.append((a, A_t, b, B_t, scale, int(j > 0)))
            return
        A_t, B_t, scale = stacked([f[0] for f in factors])
        same_input = step.items[0][1] == step.items[1][1]
        inputs = self._inputs[step.first : step.first + (h if same_input else n * h)]
        inputs = inputs.expand(n, *inputs.shape) if same_input else inputs.unflatten(0, (n, h))
        rows = rows.unflatten(0, (n, h))
        for first, height in step.tiles:
            a, b = inputs[:, first : first + height], rows[:, first : first + height]
            self._batched.append((a, A_t, b, B_t, scale))

    def run(self, x: Tensor) -> Products:
        """Form the terms of x [rows, K] at all layers."""
        if self._direct and x.dtype == self._dtype:
            torch.index_select(x, 0, self._gather, out=self._inputs)
        else:
            self._inputs.copy_(x.index_select(0, self._gather))
        for a, A_t, b, B_t, scale, beta in self._single:
            if self._convert:
                A_t, B_t = A_t.to(self._dtype), B_t.to(self._dtype)
            torch.addmm(b, torch.mm(a, A_t), B_t, beta=beta, alpha=scale, out=b)
        for a, A_t, b, B_t, scale in self._batched:
            if self._convert:
                A_t, B_t = A_t.to(self._dtype), B_t.to(self._dtype)
            torch.baddbmm(b, torch.bmm(a, A_t), B_t, beta=0, alpha=scale, out=b)
        self._workspace.turn += 1
        self.turn = self._workspace.turn
        return self

    def hold(self, turn: int) -> bool:
        """Whether the terms of that run are still there."""
        return self.turn == turn == self._workspace.turn

    def add(self, layer: int, y: Tensor) -> None:
        """y [rows, N] += the terms of the layer of this number."""
        self._targets[layer].add(y)


class _Target:
    """Where the terms of one layer lie and which rows of y they belong to."""

    def __init__(self, chunk: Chunk, steps: Sequence[_Step], layer: int, output: Tensor | None):
        rows, places = [], []
        for step in steps:
            for k, (i, g) in enumerate(step.items):
                if i == layer:
                    rows.append(chunk.rows[g])
                    places.append(step.start + k * step.height + np.arange(len(chunk.rows[g])))
        self._term = None
        if not rows:
            return
        rows, places = np.concatenate(rows), np.concatenate(places)
        order = np.argsort(rows)
        rows, places = rows[order], places[order]
        strides = np.unique(np.diff(places))
        if len(strides) <= 1 and (strides > 0).all():
            self._term, self._places = output[places[0] : places[-1] + 1 : int((*strides, 1)[0])], None
        else:
            self._term, self._places = output, torch.from_numpy(places).to(chunk.device)
        self._span = self._rows = None
        if rows[-1] + 1 - rows[0] != len(rows):
            self._rows = torch.from_numpy(rows).to(chunk.device)
        elif len(rows) < chunk.batch_rows:
            self._span = slice(int(rows[0]), int(rows[-1]) + 1)

    def add(self, y: Tensor) -> None:
        if self._term is None:
            return
        term = self._term if self._places is None else self._term.index_select(0, self._places)
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


def _plan(chunk: Chunk, joint: Joint, shape: tuple) -> Iterator[_Step]:
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
