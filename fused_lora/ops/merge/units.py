"""Merge and exact unmerge of a CPU weight by compiled loops: the contract of ``ops/merge.py``, a unit at a time.

A unit is up to 65536 elements of W, [height, width]: whole rows of up to 4096 columns, else a part of 16 rows. Its
delta is D = sum_k left[:, k] * right[k], a chain of fused multiply-adds in the order of k (in fp64 not fused): the same
bits on any machine, with any number of threads. One pass over a unit computes D, Wm = round(W + D) and
R = round(Wm - D), keeps the places and values where R is not W to the bit, and writes Wm in the end. torch's threads
take unit after unit.

Traffic: one read and one write of W; a unit's temporaries stay in the second cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from fused_lora.ops import compiled
from fused_lora.ops.merge.arrays import MULTIPLIER, WEIGHTS, fold, words_of
from fused_lora.ops.merge.workers import Team
from fused_lora.reference import bits

_MOST = 1 << 16  # elements of a unit: a place takes 16 bits
_UNIT, _WIDTH = _MOST, 1 << 12  # elements and columns at most
_WAVE = 64  # units between two calls of the interpreter: milliseconds, in which an interrupt waits


_TORN = (
    "weight: it was changed while it was merged or unmerged, by another thread perhaps, and is partly merged now: load "
    "it again"
)


@dataclass
class Units:
    """What a weight's units need to come back."""

    height: int
    width: int
    wave: int  # units whose corrections lie together
    counts: torch.Tensor  # int32 [units]: corrections of each
    starts: torch.Tensor  # int64 [units]: where among those of their wave they begin
    fingerprints: torch.Tensor  # int64 [units, 3], of the original bits
    offsets: list[torch.Tensor]  # of each wave, int16 [n], the bits of an uint16: positions inside the units
    values: list[torch.Tensor]  # of each wave, integers [n]: original bits

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.counts, self.starts, self.fingerprints, *self.offsets, *self.values]

    def fit(self, W: torch.Tensor) -> bool:
        """Whether the corrections of W's units are where the notes say: a record that was stored may be damaged."""
        if not (0 < self.width == min(W.shape[1], _WIDTH) and 0 < self.height <= _MOST // self.width and self.wave > 0):
            return False
        units = -(-W.shape[0] // self.height) * -(-W.shape[1] // self.width)
        notes = {self.counts: (torch.int32, (units,)), self.starts: (torch.int64, (units,))}
        notes[self.fingerprints] = torch.int64, (units, 3)
        kinds = [(self.offsets, torch.int16), (self.values, bits(W).dtype)]
        if (
            any((note.dtype, tuple(note.shape)) != kind for note, kind in notes.items())
            or any(kept.dtype != kind for waves, kind in kinds for kept in waves)
            or not all(t.is_contiguous() and t.device.type == "cpu" for t in self.tensors)
        ):
            return False
        room = np.array([min(len(o), len(v)) for o, v in zip(self.offsets, self.values, strict=False)], np.int64)
        starts, counts = self.starts.numpy(), self.counts.numpy()
        if len(room) * self.wave < units:
            return False
        return bool(((starts >= 0) & (counts >= 0) & (starts <= room.repeat(self.wave)[:units] - counts)).all())


class _Job:
    """A weight and its factors in the form that the loops take, and what they note of every unit."""

    def __init__(self, function: Callable, W: torch.Tensor, left: torch.Tensor, right: torch.Tensor, shape: tuple):
        self._loops, self._function, self._bits = compiled.loops(), function, bits(W).dtype
        rows, columns, (height, width, self._wave) = *W.shape, shape
        self._held = left.contiguous(), _packed(right, self._loops.TILE_BYTES)
        self._units, self._most = -(-rows // height) * -(-columns // width), height * width
        self.state, self.counts = np.zeros(self._units, np.uint8), np.zeros(self._units, np.int32)
        self.starts, self.fingerprints = np.zeros(self._units, np.int64), np.zeros((self._units, 3), np.int64)
        self._work = self._loops.Work(
            rows=rows, columns=columns, R=left.shape[1], height=height, width=width, units=self._units,
            W=W.data_ptr(), left=self._held[0].data_ptr(), right=_address(self._held[1]), weights=_address(WEIGHTS),
            lanes=len(WEIGHTS), multiplier=MULTIPLIER, state=_address(self.state), counts=_address(self.counts),
            starts=_address(self.starts), fingerprints=_address(self.fingerprints),
        )  # fmt: skip
        self._alone = W.numel() < _UNIT

    def waves(self) -> list[tuple[int, int]]:
        return [(first, min(first + self._wave, self._units)) for first in range(0, self._units, self._wave)]

    def rooms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For the offsets and values of a wave, whatever it keeps.

        torch's memory: numpy asks for huge pages, and the few places that are written would fill one.
        """
        most = min(self._units, self._wave) * self._most
        return tuple(torch.empty(most, dtype=dtype, device="cpu") for dtype in (torch.int16, self._bits))

    def run(self, restoring: bool, first: int, stop: int, offsets: torch.Tensor, values: torch.Tensor) -> int | None:
        """Merge or restore the units [first, stop) that are not yet; None where one failed, which is left alone.

        Returns how many places a merge used of ``offsets`` and ``values``. Raises MemoryError where there was none for
        the buffers of the loops, which cannot say so themselves.
        """
        work = self._work
        work.next, work.used, work.stop, work.restoring, work.failed = first, 0, stop, restoring, 0
        work.offsets, work.values = offsets.data_ptr(), values.data_ptr()
        self._loops.run(self._function, work, self._alone)
        if not work.failed and (self.state[first:stop] == restoring).any():
            raise MemoryError("weight: no memory for the buffers of its merge or unmerge")
        return None if work.failed else work.used

    def restore(self, offsets: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> bool:
        """Waves restored from what was kept of them; False where one failed."""
        waves = zip(self.waves(), offsets, values, strict=False)
        return all(self.run(True, *units, *kept) is not None for units, *kept in waves)

    def merge_again(self) -> None:
        """What was restored; a merge always gives the same bits."""
        rooms = self.rooms()
        for first, stop in self.waves():
            if self.run(False, first, stop, *rooms) is None:
                raise RuntimeError(_TORN)


def applies(W: torch.Tensor) -> bool:
    """Whether the loops do this weight: on a CPU, contiguous, of a dtype for which they work here."""
    return W.device.type == "cpu" and W.is_contiguous() and W.numel() > 0 and _function(W.dtype) is not None


def merge(W: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Units | None:
    """W <- round(W + D) in place; None, W as it was, where a copy of some unit is smaller than its corrections.

    ``left`` [rows, R] and ``right`` [R, columns] are contiguous, in fp32, or fp64 for an fp64 weight; no finite W may
    overflow.
    """
    return _merge(_function(W.dtype), W, left, right)


def _merge(function: Callable, W: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Units | None:
    width = min(W.shape[1], _WIDTH)
    shape = max(1, min(W.shape[0], _UNIT // width)), width, _WAVE
    job, offsets, values = _Job(function, W, left, right, shape), [], []
    rooms = job.rooms()
    current = (0, 0, *rooms)
    try:
        for first, stop in job.waves():
            current = (first, stop, *rooms)
            used = job.run(False, *current)
            if used is None:
                break
            for kept, room in zip((offsets, values), rooms, strict=True):  # numpy: a forked child has no torch threads
                kept.append(torch.from_numpy(room.numpy()[:used].copy()))
        else:
            notes = map(torch.from_numpy, (job.counts, job.starts, job.fingerprints))
            return Units(*shape, *notes, offsets, values)
    except BaseException:
        _take_back(job, offsets, values, current)
        raise
    _take_back(job, offsets, values, current)
    return None


def _take_back(job: _Job, offsets: list[torch.Tensor], values: list[torch.Tensor], current: tuple) -> None:
    """A merge that ended in the wave ``current``; what lies in its rooms may have been kept already."""
    if job.run(True, *current) is None or not job.restore(offsets, values):
        raise RuntimeError(_TORN)


def restore(W: torch.Tensor, left: torch.Tensor, right: torch.Tensor, units: Units) -> bool:
    """The original bits back in place; False, W as it was, where it is not what the merge left.

    (A change of an element whose original is on record is not seen, and may be lost either way.)
    """
    if not units.fit(W):
        return False
    if applies(W):
        return _restore(_function(W.dtype), W, left, right, units)
    with Team(W.device):
        return _restore_slowly(W, left, right, units)


def _restore(function: Callable, W: torch.Tensor, left: torch.Tensor, right: torch.Tensor, units: Units) -> bool:
    job = _Job(function, W, left, right, (units.height, units.width, units.wave))
    job.state[:] = 1
    for note, known in zip((job.counts, job.starts, job.fingerprints), units.tensors, strict=False):
        note[...] = known.numpy()
    try:
        if job.restore(units.offsets, units.values):
            return True
    except BaseException:
        job.merge_again()
        raise
    job.merge_again()
    return False


def _packed(right: torch.Tensor, tile_bytes: int) -> np.ndarray:
    """[tiles, R, tile]: the columns of a tile side by side, zeros behind the last."""
    R, columns = right.shape
    tile = tile_bytes // right.element_size()
    full = columns // tile
    packed = np.zeros((-(-columns // tile), R, tile), right.numpy().dtype)
    packed[:full] = right.numpy()[:, : full * tile].reshape(R, full, tile).swapaxes(0, 1)
    if full * tile < columns:
        packed[full, :, : columns - full * tile] = right.numpy()[:, full * tile :]
    return packed


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _restore_slowly(W: torch.Tensor, left: torch.Tensor, right: torch.Tensor, units: Units) -> bool:
    """:func:`restore` where the loops that merged are not: R passes over W, and a copy of it."""
    restored, panels = W.clone(memory_format=torch.contiguous_format), -(-W.shape[1] // units.width)
    for unit, (count, start) in enumerate(zip(units.counts.tolist(), units.starts.tolist(), strict=True)):
        places = slice(start, start + count)
        offsets, values = (kept[unit // units.wave][places].numpy() for kept in (units.offsets, units.values))
        row, column = unit // panels * units.height, unit % panels * units.width
        part = restored[row : row + units.height, column : column + units.width]
        delta = _delta(left[row : row + units.height], right[:, column : column + units.width])
        original = (part.to(delta.dtype) - delta).to(W.dtype).contiguous()
        flat = bits(original).view(-1).numpy()
        flat[np.minimum(offsets.view(np.uint16), flat.size - 1)] = values  # damaged: the fingerprint will say so
        if not np.array_equal(_fingerprint(flat, 1 if panels == 1 else len(part)), units.fingerprints[unit].numpy()):
            return False
        part.copy_(original)
    W.copy_(restored)
    return True


def _delta(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    total = right.new_zeros((left.shape[0], right.shape[1]))
    for k in range(right.shape[0]):
        product = left[:, k : k + 1].double() * right[k].double()
        fused = right.dtype == torch.float32
        total = _sum_to_odd(product, total.double()).float() if fused else total + product
    return total


def _sum_to_odd(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b in fp64, an inexact sum rounded to the neighbour whose last bit is 1: rounding on to fp32 is then right.

    Boldo, Melquiond: Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd (2008).
    """
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    even = (total.view(torch.int64) & 1) == 0
    neighbour = torch.nextafter(total, torch.where(error > 0, torch.inf, -torch.inf).to(total.dtype))
    return torch.where((error != 0) & even, neighbour, total)


def _fingerprint(flat: np.ndarray, lines: int) -> np.ndarray:
    """int64 [3]: the fingerprints of the lines as the digits of a number, modulo 2^64."""
    total = [0, 0, 0]
    for line in flat.reshape(lines, -1):
        total = [a * MULTIPLIER + b for a, b in zip(total, fold(words_of(line)), strict=True)]
    return np.array([value % 2**64 for value in total], np.uint64).view(np.int64)


def _function(dtype: torch.dtype) -> Callable | None:
    """The loops for weights of that dtype; None where there are none or they do not work here."""
    return None if compiled.loops() is None else _tried_function(dtype)


@functools.cache
def _tried_function(dtype: torch.dtype) -> Callable | None:
    return compiled.tried(lambda: compiled.loops().function(dtype), _first_difference, dtype)


def _first_difference(function: Callable, dtype: torch.dtype) -> str | None:
    """What a small weight shows: other bits than torch's, corrections too many or too few, a change not noticed."""
    draw = np.random.default_rng(0)
    W, left, right = (torch.from_numpy(draw.standard_normal(shape)) for shape in ((70, 333), (70, 3), (3, 333)))
    W = W.to(dtype)
    left, right = (t.to(torch.promote_types(dtype, torch.float32)) * 0.1 for t in (left, right))
    delta, merged = _delta(left, right), W.clone()
    total = (W.to(delta.dtype) + delta).to(dtype)
    back = (total.to(delta.dtype) - delta).to(dtype)
    units = _merge(function, merged, left, right)
    if units is None or not torch.equal(bits(merged), bits(total)):
        return "a merged weight differs"
    if units.counts.sum() != (bits(back) != bits(W)).sum():
        return "corrections differ"
    bits(merged)[3, 4] ^= 1 << 8
    if _restore(function, merged, left, right, units):
        return "a changed weight was restored"
    bits(merged)[3, 4] ^= 1 << 8
    if not _restore(function, merged, left, right, units) or not torch.equal(bits(merged), bits(W)):
        return "a restored weight differs"
    return None
