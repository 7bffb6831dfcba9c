"""Many adapters in one batch: y_g[row] <- round(y_g[row] + sum_j weight_j scaling_gj B_gj (A_gj x[row])) in place.

    x [T, K]      bf16 / fp16 / fp32    A_gj [r, K], B_gj [N_g, r]  any of the three, r from 1 to 512, each its own
    y_g [T, N_g]  of x's dtype, holds the base output; sums fp32, base added in fp32, one rounding; outputs g share x

Two launches. The shrink leaves S = A x of each row, adapter and output in fp32; the expand forms a tile of y from it.
Rows are known by tiles of one *group* (grouped_tables.py), so whatever adapters a row has, one program owns it: there
are no atomics, no second rounding, and rows without an adapter, or whose adapters have rank 0 here, are not touched.

Bits. Those of a row depend on the row, its adapters and the chip alone. K is summed in parts fixed by K; the parts are
added in order, by the one program that has formed them all or, where a program forms one each, by the expand. Rows and
columns of a tile are never summed over, and every product of a dtype is the same instruction at any tile (BLOCK_M and
the shrink's BLOCK_R stay below 64; on AMD the 16x16 form is asked for).

Graphs. A launch provides for the most tiles that the metadata can hold; programs past ``num_tiles`` end at once.

Bytes and flops: ``grouped_traffic``. A and B are read once by a group of up to a tile of rows, at their exact rank;
beyond that x is read once more than by the base product, y once more and written once more, and S costs 8 bytes an
element and part. For one row of rank 16 at K = N = 4096 in bf16: 262 KB of adapter, 26 KB of all else. One launch
would have to read A again in every program of the expand (64 here) or to make programs wait for each other.
"Shrink", "expand", rows by segments: Punica, arXiv:2310.18547; exact ranks in one launch: S-LoRA, arXiv:2311.03285.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .config import LaunchConfig, capability, precision
from .grouped_tables import (
    COLUMNS,
    AdapterTables,
    RowGroups,
    chunks,
    launch_options,
    pick_expand,
    pick_shrink,
    s_columns,
)
from .tiles import load_tile

_TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def tile_rows(tiles_ptr, order_ptr, tile, BLOCK_M: tl.constexpr):
    """(first position, positions, rows, which of them exist, first member, end member) of a tile."""
    entry = tiles_ptr + 4 * tile.to(tl.int64)
    first = tl.load(entry)
    lanes = tl.arange(0, BLOCK_M)
    mask = lanes < tl.load(entry + 1)
    rows = tl.load(order_ptr + first + lanes, mask=mask, other=0)
    return first, lanes, rows.to(tl.int64), mask, tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def matrix_of(ptr_table, at, DTYPE: tl.constexpr):
    """The address in a table, as a pointer; the store aligns every matrix to 16 bytes."""
    return tl.multiple_of(tl.load(ptr_table + at).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _grouped_shrink_kernel(
    x_ptr, s_ptr, a_table, rank_ptr, num_tiles_ptr, tiles_ptr, order_ptr, member_slot_ptr,
    K, chunk, span, num_slots, num_outputs, num_rank_programs,
    stride_xm, stride_xk,
    stride_plane, stride_output, stride_sm,
    DTYPE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # rank blocks and outputs are the fast axes: the programs of one tile run together and share its x in L2
    pid = tl.program_id(0)
    output = pid // num_rank_programs % num_outputs
    tile = pid // num_rank_programs // num_outputs
    if tile >= tl.load(num_tiles_ptr):
        return
    first, lanes, rows, row_ok, first_member, last_member = tile_rows(tiles_ptr, order_ptr, tile, BLOCK_M)
    k_begin = tl.program_id(1) * span
    k_end = tl.minimum(K, k_begin + span)
    zero, ks, ranks = tl.full((), 0, tl.int64), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    s_ptr += tl.program_id(1).to(tl.int64) * stride_plane + output.to(tl.int64) * stride_output
    column = 0
    for member in range(first_member, last_member):
        at = output * num_slots + tl.load(member_slot_ptr + member)
        rank = tl.load(rank_ptr + at)
        a_ptr = matrix_of(a_table, at, DTYPE)
        for r0 in range(pid % num_rank_programs * BLOCK_R, rank, num_rank_programs * BLOCK_R):
            total = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
            part = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
            for k in range(k_begin, k_end, BLOCK_K):
                x_mask = row_ok[:, None] & (ks[None, :] < K - k)
                x = tl.load(x_ptrs + (zero + k) * stride_xk, mask=x_mask, other=0.0)
                a = load_tile(a_ptr, r0, k, K, 1, rank, K, BLOCK_R, BLOCK_K)
                OPERAND: tl.constexpr = tl.float32 if UPCAST else x.dtype
                part = tl.dot(a.to(OPERAND), tl.trans(x.to(OPERAND)), part, input_precision=PRECISION)
                done = (k + BLOCK_K) % chunk == 0
                total += tl.where(done, part, 0.0)
                part = tl.where(done, 0.0, part)
            s_mask = row_ok[None, :] & (ranks[:, None] < rank - r0)
            s_ptrs = s_ptr + (first + lanes).to(tl.int64)[None, :] * stride_sm + (column + r0 + ranks)[:, None]
            tl.store(s_ptrs, total + part, mask=s_mask)
        column += tl.cdiv(rank, COLUMNS) * COLUMNS


@triton.jit
def _dot_fp32(s, b, acc, PRECISION: tl.constexpr):
    """acc + s b with s in fp32 whatever b is: as three bf16 terms, which hold all its 24 bits, where b is bf16."""
    if b.dtype == tl.bfloat16:
        high = s.to(tl.bfloat16)
        rest = s - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b, acc)))
    else:
        acc = tl.dot(s, b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def column_block(block, y_ptrs, Ns, strides_ym, strides_yn, NUM_OUTPUTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(output, first column, its y, N, row stride, column stride) of a block of columns, counted over all outputs."""
    output, first = block * 0, block * 0
    y_ptr, N, stride_ym, stride_yn = y_ptrs[0], Ns[0], strides_ym[0], strides_yn[0]
    begin = tl.cdiv(Ns[0], BLOCK_N)
    for g in tl.static_range(1, NUM_OUTPUTS):
        here = block >= begin
        output, first = tl.where(here, g, output), tl.where(here, begin, first)
        y_ptr, N = tl.where(here, y_ptrs[g], y_ptr), tl.where(here, Ns[g], N)
        stride_ym = tl.where(here, strides_ym[g], stride_ym)
        stride_yn = tl.where(here, strides_yn[g], stride_yn)
        begin += tl.cdiv(Ns[g], BLOCK_N)
    return output, (block - first) * BLOCK_N, y_ptr, N, stride_ym, stride_yn


