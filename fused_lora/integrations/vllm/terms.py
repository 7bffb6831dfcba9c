"""The LoRA terms of one step: by the eager operator, or by the Triton kernels.

Both know the rows of the step by slot, and a layer by its :class:`Slots`. Nothing here needs vLLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_lora.integrations.vllm.slots import Slots
from fused_lora.kernels.grouped_tables import COLUMNS, RowGroups
from fused_lora.ops import guard
from fused_lora.ops.grouped.launch import prepare
from fused_lora.ops.grouped.metadata import GroupLayout, RowTables
from fused_lora.ops.grouped.op import RowLayout, lora_grouped_

_MIXES = 16  # steps of other rows whose layouts are kept: requests that decode together keep their rows for many steps
_FINE = 512  # up to so many rows a launch provides for exactly them, above for the next multiple


class EagerTerms:
    """By the eager operator. What is worked out for the rows of a step is kept for steps like it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._layouts: dict[bytes, dict[int, RowLayout]] = {}
        self.step(np.zeros(0, np.int32))

    def step(self, slot_of_row: np.ndarray) -> None:
        """The rows of the next step: int32 [rows], the slot of each, -1 for the base model."""
        key = slot_of_row.tobytes()
        self._slots, self._of_rows = slot_of_row, self._layouts.pop(key, {})
        self._layouts[key] = self._of_rows
        if len(self._layouts) > _MIXES:
            del self._layouts[next(iter(self._layouts))]

    def _layout(self, rows: int) -> RowLayout:
        """vLLM may pad a step: rows beyond are of the base model. A layer may see the first of them only."""
        found = self._of_rows.get(rows)
        if found is None:
            slots = np.pad(self._slots[:rows], (0, max(0, rows - len(self._slots))), constant_values=-1)
            found = self._of_rows[rows] = RowLayout(slots, self._device)
        return found

    def linear_(self, y: Tensor, x: Tensor, slots: Slots, kind: str = "linear") -> None:
        """y [rows, N_g one beside the other] += B_g A_g x; y may have further columns."""
        lora_grouped_(y, x, self._layout(len(x)), slots.terms(kind))

    def add_(self, outputs: Sequence[Tensor], x: Tensor, slots: Slots, kind: str) -> None:
        """The same of outputs apart."""
        for g, y in enumerate(outputs):
            lora_grouped_(y, x, self._layout(len(x)), slots.terms(kind, g))

    def shrink_(self, buffers: Sequence[Tensor], x: Tensor, slots: Slots) -> None:
        """buffer_g [rows, local_rank] += A_g x."""
        self.add_(buffers, x, slots, "shrink")

    def expand_(self, outputs: Sequence[Tensor], buffers: Sequence[Tensor], slots: Slots) -> None:
        """y_g [rows, N_g] += B_g buffer_g."""
        for g, (y, buffer) in enumerate(zip(outputs, buffers, strict=True)):
            lora_grouped_(y, buffer, self._layout(len(buffer)), slots.terms("expand", g))


