"""Row tables at fixed addresses for captured CUDA graphs. They are filled before each replay."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from fused_lora.ops import guard
from fused_lora.ops.grouped.metadata import GroupLayout, RowTables
from fused_lora.serving.residency.tables import SlotTables


class RowBuffers(RowTables):
    """The groups of a step's rows on the device: one int32 buffer, one copy per step, no synchronisation.

    Attributes:
        rows: how many token rows a step has. A smaller batch is padded with base rows.
        free: a lock that a batch holds from its fill to its end: a second one would fill in other rows meanwhile.
        tables: of the store whose adapters they are. max_rank: that an adapter may have. steps: what is launched, by
            layers and dtypes.
    """

    def __init__(self, max_rows: int, max_groups: int, max_rank: int, group_size: int, tables: SlotTables):
        super().__init__(GroupLayout(max_rows, max_groups, group_size), tables.device)
        self.free = threading.Lock()
        self.rows, self.tables, self.max_rank, self.steps = max_rows, tables, max_rank, {}
        self._read: torch.Event | None = None

    def fill(self, group_of_row: np.ndarray, groups: Sequence[Sequence[tuple[int, float]]]) -> None:
        """As :meth:`RowTables.fill`, after all that the stream of the last batch's end was given."""
        if self._read is not None and not guard.capturing(self.tables.device):  # that is refused
            torch.cuda.current_stream(self.tables.device).wait_event(self._read)
        super().fill(group_of_row, groups)

    def release(self) -> None:
        """The batch has ended, on the current stream. The next may be on another."""
        device = self.tables.device
        try:
            if device.type == "cuda" and not guard.capturing(device):
                self._read = torch.cuda.current_stream(device).record_event()
        finally:
            self.free.release()
