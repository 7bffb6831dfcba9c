"""Tensor descriptors (TMA): which matrices they can address, and the memory that Triton keeps them in."""

import torch
import triton
from triton.runtime import _allocation


def describable(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can address a matrix: unit stride inside, 16-byte steps and start outside.

    Not one whose rows overlap, as those of an expanded row do.
    """
    e = x.element_size()
    apart = x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) * e % 16 == 0
    return apart and x.data_ptr() % 16 == 0 and max(x.shape) < 2**31


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, device="cuda", dtype=torch.int8)


class descriptor_memory:  # a generator's context would take four times as long, at every launch
    """Within it a launch can make descriptors on the device; afterwards the allocator of the caller is back."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        held = _allocation._allocator
        if hasattr(held, "reset"):  # a context variable, since triton 3.5
            self._before = held.set(_allocate)
        else:
            self._before = held
            triton.set_allocator(_allocate)

    def __exit__(self, *_) -> None:
        held = _allocation._allocator
        if hasattr(held, "reset"):
            held.reset(self._before)
        else:
            triton.set_allocator(self._before)
