"""The loops of merge and unmerge, for numba: see :mod:`fused_lora.ops.merge.units`, which says what a unit is.

They round where torch's operations would: nothing is reassociated, and nothing fused but the sums of a delta.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numba
import numpy as np
import torch

from fused_lora.ops.compiled_llvm import (
    FUSED,
    HALF,
    TILE_BYTES,
    differ,
    gathered,
    load,
    one_row,
    ones,
    store,
    trailing_zeros,
    two_rows,
)
from fused_lora.ops.compiled_mask import multiply_by_mask
from fused_lora.ops.compiled_team import jit, on_work, pointer, rounds_as_caller, run, take

__all__ = ["STRIP", "TILE_BYTES", "Work", "fold", "function", "multiply_by_mask", "run"]

STRIP = 2048  # elements whose mask of differences stays in the first cache
_AT_ONCE = 4  # corrections in 64 elements that most weights stay below
_ALL = 1 << 40  # units: nobody finds one after that many are taken, and no number of threads makes the sum overflow


class Work(ctypes.Structure):
    """Units ``next`` to ``stop`` of a weight, for a team; ``used`` places for offsets and values. The rest are sizes in
    elements and addresses of what :mod:`~fused_lora.ops.merge.units` notes of the units."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("next", "used", "probe", "flushes", "stop", "restoring", "failed"),
            *("rows", "columns", "R", "height", "width", "units"),
            *("W", "left", "right", "state", "counts", "starts", "fingerprints", "offsets", "values"),
            *("weights", "lanes", "multiplier"),
        )
    ]


