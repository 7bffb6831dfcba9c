"""In-place merge and bit-exact unmerge: one kernel, W <- round(W +- D), D = B A in fp32.

    A [R, K], B [N, R]   fp32, all adapters' ranks in a row, the scaling inside B          W [N, K]  fp32, bf16, fp16
    D[n, k]  = fma(B[n, R-1], A[R-1, k], ... fma(B[n, 0], A[0, k], 0))                     one rounding per step
    Wm       = round(W + D)            round(Wm - D) is W for 88 to 99.8 % of the elements: the rest is remembered

D is the chain of delta.py, the same bits for every tile shape and grid: the unmerge depends on it.

    merge_scan         reads W: corrections per segment, fingerprint of W and Wm, elements that would cease to be finite
    merge_apply        reads and writes W, and stores the corrections in the same pass, where the scan's counts say
    unmerge_scan       reads Wm: fingerprint of Wm and of what unmerge_apply would write
    unmerge_apply      reads and writes W: the candidate round(Wm - D), then the corrections over it

A segment is SEGMENT columns of one row; its corrections lie together, so nothing depends on which program came first.
The only atomics are integer additions. A fingerprint is, per row, sum(u) and sum(u * column) over the bit patterns u,
modulo 2^32 for 16-bit weights and 2^64 for 32-bit ones: it sees every change of one element of a row, and every
exchange of two (in 16 bits up to 65536 columns).

Bytes, with e bytes an element and c corrections; the floor of a merge is 2 e N K. Scan: e N K. Apply: 2 e N K +
c (e + 1). Beside them 2 bytes a segment, 16 or 32 a row, and the factors, which stay in L2. Nothing of size [N, K] is
allocated, and a pass that writes W allocates nothing but 8 bytes a segment before it starts.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .corrections import Corrections, Scan
from .delta import add_delta, bits_of, zeros_like

SEGMENT = 256  # columns, so that a position fits a byte; part of a record's format, no tile may change it
_SEGMENT = tl.constexpr(SEGMENT)


@dataclass(frozen=True)
class MergeTile:
    """Tile of a launch. Any choice gives the same bits; BLOCK_K divides SEGMENT."""

    BLOCK_N: int = 32
    BLOCK_K: int = 64
    num_warps: int = 4


def default_tile(dtype: torch.dtype, counting: bool) -> MergeTile:
    """As many elements a thread as leave no spills: 32, half of it where a pass counts too, and half again in fp32."""
    return MergeTile(BLOCK_N=64 >> (counting + (dtype == torch.float32)))


def launch_options(tile: MergeTile, nvidia: bool) -> dict[str, int | bool]:
    """No contraction but the written fma, because D's bits are a contract; registers for 3 programs a multiprocessor,
    which keeps ptxas from spilling for the sake of a fourth."""
    return dict(num_warps=tile.num_warps, enable_fp_fusion=False) | (dict(maxnreg=168) if nvidia else {})


@triton.jit
def _lost(w, new):
    """Elements finite in w and not in new."""
    v, n = w.to(tl.float32), new.to(tl.float32)
    return (v - v == 0.0) & (n - n != 0.0)


@triton.jit
def _apply_corrections(
    w_ptr, a_ptr, b_ptr, cols_ptr, values_ptr,
    rows, row_ok, begin, end, first_col, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    SCAN: tl.constexpr, INT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the corrections [begin, end) of each row, or with SCAN return what they change in the two sums."""
    BLOCK_C: tl.constexpr = 16
    plain = tl.zeros((BLOCK_N,), INT)
    weighted = tl.zeros((BLOCK_N,), INT)
    for i in range(0, tl.max(end - begin, 0), BLOCK_C):
        at = begin[:, None] + i + tl.arange(0, BLOCK_C)[None, :]
        todo = at < end[:, None]
        cols = first_col + tl.load(cols_ptr + at, mask=todo, other=0).to(tl.int64)
        value = tl.load(values_ptr + at, mask=todo, other=0.0)
        w_ptrs = w_ptr + rows[:, None] * stride_wn + cols * stride_wk
        if SCAN:
            w = tl.load(w_ptrs, mask=todo, other=0.0)
            d = add_delta(
                zeros_like(w), a_ptr, b_ptr, rows, cols, row_ok, todo, R,
                stride_ar, stride_ak, stride_bn, stride_br, GATHER=True,
            )  # fmt: skip
            change = tl.where(todo, bits_of(value, INT) - bits_of((w.to(tl.float32) - d).to(w.dtype), INT), 0)
            plain += tl.sum(change, 1)
            weighted += tl.sum(change * cols.to(INT), 1)
        else:
            tl.store(w_ptrs, value, mask=todo)
    return plain, weighted


