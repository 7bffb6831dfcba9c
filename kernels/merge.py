"""In-place merge and bit-exact unmerge: W <- round(W +- D) in one pass over W, D = B A in fp32.

    A [R, K], B [N, R]   fp32, all adapters' ranks in a row, the scaling inside B          W [N, K]  fp32, bf16, fp16
    D[n, k]  = fma(B[n, R-1], A[R-1, k], ... fma(B[n, 0], A[0, k], 0))                     one rounding per step
    Wm       = round(W + D)
    C        = round(Wm - D)           is W for 88 to 99.8 % of the elements: the rest are the corrections

D is the chain of delta.py, the same bits for every tile shape and grid: the unmerge depends on it.

A program holds a unit of W in registers and decides about it before it writes it:

    merge          refuses a unit that would lose a finite element, or whose corrections find no room
    unmerge        refuses a unit whose sums are not those of the merge
    merge_again    merges the units that the last unmerge got through
    switch         unmerges a unit and, unless that is refused, merges it anew

A refusal is of the whole weight. The caller sees it in one number and takes back the units that were written: unmerge
after merge, merge_again after unmerge, both after switch. Either gives the exact bits, needs no memory, and skips what
was not written, so the weight is again as it was before the caller goes on. A check of the whole weight in a pass of
its own would read W once more and compute D once more, and the host would have to wait between the passes: 1.5 times
the bytes, twice the chain, for a case that ends in an exception.

What is kept and summed are words of 32 bits, one element of fp32 or two neighbours in a row: half the work for 16-bit
weights, where the instructions for each element and not the bytes set the time. With u the words of a unit and i their
numbers from 1 on, the sums are

    of Wm             u i             modulo 2^64
    of C              u (2 i + 1)     modulo 2^32: other factors than those of the merge show here
    of corrections    (u + 2^32) i    modulo 2^64

A change of one word is (u - v) i, and of two that change places (u - v) (i - j): below 2^64, and not 0.

Bytes: 2 e N K with e bytes an element, also of a switch, whose unit is in the L1 or L2 cache when it is merged; 6 a
correction of each record, 48 a unit, and the factors, which stay in L2. Instructions an element on sm_90 at rank 16, of
which the chain is 22 to 27, the rest counted once as compiled: bare 31, unmerge 49, merge 63 in 16 bits; 40, 72 and 93
in fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .config import capability
from .corrections import COLUMNS, SHIFT, Corrections, Form
from .delta import add_delta, zeros_like
from .dropout import all_lanes
from .grouped_shrink import TL_DTYPES, matrix_of
from .launch import KEPT, Launch

_COLUMNS = tl.constexpr(COLUMNS)
_SHIFT = tl.constexpr(SHIFT)
_LOW = tl.constexpr((1 << SHIFT) - 1)
_FIELDS = tl.constexpr(19)  # of a weight in the table of a group


@dataclass(frozen=True)
class MergeTile:
    """Tile of a launch: ROWS x COLS is the unit, at most 65535 words. Fewer COLS than threads keep the loads of A in
    W's layout."""

    ROWS: int = 32
    COLS: int = 64
    num_warps: int = 4


def default_tile(dtype: torch.dtype, recording: bool, capability: int, random: bool = False) -> MergeTile:
    """16 elements a thread, or 32 of 16 bits, which are faster, where they do not spill: on sm_90, and where nothing is
    kept or drawn."""
    many = dtype.itemsize == 2 and (not recording or (capability == 90 and not random))
    return MergeTile(ROWS=64 if many else 32)


def launch_options(
    tile: MergeTile, nvidia: bool, dtype: torch.dtype, recording: bool, masked_switch: bool = False
) -> dict[str, int | bool]:
    """No contraction but the written fma, because D's bits are a contract; registers for 16 warps a multiprocessor, for
    12 with 32 elements a thread and where 16 words a thread are kept, or for 8 with 32 elements and masks in a switch.
    """
    elements = tile.ROWS * tile.COLS // (32 * tile.num_warps)
    many = elements >= 32 or (recording and elements * dtype.itemsize >= 64)
    registers = 192 if masked_switch and elements >= 32 else 168 if many else 128
    return dict(num_warps=tile.num_warps, enable_fp_fusion=False) | (dict(maxnreg=registers) if nvidia else {})


