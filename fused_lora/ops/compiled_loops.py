"""The loops of merge and unmerge, for numba: see :mod:`fused_lora.ops.compiled`.

They give the bits of the numpy or torch code that they stand in for: no reassociation, no contraction. (One exception:
the bits of a 16-bit NaN that a merge writes.)
"""

from __future__ import annotations

import platform
from functools import partial

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from fused_lora.ops.compiled_mask import jit, multiply_by_mask
from fused_lora.ops.merge_arrays import CHUNK

__all__ = ["ELEMENTS", "MARGIN", "STRIP", "copy", "fold", "merge", "multiply_by_mask", "restore"]

STRIP = 2048  # elements whose mask of differences stays in the first cache
_AT_ONCE = 4  # corrections in 64 elements that most weights stay below
MARGIN = STRIP + _AT_ONCE  # room that merge wants behind the corrections
_GATHER = np.uint64(0x0102040810204080)

# 16-bit floats are handed over as their bits, and the sign of the integer type says which they are
BFLOAT16, FLOAT16 = types.int16, types.uint16
# without the instruction LLVM would call a library that is not there
HALF = platform.machine() in ("aarch64", "arm64") or binding.get_host_cpu_features().get("f16c", False)

# numba widens every integer to 64 bits, which would halve the speed of these: so they are written in LLVM's words
_I16, _I32, _I64, _HALF, _FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()


def _from_bfloat16(builder, word):
    return builder.bitcast(builder.shl(builder.zext(word, _I32), _I32(16)), _FLOAT)


def _to_bfloat16(builder, value):
    """Half to even; every NaN becomes 0x7FC0."""
    word = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(word, _I32(16)), _I32(1))
    rounded = builder.lshr(builder.add(word, builder.add(odd, _I32(0x7FFF))), _I32(16))
    number = builder.icmp_unsigned("<=", builder.and_(word, _I32(0x7FFFFFFF)), _I32(0x7F800000))
    return builder.trunc(builder.select(number, rounded, _I32(0x7FC0)), _I16)


# how an element of an array is computed with: (float type, from the element, to the element)
_ELEMENTS = {
    types.float32: (types.float32, lambda builder, word: word, lambda builder, value: value),
    types.float64: (types.float64, lambda builder, word: word, lambda builder, value: value),
    BFLOAT16: (types.float32, _from_bfloat16, _to_bfloat16),
}
if HALF:
    _ELEMENTS[FLOAT16] = (
        types.float32,
        lambda builder, word: builder.fpext(builder.bitcast(word, _HALF), _FLOAT),
        lambda builder, value: builder.bitcast(builder.fptrunc(value, _HALF), _I16),
    )


# the same by torch's dtype, for who prepares the arrays
ELEMENTS = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.int16}
if HALF:
    ELEMENTS[torch.float16] = np.uint16


@intrinsic
def _load(context, element):
    """The float that an element of a weight stands for."""
    number, load, _ = _ELEMENTS[element]
    return number(element), lambda context, builder, signature, arguments: load(builder, arguments[0])


@intrinsic
def _store(context, value, element):
    """``value`` rounded to an element of the kind of ``element``."""
    _, _, store = _ELEMENTS[element]
    return element(value, element), lambda context, builder, signature, arguments: store(builder, arguments[0])


# bits of infinity; above, without the sign, are NaNs
_INFINITY = {BFLOAT16: 0x7F80, FLOAT16: 0x7C00}


@intrinsic
def _differ(context, element, other):
    """1 where two elements differ in a bit, else 0; also for a 16-bit NaN, which torch rounds in several ways."""

    def generate(context, builder, signature, arguments):
        integer = ir.IntType(signature.args[0].bitwidth)
        a, b = (builder.bitcast(element, integer) for element in arguments)
        differ = builder.icmp_unsigned("!=", a, b)
        if element in _INFINITY:
            magnitude = builder.and_(a, integer(0x7FFF))
            differ = builder.or_(differ, builder.icmp_unsigned(">", magnitude, integer(_INFINITY[element])))
        return builder.zext(differ, ir.IntType(8))

    return types.uint8(element, element), generate


@intrinsic
def _trailing_zeros(context, word):
    """64 for 0."""
    never = ir.Constant(ir.IntType(1), 0)
    return types.uint64(types.uint64), lambda _, builder, signature, arguments: builder.cttz(arguments[0], never)


