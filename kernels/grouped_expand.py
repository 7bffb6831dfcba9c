"""Many adapters in one batch: y_g[row] <- round(y_g[row] + sum_j weight_j scaling_gj B_gj (A_gj x[row])) in place.

    x [T, K]      bf16 / fp16 / fp32    A_gj [r, K], B_gj [N_g, r]  any of the three, each of its own rank, 1 to 512
    y_g [T, N_g]  of x's dtype, holds the base output; sums fp32, base added in fp32, one rounding; outputs g share x

Two launches. The shrink leaves S = A x of each row, adapter and output in fp32; the expand forms tiles of y from it.
Rows are known by tiles of one *group* (grouped_tables.py), so whatever adapters a row has, one program owns each of its
elements: there are no atomics and no second rounding. Rows without adapters, or whose adapters all have rank 0 for an
output, are not touched.

Bits. Those of a row depend on the row, its adapters and the chip alone. K is summed in parts fixed by K; the parts are
added in order, by the one program that has formed them all or, where each has a program of its own, by the expand. Rows
and columns of a tile are never summed over, and every product of a dtype is the same instruction in any tile: BLOCK_M
and the shrink's BLOCK_R stay below the 64 rows of a wgmma, and on AMD the 16x16 form is asked for.

Graphs. A launch provides for the most tiles that the metadata can hold; programs past ``num_tiles`` end at once.

Bytes and flops: ``grouped_traffic``. A and B are read once a tile, at their exact rank (from L2 after the first tile);
x is read once more than by the base product, y read and written once more, and S costs 8 bytes an element and part.
One row of rank 16 at K = N = 4096 in bf16: 262 KB of adapter, 26 KB of all else. A single launch would have to read A
again in every program of the expand, or make programs wait for each other.

Columns of one program. Of a decode step's tile one row in 16 is real, so registers, not work, bound how many programs
fit; each takes STEPS column blocks, whose B is on its way in shared memory while the blocks before are formed. That
needs a loop without loops inside: groups of one adapter of at most 64 ranks (RANK_BLOCKS); others read B as they go.

"Shrink", "expand", rows by segments: Punica, arXiv:2310.18547; exact ranks in one launch: S-LoRA, arXiv:2311.03285.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .config import capability, precision
from .grouped_shrink import TL_DTYPES, matrix_of, tile_rows
from .grouped_tables import COLUMNS, AdapterTables, ExpandConfig, RowGroups, launch_options, pick_expand
from .launch import KEPT, Launch
from .tiles import load_tile


@triton.jit
def column_range(block, y_ptrs, Ns, strides_ym, strides_yn, span, NUM_OUTPUTS: tl.constexpr):
    """(output, first column, its y, N, row stride, column stride) of a range of columns, counted over all outputs."""
    output, first = block * 0, block * 0
    y_ptr, N, stride_ym, stride_yn = y_ptrs[0], Ns[0], strides_ym[0], strides_yn[0]
    begin = tl.cdiv(Ns[0], span)
    for g in tl.static_range(1, NUM_OUTPUTS):
        here = block >= begin
        output, first = tl.where(here, g, output), tl.where(here, begin, first)
        y_ptr, N = tl.where(here, y_ptrs[g], y_ptr), tl.where(here, Ns[g], N)
        stride_ym = tl.where(here, strides_ym[g], stride_ym)
        stride_yn = tl.where(here, strides_yn[g], stride_yn)
        begin += tl.cdiv(Ns[g], span)
    return output, (block - first) * span, y_ptr, N, stride_ym, stride_yn


@triton.jit
def _sum_planes(ptrs, row_ok, r0, rank, stride_plane, NUM_PLANES: tl.constexpr):
    """S of the block of ranks from r0, its parts in their order; zero if there is none."""
    s = tl.zeros(ptrs.shape, tl.float32)
    mask = row_ok[:, None] & (tl.zeros((ptrs.shape[0], 1), tl.int32) + r0 < rank)
    for _ in tl.static_range(NUM_PLANES):
        s += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += stride_plane
    return s


@triton.jit
def _add_ranks(
    term, s, b_ptr, r0, n0, rank, N,
    PRECISION: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """term + s B^T[r0 : r0 + COLUMNS] with s in fp32 whatever B is: for a bf16 B as three terms, which hold 24 bits."""
    b = load_tile(b_ptr, r0, n0, N, 1, rank, N, COLUMNS, BLOCK_N)
    if b.dtype == tl.bfloat16:
        high = s.to(tl.bfloat16)
        rest = s - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        term = tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b, term)))
    else:
        term = tl.dot(s, b.to(tl.float32), term, input_precision=PRECISION)
    return term


@triton.jit
def _grouped_expand_kernel(
    y_ptrs, s_ptr, b_table, rank_ptr, scaling_ptr,
    num_tiles_ptr, tiles_ptr, order_ptr, member_slot_ptr, member_weight_ptr,
    Ns, strides_ym, strides_yn,
    num_slots, num_ranges, span,
    stride_plane, stride_output, stride_sm,
    NUM_OUTPUTS: tl.constexpr, NUM_PLANES: tl.constexpr, RANK_BLOCKS: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile = pid // num_ranges
    if tile >= tl.load(num_tiles_ptr):
        return
    output, n_begin, y_ptr, N, stride_ym, stride_yn = column_range(
        pid % num_ranges, y_ptrs, Ns, strides_ym, strides_yn, span, NUM_OUTPUTS
    )
    positions, rows, row_ok, first_member, last_member = tile_rows(tiles_ptr, order_ptr, tile, BLOCK_M)
    zero, cols = tl.full((), 0, tl.int64), tl.arange(0, BLOCK_N)
    y_ptrs_0 = y_ptr + rows[:, None] * stride_ym + cols[None, :] * stride_yn
    s_ptrs = s_ptr + output.to(tl.int64) * stride_output
    s_ptrs += positions[:, None] * stride_sm + tl.arange(0, COLUMNS)[None, :]
    n_end = tl.minimum(N, n_begin + span)
    if RANK_BLOCKS > 0:
        at = output * num_slots + tl.load(member_slot_ptr + first_member)
        rank = tl.load(rank_ptr + at)
        scale = tl.load(member_weight_ptr + first_member) * tl.load(scaling_ptr + at)
        b_ptr = matrix_of(b_table, at, DTYPE)
        s0 = _sum_planes(s_ptrs, row_ok, 0, rank, stride_plane, NUM_PLANES)
        if RANK_BLOCKS > 1:
            s1 = _sum_planes(s_ptrs + 16, row_ok, 16, rank, stride_plane, NUM_PLANES)
        if RANK_BLOCKS > 2:
            s2 = _sum_planes(s_ptrs + 32, row_ok, 32, rank, stride_plane, NUM_PLANES)
            s3 = _sum_planes(s_ptrs + 48, row_ok, 48, rank, stride_plane, NUM_PLANES)
        n_end = tl.where(rank > 0, n_end, n_begin)
        for n0 in range(n_begin, n_end, BLOCK_N):
            y_mask = row_ok[:, None] & (cols[None, :] < N - n0)
            y_here = y_ptrs_0 + (zero + n0) * stride_yn
            acc = tl.load(y_here, mask=y_mask, other=0.0).to(tl.float32)
            term = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            term = _add_ranks(term, s0, b_ptr, 0, n0, rank, N, PRECISION, COLUMNS, BLOCK_N)
            if RANK_BLOCKS > 1:
                term = _add_ranks(term, s1, b_ptr, 16, n0, rank, N, PRECISION, COLUMNS, BLOCK_N)
            if RANK_BLOCKS > 2:
                term = _add_ranks(term, s2, b_ptr, 32, n0, rank, N, PRECISION, COLUMNS, BLOCK_N)
                term = _add_ranks(term, s3, b_ptr, 48, n0, rank, N, PRECISION, COLUMNS, BLOCK_N)
            acc = tl.fma(term, tl.zeros_like(term) + scale, acc)
            tl.store(y_here, acc.to(y_ptr.dtype.element_ty), mask=y_mask)
    else:
        for n0 in range(n_begin, n_end, BLOCK_N):
            y_mask = row_ok[:, None] & (cols[None, :] < N - n0)
            y_here = y_ptrs_0 + (zero + n0) * stride_yn
            acc = tl.load(y_here, mask=y_mask, other=0.0).to(tl.float32)
            column = 0
            for member in range(first_member, last_member):
                at = output * num_slots + tl.load(member_slot_ptr + member)
                rank = tl.load(rank_ptr + at)
                scale = tl.load(member_weight_ptr + member) * tl.load(scaling_ptr + at)
                b_ptr = matrix_of(b_table, at, DTYPE)
                term = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for r0 in range(0, rank, COLUMNS):
                    s = _sum_planes(s_ptrs + (column + r0), row_ok, r0, rank, stride_plane, NUM_PLANES)
                    term = _add_ranks(term, s, b_ptr, r0, n0, rank, N, PRECISION, COLUMNS, BLOCK_N)
                # written as fma, so that no compiler decides where the sum of the adapters is rounded
                acc = tl.fma(term, tl.zeros_like(term) + scale, acc)
                column += tl.cdiv(rank, COLUMNS) * COLUMNS
            if column > 0:
                tl.store(y_here, acc.to(y_ptr.dtype.element_ty), mask=y_mask)


def grouped_expand(
    S: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    tables: AdapterTables,
    groups: RowGroups,
    config: ExpandConfig | None = None,
) -> None:
    """y_g[row] <- round(y_g[row] + sum_j weight_j scaling_gj B_gj S_gj[row]) in place, y_g [T, N_g] of any strides."""
    ys = tuple([(y.shape[1], *y.stride()) for y in outputs])
    launch = _launch(ys, outputs[0].dtype, S.device, S.shape[0], S.stride()[:3], tables.form, groups.form, config)
    if launch is not None:
        launch(
            _grouped_expand_kernel, tuple(outputs), S, tables.B_ptr, tables.rank, tables.scaling,
            groups.num_tiles, groups.tiles, groups.order, groups.member_slot, groups.member_weight,
        )  # fmt: skip


@lru_cache(KEPT)
def _launch(ys, dtype, device, planes, s_strides, tables, groups, config) -> Launch | None:
    """The launch, if there is something to do. ys: N and the strides of each output."""
    (_, slots, adapter_dtype, max_rank), (_, block_m, group_size, tiles) = tables, groups
    N, strides_ym, strides_yn = zip(*ys, strict=True)
    config = config or pick_expand(tiles, block_m, N, max_rank, group_size, dtype, capability(device))
    span = config.BLOCK_N * config.STEPS
    ranges = sum(-(-n // span) for n in N)
    if tiles * ranges * max_rank == 0:
        return None
    return Launch(
        (tiles * ranges,),
        N, strides_ym, strides_yn, slots, ranges, span, *s_strides,
        NUM_OUTPUTS=len(N), NUM_PLANES=planes, RANK_BLOCKS=config.RANK_BLOCKS, DTYPE=TL_DTYPES[adapter_dtype],
        PRECISION=precision(dtype), COLUMNS=COLUMNS, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
        **launch_options(config, nvidia=not torch.version.hip),
    )  # fmt: skip
