"""Row tables at fixed addresses for captured CUDA graphs. They are filled before each replay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fused_lora.ops.grouped.metadata import GroupLayout, build_metadata
from fused_lora.serving.residency.tables import SlotTables


class RowBuffers:
    """The groups of a step's rows on the device: one int32 buffer, one copy per step, no synchronisation.

    Attributes:
        rows: how many token rows a step has. A smaller batch is padded with base rows.
        groups: the tables in the buffer, with room for the largest step. They never move.
        tables: of the store whose adapters they are. max_rank: that an adapter may have. steps: what is launched, by
            layers and dtypes.
    """

    def __init__(self, max_rows: int, max_groups: int, max_rank: int, group_size: int, tables: SlotTables):
        self.rows, self._layout = max_rows, GroupLayout(max_rows, max_groups, group_size)
        self.tables, self.max_rank, self.steps, device = tables, max_rank, {}, tables.device
        self._buffer = torch.zeros(self._layout.size, dtype=torch.int32, device=device)
        self.groups = self._layout.views(self._buffer)
        # two, so that one can be filled while the copy of the other may still be under way
        self._staging = [torch.zeros_like(self._buffer, device="cpu", pin_memory=device.type == "cuda") for _ in "ab"]
        self._copied: list[torch.Event | None] = [None, None]
        self._turn = 0

    def fill(self, group_of_row: np.ndarray, members: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Describe the next step, on the current stream. Raises ValueError beyond the sizes."""
        self._turn ^= 1
        staging, copied = self._staging[self._turn], self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        build_metadata(self._layout, group_of_row, members, staging.numpy())
        self._buffer.copy_(staging, non_blocking=True)
        if self._buffer.is_cuda:
            self._copied[self._turn] = torch.cuda.current_stream(self._buffer.device).record_event()