@intrinsic
def _ones(context, word):
    return types.uint64(types.uint64), lambda _, builder, signature, arguments: builder.ctpop(arguments[0])


@jit
def _add(w, delta, merged, differs):
    """merged (None: delta) <- round(w + delta), differs <- whether round(merged - delta) is not w to the bit."""
    for i in range(w.size):
        total = _store(_load(w[i]) + delta[i], w[i])
        differs[i] = _differ(_store(_load(total) - delta[i], total), w[i])
        if merged is None:  # decided when compiling; two names of one memory would not be vectorised
            delta[i] = total
        else:
            merged[i] = total


@jit
def _keep(differs, integers, base, offsets, values, kept):
    """The places and bits of the elements that differ, appended; ``differs`` is read in words of 64 bits.

    Up to _AT_ONCE places behind the last are written, too.
    """
    for group in range((integers.size + 63) // 64):
        first, found = np.uint64(64 * group), np.uint64(0)
        for q in range(8):  # the lowest bits of eight bytes, gathered in one
            found |= ((differs[8 * group + q] * _GATHER) >> np.uint64(56)) << np.uint64(8 * q)
        end = kept + _ones(found)
        for _ in range(_AT_ONCE):  # whether needed or not: cheaper than a branch that no processor foresees
            i = first + (_trailing_zeros(found) & np.uint64(63))
            offsets[kept] = base + i
            values[kept] = integers[min(i, np.uint64(integers.size - 1))]
            kept += np.uint64(1)
            found &= found - np.uint64(1)
        while found != np.uint64(0):
            i = first + _trailing_zeros(found)
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
def merge(
    w: np.ndarray,
    integers: np.ndarray,
    words: np.ndarray,
    delta: np.ndarray,
    merged: np.ndarray | None,
    offsets: np.ndarray,
    values: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
    multiplier: int,
) -> tuple[int, tuple[int, int, int]]:
    """merged <- round(w + delta); where round(merged - delta) is not w to the bit, its place and its bits are kept.

    All flat. ``integers`` and ``words`` are w's memory; without ``merged`` (None) delta is overwritten. Returns how
    many elements are kept, ``counts[c]`` of them in chunk c, or -1 where ``offsets`` and ``values`` are too short; and
    the fingerprint of w.
    """
    fingerprint = fold(words, weights, multiplier)
    differs = np.zeros(STRIP, np.uint8)
    words = differs.view(np.uint64)
    kept = np.uint64(0)
    for chunk in range(0, w.size, CHUNK):
        before = kept
        for start in range(chunk, min(chunk + CHUNK, w.size), STRIP):
            strip = slice(start, min(start + STRIP, w.size))
            if kept + np.uint64(MARGIN) > np.uint64(offsets.size):
                return -1, fingerprint
            if w.size - start < STRIP:
                differs[:] = 0
            _add(w[strip], delta[strip], None if merged is None else merged[strip], differs)
            kept = _keep(words, integers[strip], np.uint64(start - chunk), offsets, values, kept)
        counts[chunk // CHUNK] = kept - before
    return np.int64(kept), fingerprint


@jit
def restore(
    w: np.ndarray,
    delta: np.ndarray,
    original: np.ndarray | None,
    integers: np.ndarray,
    words: np.ndarray,
    counts: np.ndarray,
    offsets: np.ndarray,
    values: np.ndarray,
    weights: np.ndarray,
    multiplier: int,
) -> tuple[int, int, int]:
    """original <- round(w - delta), then the kept bits; delta is overwritten where there is None. Its fingerprint.

    ``integers`` and ``words`` are the memory that is written.
    """
    for i in range(w.size):
        value = _store(_load(w[i]) - delta[i], w[i])
        if original is None:
            delta[i] = value
        else:
            original[i] = value
    first = 0
    for c in range(counts.size):
        for i in range(first, first + counts[c]):
            integers[c * CHUNK + np.int64(offsets[i])] = values[i]
        first += counts[c]
    return fold(words, weights, multiplier)


@partial(jit, nogil=False)
def copy(source: np.ndarray, target: np.ndarray) -> None:
    """Few microseconds, in which handing the lock over and waiting to get it back would take longer than the copy."""
    for i in range(source.size):
        target[i] = source[i]