@triton.jit
def _merge_kernel(
    w_ptr, a_ptr, b_ptr,
    counts_ptr, ends_ptr, cols_ptr, values_ptr, fingerprint_ptr, totals_ptr,
    N, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    UNMERGE: tl.constexpr, SCAN: tl.constexpr, CORRECT: tl.constexpr, INT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """SCAN: only count and sum, else write W. CORRECT: a merge stores its corrections, an unmerge uses them."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    segment = rows * tl.num_programs(1) + tl.program_id(1)
    first_col = tl.program_id(1).to(tl.int64) * _SEGMENT
    found = tl.zeros((BLOCK_N,), tl.int32)
    lost = tl.zeros((BLOCK_N,), tl.int32)
    old_plain = tl.zeros((BLOCK_N,), INT)
    old_weighted = tl.zeros((BLOCK_N,), INT)
    new_plain = tl.zeros((BLOCK_N,), INT)
    new_weighted = tl.zeros((BLOCK_N,), INT)
    if CORRECT and not UNMERGE:
        begin = tl.load(ends_ptr + segment - 1, mask=row_ok & (segment > 0), other=0)

    for k in range(first_col, tl.minimum(first_col + _SEGMENT, K), BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = row_ok[:, None] & (cols[None, :] < K)
        w_ptrs = w_ptr + rows[:, None] * stride_wn + cols[None, :] * stride_wk
        w = tl.load(w_ptrs, mask=inside, other=0.0)
        d = add_delta(
            zeros_like(w), a_ptr, b_ptr, rows, cols, row_ok, cols < K, R,
            stride_ar, stride_ak, stride_bn, stride_br, GATHER=False,
        )  # fmt: skip
        new = (w.to(tl.float32) - d).to(w.dtype) if UNMERGE else (w.to(tl.float32) + d).to(w.dtype)
        if (SCAN or CORRECT) and not UNMERGE:
            wrong = (bits_of((new.to(tl.float32) - d).to(w.dtype), INT) != bits_of(w, INT)) & inside
            if CORRECT:
                at = begin[:, None] + found[:, None] + tl.cumsum(wrong.to(tl.int32), 1) - 1
                place = tl.broadcast_to((cols - first_col)[None, :], (BLOCK_N, BLOCK_K))
                tl.store(cols_ptr + at, place.to(tl.uint8), mask=wrong)
                tl.store(values_ptr + at, w, mask=wrong)
            found += tl.sum(wrong.to(tl.int32), 1)
        if SCAN:
            lost += tl.sum((_lost(w, new) & inside).to(tl.int32), 1)
            column = cols[None, :].to(INT)
            old_bits = tl.where(inside, bits_of(w, INT), 0)
            new_bits = tl.where(inside, bits_of(new, INT), 0)
            old_plain += tl.sum(old_bits, 1)
            old_weighted += tl.sum(old_bits * column, 1)
            new_plain += tl.sum(new_bits, 1)
            new_weighted += tl.sum(new_bits * column, 1)
        else:
            tl.store(w_ptrs, new, mask=inside)

    if UNMERGE and CORRECT:
        if not SCAN:
            # candidates are stored by other threads than the corrections that go over them
            tl.debug_barrier()
        begin = tl.load(ends_ptr + segment - 1, mask=row_ok & (segment > 0), other=0)
        end = tl.load(ends_ptr + segment, mask=row_ok, other=0)
        plain, weighted = _apply_corrections(
            w_ptr, a_ptr, b_ptr, cols_ptr, values_ptr,
            rows, row_ok, begin, end, first_col, R,
            stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
            SCAN, INT, BLOCK_N,
        )  # fmt: skip
        new_plain += plain
        new_weighted += weighted
    if SCAN:
        sums = fingerprint_ptr + rows * 4
        tl.atomic_add(sums, old_plain, mask=row_ok, sem="relaxed")
        tl.atomic_add(sums + 1, old_weighted, mask=row_ok, sem="relaxed")
        tl.atomic_add(sums + 2, new_plain, mask=row_ok, sem="relaxed")
        tl.atomic_add(sums + 3, new_weighted, mask=row_ok, sem="relaxed")
        if not UNMERGE:
            tl.store(counts_ptr + segment, found.to(tl.int16), mask=row_ok)
            tl.atomic_add(totals_ptr, tl.sum(found, 0).to(tl.int64), sem="relaxed")
            tl.atomic_add(totals_ptr + 1, tl.sum(lost, 0).to(tl.int64), sem="relaxed")


def _along_rows(W, A, B):
    """The same merge with W's contiguous dimension last: a transposed W (fan_in_fan_out) swaps the factors' roles."""
    return (W.t(), B.t(), A.t()) if W.stride(0) < W.stride(1) else (W, A, B)


def _launch(W, A, B, tile, corrections=None, *, UNMERGE=False, counts=None, fingerprint=None, totals=None) -> None:
    """One launch; W is [N, K] along rows. It scans if it gets a fingerprint to fill, else it writes W."""
    if W.numel() == 0:
        return
    (N, K), scan, c = W.shape, fingerprint is not None, corrections
    tile = tile or default_tile(W.dtype, counting=scan or (c is not None and not UNMERGE))
    ends = None if c is None else c.counts.flatten().cumsum(0, dtype=torch.int64)
    with torch.cuda.device_of(W):
        _merge_kernel[(triton.cdiv(N, tile.BLOCK_N), triton.cdiv(K, SEGMENT))](
            W, A, B,
            counts, ends, c and c.cols, c and c.values, fingerprint, totals,
            N, K, len(A),
            *W.stride(), *A.stride(), *B.stride(),
            UNMERGE=UNMERGE, SCAN=scan, CORRECT=c is not None, INT=tl.int64 if W.dtype == torch.float32 else tl.int32,
            BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, **launch_options(tile, nvidia=not torch.version.hip),
        )  # fmt: skip


def _new_fingerprint(W: torch.Tensor) -> torch.Tensor:
    return torch.zeros((len(W), 4), dtype=torch.int64 if W.dtype == torch.float32 else torch.int32, device=W.device)


def merge_scan(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, tile: MergeTile | None = None) -> Scan:
    """What ``merge_apply`` would do, without doing it. One launch that only reads W.

    W: [N, K], any strides. A: [R, K] and B: [N, R], fp32, scaling inside B, any strides (column-major B reads best).
    Refuse the merge if ``totals[1]`` is not 0.
    """
    W, A, B = _along_rows(W, A, B)
    counts = torch.empty((len(W), triton.cdiv(W.shape[1], SEGMENT)), dtype=torch.int16, device=W.device)
    scan = Scan(counts, torch.zeros(2, dtype=torch.int64, device=W.device), _new_fingerprint(W))
    _launch(W, A, B, tile, counts=counts, fingerprint=scan.fingerprint, totals=scan.totals)
    return scan


def new_corrections(W: torch.Tensor, scan: Scan, corrections: int) -> Corrections:
    """Memory for the ``corrections`` = ``scan.totals[0]`` corrections that ``merge_apply`` will store."""
    cols = torch.empty(corrections, dtype=torch.uint8, device=W.device)
    return Corrections(scan.counts, cols, torch.empty(corrections, dtype=W.dtype, device=W.device), scan.fingerprint)


def merge_apply(W, A, B, corrections: Corrections | None = None, tile: MergeTile | None = None) -> None:
    """W <- round(W + B A) in place, filling ``corrections`` from :func:`new_corrections`. One launch over W.

    Without ``corrections`` it is the bare merge, one read and one write of W, that cannot be undone to the bit.
    """
    _launch(*_along_rows(W, A, B), tile, corrections)


def unmerge_scan(W, A, B, corrections: Corrections, tile: MergeTile | None = None) -> torch.Tensor:
    """Fingerprint of W as it is and as ``unmerge_apply`` would leave it, for ``corrections.matches``. Only reads W."""
    W, A, B = _along_rows(W, A, B)
    fingerprint = _new_fingerprint(W)
    _launch(W, A, B, tile, corrections, UNMERGE=True, fingerprint=fingerprint)
    return fingerprint


def unmerge_apply(W, A, B, corrections: Corrections | None = None, tile: MergeTile | None = None) -> None:
    """W <- round(W - B A) in place, then the corrections: the bits from before the merge. One launch over W."""
    _launch(*_along_rows(W, A, B), tile, corrections, UNMERGE=True)
