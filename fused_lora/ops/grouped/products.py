"""The products behind a mixed batch on a CPU, bound to the buffers they read and write.

Rows of one group are filled up to whole tiles, so that every product has a height in which a row's bits do not depend
on its neighbours (:mod:`fused_lora.ops.grouped.invariant`); :mod:`fused_lora.ops.grouped.plan` says which share a call.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fused_lora.ops.grouped.invariant import aligned
from fused_lora.ops.grouped.plan import Step, Target, filled, steps_of
from fused_lora.ops.grouped.terms import Joint, stacked

_KEEP = 64  # chunks of at most this many rows keep their products for the next time


class _Workspace(threading.local):
    """Buffers that all products of a thread take in turn; ``turn`` says whose results are in them.

    On a CPU they are kept, as large as the largest chunk needed: fresh memory costs more than what is written to it. On
    a GPU torch keeps memory itself, and knows of streams and of graphs that hold it.
    """

    def __init__(self):
        self.turn = 0
        self._buffers: dict[tuple, Tensor] = {}

    def buffer(self, side: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu":
            return aligned(rows, columns, dtype=dtype, device=device)
        # an inference tensor cannot be written outside that mode
        key = side, columns, dtype, torch.is_inference_mode_enabled()
        found = self._buffers.get(key)
        if found is None or len(found) < rows:
            found = self._buffers[key] = aligned(rows, columns, dtype=dtype, device=device)
        return found[:rows]


_workspace = _Workspace()


class Chunk:
    """Some rows by group, each group filled up to whole tiles.

    Args:
        pieces: the group and its row numbers.
    """

    def __init__(self, pieces: Sequence[tuple[int, np.ndarray]], device: torch.device):
        self.rows, self.device = dict(pieces), device
        self.heights = {g: filled(len(numbers)) for g, numbers in pieces}
        self.height = sum(self.heights.values())
        # the last row of a group fills it up
        gather = [np.pad(numbers, (0, self.heights[g] - len(numbers)), mode="edge") for g, numbers in pieces]
        self.gather = torch.from_numpy(np.concatenate(gather)).to(device)
        self._plans: dict[tuple, tuple[tuple[Step, ...], list[Target]]] = {}
        self._frames: dict[tuple, _Frame] = {}
        self._products: dict[tuple, Products] = {}

    def products(self, joint: Joint, dtype: torch.dtype, keep: bool = True) -> Products:
        """The products of these layers for these rows, on inputs of this dtype; small ones are made once.

        keep: for the next call with this very ``joint``.
        """
        # an inference tensor cannot be written outside that mode, and threads may share a chunk
        mine = threading.get_ident(), torch.is_inference_mode_enabled(), torch.get_num_threads()
        key = joint, dtype, *mine
        found = self._products.get(key)
        if found is None:
            accumulate = torch.promote_types(torch.promote_types(dtype, joint.dtype), torch.float32)
            found = Products(joint, self._frame(joint, accumulate, mine))
            if keep and self.height <= _KEEP:
                self._products[key] = found
        return found

    def _frame(self, joint: Joint, dtype: torch.dtype, mine: tuple) -> _Frame:
        """The buffers for layers of these sizes: those of one thread take turns with them."""
        sizes = joint.signature, joint.K, dtype, mine[-1]
        plan = self._plans.get(sizes)
        if plan is None:
            steps = tuple(steps_of(self.heights, joint, (dtype, self.device, mine[-1])))
            plan = self._plans[sizes] = (
                steps,
                [Target(steps, i, self.rows, self.device) for i in range(len(joint.terms))],
            )
        if self.height > _KEEP:
            return _Frame(self, joint, *plan, dtype)
        key = *sizes, *mine
        if key not in self._frames:
            self._frames[key] = _Frame(self, joint, *plan, dtype)
        return self._frames[key]


class _Frame:
    """The buffers of a plan: for each step the tiles of its inputs and of its results; for each layer its results."""

    def __init__(
        self,
        chunk: Chunk,
        joint: Joint,
        steps: Sequence[Step],
        targets: list[Target],
        dtype: torch.dtype,
    ):
        self.steps, self.targets, self.dtype = steps, targets, dtype
        self.gather = chunk.gather
        self.inputs = _workspace.buffer("x", chunk.height, joint.K, dtype, chunk.device)
        ends = dict.fromkeys(joint.N, 0)
        for step in steps:
            ends[joint.N[step.items[0][0]]] += len(step.items) * step.height
        widths = {n: _workspace.buffer("y", rows, n, dtype, chunk.device) for n, rows in ends.items() if rows}
        self.tiles = [self._views(step, widths[joint.N[step.items[0][0]]]) for step in steps]
        self.results = [widths.get(n) for n in joint.N]

    def _views(self, step: Step, results: Tensor) -> list[tuple[Tensor, Tensor]]:
        n, h = len(step.items), step.height
        rows = [results[step.result(first) :][: n * count * k] for first, count, k in step.tiles]
        if n == 1:
            inputs = [self.inputs[step.first + first :][: count * k] for first, count, k in step.tiles]
            return [
                (a, b) if count == 1 else (a.unflatten(0, (count, k)), b.unflatten(0, (count, k)))
                for a, b, (_, count, k) in zip(inputs, rows, step.tiles, strict=True)
            ]
        same_input = step.items[0][1] == step.items[1][1]
        inputs = self.inputs[step.first : step.first + (h if same_input else n * h)]
        inputs = inputs.expand(n, *inputs.shape) if same_input else inputs.unflatten(0, (n, h))
        return [
            (inputs[:, first : first + k], b.unflatten(0, (n, k)))
            for b, (first, _, k) in zip(rows, step.tiles, strict=True)
        ]


class Products:
    """What is multiplied with what, bound to the tensors: nothing is looked up when it runs."""

    def __init__(self, joint: Joint, frame: _Frame):
        self._frame, self._dtype = frame, frame.dtype
        self._convert, self._direct = joint.dtype != frame.dtype, frame.inputs.is_contiguous()
        self._calls: list[tuple] = []
        for step, tiles in zip(frame.steps, frame.tiles, strict=True):
            each = [joint.terms[i].factors[g] for i, g in step.items]
            for j, (A_t, B_t, scale) in enumerate(each[0] if len(each) == 1 else [stacked([f[0] for f in each])]):
                for a, b in tiles:
                    # several tiles under one adapter, or each under its own
                    left, right = (t if t.dim() == a.dim() else t.expand(len(a), *t.shape) for t in (A_t, B_t))
                    product, add = (torch.mm, torch.addmm) if a.dim() == 2 else (torch.bmm, torch.baddbmm)
                    self._calls.append((product, add, a, left, b, right, scale, int(j > 0)))
        self.turn = -1

    def run(self, x: Tensor) -> Products:
        """Form the terms of x [rows, K] at all layers."""
        frame = self._frame
        if self._direct and x.dtype == self._dtype:
            torch.index_select(x, 0, frame.gather, out=frame.inputs)
        else:
            frame.inputs.copy_(x.index_select(0, frame.gather))
        for product, add, a, A_t, b, B_t, scale, beta in self._calls:
            if self._convert:
                A_t, B_t = A_t.to(self._dtype), B_t.to(self._dtype)
            add(b, product(a, A_t), B_t, beta=beta, alpha=scale, out=b)
        _workspace.turn += 1
        self.turn = _workspace.turn
        return self

    def hold(self, turn: int) -> bool:
        """Whether the terms of that run are still there."""
        return self.turn == turn == _workspace.turn

    def add(self, layer: int, y: Tensor) -> None:
        """y [rows, N] += the terms of the layer of this number."""
        self._frame.targets[layer].add(y, self._frame.results[layer])
