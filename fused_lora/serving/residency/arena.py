"""The device memory of all adapters, within a budget: blocks of any size. Free is what no block in use has."""

from __future__ import annotations

from collections.abc import Iterable
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
    """

    def __init__(self, device: torch.device, capacity: int | None, grow: int | None = None):
        self.device, self.capacity, self.grow = device, capacity, grow
        self._chunks: list[torch.Tensor] = []

    @property
    def reserved(self) -> int:
        """Bytes taken from the device."""
        return sum(map(len, self._chunks))

    def allocate(self, nbytes: int, taken: Iterable[Block] = ()) -> Block | None:
        """A block of at least ``nbytes`` beside those that are ``taken``. None if neither a hole nor the budget has
        room for it."""
        size = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        ends = [(c, len(chunk), 0) for c, chunk in enumerate(self._chunks)]
        found: tuple[int, int, int] | None = None  # length, chunk, offset of the smallest hole
        last, begin = -1, 0
        for c, offset, length in sorted([*((b.chunk, b.offset, b.size) for b in taken), *ends]):
            begin = begin if c == last else 0
            hole = offset - begin, c, begin
            if hole[0] >= size and (found is None or hole < found):
                found = hole
            last, begin = c, offset + length
        if found is None:
            if not self._extend(size):
                return None
            found = 0, len(self._chunks) - 1, 0
        _, c, offset = found
        return Block(c, offset, size, self._chunks[c][offset : offset + size])

    def clear(self) -> None:
        """Give the memory back to the device. No block may be in use."""
        self._chunks = []

    def fits(self, nbytes: int) -> bool:
        """Whether ``nbytes`` would fit if nothing else were in the arena."""
        size = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        largest = max((len(chunk) for chunk in self._chunks), default=0)
        return self.capacity is None or size <= max(largest, self.capacity - self.reserved)

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
        self._chunks = [*self._chunks, chunk]
        return True
