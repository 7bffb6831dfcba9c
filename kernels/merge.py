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

A refusal is of the whole weight. The caller sees it in one number and takes back the units that were written: unmerge
after merge, merge_again after unmerge. Either gives the exact bits, needs no memory, and skips what was not written, so
the weight is again as it was before the caller goes on. A check of the whole weight in a pass of its own would read W
once more and compute D once more, and the host would have to wait between the passes: 1.5 times the bytes, twice the
chain, for a case that ends in an exception.

Sums of a unit, over the bit patterns u of elements and their numbers i from 1 on, modulo 2^32 for 16-bit weights and
2^64 for 32-bit ones:

    of Wm             u i
    of C              u i
    of corrections    (u + 2^16) i

A change of one element is (u - v) i, one of two that change places is (u - v) (i - j): both below the modulus, and not
0. The second sum finds factors, the third corrections, that are not those of the merge.

Bytes: 2 e N K with e bytes an element, c (e + 2) for c corrections, 48 a unit, and the factors, which stay in L2.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .corrections import COLUMNS, Corrections
from .delta import add_delta, bits_of, zeros_like

_COLUMNS = tl.constexpr(COLUMNS)
_INFINITY = tl.constexpr(0x7F800000)


@dataclass(frozen=True)
class MergeTile:
    """Tile of a launch: ROWS x COLS is the unit, at most 32768 elements; a program does UNITS of them, one below the
    other. COLS below the number of threads keeps the loads of A in W's layout."""

    ROWS: int = 32
    COLS: int = 128
    UNITS: int = 1
    num_warps: int = 8


def default_tile(dtype: torch.dtype, recording: bool) -> MergeTile:
    """32 elements a thread, and 16 where what is counted and kept needs the registers."""
    return MergeTile() if recording or dtype == torch.float32 else MergeTile(ROWS=64)


def launch_options(tile: MergeTile, nvidia: bool) -> dict[str, int | bool]:
    """No contraction but the written fma, because D's bits are a contract; registers for 16 warps a multiprocessor."""
    return dict(num_warps=tile.num_warps, enable_fp_fusion=False) | (dict(maxnreg=128) if nvidia else {})


@triton.jit
def _sum_of_corrections(places_ptr, values_ptr, count, INT: tl.constexpr):
    BLOCK: tl.constexpr = 256
    total = tl.zeros((BLOCK,), INT)
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        place = tl.load(places_ptr + at, mask=at < count, other=0).to(INT)
        value = tl.load(values_ptr + at, mask=at < count, other=0.0)
        total += tl.where(at < count, (bits_of(value, INT) + 65536) * place, 0)
    return tl.sum(total).to(tl.int64)


