"""Copy an adapter's bytes to the device, and update the tables of the kernels.

On a GPU the copies run on their own stream, layer by layer, with an event after each. A batch waits only for the layer
that it computes next, so an adapter is copied while the step runs. Each batch leaves an event, and the stream waits for
the events of the adapters whose memory it overwrites.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_lora.ops import guard
from fused_lora.ops.checks import FLOAT_DTYPES
from fused_lora.serving.residency.arena import Block
from fused_lora.serving.residency.packing import Packed, Part, Site
from fused_lora.serving.residency.tables import SlotTables


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
    linear = sum(site.kind == "linear" for site in sites.values())
    tables = SlotTables(max(linear, 1), slots, device, dtype) if guard.usable(device) else None
    return (CudaTransfer if device.type == "cuda" else Transfer)(device, dtype, tables)


@dataclass(eq=False)
class Arrival:
    """The events of a copy to ``device`` that is under way, by site. After ``last`` the copy is complete.

    Until ``tables`` those of the kernels may still be about the slot's adapter before, at every layer.
    """

    events: dict[int, torch.cuda.Event]
    tables: torch.cuda.Event
    last: torch.cuda.Event
    device: torch.device

    def done(self) -> bool:
        """Whether the copy is complete."""
        return self.last.query()

    def wait_for_all(self) -> None:
        """Make the device's current stream wait for the whole adapter."""
        torch.cuda.current_stream(self.device).wait_event(self.last)

    def wait(self, site: int) -> None:
        """Make the device's current stream wait for one layer of the adapter, or for its having none there."""
        torch.cuda.current_stream(self.device).wait_event(self.events.get(site, self.tables))


class Transfer:
    """Copies that are complete when ``send`` returns.

    Attributes:
        device, dtype: of the arena and of the adapters in it. tables: for the kernels, where they may run.
        pinned: whether the host keeps the bytes of what is on the device.
    """

    pinned = False

    def __init__(self, device: torch.device, dtype: torch.dtype, tables: SlotTables | None):
        self.device, self.dtype, self.tables = device, dtype, tables

    def stage(self, packed: Packed) -> Tensor | None:
        """The bytes in host memory. None if copying from the tensors is as fast."""
        return None

    def send(
        self, parts: Sequence[Part], packed: Packed | None, staged: Tensor | None, block: Block, slot: int
    ) -> Arrival | None:
        """Copy ``staged``, or the tensors of ``packed``, into ``block``, and update the tables."""
        if staged is not None:
            block.memory[: len(staged)].copy_(staged)
        else:
            packed.write(block.memory, self.dtype)
        if self.tables is not None:
            self.tables.write(slot, parts, block)
        return None

    def fetch(self, block: Block, nbytes: int) -> Tensor:
        """The first ``nbytes`` of the block, in host memory."""
        return block.memory[:nbytes].to("cpu", copy=True)

    def vacate(self, slot: int, uses: Iterable[torch.cuda.Event]) -> None:
        """Free ``slot``. Its memory may be overwritten after the events ``uses``."""
        if self.tables is not None:
            self.tables.clear(slot)

    def on_this_stream(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work`` for another thread, which finds the current stream of this one there."""
        return work

    def mark(self) -> tuple[int, torch.cuda.Event] | None:
        """The end of a batch: (its stream, event after which its adapters may be overwritten). None if not needed."""
        return None

    def close(self) -> None:
        """Wait until all work with the arena's memory is done."""

    def factors(self, parts: Sequence[Part], block: Block) -> dict[int, tuple[Tensor, Tensor, float]]:
        """A^T [K, r], B^T [r, N] and scaling by site: views of the block, r of all experts where there are some."""
        found = {}
        for part in parts:
            A, B_t = part.views(block.memory, self.dtype)
            found[part.site.index] = (A.t(), B_t, part.scaling)
        return found


class CudaTransfer(Transfer):
    """Copies from pinned memory, or from tensors on a GPU, on their own stream."""

    pinned = True

    def __init__(self, device: torch.device, dtype: torch.dtype, tables: SlotTables | None):
        super().__init__(device, dtype, tables)
        self._stream = torch.cuda.Stream(device)
        self._order = threading.Lock()  # one transfer after the other on the stream

    def stage(self, packed: Packed) -> Tensor | None:
        """The bytes in pinned memory; None for tensors on a GPU, which are copied from where they are."""
        if any(tensor.is_cuda for pair in packed.tensors for tensor in pair):
            return None
        staged = torch.empty(packed.nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        packed.write(staged, self.dtype)
        return staged

    def send(
        self, parts: Sequence[Part], packed: Packed | None, staged: Tensor | None, block: Block, slot: int
    ) -> Arrival:
        """As for a CPU, but queued on the stream: each layer is there after its event."""
        caller = torch.cuda.current_stream(self.device)
        with self._order, torch.cuda.stream(self._stream):
            if staged is None:  # the tensors may still be being computed
                self._stream.wait_stream(caller)
            if self.tables is not None:
                self.tables.write(slot, parts, block)
            tables: Any = self._stream.record_event()
            events = {}
            for i, part in enumerate(parts):
                if staged is None:
                    packed._replace(parts=(part,), tensors=(packed.tensors[i],)).write(block.memory, self.dtype)
                else:
                    end = parts[i + 1].A if i + 1 < len(parts) else len(staged)
                    block.memory[part.A : end].copy_(staged[part.A : end], non_blocking=True)
                events[part.site.index] = self._stream.record_event()
            last = events[parts[-1].site.index]
            if staged is None:  # what the caller writes to the tensors from now on, or to their freed memory
                caller.wait_event(last)
            return Arrival(events, tables, last, self.device)

    def fetch(self, block: Block, nbytes: int) -> Tensor:
        """The first ``nbytes`` of the block in pinned memory; waits for the copy."""
        staged = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        with self._order, torch.cuda.stream(self._stream):
            staged.copy_(block.memory[:nbytes], non_blocking=True)
            self._stream.synchronize()
        return staged

    def vacate(self, slot: int, uses: Iterable[torch.cuda.Event]) -> None:
        """As for a CPU; later copies on the stream wait for ``uses``."""
        with self._order, torch.cuda.stream(self._stream):
            for event in uses:
                self._stream.wait_event(event)
            super().vacate(slot, uses)

    def on_this_stream(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """As for a CPU: what the caller's stream computes is there before it is read."""
        stream = torch.cuda.current_stream(self.device)

        def on_stream(*args: Any, **kwargs: Any) -> Any:
            with torch.cuda.stream(stream):
                return work(*args, **kwargs)

        return on_stream

    def mark(self) -> tuple[int, torch.cuda.Event]:
        """An event on the current stream."""
        stream = torch.cuda.current_stream(self.device)
        event = torch.cuda.Event()
        event.record(stream)
        return stream.cuda_stream, event

    def close(self) -> None:
        """Wait for the device, because freed memory may be reused on any stream."""
        torch.cuda.synchronize(self.device)
