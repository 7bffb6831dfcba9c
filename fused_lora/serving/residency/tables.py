"""Tables for the kernels: addresses, ranks and scalings of the adapters on the device, by layer and slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fused_lora.kernels.grouped_tables import AdapterTables
from fused_lora.serving.residency.arena import Block
from fused_lora.serving.residency.packing import Part


class SlotTables:
    """Tables [sites, slots] at fixed addresses, so that a captured graph reads what is written to them later.

    They are about linear layers, which have the first numbers of all sites.

    Args:
        sites, slots: how many. device, dtype: of the adapters.

    Attributes:
        max_rank: of all adapters so far, or the limit that has been set.
    """

    @torch.inference_mode(False)  # written in any mode later
    def __init__(self, sites: int, slots: int, device: torch.device, dtype: torch.dtype):
        shape = sites, -(-slots // 16) * 16  # every layer's tables start at a multiple of 16 bytes
        self.device = device
        self._pointers = [torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2)]
        self._rank = torch.zeros(shape, dtype=torch.int32, device=device)
        self._scaling = torch.zeros(shape, dtype=torch.float32, device=device)
        self._dtype, self.max_rank, self._limit = dtype, 1, None
        self._of_sites: dict[tuple[int, int], AdapterTables] = {}

    def sites(self, first: int, last: int) -> AdapterTables:
        """The tables of the layers ``first`` to ``last``, both included, which read the same input."""
        found = self._of_sites.get((first, last))
        if found is None or found.max_rank != self.max_rank:
            rows = slice(first, last + 1)
            A_ptr, B_ptr = (table[rows] for table in self._pointers)
            found = AdapterTables(A_ptr, B_ptr, self._rank[rows], self._scaling[rows], self._dtype, self.max_rank)
            self._of_sites[first, last] = found
        return found

    def limit(self, max_rank: int) -> None:
        """Allow no larger rank from now on, because graphs are captured for it. Raises ValueError if there is one."""
        if max_rank < self.max_rank:
            raise ValueError(f"max_rank: expected at least {self.max_rank}, the largest rank loaded, got {max_rank}")
        self.max_rank = self._limit = max_rank

    def check(self, parts: Sequence[Part]) -> None:
        """Raise ValueError for what graphs are not captured for: a rank beyond the limit, or another kind of layer."""
        if self._limit is None:
            return
        other = next((part.site.path for part in parts if part.site.kind != "linear"), None)
        if other is not None:
            raise ValueError(f"source: {other!r} is no linear layer, and the store's row buffers are for those alone")
        rank = max(part.r for part in parts)
        if rank > self._limit:
            raise ValueError(f"source: rank {rank}; the store's row buffers are made for {self._limit} at most")

    def write(self, slot: int, parts: Sequence[Part], block: Block) -> None:
        """Put an adapter at ``block`` into ``slot``: four copies on the current stream."""
        sites, pinned = len(self._rank), self._rank.is_cuda
        columns = [
            torch.zeros(sites, dtype=table.dtype, device="cpu", pin_memory=pinned)
            for table in (*self._pointers, self._rank, self._scaling)
        ]
        start = block.memory.data_ptr()
        for part in linear(parts):
            for column, value in zip(columns, (start + part.A, start + part.B_t, part.r, part.scaling), strict=True):
                column[part.site.index] = value
        self.max_rank = max([self.max_rank, *(part.r for part in linear(parts))])
        for table, column in zip((*self._pointers, self._rank, self._scaling), columns, strict=True):
            table[:, slot].copy_(column, non_blocking=True)

    def clear(self, slot: int) -> None:
        """Set rank 0 everywhere: rows that still use the slot get no LoRA term."""
        self._rank[:, slot].zero_()


def linear(parts: Sequence[Part]) -> list[Part]:
    """Those of linear layers."""
    return [part for part in parts if part.site.kind == "linear"]
