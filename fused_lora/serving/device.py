"""How an adapter's bytes reach the device, and what the device has to be told about them.

On a GPU the copies run on a stream of their own, layer by layer, with an event after each: a batch waits for the layer
it is about to compute and for no other, so that a cold adapter arrives while the step runs. Memory is written again
only after the batches that read it: the stream waits for an event that each of them left behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fused_lora.serving.arena import Block
from fused_lora.serving.packing import FLOAT_DTYPES, Packed, Part, Site


def open_transfer(
    device: torch.device, model_dtype: torch.dtype, dtype: torch.dtype | None, sites: Mapping[str, Site], slots: int
) -> Transfer:
    """The transfer to ``device`` for adapters in ``dtype``, or in the dtype that suits the device and the model.

    Raises:
        TypeError: dtype is no floating dtype.
    """
    if dtype is None:
        # a 16-bit product on a CPU would be taken in fp32 anyway, from a copy made at every step
        dtype = torch.promote_types(model_dtype, torch.float32) if device.type == "cpu" else model_dtype
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected one of {FLOAT_DTYPES}, got {dtype!r}")
    return Transfer(device, dtype)


class Arrival:
    """Events of one transfer, by site. ``last`` is the one after which all is there."""

    def __init__(self, events: dict[int, torch.cuda.Event], last: torch.cuda.Event):
        self.events, self.last = events, last

    def wait(self, site: int) -> None:
        """Make the current stream wait for the site's part."""
        event = self.events.get(site)
        if event is not None:
            torch.cuda.current_stream().wait_event(event)


class Transfer:
    """Copies into a CPU arena: done when ``send`` returns.

    Attributes:
        device, dtype: of the arena and of the adapters in it. pinned: whether the host keeps a copy for the way back.
    """

    pinned = False

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def stage(self, packed: Packed) -> Tensor | None:
        """The bytes in host memory, where a copy from there is faster than from the tensors."""
        return None

    def send(
        self, parts: Sequence[Part], packed: Packed | None, staged: Tensor | None, block: Block, slot: int
    ) -> Arrival | None:
        """Copy ``staged``, or the tensors of ``packed``, into ``block``."""
        if staged is not None:
            block.memory[: len(staged)].copy_(staged)
        else:
            packed.write(block.memory, self.dtype)
        return None

    def fetch(self, block: Block, nbytes: int) -> Tensor:
        """The first ``nbytes`` of the block, in host memory."""
        return block.memory[:nbytes].clone()

    def factors(self, parts: Sequence[Part], block: Block) -> dict[int, tuple[Tensor, Tensor, float]]:
        """A^T [K, r], B^T [r, N] and scaling by site: views of the block."""
        found = {}
        for part in parts:
            A, B_t = part.views(block.memory, self.dtype)
            found[part.site.index] = (A.t(), B_t, part.scaling)
        return found

    def left_behind(self) -> None:
        """A batch ends here: what it read may be overwritten after it."""
