"""Buffers between guard bands, filled with distinct NaNs: they show what a kernel did not write, or wrote outside.

Bands and body of each buffer get their own NaN payloads, so that a copy of one poison over another is seen too.
Bits are compared, not values.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

BAND_BYTES = 1024  # each side; keeps the body 16-byte aligned for tensor descriptors
_INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_QUIET_NAN = {torch.float16: (0x7E00, 0x1FF), torch.bfloat16: (0x7FC0, 0x3F), torch.float32: (0x7FC00000, 0x3FFFFF)}
_QUIET_NAN[torch.float64] = (0x7FF8000000000000, 0x7FFFFFFFFFFFF)


def poison_bits(dtype: torch.dtype, serial: int) -> int:
    """The bit pattern of NaN number ``serial`` of a floating dtype, or an unlikely number for the others."""
    if dtype in _QUIET_NAN:
        base, payload = _QUIET_NAN[dtype]
        return base | (serial % payload + 1)
    if dtype == torch.bool:
        return 1
    size = torch.empty((), dtype=dtype).element_size()
    return (0x5A5A5A5A5A5A5A5A >> (64 - 8 * size)) ^ (serial % 63 + 1)


@dataclass
class _Guarded:
    name: str
    tensor: torch.Tensor
    before: torch.Tensor
    body: torch.Tensor
    after: torch.Tensor
    band_bits: int
    body_bits: int


class GuardedBuffers:
    """Hands out guarded tensors and checks them all.

    ``empty`` for outputs (poisoned), ``copy`` for inputs (same strides, bands around). ``assert_intact`` looks at every
    band, ``assert_written`` also at every element of one output.
    """

    def __init__(self):
        self._buffers: list[_Guarded] = []
        self._serial = itertools.count(1)

    def __len__(self) -> int:
        return len(self._buffers)

    def empty(self, shape: Sequence[int], dtype=torch.float32, device=None, name: str = "buffer") -> torch.Tensor:
        """A contiguous tensor of NaN (integers: an unlikely number) between two bands."""
        contiguous_strides = torch.empty(tuple(shape), device="meta").stride()
        return self._allocate(tuple(shape), contiguous_strides, dtype, device, name)

    def copy(self, tensor: torch.Tensor, name: str = "input") -> torch.Tensor:
        """The tensor's values and strides in a guarded buffer; gaps between its elements are poisoned."""
        guarded = self._allocate(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, name)
        guarded.copy_(tensor)
        return guarded

    def _allocate(self, shape, strides, dtype, device, name) -> torch.Tensor:
        size = torch.empty((), dtype=dtype).element_size()
        span = 0 if 0 in shape else sum((n - 1) * st for n, st in zip(shape, strides, strict=True)) + 1
        band = BAND_BYTES // size
        storage = _real_empty(2 * band + span, dtype=_INT_OF_SIZE[size], device=device)
        band_bits, body_bits = (poison_bits(dtype, next(self._serial)) for _ in range(2))
        parts = storage[:band], storage[band : band + span], storage[band + span :]
        for part, bits in zip(parts, (band_bits, body_bits, band_bits), strict=True):
            part.fill_(bits)
        tensor = torch.as_strided(storage.view(dtype), shape, strides, band)
        self._buffers.append(_Guarded(name, tensor, *parts, band_bits, body_bits))
        return tensor

    def assert_intact(self) -> None:
        """AssertionError naming the buffer, the side and the distance of the nearest band element overwritten."""
        for b in self._buffers:
            for side, part in (("before", b.before), ("after", b.after)):
                touched = (part != b.band_bits).nonzero().flatten().tolist()
                if touched:
                    distance = len(part) - touched[-1] if side == "before" else touched[0] + 1
                    raise AssertionError(
                        f"{b.name} {tuple(b.tensor.shape)}: {len(touched)} elements {side} it were overwritten, "
                        f"the nearest {distance} away"
                    )

    def assert_written(self, tensor: torch.Tensor) -> None:
        """AssertionError if an element of this output still holds the poison it was made with."""
        b = next(b for b in self._buffers if b.tensor.data_ptr() == tensor.data_ptr() and b.tensor.numel())
        left = torch.as_strided(b.body, b.tensor.shape, b.tensor.stride(), b.body.storage_offset()) == b.body_bits
        if left.any():
            first = left.nonzero()[0].tolist()
            raise AssertionError(f"{b.name} {tuple(b.tensor.shape)}: {int(left.sum())} elements never written, {first}")


_real_empty = torch.empty
_ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


@contextlib.contextmanager
def guarded_allocations(packages: Sequence[str] = ("fused_lora.kernels",)) -> Iterator[GuardedBuffers]:
    """A context in which uninitialised allocations of the launchers of ``packages`` are guarded and poisoned.

    Replaces torch.empty, empty_like, empty_strided and Tensor.new_empty for calls from those packages alone, and checks
    every band at the end.
    """
    buffers = GuardedBuffers()

    def guarding(original):
        def allocate(*args, **kwargs):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not any(caller == p or caller.startswith(p + ".") for p in packages):
                return original(*args, **kwargs)
            # the original says what shape, strides, dtype and device the arguments mean
            plain = original(*args, **kwargs)
            return buffers._allocate(tuple(plain.shape), plain.stride(), plain.dtype, plain.device, caller)

        return allocate

    before = [getattr(owner, name) for owner, name in _ALLOCATORS]
    for (owner, name), original in zip(_ALLOCATORS, before, strict=True):
        setattr(owner, name, guarding(original))
    try:
        yield buffers
    finally:
        for (owner, name), original in zip(_ALLOCATORS, before, strict=True):
            setattr(owner, name, original)
    buffers.assert_intact()