@jit
def _delta(left, right, out, rows, columns, R, tile):
    """out [rows, columns] = left [rows, R] @ right; ``out`` has room for a tile more."""
    for j in range((columns - 1) // tile * tile, -1, -tile):  # the last tile first: it writes over the first ones
        for i in range(0, rows - 1, 2):
            two_rows(left, right, out, i, j, R, columns)
        if rows % 2:
            one_row(left, right, out, rows - 1, j, R, columns)


@jit
def _add(w, delta, merged, differs):
    """merged (None: delta) <- round(w + delta), differs <- whether round(merged - delta) is not w to the bit."""
    for i in range(w.size):
        total = store(load(w[i]) + delta[i], w[i])
        differs[i] = differ(store(load(total) - delta[i], total), w[i])
        if merged is None:  # decided when compiling; two names of one memory would not be vectorised
            delta[i] = total
        else:
            merged[i] = total


@jit
def _keep(differs, integers, base, offsets, values, kept):
    """The places and bits of the elements that differ, appended.

    Up to _AT_ONCE places behind the last are written, too.
    """
    for group in range((integers.size + 63) // 64):
        first, found = np.uint64(64 * group), gathered(differs, group)
        end = kept + ones(found)
        for _ in range(_AT_ONCE):  # whether needed or not: cheaper than a branch that no processor foresees
            i = first + (trailing_zeros(found) & np.uint64(63))
            offsets[kept] = base + i
            values[kept] = integers[min(i, np.uint64(integers.size - 1))]
            kept += np.uint64(1)
            found &= found - np.uint64(1)
        while found != np.uint64(0):
            i = first + trailing_zeros(found)
            offsets[kept] = base + i
            values[kept] = integers[i]
            kept += np.uint64(1)
            found &= found - np.uint64(1)
        kept = end
    return kept


@jit
def _weigh(sums, weights, multiplier):
    folded = np.uint64(0)
    for start in range(0, sums.size, weights.size):
        dot = np.uint64(0)
        for i in range(min(weights.size, sums.size - start)):
            dot += np.uint64(sums[start + i]) * np.uint64(weights[i])
        folded = folded * np.uint64(multiplier) + dot
    return folded


@jit
def fold(words: np.ndarray, weights: np.ndarray, multiplier: int) -> tuple[int, int, int]:
    """The fingerprint of a block's int64 words: see ``merge_arrays.fingerprint``."""
    lanes = weights.size
    rows = words.size // lanes
    columns, sums = np.zeros(lanes, np.int64), np.empty(rows, np.int64)
    for row in range(rows):
        line, total = words[row * lanes : (row + 1) * lanes], np.int64(0)
        for i in range(lanes):
            columns[i] += line[i]
            total += line[i]
        sums[row] = total
    return (
        _weigh(columns, weights, multiplier),
        _weigh(sums, weights, multiplier),
        _weigh(words[rows * lanes :], weights, multiplier),
    )


@jit
def _subtract(w, delta, original):
    """original (None: delta) <- round(w - delta)."""
    for i in range(w.size):
        value = store(load(w[i]) - delta[i], w[i])
        if original is None:
            delta[i] = value
        else:
            original[i] = value


@jit
def _line(address, step, line, integer, length):
    return numba.carray(pointer(address + line * step, integer), length)


@jit
def _copy(source, target):
    for i in range(source.size):
        target[i] = source[i]


@jit
def _fingerprint(address, integer, size, length, lines, step, weights, multiplier):
    """:func:`fold` of each line, as words of 64 bits where they are some, like digits; lines ``step`` bytes apart."""
    a, b, c = np.uint64(0), np.uint64(0), np.uint64(0)
    for line in range(lines):
        if size * length % 8:
            one = fold(numba.carray(pointer(address + line * step, integer), length), weights, multiplier)
        else:
            words = numba.carray(pointer(address + line * step, np.int64(0)), size * length // 8)
            one = fold(words, weights, multiplier)
        factor = np.uint64(multiplier)
        a, b, c = a * factor + one[0], b * factor + one[1], c * factor + one[2]
    return a, b, c


@jit
def _merge_lines(source, integer, element, lines, length, step, delta, merged, differs, offsets, values):
    """The lines of a unit merged into ``merged`` (None: delta); returns how many places and values were kept."""
    kept = np.uint64(0)
    for line in range(lines):
        w = numba.carray(pointer(source + line * step, element), length)
        bits = numba.carray(pointer(source + line * step, integer), length)
        for start in range(0, length, STRIP):
            strip = slice(start, min(start + STRIP, length))
            here = slice(line * length + start, line * length + strip.stop)
            if length - start < STRIP:
                differs[:] = 0
            _add(w[strip], delta[here], None if merged is None else merged[here], differs)
            kept = _keep(differs, bits[strip], np.uint64(here.start), offsets, values, kept)
    return kept


@jit
def _restore_lines(source, element, lines, length, step, delta, original):
    """round(w - delta) of the lines of a unit, in ``original`` (None: delta)."""
    for line in range(lines):
        here = slice(line * length, (line + 1) * length)
        w = numba.carray(pointer(source + line * step, element), length)
        _subtract(w, delta[here], None if original is None else original[here])


@jit
def _units(shared, work, element, integer, number, same):
    """Merge or restore units as long as there are any left. ``same``: None where W is of the delta's dtype."""
    columns, R, most = work.columns, work.R, work.height * work.width
    room = 0 if work.restoring != 0 else most + STRIP + _AT_ONCE  # _keep writes behind the last
    offsets_room, values_room = np.empty(room, np.uint16), np.empty(room, np.int64)
    sums, rounded = np.empty(most + TILE_BYTES, np.float64), np.empty(most, np.int16)
    size = numba.carray(pointer(work.W, element), 1).itemsize
    tile, differs = TILE_BYTES // numba.carray(pointer(work.left, number), 1).itemsize, np.empty(STRIP, np.uint8)
    left = numba.carray(pointer(work.left, number), work.rows * R)
    right = numba.carray(pointer(work.right, number), (columns + tile - 1) // tile * tile * R)
    state = numba.carray(pointer(work.state, np.uint8(0)), work.units)
    counts = numba.carray(pointer(work.counts, np.int32(0)), work.units)
    starts = numba.carray(pointer(work.starts, np.int64(0)), work.units)
    fingerprints = numba.carray(pointer(work.fingerprints, np.uint64(0)), (work.units, 3))
    weights = numba.carray(pointer(work.weights, np.int64(0)), work.lanes)
    panels = (columns + work.width - 1) // work.width
    while True:
        unit = take(shared, 0, 1)
        if unit >= work.stop:
            return
        if state[unit] != work.restoring:
            continue
        # numba frees an array after the last line that names it, so the pointers are taken where they are used
        result = sums.ctypes.data if same is None else rounded.ctypes.data
        delta = numba.carray(pointer(sums.ctypes.data, number), most + TILE_BYTES)
        out = None if same is None else numba.carray(pointer(result, element), most)
        new = numba.carray(pointer(result, integer), most)
        row, column = unit // panels * work.height, unit % panels * work.width
        h, n = min(work.height, work.rows - row), min(work.width, columns - column)
        lines, length = (1, h * n) if n == columns else (h, n)
        place, step = work.W + (row * columns + column) * size, columns * size
        offsets, values = offsets_room, numba.carray(pointer(values_room.ctypes.data, integer), offsets_room.size)
        if work.restoring == 0:
            source, gap = place, step
            if place % 8 != 0 or (lines > 1 and step % 8 != 0):  # words would lie askew
                source, gap = sums.ctypes.data, length * size
                for line in range(lines):
                    _copy(_line(place, step, line, integer, length), _line(source, gap, line, integer, length))
            print_ = _fingerprint(source, integer, size, length, lines, gap, weights, work.multiplier)
            fingerprints[unit, 0], fingerprints[unit, 1], fingerprints[unit, 2] = print_
        _delta(left[row * R :], right[column * R :], delta, h, n, R, tile)
        if work.restoring == 0:
            kept = _merge_lines(place, integer, element, lines, length, step, delta, out, differs, offsets, values)
            failed = kept * (size + 2) >= h * n * size  # a copy would be smaller
            if not failed:
                counts[unit], starts[unit] = kept, take(shared, 1, np.int64(kept))
                _copy(offsets[:kept], numba.carray(pointer(work.offsets + 2 * starts[unit], np.uint16(0)), kept))
                _copy(values[:kept], _line(work.values, size, starts[unit], integer, kept))
        else:
            _restore_lines(place, element, lines, length, step, delta, out)
            offsets = numba.carray(pointer(work.offsets + 2 * starts[unit], np.uint16(0)), counts[unit])
            values = _line(work.values, size, starts[unit], integer, counts[unit])
            for i in range(offsets.size):
                new[min(np.int64(offsets[i]), most - 1)] = values[i]  # damaged: the fingerprint will say so
            a, b, c = _fingerprint(result, integer, size, length, lines, length * size, weights, work.multiplier)
            known = fingerprints[unit]
            failed = (a != known[0]) | (b != known[1]) | (c != known[2])
        if failed:
            work.failed = 1
            take(shared, 0, _ALL)
            return
        for line in range(lines):
            _copy(_line(result, length * size, line, integer, length), _line(place, step, line, integer, length))
        state[unit] = 1 - work.restoring


# torch's dtype: zeros of an element of W, of the integer of its bits and of the delta, and None where two are alike
_KINDS = {torch.float64: (np.float64(0), np.int64(0), np.float64(0), None)}
if FUSED:
    _KINDS[torch.float32] = np.float32(0), np.int32(0), np.float32(0), None
    _KINDS[torch.bfloat16] = np.int16(0), np.int16(0), np.float32(0), 0
if FUSED and HALF:
    _KINDS[torch.float16] = np.uint16(0), np.int16(0), np.float32(0), 0


@functools.cache
def function(dtype: torch.dtype) -> Callable | None:
    """What :func:`~fused_lora.ops.compiled_team.run` takes for :class:`Work` on weights of that dtype, if any."""
    if dtype not in _KINDS:
        return None
    element, integer, number, same = _KINDS[dtype]

    def units(shared):
        work = numba.carray(shared, 1)[0]
        if rounds_as_caller(work):
            _units(shared, work, element, integer, number, same)

    units.__qualname__ = f"units_{dtype}".replace(".", "_")  # of one name, they would share a file of numba's
    return on_work(Work)(units)
