"""Which adapters are on the device. The least recently used ones are evicted; those that a batch holds never are.

There are three places: the arena on the device, host memory (pinned for a GPU), and files. An adapter with files can be
dropped from the first two. One from tensors moves to the host before it leaves the arena. One condition variable guards
all state. Files are read and bytes are copied outside it.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from fused_lora.modules.names import some
from fused_lora.serving.residency.arena import Arena, Block
from fused_lora.serving.residency.packing import Packed, Part, Signature, signature
from fused_lora.serving.residency.refusal import Refusal
from fused_lora.serving.residency.transfer import Arrival, Transfer


class StoreFull(RuntimeError):
    """An adapter does not fit beside those that are pinned or in use. Nothing has changed.

    Attributes:
        in_use: whether it may fit when batches, leases or loads have ended. False: only an unpin or a larger budget
            helps.
    """

    def __init__(self, message: str, in_use: bool = True):
        super().__init__(message)
        self.in_use = in_use


@dataclass(eq=False)
class Version:
    """One load of one adapter: what it is, where it is and who uses it.

    folder: where its files are, or None. held: how many batches use it. retired: its name has a newer version or was
    unloaded. refusal: why it is not served, or None. inside: the folder that its files must be in, or None. moving:
    the thread that brings it now. leaving: block, slot and last uses, of which the transfer has not been told yet.
    allow_partial: whether its files may hold more than the model takes. trained_on: the base that its config names.
    invocation: the tokens that an aLoRA begins at.
    """

    name: str
    number: int
    folder: str | None
    parts: tuple[Part, ...] = ()
    nbytes: int = 0
    host: Tensor | None = None
    block: Block | None = None
    slot: int = -1
    held: int = 0
    used: int = 0
    retired: bool = False
    moving: int | None = None
    leaving: tuple[Block, int, list[Any]] | None = None
    files: Signature | None = None
    factors: dict[int, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    arrival: Arrival | None = None
    uses: dict[int, torch.cuda.Event] = field(default_factory=dict)
    refusal: Refusal | None = None
    inside: str | None = None
    allow_partial: bool = False
    trained_on: str | None = None
    invocation: tuple[int, ...] = ()

    @property
    def identity(self) -> str:
        """The name and the number of the load."""
        return f"{self.name}@{self.number}"

    @property
    def quarantined(self) -> bool:
        """Whether it is refused until its files change."""
        return self.refusal is not None and self.refusal.for_good


class Residency:
    """Moves versions onto the device and evicts them.

    Args:
        transfer: how bytes reach the device.
        capacity, grow: of the arena. host_capacity: bytes on the host, or None for no limit. slots: most adapters on
            the device at a time.

    Attributes:
        pinned: names whose versions must stay on the device.
    """

    def __init__(
        self, transfer: Transfer, capacity: int | None, grow: int | None, host_capacity: int | None, slots: int
    ):
        self.transfer, self.host_capacity = transfer, host_capacity
        self.changed = threading.Condition(threading.RLock())
        self.arena = Arena(transfer.device, capacity, grow)
        self.loads = self.evictions = 0
        self.closed = False  # nothing is brought any more
        # those that say of themselves that they have room, and perhaps more: what is taken is counted from them, so an
        # interrupt loses none
        self._placed: set[Version] = set()
        self._on_host: set[Version] = set()
        self.pinned: set[str] = set()
        self._slots = slots
        self._clock = itertools.count(1)
        _all.add(self)

    def bring(self, version: Version, read: Callable[[], Packed]) -> bool:
        """Put a version that the caller holds on the device. Returns whether it was there already.

        ``read`` reads it if it is not in host memory. If ``read`` raises, the version stays where it was.

        Raises:
            StoreFull: no room beside what is pinned or held. RuntimeError: the store has been detached meanwhile.
        """
        me, ready = threading.get_ident(), False
        try:
            with self.changed:
                self.changed.wait_for(lambda: version.moving is None)
                if self.closed:
                    raise RuntimeError("the store has been detached from its model")
                version.used = next(self._clock)
                if version.block is not None:
                    return True
                if version.nbytes and (version.folder is None or signature(version.folder) == version.files):
                    self._victims(version)  # its size is known: nothing is read that will find no room
                self._placed.add(version)
                version.moving = me
            packed = None if version.host is not None else read()
            staged = self._place(version, packed)
            ready = True
            with self.changed:
                kept = staged if self.transfer.pinned else None
                if version.host is None and kept is not None and self._host_room(version.nbytes):
                    self._keep_on_host(version, kept)
                elif version.host is not None and kept is None:
                    self._drop_host(version)  # on a CPU the arena's copy is as good
            return False
        finally:
            if version.moving == me:
                try:
                    self._settle(version, me, ready)
                except BaseException:  # an interrupt
                    self._settle(version, me, ready)
                    raise

    def _settle(self, version: Version, me: int, ready: bool) -> None:
        """After a move by ``me``, ready or not. Does nothing the second time."""
        with self.changed:
            if version.moving == me:
                if not ready:
                    self._leave_device(version)
                self.changed.notify_all()
                version.moving = None

    def _place(self, version: Version, packed: Packed | None) -> Tensor | None:
        """Returns its bytes in host memory, if they were there on the way."""
        if packed is not None:
            version.parts, version.nbytes, version.invocation = packed.parts, packed.nbytes, packed.invocation
        if self.transfer.tables is not None:
            self.transfer.tables.check(version.parts)
        staged = version.host if packed is None else self.transfer.stage(packed)
        with self.changed:
            self._make_room(version)
        block: Any = version.block
        arrival = self.transfer.send(version.parts, packed, staged, block, version.slot)
        factors = self.transfer.factors(version.parts, block)
        with self.changed:
            version.arrival, version.factors, version.used = arrival, factors, next(self._clock)
            self.loads += 1
        return staged

    @property
    def resident(self) -> list[Version]:
        """The versions that are on the device."""
        return [v for v in self._placed if v.block is not None and v.moving is None]

    @property
    def used(self) -> int:
        """Bytes of the arena in blocks."""
        return sum(block.size for block, _ in self._taken())

    @property
    def host_used(self) -> int:
        """Bytes in host memory."""
        return sum(v.nbytes for v in self._on_host if v.host is not None)

    @property
    def busy(self) -> bool:
        """Whether a version is held or being moved."""
        return any(v.held or v.moving is not None for v in self._placed)

    def _taken(self) -> list[tuple[Block, int]]:
        """Blocks and slots that may not be given to another."""
        here = [(v.block, v.slot) for v in self._placed if v.block is not None]
        return here + [v.leaving[:2] for v in self._placed if v.leaving is not None]

    def retire(self, version: Version) -> None:
        """Mark a version as replaced or unloaded. It is freed as soon as nothing holds it."""
        with self.changed:
            version.retired = True
            self._collect(version)

    def hold(self, version: Version, holds: list[Version]) -> None:
        """Keep a version on the device until :meth:`release` of ``holds``, to which it is added."""
        with self.changed:
            version.held += 1
            holds += [version]  # Python handles no signal between these two

    def release(self, holds: list[Version], keep: int = 0) -> None:
        """End the holds that were added after the first ``keep``, and take them out of the list. What an interrupt
        leaves in it is held."""
        with self.changed:
            mark = self.transfer.mark() if len(holds) > keep else None
            while len(holds) > keep:
                version = holds[-1]
                if mark is not None:
                    version.uses[mark[0]] = mark[1]  # the last batch on each stream
                if version.held == 1:
                    self._collect(version, 1)
                version.held -= 1
                del holds[-1]  # as in hold

    def _collect(self, version: Version, held: int = 0) -> None:
        """Free it if it has no name, and nobody but the caller, with ``held``, holds it."""
        if version.retired and version.held == held and version.moving is None:
            self._leave_device(version)
            self._drop_host(version)

    def _make_room(self, version: Version) -> None:
        """A block and a slot, after evicting the least recently used versions if necessary."""
        for other in list(self._placed):  # what an interrupt has left
            if other.leaving is not None:
                self._leave_device(other)
            self._collect(other)
        self._placed = {v for v in self._placed if v.block is not None or v.moving is not None}
        victims = self._victims(version)
        for victim in [*victims, None]:
            taken = self._taken()
            slots = {slot for _, slot in taken}
            block = self.arena.allocate(version.nbytes, [b for b, _ in taken]) if len(slots) < self._slots else None
            if block is not None:
                version.block, version.slot = block, next(slot for slot in itertools.count() if slot not in slots)
                return
            if victim is not None:
                self._evict(victim)
        resident = self.resident
        raise self._full(version, [v.name for v in victims if v in resident])

    def clear(self, wanted: Sequence[Version]) -> bool:
        """Evict all that may leave the device, if these versions then have room beside the others. With the lock."""
        leave = [v for v in self.resident if self._may_leave(v)]
        free, stay = self._free_bytes(), set(self.resident).difference(leave)
        room = None if free is None else free + sum(v.block.size for v in leave if v.block is not None)
        if room is None or sum(v.nbytes for v in wanted if v not in stay) > room:
            return False
        for version in leave:
            self._evict(version)
        return True

    def _evict(self, version: Version) -> None:
        if self._save(version):
            self._leave_device(version)
            self.evictions += 1

    def _victims(self, version: Version) -> list[Version]:
        """The versions that may be evicted for this one, least recently used first. Raises StoreFull."""
        victims = sorted((v for v in self.resident if self._may_leave(v)), key=lambda v: v.used)
        free = self._free_bytes()
        room = free is None or version.nbytes <= free + sum(v.block.size for v in victims if v.block is not None)
        if not (room and self.arena.fits(version.nbytes)):
            raise self._full(version)
        return victims

    def _free_bytes(self) -> int | None:
        """What is left of the arena's capacity; None without a limit."""
        return None if self.arena.capacity is None else self.arena.capacity - self.used

    def _full(self, version: Version, stuck: Sequence[str] = ()) -> StoreFull:
        """stuck: names of versions that have no files, and found no room in host memory."""
        stay = sorted({v.name for v in self.resident if not self._may_leave(v)})
        others = any(v.held or v.moving is not None for v in self._placed if v is not version)
        return StoreFull(
            f"adapter {version.name!r} needs {version.nbytes} bytes in one piece; {self.used} of "
            f"{self.arena.capacity} are taken, pinned or in use: [{some(stay)}]"
            + (f"; from tensors, with no room in host memory (host_bytes): [{some(stuck)}]" if stuck else ""),
            in_use=others and self.arena.fits(version.nbytes),
        )

    def _may_leave(self, version: Version) -> bool:
        return not (version.held or version.moving is not None or version.name in self.pinned)

    def _save(self, version: Version) -> bool:
        """Whether the version may leave the device: it has files, or there was room to copy it to the host."""
        if version.folder is not None or version.host is not None:
            return True
        if version.block is None or not self._host_room(version.nbytes):
            return False
        self._keep_on_host(version, self.transfer.fetch(version.block, version.nbytes))
        return True

    def _leave_device(self, version: Version) -> None:
        if version.block is not None:
            version.leaving, version.block, version.slot, version.factors, version.arrival, version.uses = (
                (version.block, version.slot, [*version.uses.values()]), None, -1, {}, None, {}
            )  # fmt: skip
        if version.leaving is not None:
            _, slot, uses = version.leaving
            self.transfer.vacate(slot, uses)
            version.leaving = None  # last: who has the block next must not share it
        if version.moving is None:
            self._placed.discard(version)

    def _host_room(self, nbytes: int) -> bool:
        """Whether ``nbytes`` fit on the host, after dropping copies of what is on the device or in files."""
        if self.host_capacity is None:
            return True
        spare = sorted((v for v in self._on_host if self._is_copy(v)), key=lambda v: v.used)
        missing = self.host_used + nbytes - self.host_capacity
        if missing > sum(v.nbytes for v in spare):
            return False
        for version in spare:
            if missing <= 0:
                break
            missing -= version.nbytes
            self._drop_host(version)
        return True

    def _is_copy(self, version: Version) -> bool:
        return version.moving is None and (version.folder is not None or version.block is not None)

    def _keep_on_host(self, version: Version, memory: Tensor) -> None:
        self._on_host.add(version)
        version.host = memory

    def _drop_host(self, version: Version) -> None:
        version.host = None
        self._on_host.discard(version)

    def end_other_moves(self) -> None:
        """In a forked child, which has none of the other threads, so that nobody waits for them."""
        for version in self._placed:
            if version.moving not in (None, threading.get_ident()):
                self._leave_device(version)
                version.moving = None


_all: WeakSet[Residency] = WeakSet()
_forking = threading.local()  # held: while this thread forks, so that no other is in the middle of a change


def _before_fork() -> None:
    _forking.held = []
    for residency in sorted(_all, key=id):  # in one order, for two threads may fork
        residency.changed.acquire()
        _forking.held.append(residency)


def _after_fork(in_child: bool) -> None:
    held: list[Residency] = vars(_forking).get("held", [])
    while held:
        residency = held.pop()
        try:
            if in_child:
                residency.end_other_moves()
        finally:
            residency.changed.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=functools.partial(_after_fork, False),
        after_in_child=functools.partial(_after_fork, True),
    )
