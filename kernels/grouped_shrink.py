"""Grouped shrink: S_gj[row] = A_gj x[row] for the adapters j of each row and the outputs g, one launch for all ranks.

    x [T, K]  bf16 / fp16 / fp32    A_gj [r, K]  any of the three, by address    S [P, G, rows, columns]  fp32

A program forms a block of ranks of the adapters of one tile of rows, over all of K or over one part of it. The S of a
row is where ``order`` has the row, its adapters side by side, each from a multiple of COLUMNS on. grouped_expand.py
says the rest.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .config import LaunchConfig, capability, precision
from .grouped_tables import COLUMNS, AdapterTables, RowGroups, chunks, launch_options, pick_shrink
from .launch import KEPT, Launch
from .tiles import load_tile

TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def tile_rows(tiles_ptr, order_ptr, tile, BLOCK_M: tl.constexpr):
    """(position in S of each row, row numbers, which of them exist, first member, end member) of a tile."""
    entry = tiles_ptr + 4 * tile.to(tl.int64)
    first = tl.load(entry)
    lanes = tl.arange(0, BLOCK_M)
    mask = lanes < tl.load(entry + 1)
    rows = tl.load(order_ptr + first + lanes, mask=mask, other=0)
    return (first + lanes).to(tl.int64), rows.to(tl.int64), mask, tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def matrix_of(ptr_table, at, DTYPE: tl.constexpr):
    """The address in a table as a pointer; every matrix starts at a multiple of 16 bytes."""
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
    positions, rows, row_ok, first_member, last_member = tile_rows(tiles_ptr, order_ptr, tile, BLOCK_M)
    k_begin = tl.program_id(1) * span
    k_end = tl.minimum(K, k_begin + span)
    zero, ks, ranks = tl.full((), 0, tl.int64), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :] * stride_xk
    s_ptr += tl.program_id(1).to(tl.int64) * stride_plane + output.to(tl.int64) * stride_output
    column = 0
    for member in range(first_member, last_member):
        at = output * num_slots + tl.load(member_slot_ptr + member)
        rank = tl.load(rank_ptr + at)
        width = tl.cdiv(rank, COLUMNS) * COLUMNS
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
            # up to the next multiple of COLUMNS there are zeros, so that the expand reads S in whole vectors
            s_mask = row_ok[None, :] & (ranks[:, None] < width - r0)
            s_ptrs = s_ptr + positions[None, :] * stride_sm + (column + r0 + ranks)[:, None]
            tl.store(s_ptrs, total + part, mask=s_mask)
        column += width


def grouped_shrink(
    x: torch.Tensor, tables: AdapterTables, groups: RowGroups, config: LaunchConfig | None = None
) -> torch.Tensor:
    """S [P, G, rows, columns] fp32: P parts of A_gj x[row], which the expand adds up in order. One launch.

    x [T, K], any strides. S is written where a row has an adapter, nowhere else. It needs nothing of the base product
    and can run beside it on another stream.
    """
    shape, launch = _launch(x.shape[1], x.stride(), x.dtype, x.device, tables.form, groups.form, config)
    S = torch.empty(shape, dtype=torch.float32, device=x.device)
    if launch is not None:
        launch(
            _grouped_shrink_kernel, x, S, tables.A_ptr, tables.rank,
            groups.num_tiles, groups.tiles, groups.order, groups.member_slot,
        )  # fmt: skip
    return S


@lru_cache(KEPT)
def _launch(K, strides, dtype, device, tables, groups, config) -> tuple[tuple[int, ...], Launch | None]:
    """The shape of S, and the launch if there is something to do."""
    (G, slots, adapter_dtype, max_rank), (rows, block_m, group_size, tiles), (number, chunk) = tables, groups, chunks(K)
    config = config or pick_shrink(tiles * G, block_m, K, max_rank, dtype, adapter_dtype, capability(device))
    planes = number if config.SPLIT_K > 1 else 1
    columns = group_size * -(-max_rank // COLUMNS) * COLUMNS  # what the largest group of the largest adapters needs
    rank_programs = -(-max_rank // config.BLOCK_R)
    shape = planes, G, rows, columns
    if tiles * rank_programs == 0:
        return shape, None
    return shape, Launch(
        (tiles * G * rank_programs, planes),
        K, chunk, chunk if planes > 1 else chunk * number, slots, G, rank_programs,
        *strides, G * rows * columns, rows * columns, columns,
        DTYPE=TL_DTYPES[adapter_dtype], UPCAST=adapter_dtype != dtype, PRECISION=precision(dtype),
        COLUMNS=COLUMNS, BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R,
        **launch_options(config, nvidia=not torch.version.hip),
    )  # fmt: skip
