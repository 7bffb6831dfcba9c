"""The device memory of all adapters, within a budget: blocks of any size, merged with free neighbours when freed."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch

ALIGNMENT = 256  # of every block's start: whole cache lines, and what vector loads and bulk copies ask for


@dataclass(frozen=True, eq=False)
class Block:
    """``size`` bytes at ``offset`` of chunk number ``chunk``; ``memory`` is the uint8 tensor over them."""

    chunk: int
    offset: int
    size: int
    memory: torch.Tensor


class Arena:
    """Best-fit allocator over a few large uint8 tensors on one device.

    The caller must hold a lock: methods must not run at the same time.

    Args:
        device: where the memory lies.
        capacity: bytes that blocks may take in all, or None for no limit.
        grow: least bytes to allocate at a time. None: the whole capacity at the first allocation. Without a capacity
            64 MiB at a time.

    Attributes:
        used: bytes in blocks. reserved: bytes taken from the device.
    """

    def __init__(self, device: torch.device, capacity: int | None, grow: int | None = None):
        self.device, self.capacity, self.grow = device, capacity, grow
        self.used = self.reserved = 0
        self._chunks: list[torch.Tensor] = []
        self._free: list[list[tuple[int, int]]] = []  # of each chunk: (offset, size), ascending, never adjacent

    def allocate(self, nbytes: int) -> Block | None:
        """A block of at least ``nbytes``. None if neither a hole nor the budget has room for it."""
        size = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        holes = [
            (length, c, i) for c, free in enumerate(self._free) for i, (_, length) in enumerate(free) if length >= size
        ]
        if not holes:
            if not self._extend(size):
                return None
            holes = [(self._free[-1][0][1], len(self._chunks) - 1, 0)]
        length, c, i = min(holes)
        offset = self._free[c][i][0]
        self._free[c][i : i + 1] = [(offset + size, length - size)] if length > size else []
        self.used += size
        return Block(c, offset, size, self._chunks[c][offset : offset + size])

    def free(self, block: Block) -> None:
        """Give a block back; its memory may be handed out again at once."""
        free = self._free[block.chunk]
        i = bisect.bisect_left(free, (block.offset, 0))
        start, end = block.offset, block.offset + block.size
        if (i > 0 and sum(free[i - 1]) > start) or (i < len(free) and free[i][0] < end):
            raise RuntimeError(f"block: {start}..{end} of chunk {block.chunk} is free already")
        low, high = i, i
        if i > 0 and sum(free[i - 1]) == start:
            low, start = i - 1, free[i - 1][0]
        if i < len(free) and free[i][0] == end:
            high, end = i + 1, sum(free[i])
        free[low:high] = [(start, end - start)]
        self.used -= block.size

    def clear(self) -> None:
        """Give the memory back to the device. Raises RuntimeError while there are blocks."""
        if self.used:
            raise RuntimeError(f"arena: {self.used} bytes are in blocks")
        self._chunks, self._free, self.reserved = [], [], 0

    def fits(self, nbytes: int) -> bool:
        """Whether ``nbytes`` would fit if nothing else were in the arena."""
        size = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        largest = max((len(chunk) for chunk in self._chunks), default=0)
        return self.capacity is None or size <= max(largest, self.capacity - self.reserved)

    @property
    def free_bytes(self) -> int | None:
        """Bytes that are left of the capacity; None without a limit."""
        return None if self.capacity is None else self.capacity - self.used

    def _extend(self, size: int) -> bool:
        left = None if self.capacity is None else self.capacity - self.reserved
        if left is not None and size > left:
            return False
        if left is None:
            size = max(size, (64 << 20) if self.grow is None else self.grow)
        else:
            size = left if self.grow is None else min(max(size, self.grow), left)
        # the offset of a chunk is aligned as torch aligns it: 64 bytes on a CPU, 512 on a GPU
        chunk = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self.device.type == "cuda":
            # work on this stream may still use what the memory was before; adapters are copied on another
            torch.cuda.current_stream(self.device).synchronize()
        self._chunks, self._free = [*self._chunks, chunk], [*self._free, [(0, size)]]  # both, also in an interrupt
        self.reserved += size
        return True