@triton.jit
def _words(x):
    """The bit patterns of x [ROWS, COLS] as uint32: one an element, or two 16-bit neighbours, the left one low."""
    if x.dtype.primitive_bitwidth == 32:
        words = x.to(tl.uint32, bitcast=True)
    else:
        left, right = tl.split(tl.reshape(x.to(tl.uint16, bitcast=True), [x.shape[0], x.shape[1] // 2, 2]))
        words = left.to(tl.uint32) | (right.to(tl.uint32) << 16)
    return words


@triton.jit
def _elements(words, dtype: tl.constexpr):
    """The reverse of :func:`_words`."""
    if dtype.primitive_bitwidth == 16:
        halves = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))
        words = tl.reshape(halves, [words.shape[0], words.shape[1] * 2])
    return words.to(dtype, bitcast=True)


@triton.jit
def _plus(words, d, dtype: tl.constexpr, MINUS: tl.constexpr):
    """The words of round(x + d), or of round(x - d), where x [ROWS, COLS] are the elements of ``words``."""
    if dtype.primitive_bitwidth == 32:
        x = words.to(tl.float32, bitcast=True)
        words = (x - d if MINUS else x + d).to(tl.uint32, bitcast=True)
    else:
        left, right = tl.split(tl.reshape(d, [words.shape[0], words.shape[1], 2]))
        if dtype == tl.bfloat16:
            x, y = (words << 16).to(tl.float32, bitcast=True), (words & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            x = words.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
            y = (words >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
        x, y = (x - left if MINUS else x + left).to(dtype), (y - right if MINUS else y + right).to(dtype)
        x, y = x.to(tl.uint16, bitcast=True), y.to(tl.uint16, bitcast=True)
        words = x.to(tl.uint32) | (y.to(tl.uint32) << 16)
    return words


@triton.jit
def _not_finite(words, dtype: tl.constexpr):
    """Words with 1 in the sign bit of each infinity and NaN; their other bits mean nothing."""
    bits = dtype.primitive_bitwidth
    ONE: tl.constexpr = 0x00800000 if bits == 32 else 0x00800080 if dtype == tl.bfloat16 else 0x04000400
    return (words & (0x7FFFFFFF if bits == 32 else 0x7FFF7FFF)) + ONE


@triton.jit
def _add_sums(merged, back, kept, lost, merged2, back2, kept2, lost2):
    return merged + merged2, back + back2, kept + kept2, lost | lost2


@triton.jit
def _fourth(x, PART: tl.constexpr):
    """x[:, PART::4] in one dimension; a thread has neighbours of each row, four or eight, so nothing moves."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0] * x.shape[1] // 4, 2, 2]))
    first, second = tl.split(odd if PART % 2 else even)
    return second if PART // 2 else first


@triton.jit
def _sum_of_corrections(places_ptr, values_ptr, count):
    BLOCK: tl.constexpr = 256
    total = tl.zeros((BLOCK,), tl.int64)
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        place = tl.load(places_ptr + at, mask=at < count, other=0).to(tl.int64)
        value = tl.load(values_ptr + at, mask=at < count, other=0)
        total += (value.to(tl.uint32, bitcast=True).to(tl.int64) + 0x100000000) * place
    return tl.sum(total)


@triton.jit
def _store_corrections(w_unit, places_ptr, values_ptr, count, cols, COLS: tl.constexpr, stride_wn, stride_wk):
    """cols: how many columns the unit has within W."""
    BLOCK: tl.constexpr = 256
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        word = tl.load(places_ptr + at, mask=at < count, other=1).to(tl.int32) - 1
        value = tl.load(values_ptr + at, mask=at < count, other=0).to(tl.uint32, bitcast=True)
        w_ptrs = w_unit + (word // COLS).to(tl.int64) * stride_wn + (word % COLS).to(tl.int64) * stride_wk
        if w_unit.dtype.element_ty.primitive_bitwidth == 32:
            tl.store(w_ptrs, value.to(w_unit.dtype.element_ty, bitcast=True), mask=at < count)
        else:
            w_ptrs += (word % COLS).to(tl.int64) * stride_wk
            tl.store(w_ptrs, value.to(tl.uint16).to(w_unit.dtype.element_ty, bitcast=True), mask=at < count)
            right = (value >> 16).to(tl.uint16).to(w_unit.dtype.element_ty, bitcast=True)
            tl.store(w_ptrs + stride_wk, right, mask=(at < count) & (word % COLS * 2 + 1 < cols))


@triton.jit
def _dithered(total, dtype: tl.constexpr, seed, row0, col0):
    """fp32 [ROWS, COLS] rounded to 16 bits at random, the bits of ``blocks.dithered``; col0 is a multiple of 8."""
    chance = all_lanes(seed, row0, col0, total.shape[0], total.shape[1])
    pattern = total.to(tl.uint32, bitcast=True)
    sign, magnitude = pattern >> 16 & 0x8000, tl.minimum(pattern & 0x7FFFFFFF, 0x7F800000)
    if dtype == tl.bfloat16:
        half = magnitude + chance >> 16
    else:
        small = magnitude < 0x38800000
        units = tl.where(small, tl.abs(total), 0.0) * 16777216.0 + chance.to(tl.int32).to(tl.float32) * (1 / 65536)
        normal = tl.minimum(tl.maximum(magnitude, 0x38800000) - 0x38000000 + (chance >> 3) >> 13, 0x7C00)
        half = tl.where(small, units.to(tl.int32).to(tl.uint32), normal)
    return (sign | half).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def _corrections_of(row, places_ptr, values_ptr, GROUP: tl.constexpr, FIRST: tl.constexpr):
    """Places and values; of a group they are loaded where they are used, for held before they would cost registers."""
    if GROUP is not None:
        places_ptr, values_ptr = matrix_of(row, FIRST + 3, tl.uint16), matrix_of(row, FIRST + 4, tl.int32)
    return places_ptr, values_ptr


@triton.jit
def _do_unit(
    unit, row, w_ptr, a_ptr, b_ptr, table_ptr, places_ptr, values_ptr, seed_ptr,
    N, K, R, room,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    UNMERGE: tl.constexpr, RECORD: tl.constexpr, AGAIN: tl.constexpr, EVEN: tl.constexpr, RANDOM: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One unit of W; False where an unmerge refuses it. FIRST: the field of A in the row of a group."""
    if GROUP is not None:
        w_ptr, seed_ptr = matrix_of(row, 1, GROUP), matrix_of(row, 2, tl.int64)
        N, K = tl.load(row + 3).to(tl.int32), tl.multiple_of(tl.load(row + 4).to(tl.int32), 16)
        stride_wn, room = tl.multiple_of(tl.load(row + 5), 16), tl.load(row + 6)
        a_ptr, b_ptr = matrix_of(row, FIRST, tl.float32), matrix_of(row, FIRST + 1, tl.float32)
        table_ptr, R = matrix_of(row, FIRST + 2, tl.int64), tl.load(row + FIRST + 5).to(tl.int32)
        stride_ar, stride_bn = K, R
    WORDS: tl.constexpr = COLS * w_ptr.dtype.element_ty.primitive_bitwidth // 32  # in a row of a unit
    strips = tl.cdiv(K, COLS)
    unit_rows = tl.cdiv(N, ROWS)
    strip = unit % strips
    unit_row = unit // strips
    if RECORD or AGAIN:
        totals = table_ptr + unit_rows.to(tl.int64) * strips * _COLUMNS
    cols = tl.arange(0, COLS)
    rows = tl.arange(0, ROWS)
    first_col = strip.to(tl.int64) * COLS
    col_ok = (cols < K - strip * COLS) | EVEN
    if RECORD or AGAIN:
        entry = table_ptr + (unit_row.to(tl.int64) * strips + strip) * _COLUMNS
    if AGAIN:
        todo = tl.load(entry + 5) != 0
        tl.store(totals + 5, 0, mask=unit == 0)  # what was refused
    elif UNMERGE and RECORD:
        todo = tl.load(entry) != 0
        if not todo:
            tl.store(entry + 5, 0)
    else:
        todo = True
    fits = todo | (strip >= 0)
    if todo:
        first_row = unit_row.to(tl.int64) * ROWS
        row_ok = (rows < N - unit_row * ROWS) | EVEN
        inside = row_ok[:, None] & col_ok[None, :]
        w_unit = w_ptr + first_row * stride_wn + first_col * stride_wk
        w_ptrs = w_unit + rows[:, None].to(tl.int64) * stride_wn + cols[None, :].to(tl.int64) * stride_wk
        w = tl.load(w_ptrs, mask=inside)
        d = add_delta(
            zeros_like(w), a_ptr + first_col * stride_ak, b_ptr + first_row * stride_bn,
            cols.to(tl.int64) * stride_ak, rows.to(tl.int64) * stride_bn, col_ok, row_ok, R, stride_ar, stride_br,
        )  # fmt: skip
        old_words = _words(w)
        if RANDOM and not UNMERGE:
            row0 = tl.load(seed_ptr + 1) + first_row
            new = _dithered(w.to(tl.float32) + d, w.dtype, tl.load(seed_ptr), row0, strip * COLS)
            new = tl.where(tl.abs(w.to(tl.float32)) < float("inf"), new, w)
            new_words = _words(new)
        else:
            new_words = _plus(old_words, d, w.dtype, UNMERGE)
        if not RECORD:
            tl.store(w_ptrs, _elements(new_words, w.dtype), mask=inside)
            if AGAIN:
                tl.debug_barrier()  # other threads may not have read it
                tl.store(entry + 5, 0)
        else:
            if not EVEN:  # the bits of a word that are within W
                last, left = tl.arange(0, WORDS) * (COLS // WORDS) + (COLS // WORDS - 1), K - strip * COLS
                keep = tl.where(last < left, -1, tl.where(last - 1 < left, 0xFFFF, 0) if WORDS < COLS else 0)
                keep = tl.where(row_ok[:, None], keep[None, :], 0).to(tl.uint32, bitcast=True)
                old_words, new_words = old_words & keep, new_words & keep
            new = _elements(new_words, w.dtype)
            number = (rows[:, None] * WORDS + tl.arange(0, WORDS)[None, :] + 1).to(tl.uint32)
            if UNMERGE:
                places, values = _corrections_of(row, places_ptr, values_ptr, GROUP, FIRST)
                begin, count = tl.load(entry) - 1, tl.load(entry + 1).to(tl.int32)
                kept = _sum_of_corrections(places + begin, values + begin, count)
                sum_merged = tl.sum(old_words.to(tl.uint64) * number.to(tl.uint64)).to(tl.int64)
                sum_back = tl.sum(new_words * (2 * number + 1)).to(tl.int64)
                same = (tl.load(entry + 2) == sum_merged) & (tl.load(entry + 3) == sum_back)
                same &= tl.load(entry + 4) == kept
                fits = same
                tl.store(entry + 5, same.to(tl.int64))
                if same:
                    tl.store(w_ptrs, new, mask=inside)
                    tl.debug_barrier()  # candidates are stored by other threads than the corrections over them
                    _store_corrections(
                        w_unit, places + begin, values + begin, count, K - strip * COLS, WORDS, stride_wn, stride_wk
                    )  # fmt: skip
                else:
                    tl.atomic_add(totals + 5, 1, sem="relaxed")
            else:
                back_words = _plus(new_words, d, w.dtype, True)
                if not EVEN:
                    back_words &= keep
                # 1 or 0 by arithmetic: of predicates the compiler makes bit masks, and those it takes apart again
                wrong = back_words ^ old_words
                wrong = ((wrong >> 16) | (wrong & 0xFFFF)) + 0xFFFF >> 16
                kept = wrong * number
                SIGNS: tl.constexpr = 0x80000000 if WORDS == COLS else 0x80008000
                lost = _not_finite(new_words, w.dtype) & (_not_finite(old_words, w.dtype) ^ SIGNS)
                sum_merged, sum_back, sum_kept, lost = tl.reduce((
                    new_words.to(tl.uint64) * number.to(tl.uint64), back_words * (2 * number + 1),
                    kept.to(tl.uint64) * old_words.to(tl.uint64) + (kept.to(tl.uint64) << 32), lost,
                ), None, _add_sums)  # fmt: skip
                lost, wrong = ((lost & SIGNS) != 0).to(tl.int32), wrong.to(tl.int32)
                in_row = tl.sum(wrong, 1)
                count = tl.sum(in_row)
                before_row = tl.cumsum(in_row, 0) - in_row - 1
                place = tl.cumsum(wrong, 1).to(tl.uint32)
                begin = tl.atomic_add(totals, count.to(tl.int64) + (lost.to(tl.int64) << _SHIFT), sem="relaxed")
                begin = begin & _LOW
                places, values = _corrections_of(row, places_ptr, values_ptr, GROUP, FIRST)
                if (begin + count <= room) & (lost == 0):
                    for part in tl.static_range(4):  # a word of each thread at a time, in w's layout
                        at = begin + _fourth(before_row[:, None] + place, part)
                        mask = _fourth(wrong, part) != 0
                        tl.store(places + at, _fourth(number, part).to(tl.uint16), mask=mask)
                        tl.store(values + at, _fourth(old_words, part).to(tl.int32, bitcast=True), mask=mask)
                    tl.store(w_ptrs, new, mask=inside)
                    tl.store(entry, begin + 1)
                    tl.store(entry + 1, count.to(tl.int64))
                    tl.store(entry + 2, sum_merged.to(tl.int64))
                    tl.store(entry + 3, sum_back.to(tl.int64))
                    tl.store(entry + 4, sum_kept.to(tl.int64))
    return fits


@triton.jit
def _weight_of(group_ptr, unit, num_weights):
    """The row of the table of a group that has this unit: the last one whose first unit is not above it."""
    low, high = unit * 0, unit * 0 + num_weights
    while high - low > 1:
        middle = (low + high) // 2
        after = tl.load(group_ptr + middle.to(tl.int64) * _FIELDS) > unit
        low, high = tl.where(after, low, middle), tl.where(after, middle, high)
    return group_ptr + low.to(tl.int64) * _FIELDS


@triton.jit(do_not_specialize=["num_weights"])
def _merge_kernel(
    w_ptr, a_ptr, b_ptr, table_ptr, places_ptr, values_ptr, seed_ptr,
    old_a_ptr, old_b_ptr, old_table_ptr, old_places_ptr, old_values_ptr, group_ptr,
    N, K, R, room,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    OLD_R, stride_old_ar, stride_old_ak, stride_old_bn, stride_old_br, num_weights,
    UNMERGE: tl.constexpr, RECORD: tl.constexpr, AGAIN: tl.constexpr, EVEN: tl.constexpr, RANDOM: tl.constexpr,
    SWITCH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """RECORD: a merge keeps what its unmerge needs, an unmerge uses it. AGAIN: once what the last unmerge got through.
    EVEN: ROWS divides N and COLS divides K, nothing is masked. RANDOM: a merge rounds at random. SWITCH: an old merge
    is taken off first; the unit then comes from the L1 or L2 cache. GROUP: None, or the type of W's elements: addresses
    and sizes are those of the weight that has the program's unit, from its row of the table (:func:`launch_group`)."""
    unit = tl.program_id(0)
    if GROUP is not None:
        group_ptr = _weight_of(group_ptr, unit, num_weights)
        unit -= tl.load(group_ptr).to(tl.int32)
    if SWITCH:
        fits = _do_unit(
            unit, group_ptr, w_ptr, old_a_ptr, old_b_ptr, old_table_ptr, old_places_ptr, old_values_ptr, seed_ptr,
            N, K, OLD_R, room,
            stride_wn, stride_wk, stride_old_ar, stride_old_ak, stride_old_bn, stride_old_br,
            True, True, False, EVEN, False, ROWS, COLS, GROUP, 13,
        )  # fmt: skip
        tl.debug_barrier()  # corrections are stored by other threads than load the unit
        if fits:
            _do_unit(
                unit, group_ptr, w_ptr, a_ptr, b_ptr, table_ptr, places_ptr, values_ptr, seed_ptr, N, K, R, room,
                stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
                False, True, False, EVEN, RANDOM, ROWS, COLS, GROUP, 7,
            )  # fmt: skip
    else:
        _do_unit(
            unit, group_ptr, w_ptr, a_ptr, b_ptr, table_ptr, places_ptr, values_ptr, seed_ptr, N, K, R, room,
            stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
            UNMERGE, RECORD, AGAIN, EVEN, RANDOM, ROWS, COLS, GROUP, 7,
        )  # fmt: skip


def _is_transposed(W) -> bool:
    return W.stride(0) < W.stride(1)


def _along_rows(W, A, B, transposed: bool):
    """The same merge with W's contiguous dimension last: a transposed W (fan_in_fan_out) swaps the factors' roles.

    Of a record it is what W was when it was merged: the units are counted along those rows, whatever W's strides are.
    """
    return (W.t(), B.t(), A.t()) if transposed else (W, A, B)


def _launch(W, A, B, tile, record=None, old=(None, None, None), *, UNMERGE=False, AGAIN=False) -> None:
    """One launch; W is [N, K] along rows. old: A, B and the record of what a switch takes off."""
    if W.numel() == 0:
        return
    RECORD = record is not None and not AGAIN
    room = len(record.values) if RECORD and not UNMERGE else None
    old_A, old_B, before = old
    taken = (None,) * 5 if old_A is None else (len(old_A), *old_A.stride(), *old_B.stride())
    sizes = *W.shape, len(A), room, *W.stride(), *A.stride(), *B.stride(), *taken, None
    seed = None if record is None or UNMERGE else record.seed
    launch = _prepared(sizes, tile, W.dtype, W.device, UNMERGE, RECORD, AGAIN, seed is not None)
    places, values = (record.places, record.values) if RECORD else (None, None)
    held = (None, None, None) if before is None else (before.table, before.places, before.values)
    launch(_merge_kernel, W, A, B, record and record.table, places, values, seed, old_A, old_B, *held, None)


@lru_cache(KEPT)
def _prepared(
    sizes, tile, dtype, device, UNMERGE, RECORD, AGAIN, RANDOM, group: tuple[int, bool] | None = None
) -> Launch:
    """group: units of all its weights, and EVEN."""
    SWITCH = sizes[-2] is not None
    units, EVEN = group or (_units(*sizes[:2], tile), _is_even(*sizes[:2], tile))
    return Launch(
        (units,), *sizes,
        UNMERGE=UNMERGE, RECORD=RECORD, AGAIN=AGAIN, EVEN=EVEN, RANDOM=RANDOM, SWITCH=SWITCH,
        GROUP=TL_DTYPES[dtype] if group else None, ROWS=tile.ROWS, COLS=tile.COLS,
        **launch_options(tile, not torch.version.hip, dtype, RECORD, SWITCH and not EVEN),
    )  # fmt: skip


def _units(N: int, K: int, tile: MergeTile) -> int:
    return -(-N // tile.ROWS) * -(-K // tile.COLS)


def _is_even(N: int, K: int, tile: MergeTile) -> bool:
    return N % tile.ROWS == 0 and K % tile.COLS == 0


Merge = tuple[torch.Tensor, torch.Tensor, Corrections]  # A, B and the record


class Member(NamedTuple):
    """One weight of :func:`launch_group`: as for :func:`merge`, or with ``old`` as for :func:`switch`."""

    W: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    record: Corrections
    old: Merge | None = None


def launch_group(members: Sequence[Member], UNMERGE: bool = False) -> None:
    """:func:`merge`, :func:`switch` or :func:`unmerge` of many weights: the upload of a table, and one launch.

    All have the same :func:`group_of`, an old merge or none, and round at random or not. The caller keeps their tensors
    until it has waited for the launch.
    """
    *_, record, old = members[0]
    SWITCH = old is not None
    RANDOM, tile = record.seed is not None and not UNMERGE, MergeTile(*record.unit)
    rows, units, EVEN = [], 0, True
    for W, A, B, record, old in members:
        along, *factors = _along_rows(W, A, B, record.transposed)
        merges = _fields(*factors, record)
        merges += [0] * 6 if old is None else _fields(*_along_rows(W, *old[:2], record.transposed)[1:], old[2])
        seed = 0 if record.seed is None else record.seed.data_ptr()
        rows.append([units, along.data_ptr(), seed, *along.shape, along.stride(0), len(record.values), *merges])
        units += _units(*along.shape, tile)
        EVEN = EVEN and _is_even(*along.shape, tile)
    # a copy from pageable memory is staged, so nobody waits for it
    table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(W.device, non_blocking=True)
    unit = 1 if SWITCH else None
    sizes = *(None,) * 4, None, 1, None, 1, None, 1, None, None, unit, None, unit, len(rows)
    launch = _prepared(sizes, tile, W.dtype, W.device, UNMERGE, True, False, RANDOM, (units, EVEN))
    launch(_merge_kernel, *(None,) * 12, table)


def _fields(A, B, record: Corrections) -> list[int]:
    return [*(t.data_ptr() for t in (A, B, record.table, record.places, record.values)), len(A)]


def group_of(
    W: torch.Tensor, factors: Sequence[tuple[torch.Tensor, torch.Tensor]], form: Form
) -> tuple[MergeTile, torch.dtype, torch.device, bool] | None:
    """What the weights of a group have in common: tile, dtype, device, and whether the tile divides them.

    None: W has a launch of its own. In a group rows are contiguous, and their length, their distance and all addresses
    are multiples of 16, so that 16 bytes are loaded at a time.

    factors: (A, B), and those of an old merge. form: of the records.
    """
    tile, tensors = MergeTile(*form.unit), [t for A, B in factors for t in _along_rows(W, A, B, form.transposed)[1:]]
    W = W.t() if form.transposed else W
    plain = W.stride(1) == 1 and all(t.is_contiguous() for t in tensors)
    multiples = [W.shape[1], W.stride(0), *[t.data_ptr() for t in (W, *tensors)]]
    if W.numel() == 0 or not plain or any(n % 16 for n in multiples):
        return None
    return tile, W.dtype, W.device, _is_even(*W.shape, tile)


def _tile_of(record: Corrections, tile: MergeTile | None) -> MergeTile:
    """The record's units by the program of ``tile``."""
    return MergeTile(*record.unit, (tile or MergeTile()).num_warps)


def form_of(W: torch.Tensor, random: bool) -> Form:
    """Of a new record."""
    tile = default_tile(W.dtype, True, capability(W.device), random)
    return Form((tile.ROWS, tile.COLS), _is_transposed(W))


def new_record(
    W: torch.Tensor, room: int, tile: MergeTile | None = None, dither: tuple[int, int] | None = None
) -> Corrections:
    """Memory for a merge of W with up to ``room`` corrections. Until then an unmerge with it does nothing.

    dither: (seed, number of the first row as W is stored): the merge rounds to 16 bits at random.
    """
    (record,) = new_records([(W, room, dither)], tile)
    return record


def new_records(
    weights: Sequence[tuple[torch.Tensor, int, tuple[int, int] | None]], tile: MergeTile | None = None
) -> list[Corrections]:
    """:func:`new_record` of each (W, room, dither) on one device, with one launch and no wait."""
    records = []
    for W, room, dither in weights:
        own = tile or default_tile(W.dtype, True, capability(W.device), dither is not None)
        transposed = _is_transposed(W)
        units = _units(*(W.t() if transposed else W).shape, own)
        table = torch.empty((units + 1, COLUMNS), dtype=torch.int64, device=W.device)
        places = torch.empty(room, dtype=torch.uint16, device=W.device)
        values = torch.empty(room, dtype=torch.int32, device=W.device)
        seed = None if dither is None else torch.tensor(dither, dtype=torch.int64, device="cpu")
        seed = None if seed is None else seed.to(W.device, non_blocking=True)
        records.append(Corrections(table, places, values, (own.ROWS, own.COLS), seed, transposed))
    torch._foreach_zero_([record.table for record in records])
    return records


def merge(
    W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, record: Corrections, tile: MergeTile | None = None
) -> None:
    """W <- round(W + B A) in place, and what it takes to undo it into ``record``, from :func:`new_record`. One launch.

    W: [N, K], any strides. A: [R, K] and B: [N, R], fp32, scaling inside B, any strides.
    If ``record.totals()`` then says that units were lost, or more corrections than there was room for, only some units
    are merged: :func:`unmerge` takes them back.
    """
    _launch(*_along_rows(W, A, B, record.transposed), _tile_of(record, tile), record)


def unmerge(W, A, B, record: Corrections, tile: MergeTile | None = None) -> None:
    """The bits from before :func:`merge` in place, unit by unit. One launch over W.

    If ``record.refused`` is not 0 then, W is not what the merge left: :func:`merge_again` takes the others back.
    """
    _launch(*_along_rows(W, A, B, record.transposed), _tile_of(record, tile), record, UNMERGE=True)


def switch(
    W: torch.Tensor,
    old: Merge,
    new: Merge,
    tile: MergeTile | None = None,
) -> None:
    """:func:`unmerge` with old's (A, B, record) and :func:`merge` with new's, unit by unit. One launch.

    The records have the same form. A unit that the unmerge refuses stays as it is, one that the merge refuses is
    unmerged: :func:`unmerge` with new's and then :func:`merge_again` with old's take everything back.
    """
    before, (A, B, record) = old[2], new
    _, *factors = _along_rows(W, *old[:2], record.transposed)
    _launch(*_along_rows(W, A, B, record.transposed), _tile_of(record, tile), record, (*factors, before))


def merge_again(W, A, B, record: Corrections, tile: MergeTile | None = None) -> None:
    """Undo the last :func:`unmerge`, to the bit; another call finds nothing to undo. One launch."""
    _launch(*_along_rows(W, A, B, record.transposed), _tile_of(record, tile), record, AGAIN=True)


def merge_apply(W, A, B, tile: MergeTile | None = None) -> None:
    """W <- round(W + B A) in place and nothing else: no check, no record, no way back to the bit."""
    _launch(*_along_rows(W, A, B, _is_transposed(W)), tile or default_tile(W.dtype, False, 0))


def unmerge_apply(W, A, B, tile: MergeTile | None = None) -> None:
    """W <- round(W - B A) in place: most of the bits from before :func:`merge_apply`."""
    _launch(*_along_rows(W, A, B, _is_transposed(W)), tile or default_tile(W.dtype, False, 0), UNMERGE=True)