class KernelTerms:
    """By the grouped kernels, which may be captured: what they read is at fixed addresses, and :meth:`step` fills it.

    Args:
        max_rows: of a step. max_slots: of adapters. device: of the rows.
    """

    def __init__(self, max_rows: int, max_slots: int, device: torch.device):
        self._eager, self._device = EagerTerms(device), device
        self._max_slots, self._members = max_slots, [[(slot, 1.0)] for slot in range(max_slots)]
        # few rows have tiles of 16, a full step tiles of 32
        sizes = sorted({min(32 * max_slots - 1, max_rows), max_rows})
        self._tables = [RowTables(GroupLayout(rows, max_slots, slots=max_slots), device) for rows in sizes]
        self._forms: dict[int, RowGroups] = {}
        self._rows, self._acts = 0, False

    def step(self, slot_of_row: np.ndarray) -> None:
        """The rows of the next step: int32 [rows], the slot of each, -1 for the base model. Nothing waits.

        Raises:
            ValueError: more rows or slots than were provided for.
        """
        if not len(slot_of_row) <= self._tables[-1].layout.max_rows:
            raise ValueError(
                f"slot_of_row: {len(slot_of_row)} rows, provided for {self._tables[-1].layout.max_rows} at most"
            )
        self._eager.step(slot_of_row)
        self._rows, self._acts = len(slot_of_row), bool((slot_of_row >= 0).any())
        for tables in self._tables:
            if len(slot_of_row) <= tables.layout.max_rows:
                tables.fill(slot_of_row, self._members)

    def _groups(self, rows: int) -> RowGroups:
        """The tables for a launch over x of so many rows. No more is asked of it than that they hold."""
        if rows < self._rows:
            raise ValueError(f"x: expected the {self._rows} rows of the step or more, got {rows}")
        tables = next((t for t in self._tables if rows <= t.layout.max_rows), self._tables[-1])
        rows = rows if rows <= _FINE else -(-rows // _FINE) * _FINE
        rows = min(rows, tables.layout.max_rows)
        found = self._forms.get(rows)
        if found is None:
            groups = min(rows, self._max_slots)
            tiles = groups + (rows - groups) // tables.layout.block_m
            order = tables.groups.order[:rows]
            found = self._forms[rows] = dataclasses.replace(tables.groups, order=order, grid_tiles=tiles)
        return found

    def _launches(self, kind: str, x: Tensor, dtype: torch.dtype, slots: Slots) -> tuple | None:
        groups = self._groups(len(x))
        key = kind, len(groups.order), dtype
        if key not in slots.launches:
            tables = slots.tables(kind)
            slots.launches[key] = prepare(tables, [tables], groups, dtype, x.device)
        return slots.launches[key]

    def linear_(self, y: Tensor, x: Tensor, slots: Slots, kind: str = "linear") -> None:
        """y [rows, N_g one beside the other] += B_g A_g x: two launches for all outputs. y may have further columns."""
        if self._acts and kind == "expand" and torch.promote_types(x.dtype, y.dtype) != y.dtype:
            self.expand_(slots.split(y), [x], slots)  # an embedding's rows of A, wider than the model
        elif self._acts:
            self._add(slots.split(y), x, slots, kind)

    def _add(self, outputs: Sequence[Tensor], x: Tensor, slots: Slots, kind: str) -> None:
        if len(x) < self._rows and not guard.capturing(self._device):  # logits of a prompt: the tables have more rows
            return self._eager.add_(outputs, x, slots, kind)
        x = x.to(torch.promote_types(x.dtype, outputs[0].dtype))  # logits may be fp32 over 16-bit rows
        launches: Any = self._launches(kind, x, x.dtype, slots)
        S = launches and launches[0](x)
        if not (S and launches[1](S, 0, tuple(outputs))):
            self._refuse_capture()
            self._eager.add_(outputs, x, slots, kind)

    def shrink_(self, buffers: Sequence[Tensor], x: Tensor, slots: Slots) -> None:
        """buffer_g [rows, local_rank] += A_g x, in fp32."""
        if self._acts:
            self._add(buffers, x, slots, "shrink")

    def expand_(self, outputs: Sequence[Tensor], buffers: Sequence[Tensor], slots: Slots) -> None:
        """y_g [rows, N_g] += B_g buffer_g, a buffer [rows, max_rank] of any floating dtype: one launch."""
        if not self._acts:
            return
        order = self._groups(len(outputs[0])).order
        launches = self._launches("expand", outputs[0], outputs[0].dtype, slots)
        # the kernel reads S in the order of its tiles; beyond them ``order`` has what an earlier step left there
        S = torch.stack([b.float() for b in buffers]).index_select(1, order.clamp(0, len(outputs[0]) - 1))
        S = torch.nn.functional.pad(S, (0, -S.shape[2] % COLUMNS)).unsqueeze(0)
        if not (launches and launches[1]([S], 0, tuple(outputs))):
            self._refuse_capture()
            self._eager.expand_(outputs, buffers, slots)

    def _refuse_capture(self) -> None:
        if guard.capturing(self._device):
            raise RuntimeError("the LoRA kernels do not run, see the warning before, and nothing else can be captured")
