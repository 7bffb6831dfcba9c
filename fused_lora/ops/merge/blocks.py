"""Merge and exact unmerge unit by unit, by the C loops or by the same steps in torch: the bits are the same.

csrc/cpu_loops.c says what a unit, its checksum and its corrections are. C takes fp32, bf16 and fp16 weights on a CPU
whose rows are contiguous; torch takes fp64, other strides, CUDA devices, and everything where C is missing. Weights of
other devices are merged on the CPU.

If something fails, or an interrupt comes, a weight is as it was: C takes back the units that it has written, torch has
a copy meanwhile. Memory: corrections of about 2 bytes for 1 to 3 % of the elements, and 25 bytes a unit of 4096.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from fused_lora.ops import native
from fused_lora.ops.merge import launch
from fused_lora.ops.merge.delta import chain
from fused_lora.ops.native import CHANGED, DONE, FULL, LOST, MERGE, MERGE_AGAIN, TORN, UNMERGE
from fused_lora.reference import bits, dropout_lanes

_LOW = 0xFFFFFFFF
AREA, WIDTH, HEIGHT = 4096, 128, 256  # of a unit at most, as in C
_HUGE_PAGES = 1 << 22  # bytes from which numpy asks for pages of 2 MiB, which count whole
_BAND = 1 << 17  # elements that torch takes at a time: the temporaries stay in a cache


class Scales(NamedTuple):
    """What a weight is multiplied by beside the delta: ``rows`` [2, rows] and ``columns`` [2, columns], scales and the
    reciprocals that undo them."""

    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of_rows(cls, scale: torch.Tensor, columns: int) -> Scales:
        """``scale`` [rows] alone. 0 has no reciprocal: its elements all get corrections, or the weight a copy."""
        inverse = scale.reciprocal()
        inverse = torch.where(inverse.isfinite(), inverse, 0)
        return cls(torch.stack([scale, inverse]), scale.new_ones((2, columns)))


class Dither(NamedTuple):
    """Sums of 16 bits are rounded at random: the seed, a signed integer of 64 bits, and the number of the first row."""

    seed: int
    row: int = 0


class Factors(NamedTuple):
    """The delta D = left @ right. ``left`` [rows, R] and ``right`` [R, columns] are contiguous for :func:`merge`, in
    fp32, or in fp64 for an fp64 weight. The scaling is in the one that was lora_B. scales: of the weight itself.
    dither: None rounds to the nearest."""

    left: torch.Tensor
    right: torch.Tensor
    scales: Scales | None = None
    dither: Dither | None = None

    def t(self) -> Factors:
        """For the transposed weight; its elements are numbered as the weight is stored."""
        scales = None if self.scales is None else Scales(self.scales.columns, self.scales.rows)
        return Factors(self.right.t().contiguous(), self.left.t().contiguous(), scales, self.dither)

    def cpu(self) -> Factors:
        scales = None if self.scales is None else Scales(self.scales.rows.cpu(), self.scales.columns.cpu())
        return Factors(self.left.cpu(), self.right.cpu(), scales, self.dither)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""
        return [self.left, self.right, *(self.scales or ())]


@dataclass
class Units:
    """What the units of one weight need to come back: corrections, or a ``copy`` of the weight if it is smaller."""

    height: int
    width: int
    notes: torch.Tensor  # int64 [3, units]: corrections of each, where they begin, checksum of the original bits
    corrections: torch.Tensor  # uint8 [n, 2], (advance, xor)
    copy: torch.Tensor | None = None  # with it, the others are not used

    @classmethod
    def of(cls, W: torch.Tensor) -> Units:
        """For a merge of W [rows, columns]."""
        rows, columns = W.shape
        panels = -(-columns // WIDTH)
        width = max(1, min(columns, -(-columns // max(1, panels) // 32) * 32))  # of equal panels, whole tiles of C wide
        height = max(1, min(rows, AREA // width, HEIGHT))
        height -= height % 8 if height > 8 else 0  # C computes 8 rows at a time
        units = -(-rows // height) * panels
        notes = torch.zeros((3, units), dtype=torch.int64, device=W.device)
        return cls(height, width, notes, torch.empty((0, 2), dtype=torch.uint8, device=W.device))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.notes, self.corrections, *([] if self.copy is None else [self.copy])]

    def fit(self, W: torch.Tensor) -> bool:
        """Whether these are notes of such a weight: a record that was stored may be damaged."""
        if not (0 < self.width <= WIDTH and 0 < self.height <= min(HEIGHT, AREA // self.width)):
            return False
        notes = 3, -(-W.shape[0] // self.height) * -(-W.shape[1] // self.width)
        kinds = [(torch.int64, notes), (torch.uint8, (*self.corrections.shape[:1], 2)), (W.dtype, W.shape)]
        return all(
            t.dtype == dtype and t.shape == shape and t.is_contiguous() and t.device == W.device
            for t, (dtype, shape) in zip(self.tensors, kinds, strict=False)
        )


class _Sweep:
    """A merge of a weight, or its unmerge."""

    units: Units
    _before: torch.Tensor | None = None  # W, where this tells what to go back to

    def joins(self) -> bool:
        """Whether others can be in one call with it."""
        return isinstance(self, _InC) and self.units.copy is None

    @native.safe_in_a_child
    def alone(self: Any, mode: int) -> None:
        """All of it, or an error and nothing."""
        units = self.units
        if mode == UNMERGE and units.copy is not None:
            return self._put_back(units.copy)
        try:
            outcome = self.run(mode)
            if outcome == FULL:  # a copy is no larger
                self._before = units.copy = self.W.clone(memory_format=torch.contiguous_format)
                outcome = self.run(MERGE_AGAIN)
            elif outcome == DONE and mode == MERGE:
                units.corrections = self.kept()
            if outcome != DONE:
                raise launch.error(outcome)
        except BaseException:
            if self.undo(UNMERGE if mode == MERGE else MERGE_AGAIN) != DONE:
                raise launch.error(TORN) from None
            raise

    def _put_back(self: Any, copy: torch.Tensor) -> None:
        again = copy.clone()
        if _run_again(again, self.factors) != DONE or not torch.equal(bits(again), bits(self.W)):
            raise launch.error(CHANGED)
        self._before = again
        try:
            self.W.copy_(copy)
        except BaseException:  # an interrupt meanwhile is raised behind it
            self.undo(MERGE_AGAIN)
            raise

    @native.safe_in_a_child
    def undo(self: Any, mode: int) -> int:
        """Take back, by ``mode``, what was written. It finds nothing where nothing was, nor a second time."""
        if self._before is not None:
            self.W.copy_(self._before)
        return DONE


class _InC(_Sweep):
    """By the C loops."""

    kind = ()  # any two can be in one call
    at_once = 1 << 26  # bytes of weights in one call: room for their corrections is held meanwhile

    def __init__(self, W: torch.Tensor, factors: Factors, units: Units, room: int):
        self.W, self.units = W, units
        # numpy's memory shrinks in place: beside small weights a copy is a hundredth of what a merge may hold
        self._shrinks = np.empty((room, 2), np.uint8) if 0 < 2 * room < _HUGE_PAGES else None
        self._room = units.corrections
        if room:
            large = self._shrinks is None
            self._room = W.new_empty((room, 2), dtype=torch.uint8) if large else torch.from_numpy(self._shrinks)
        count, counts = units.notes.shape[1], units.notes.data_ptr()
        self._merged = (ctypes.c_uint8 * count)()
        if room == 0:
            ctypes.memset(self._merged, 1, count)
        self.factors = factors  # as long as C has their addresses
        left, right, scales, dither = factors
        self.work = native.Work(
            *W.shape, W.stride(0), right.shape[0], units.height, units.width,
            native.TYPES[W.dtype], W.data_ptr(), left.data_ptr(), right.data_ptr(),
            *((0, 0) if scales is None else (scales.rows.data_ptr(), scales.columns.data_ptr())),
            counts, counts + 8 * count, counts + 16 * count,
            ctypes.addressof(self._merged), self._room.data_ptr(), self._room.shape[0], 0,
            *((0, 0, 0) if dither is None else (1, dither.row, dither.seed)),
        )  # fmt: skip

    def run(self, mode: int) -> int:
        return native.run([self.work], mode)

    def undo(self, mode: int) -> int:
        if self._before is not None:
            return super().undo(mode)
        if self._shrinks is not None:
            self.work.corrections = self._shrinks.ctypes.data  # :meth:`kept` may have moved them
        return self.run(mode)  # what was not written is known: an interrupt waits for the end of a sweep

    def kept(self) -> torch.Tensor:
        if self._shrinks is None:
            return self._room[: self.work.used].clone()
        del self._room
        self._shrinks.resize((self.work.used, 2), refcheck=False)
        return torch.from_numpy(self._shrinks)


class _InTorch(_Sweep):
    """The same in torch, a band of rows at a time."""

    def __init__(self, W: torch.Tensor, factors: Factors, units: Units, room: int):
        self.W, self.factors, self.units, self._room = W, factors, units, room
        self._counts, self._starts, self._checksum = units.notes.unbind()
        self._left, self._right, self._scales, self._dither = factors
        rows, columns = W.shape if W.numel() else (0, 0)
        self._panels = -(-columns // units.width)
        whole = rows // units.height * units.height  # units that may be lower are a band of their own
        step = max(1, _BAND // max(1, units.height * columns)) * units.height
        self._bands = list(itertools.pairwise(sorted({*range(0, whole, step), whole, rows})))
        self._pieces: list[torch.Tensor] = [units.corrections]

    def kept(self) -> torch.Tensor:
        return torch.cat(self._pieces)

    def run(self, mode: int) -> int:
        if self._before is None:
            self._before = self.W.clone()
        for band in self._bands:
            outcome = self._do(band, mode)
            if outcome != DONE:
                self.undo(mode)
                return outcome
        return DONE

    def _do(self, band: tuple[int, int], mode: int) -> int:
        w, checksums = self.W[slice(*band)], self._notes(band, self._checksum)
        delta = chain(self._left[slice(*band)], self._right)
        if mode == UNMERGE:
            out = self._round(w, self._scaled(band, w.to(delta.dtype) - delta, 1))
            if not self._decode(band, bits(out)) or not torch.equal(self._checksums(out), checksums):
                return CHANGED
        else:
            out = self._round(w, self._scaled(band, w.to(delta.dtype)) + delta, band)
            if bool((w.isfinite() & ~out.isfinite()).any()):
                return LOST
        if mode == MERGE:
            back = self._round(w, self._scaled(band, out.to(delta.dtype) - delta, 1))
            pairs, counts = self._encode(bits(back) ^ bits(w.contiguous()))
            used = sum(map(len, self._pieces))
            if used + len(pairs) > self._room:
                return FULL
            self._pieces.append(pairs)
            checksums.copy_(self._checksums(w))
            self._notes(band, self._counts).copy_(counts)
            self._notes(band, self._starts).copy_(used + counts.cumsum(0) - counts)
        w.copy_(out)
        return DONE

    def _scaled(self, band: tuple[int, int], values: torch.Tensor, which: int = 0) -> torch.Tensor:
        if self._scales is None:
            return values
        rows, columns = self._scales
        return values * rows[which, slice(*band), None] * columns[which]

    def _round(self, w: torch.Tensor, total: torch.Tensor, band: tuple[int, int] | None = None) -> torch.Tensor:
        """``band``: of a sum that may be rounded at random."""
        if self._dither is None or band is None:
            rounded = total.to(w.dtype)
        else:
            rounded = dithered(total, w.dtype, Dither(self._dither.seed, self._dither.row + band[0]))
        return torch.where(w.isfinite(), rounded, w).contiguous()

    def _notes(self, band: tuple[int, int], notes: torch.Tensor) -> torch.Tensor:
        """Those of the band's units."""
        first, stop = (-(-row // self.units.height) * self._panels for row in band)
        return notes[first:stop]

    def _blocks(self, rows: torch.Tensor) -> torch.Tensor:
        """A band's integers by unit, [units, height, width], unsigned, with 0 behind the last column."""
        height, width, panels = min(self.units.height, len(rows)), self.units.width, self._panels
        words = rows.long() if rows.itemsize == 8 else rows.long() & ((1 << 8 * rows.itemsize) - 1)
        words = torch.nn.functional.pad(words, (0, panels * width - rows.shape[1]))
        return words.view(len(rows) // height, height, panels, width).transpose(1, 2).flatten(0, 1)

    def _widths_of(self, unit: torch.Tensor) -> torch.Tensor:
        return (self.W.shape[1] - unit % self._panels * self.units.width).clamp(max=self.units.width)

    def _checksums(self, rows: torch.Tensor) -> torch.Tensor:
        blocks = self._blocks(bits(rows))
        sums = torch.zeros_like(blocks[:, 0])
        for row in blocks.unbind(1):
            sums = sums ^ row
            sums = ((sums << 13 | sums >> 19) & _LOW) * 0x85EBCA6B & _LOW
        weights = torch.arange(1, sums.shape[1] + 1, device=rows.device) * 0x9E3779B1 & _LOW
        return (sums * weights).sum(1)

    def _encode(self, difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [n, 2] and how many of them every unit has."""
        blocks = self._blocks(difference)
        unit, row, column = blocks.nonzero(as_tuple=True)
        word, at = blocks[unit, row, column], row * self._widths_of(unit) + column
        before = torch.where(unit.diff(prepend=unit.new_full((1,), -1)) == 0, at.roll(1), -1)
        bridges = (at - before - 1) // 255
        length = bridges + 1 + sum(((word >> shift) != 0).long() for shift in range(8, 8 * difference.itemsize, 8))
        owner = torch.repeat_interleave(torch.arange(len(at), device=at.device), length)
        byte = torch.arange(len(owner), device=at.device) - (length.cumsum(0) - length + bridges)[owner]
        advance = torch.where(byte == 0, (at - before - 255 * bridges)[owner], torch.where(byte < 0, 255, 0))
        xor = torch.where(byte < 0, 0, word[owner] >> (8 * byte.clamp(min=0)) & 255)
        counts = length.new_zeros(len(blocks)).index_add_(0, unit, length)
        return torch.stack([advance, xor], 1).to(torch.uint8), counts

    def _decode(self, band: tuple[int, int], rows: torch.Tensor) -> bool:
        """The corrections of the band's units applied to its bits; False where they cannot be of it."""
        counts, starts = (self._notes(band, notes) for notes in (self._counts, self._starts))
        pairs, panels = torch.cat(self._pieces), self._panels
        if bool(((counts < 0) | (starts < 0) | (starts > len(pairs) - counts)).any()):
            return False
        unit = torch.repeat_interleave(torch.arange(len(counts), device=rows.device), counts)
        first = counts.cumsum(0) - counts
        entry = torch.arange(len(unit), device=rows.device)
        advance, xor = pairs[starts[unit] + entry - first[unit]].long().unbind(1)
        gone = torch.cat([advance.new_zeros(1), advance.cumsum(0)])
        at, width = gone[1:] - gone[first[unit]] - 1, self._widths_of(unit)
        byte = entry - torch.where(advance != 0, entry, -1).cummax(0).values if len(entry) else entry
        height = min(self.units.height, len(rows))
        if bool(((at < 0) | (at >= height * width) | (byte >= rows.itemsize)).any()):
            return False
        place = unit // panels * height + at // width, unit % panels * self.units.width + at % width
        change = torch.zeros(rows.shape, dtype=torch.int64, device=rows.device)
        rows ^= change.index_put_(place, xor << (8 * byte), accumulate=True).to(rows.dtype)
        return True


class _OnHost(_Sweep):
    """On a CPU and back: a device that is neither a CPU nor CUDA's may have no fp64, which the steps in torch need."""

    def __init__(self, W: torch.Tensor, factors: Factors, units: Units, room: int):
        self.W, self.factors, self.units = W, factors, units
        host = W.to("cpu", copy=True)
        notes = Units(units.height, units.width, units.notes.cpu(), units.corrections.cpu())
        self._sweep = _best(host)(host, factors.cpu(), notes, room)

    def run(self, mode: int) -> int:
        outcome = self._sweep.run(mode)
        if outcome == DONE:
            self.units.notes.copy_(self._sweep.units.notes)
            self.W.copy_(self._sweep.W)
        return outcome

    @native.safe_in_a_child
    def undo(self, mode: int) -> int:
        if self._before is not None:
            return super().undo(mode)
        outcome = self._sweep.undo(mode)
        self.W.copy_(self._sweep.W)
        return outcome

    def kept(self) -> torch.Tensor:
        return self._sweep.kept().to(self.W.device)


def dithered(total: torch.Tensor, dtype: torch.dtype, dither: Dither) -> torch.Tensor:
    """fp32 [rows, columns] in bf16 or fp16, rounded at random so that the expectation is the sum, as ``dithered`` in C.

    Of fp16 below 2^-14 the expectation may be off by 2^-15 of a last place. NaN becomes infinity.
    """
    rows, columns = total.shape
    lanes = dropout_lanes(dither.seed, dither.row, rows, columns, total.device)[:, :columns]
    chance, pattern = lanes.int() & 0xFFFF, total.view(torch.int32)
    sign, magnitude = pattern >> 16 & 0x8000, (pattern & 0x7FFFFFFF).clamp(max=0x7F800000)
    if dtype is torch.bfloat16:
        half = magnitude + chance >> 16
    else:
        small = magnitude < 0x38800000
        units = torch.where(small, total.abs(), 0.0) * 2.0**24 + chance.float() * 2.0**-16
        normal = (magnitude - 0x38000000 + (chance >> 3) >> 13).clamp(max=0x7C00)
        half = torch.where(small, units.int(), normal)
    return (sign | half).to(torch.int16).view(dtype)


def prepared(W: torch.Tensor, factors: Factors, sweeps: Any = None) -> Any:
    """The sweep of a merge of W [rows, columns]. sweeps: the class, or the best."""
    return (sweeps or _best(W))(W, factors, Units.of(W), W.nbytes // 2)


def merge(W: torch.Tensor, factors: Factors, sweeps: Any = None) -> Units:
    """W [rows, columns] <- round(W + D) in place, or ValueError and W as it was: a finite weight would not stay so.

    A weight that is not finite stays as it is.
    """
    sweep = prepared(W, factors, sweeps)
    sweep.alone(MERGE)
    return sweep.units


@native.safe_in_a_child
def merge_again(W: torch.Tensor, factors: Factors) -> None:
    """:func:`merge` that notes nothing; on an error W is partly merged."""
    if _run_again(W, factors) != DONE:
        raise launch.error(LOST)


def _run_again(W: torch.Tensor, factors: Factors) -> int:
    return _best(W)(W, factors, Units.of(W), 1).run(MERGE_AGAIN)


def restoring(W: torch.Tensor, factors: Factors, units: Units, sweeps: Any = None) -> Any:
    """The sweep of an unmerge: the bits from before :func:`merge` in place, or RuntimeError and W as it was: it is not
    what the merge left."""
    if not units.fit(W):
        raise launch.error(CHANGED)
    return (sweeps or _best(W))(W, factors, units, 0)


@native.safe_in_a_child
def run_together(sweeps: Sequence[_InC], mode: int) -> int:
    """Merge or unmerge all of them or none, in one call; returns how that ended. A merge's units are then
    complete."""
    try:
        outcome = native.run([sweep.work for sweep in sweeps], mode)
        if outcome == DONE and mode == MERGE:
            for sweep in sweeps:
                sweep.units.corrections = sweep.kept()
        return outcome
    except BaseException:
        if any([sweep.undo(MERGE_AGAIN if mode == UNMERGE else UNMERGE) != DONE for sweep in sweeps]):
            raise launch.error(TORN) from None
        raise


def _best(W: torch.Tensor) -> type[_InC | _InTorch | _OnHost]:
    if W.device.type not in ("cpu", "cuda"):
        return _OnHost
    plain = W.device.type == "cpu" and W.dtype in native.TYPES and W.stride(1) == 1 and W.numel() > 0
    return _InC if plain and native.usable() and _agree() and native.usable() else _InTorch


@functools.cache
def _agree() -> bool:
    """Compares C with torch on small weights, once in a process; where a bit differs, C is rejected."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device="cpu", dtype=torch.float32)

    left, right, scales = normal(37, 3) * 0.01, normal(3, 333), Scales.of_rows(1 + normal(37) * 0.1, 333)
    for dtype, scaled, dither in itertools.product(native.TYPES, (None, scales), (None, Dither(7, 2))):
        factors = Factors(left, right, scaled, dither)
        if dither is not None and dtype is torch.float32:
            continue
        W = normal(37, 333).to(dtype)
        merged = W.clone(), W.clone()
        try:
            in_c, in_torch = (merge(m, factors, k) for k, m in zip((_InC, _InTorch), merged, strict=True))
            same = all(map(torch.equal, in_c.tensors, in_torch.tensors)) and torch.equal(*map(bits, merged))
            restoring(merged[0], factors, in_torch, _InC).alone(UNMERGE)
        except (RuntimeError, ValueError) as error:
            native.reject(f"a merge in {dtype}: {error}")
        else:
            if not same or not torch.equal(bits(merged[0]), bits(W)):
                native.reject(f"a merge in {dtype} differs")
    return True