@triton.jit
def _grouped_expand_kernel(
    y_ptrs, s_ptr, b_table, rank_ptr, scaling_ptr,
    num_tiles_ptr, tiles_ptr, order_ptr, member_slot_ptr, member_weight_ptr,
    Ns, strides_ym, strides_yn,
    num_slots, num_column_blocks, num_planes,
    stride_plane, stride_output, stride_sm,
    NUM_OUTPUTS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile = pid // num_column_blocks
    if tile >= tl.load(num_tiles_ptr):
        return
    output, n0, y_ptr, N, stride_ym, stride_yn = column_block(
        pid % num_column_blocks, y_ptrs, Ns, strides_ym, strides_yn, NUM_OUTPUTS, BLOCK_N
    )
    first, lanes, rows, row_ok, first_member, last_member = tile_rows(tiles_ptr, order_ptr, tile, BLOCK_M)
    ranks, cols = tl.arange(0, BLOCK_R), n0 + tl.arange(0, BLOCK_N)
    s_ptrs = s_ptr + output.to(tl.int64) * stride_output
    s_ptrs += (first + lanes).to(tl.int64)[:, None] * stride_sm + ranks[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    column = 0
    for member in range(first_member, last_member):
        at = output * num_slots + tl.load(member_slot_ptr + member)
        rank = tl.load(rank_ptr + at)
        scale = tl.load(member_weight_ptr + member) * tl.load(scaling_ptr + at)
        b_ptr = matrix_of(b_table, at, DTYPE)
        term = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r0 in range(0, rank, BLOCK_R):
            s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            s_mask = row_ok[:, None] & (ranks[None, :] < rank - r0)
            plane_ptrs = s_ptrs + column + r0
            for _ in range(num_planes):
                s += tl.load(plane_ptrs, mask=s_mask, other=0.0)
                plane_ptrs += stride_plane
            b = load_tile(b_ptr, r0, n0, N, 1, rank, N, BLOCK_R, BLOCK_N)
            term = _dot_fp32(s, b, term, PRECISION)
        # written as fma, so that no compiler decides where the sum of the adapters is rounded
        acc = tl.fma(term, tl.zeros_like(term) + scale, acc)
        column += tl.cdiv(rank, COLUMNS) * COLUMNS
    if column > 0:
        y_mask = row_ok[:, None] & (cols[None, :] < N)
        ptrs = y_ptr + rows[:, None] * stride_ym + cols.to(tl.int64)[None, :] * stride_yn
        y = tl.load(ptrs, mask=y_mask, other=0.0).to(tl.float32) + acc
        tl.store(ptrs, y.to(y_ptr.dtype.element_ty), mask=y_mask)


def _options(config: LaunchConfig, nvidia: bool) -> dict[str, int]:
    return config.options() | ({} if nvidia else dict(matrix_instr_nonkdim=16))


def grouped_shrink(
    x: torch.Tensor, tables: AdapterTables, groups: RowGroups, config: LaunchConfig | None = None
) -> torch.Tensor:
    """S [P, G, rows, columns] fp32: P parts of A_gj x[row], which the expand adds up in order.

    x [T, K], any strides. S is written where a row and a rank exist, nowhere else. It needs nothing of the base product
    and can run beside it on another stream.
    """
    (number, chunk), G = chunks(x.shape[1]), len(tables.rank)
    config = config or pick_shrink(
        groups.grid_tiles * G, groups.block_m, x.shape[1], tables.max_rank, x.dtype, tables.dtype, capability(x.device)
    )
    planes = number if config.SPLIT_K > 1 else 1
    S = torch.empty((planes, G, len(groups.order), s_columns(tables, groups)), dtype=torch.float32, device=x.device)
    rank_programs = triton.cdiv(tables.max_rank, config.BLOCK_R)
    if groups.grid_tiles == 0:
        return S
    with torch.cuda.device_of(x):
        _grouped_shrink_kernel[(groups.grid_tiles * G * rank_programs, planes)](
            x, S, tables.A_ptr, tables.rank, groups.num_tiles, groups.tiles, groups.order, groups.member_slot,
            x.shape[1], chunk, chunk if planes > 1 else chunk * number, tables.rank.shape[1], G, rank_programs,
            *x.stride(),
            *S.stride()[:3],
            DTYPE=_TL_DTYPES[tables.dtype], UPCAST=tables.dtype != x.dtype, PRECISION=precision(x.dtype),
            COLUMNS=COLUMNS, BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R,
            **launch_options(config, nvidia=not torch.version.hip),
        )  # fmt: skip
    return S


def grouped_expand(
    S: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    tables: AdapterTables,
    groups: RowGroups,
    config: LaunchConfig | None = None,
) -> None:
    """y_g[row] <- round(y_g[row] + sum_j weight_j scaling_gj B_gj S_gj[row]) in place, y_g [T, N_g] of any strides."""
    N, dtype = [y.shape[1] for y in outputs], outputs[0].dtype
    config = config or pick_expand(groups.grid_tiles, groups.block_m, N, dtype, tables.dtype)
    blocks = sum(triton.cdiv(n, config.BLOCK_N) for n in N)
    if groups.grid_tiles * blocks == 0:
        return
    with torch.cuda.device_of(S):
        _grouped_expand_kernel[(groups.grid_tiles * blocks,)](
            tuple(outputs), S, tables.B_ptr, tables.rank, tables.scaling,
            groups.num_tiles, groups.tiles, groups.order, groups.member_slot, groups.member_weight,
            tuple(N), tuple(y.stride(0) for y in outputs), tuple(y.stride(1) for y in outputs),
            tables.rank.shape[1], blocks, S.shape[0],
            *S.stride()[:3],
            NUM_OUTPUTS=len(N), DTYPE=_TL_DTYPES[tables.dtype], PRECISION=precision(dtype),
            COLUMNS=COLUMNS, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_R=config.BLOCK_R,
            **launch_options(config, nvidia=not torch.version.hip),
        )  # fmt: skip


def lora_grouped(x: torch.Tensor, outputs: Sequence[torch.Tensor], tables: AdapterTables, groups: RowGroups) -> None:
    """Both launches: every row of the G ``outputs`` that has adapters gets their term. Nothing waits for the device.

    x [T, K] and y_g [T, N_g] of one dtype, y_g apart from each other and from x; G = len(outputs) = rows of the tables.
    Arguments are checked by the op above, not here.
    """
    grouped_expand(grouped_shrink(x, tables, groups), outputs, tables, groups)