@triton.jit
def _store_corrections(w_unit, places_ptr, values_ptr, count, COLS: tl.constexpr, stride_wn, stride_wk):
    BLOCK: tl.constexpr = 256
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        place = tl.load(places_ptr + at, mask=at < count, other=1).to(tl.int32) - 1
        value = tl.load(values_ptr + at, mask=at < count, other=0.0)
        to = w_unit + (place // COLS).to(tl.int64) * stride_wn + (place % COLS).to(tl.int64) * stride_wk
        tl.store(to, value, mask=at < count)


@triton.jit
def _merge_kernel(
    w_ptr, a_ptr, b_ptr, table_ptr, places_ptr, values_ptr,
    N, K, R, room,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    UNMERGE: tl.constexpr, RECORD: tl.constexpr, AGAIN: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """RECORD: a merge keeps what its unmerge needs, an unmerge uses it. AGAIN: only what the last unmerge got through.
    EVEN: ROWS divides N and COLS divides K, nothing is masked."""
    WIDE: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth == 32
    INT: tl.constexpr = tl.int64 if WIDE else tl.int32
    strips = tl.cdiv(K, COLS)
    unit_rows = tl.cdiv(N, ROWS)
    strip = tl.program_id(0) % strips
    first = tl.program_id(0) // strips * UNITS
    if RECORD:
        totals = table_ptr + unit_rows.to(tl.int64) * strips * _COLUMNS
    cols = tl.arange(0, COLS)
    rows = tl.arange(0, ROWS)
    first_col = strip.to(tl.int64) * COLS
    col_ok = (cols < K - strip * COLS) | EVEN
    number = rows[:, None] * COLS + cols[None, :] + 1
    for i in range(0, tl.minimum(UNITS, unit_rows - first)):
        unit_row = first + i
        if RECORD or AGAIN:
            entry = table_ptr + (unit_row.to(tl.int64) * strips + strip) * _COLUMNS
        if AGAIN:
            todo = tl.load(entry + 5) != 0
        elif UNMERGE and RECORD:
            todo = tl.load(entry) != 0
            if not todo:
                tl.store(entry + 5, 0)
        else:
            todo = True
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
            new = (w.to(tl.float32) - d).to(w.dtype) if UNMERGE else (w.to(tl.float32) + d).to(w.dtype)
            if not RECORD:
                tl.store(w_ptrs, new, mask=inside)
            else:
                merged = w if UNMERGE else new
                back = new if UNMERGE else (new.to(tl.float32) - d).to(w.dtype)
                back_bits = bits_of(back, tl.uint32)
                sum_merged = tl.sum(tl.where(inside, bits_of(merged, INT) * number.to(INT), 0)).to(tl.int64)
                sum_back = tl.sum(tl.where(inside, back_bits.to(INT) * number.to(INT), 0)).to(tl.int64)
                if UNMERGE:
                    begin, count = tl.load(entry) - 1, tl.load(entry + 1).to(tl.int32)
                    kept = _sum_of_corrections(places_ptr + begin, values_ptr + begin, count, INT)
                    same = (tl.load(entry + 2) == sum_merged) & (tl.load(entry + 3) == sum_back)
                    same &= tl.load(entry + 4) == kept
                    tl.store(entry + 5, same.to(tl.int64))
                    if same:
                        tl.store(w_ptrs, new, mask=inside)
                        tl.debug_barrier()  # candidates are stored by other threads than the corrections over them
                        _store_corrections(
                            w_unit, places_ptr + begin, values_ptr + begin, count, COLS, stride_wn, stride_wk
                        )
                    else:
                        tl.atomic_add(totals + 2, 1, sem="relaxed")
                else:
                    wrong = back_bits ^ bits_of(w, tl.uint32)
                    if WIDE:
                        wrong = (wrong >> 16) | (wrong & 0xFFFF)
                    # 0 or 1 by arithmetic: predicates are few, and the compiler would pack and unpack them
                    wrong = tl.where(inside, (wrong + 0xFFFF) >> 16, 0).to(tl.int32)
                    size = tl.where(inside, new.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
                    lost = 0
                    if tl.max(size) >= _INFINITY:
                        before = w.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
                        lost = tl.sum(((size >= _INFINITY) & (before < _INFINITY)).to(tl.int32))
                    in_row = tl.sum(wrong, 1)
                    count = tl.sum(in_row)
                    before_row = tl.cumsum(in_row, 0) - in_row - 1
                    place = tl.cumsum(wrong, 1).to(tl.uint32)
                    begin = tl.atomic_add(totals, count.to(tl.int64), sem="relaxed")
                    if lost > 0:
                        tl.atomic_add(totals + 1, lost.to(tl.int64), sem="relaxed")
                    elif begin + count <= room:
                        WIDTH: tl.constexpr = 4 if WIDE else 8
                        # Addresses called contiguous, which they are not, keep the stores in w's layout; the mask, of
                        # which the compiler knows nothing, splits them into stores of one element.
                        to = (places_ptr + begin + before_row)[:, None] + place
                        to = tl.max_contiguous(tl.multiple_of(to, [1, 16]), [1, WIDTH])
                        tl.store(to, number.to(tl.uint16), mask=wrong != 0)
                        to = (values_ptr + begin + before_row)[:, None] + place
                        to = tl.max_contiguous(tl.multiple_of(to, [1, 16]), [1, WIDTH])
                        tl.store(to, w, mask=wrong != 0)
                        tl.store(w_ptrs, new, mask=inside)
                        tl.debug_barrier()  # they are read by other threads than stored them
                        kept = _sum_of_corrections(places_ptr + begin, values_ptr + begin, count, INT)
                        tl.store(entry, begin + 1)
                        tl.store(entry + 1, count.to(tl.int64))
                        tl.store(entry + 2, sum_merged)
                        tl.store(entry + 3, sum_back)
                        tl.store(entry + 4, kept)


def _along_rows(W, A, B):
    """The same merge with W's contiguous dimension last: a transposed W (fan_in_fan_out) swaps the factors' roles."""
    return (W.t(), B.t(), A.t()) if W.stride(0) < W.stride(1) else (W, A, B)


def _launch(W, A, B, tile, record=None, *, UNMERGE=False, AGAIN=False) -> None:
    """One launch; W is [N, K] along rows."""
    if W.numel() == 0:
        return
    (N, K), RECORD = W.shape, record is not None and not AGAIN
    strips = -(-K // tile.COLS)
    with torch.cuda.device_of(W):
        _merge_kernel[(strips * -(-N // (tile.ROWS * tile.UNITS)),)](
            W, A, B, record and record.table, record.places if RECORD else None, record.values if RECORD else None,
            N, K, len(A), len(record.values) if RECORD else None,
            *W.stride(), *A.stride(), *B.stride(),
            UNMERGE=UNMERGE, RECORD=RECORD, AGAIN=AGAIN, EVEN=N % tile.ROWS == 0 and K % tile.COLS == 0,
            ROWS=tile.ROWS, COLS=tile.COLS, UNITS=tile.UNITS, **launch_options(tile, nvidia=not torch.version.hip),
        )  # fmt: skip


def _tile_of(record: Corrections, tile: MergeTile | None, dtype: torch.dtype) -> MergeTile:
    """The record's units by the program of ``tile``."""
    tile = tile or default_tile(dtype, recording=True)
    return MergeTile(*record.unit, tile.UNITS, tile.num_warps)


def new_record(W: torch.Tensor, room: int, tile: MergeTile | None = None) -> Corrections:
    """Memory for a merge of W with up to ``room`` corrections. Until then an unmerge with it does nothing."""
    tile = tile or default_tile(W.dtype, recording=True)
    N, K = (W.t() if W.stride(0) < W.stride(1) else W).shape
    units = -(-N // tile.ROWS) * -(-K // tile.COLS)
    return Corrections(
        torch.zeros((units + 1, COLUMNS), dtype=torch.int64, device=W.device),
        torch.empty(room, dtype=torch.uint16, device=W.device),
        torch.empty(room, dtype=W.dtype, device=W.device),
        (tile.ROWS, tile.COLS),
    )


def merge(
    W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, record: Corrections, tile: MergeTile | None = None
) -> None:
    """W <- round(W + B A) in place, and what it takes to undo it into ``record``, from :func:`new_record`. One launch.

    W: [N, K], any strides. A: [R, K] and B: [N, R], fp32, scaling inside B, any strides.
    If ``record.totals`` then says that elements were lost, or more corrections than there was room for, only some units
    are merged: :func:`unmerge` takes them back.
    """
    _launch(*_along_rows(W, A, B), _tile_of(record, tile, W.dtype), record)


def unmerge(W, A, B, record: Corrections, tile: MergeTile | None = None) -> None:
    """The bits from before :func:`merge` in place, unit by unit. One launch over W.

    If ``record.refused`` is not 0 then, W is not what the merge left: :func:`merge_again` takes the others back.
    """
    record.refused.zero_()
    _launch(*_along_rows(W, A, B), _tile_of(record, tile, W.dtype), record, UNMERGE=True)


def merge_again(W, A, B, record: Corrections, tile: MergeTile | None = None) -> None:
    """Undo the last :func:`unmerge`, to the bit."""
    _launch(*_along_rows(W, A, B), _tile_of(record, tile, W.dtype), record, AGAIN=True)


def merge_apply(W, A, B, tile: MergeTile | None = None) -> None:
    """W <- round(W + B A) in place and nothing else: no check, no record, no way back to the bit."""
    _launch(*_along_rows(W, A, B), tile or default_tile(W.dtype, recording=False))


def unmerge_apply(W, A, B, tile: MergeTile | None = None) -> None:
    """W <- round(W - B A) in place: most of the bits from before :func:`merge_apply`."""
    _launch(*_along_rows(W, A, B), tile or default_tile(W.dtype, recording=False), UNMERGE=True)
