"""Shrink: S_i = scale_i * (mask_i * X) P_i^T for several adapters at once, X read from memory once.

    X [M, K]  bf16 / fp16 / fp32    P [R, K]  the adapters' lora_A (forward) or lora_B^T (backward), stacked
    S [M, R]  fp32, summed in fp32, the ranks of adapter i in columns rank_ends[i - 1] : rank_ends[i]

One program forms a row block of one block of ranks, which belongs to one adapter and hence to one mask. The programs of
a row block are neighbours, so the first brings its X into L2 and the others find it there. The mask is drawn in
registers, once an element and rank block. Where rows are few, K is split over programs, and the last of them to arrive
adds their planes in order. Bytes: e M K + e R K (again from L2 for every row block) + 4 M R, the floor of any shrink,
+ 8 SPLIT_K M R of planes; flops 2 M K R. "Shrink" and "expand": Punica, arXiv:2310.18547.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from .config import LaunchConfig, capability, pick, precision
from .dropout import threshold
from .launch import Launch
from .sync import counters, last_to_arrive
from .tiles import addressable, contract, store_tile, sum_planes


@triton.jit
def adapter_of(rank_block, rank_ends, bounds, scales, NUM_ADAPTERS: tl.constexpr, BLOCK_R: tl.constexpr):
    """(adapter, first rank, end of the adapter's ranks, mask bound, scale) of a block of ranks."""
    adapter, r0, r_end, bound = rank_block * 0, rank_block * 0, rank_block * 0, rank_block * 0
    scale = 0.0
    first = 0
    begin = 0
    for i in tl.static_range(NUM_ADAPTERS):
        blocks = tl.cdiv(rank_ends[i] - begin, BLOCK_R)
        hit = (rank_block >= first) & (rank_block < first + blocks)
        adapter = tl.where(hit, i, adapter)
        r0 = tl.where(hit, begin + (rank_block - first) * BLOCK_R, r0)
        r_end = tl.where(hit, rank_ends[i], r_end)
        bound = tl.where(hit, bounds[i], bound)
        scale = tl.where(hit, scales[i], scale)
        first += blocks
        begin = rank_ends[i]
    return adapter, r0, r_end, bound, scale


@triton.jit
def _lora_shrink_kernel(
    x_ptr, p_ptr, s_ptr, seeds_ptr, planes_ptr, sync_ptr,
    rank_ends, bounds, scales,
    M, K, R, num_rank_blocks,
    stride_xm, stride_xk,
    stride_pr, stride_pk,
    NUM_ADAPTERS: tl.constexpr, DROP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # rank blocks are the fast axis: the programs of one row block run together and share its x in L2
    m0 = tl.program_id(0) // num_rank_blocks * BLOCK_M
    adapter, r0, r_end, bound, scale = adapter_of(
        tl.program_id(0) % num_rank_blocks, rank_ends, bounds, scales, NUM_ADAPTERS, BLOCK_R
    )
    seed = tl.load(seeds_ptr + adapter) if DROP else 0
    begin, end, splits = 0, K, tl.num_programs(1)
    if SPLIT:
        chunk = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
        begin = tl.program_id(1) * chunk
        end = tl.minimum(K, begin + chunk)
    s = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    _, s = contract(
        0.0, s,
        x_ptr, x_ptr, p_ptr,
        m0, 0, r0,
        begin, end,
        M, 0, K, r_end,
        stride_xm, stride_xk,
        0, 0,
        stride_pr, stride_pk,
        seed, bound,
        BASE=False, SHRINK=True, DROP=DROP, ROWS_ARE_K=False,
        TMA=False, W_IS_NK=False, UPCAST=UPCAST, PRECISION=PRECISION,
        BLOCK_M=BLOCK_M, BLOCK_N=16, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    s = tl.trans(s) * scale
    if SPLIT:
        stride_plane = (tl.full((), 0, tl.int64) + M) * R
        store_tile(planes_ptr + tl.program_id(1) * stride_plane, s, m0, r0, R, 1, M, r_end, BLOCK_M, BLOCK_R)
        if last_to_arrive(sync_ptr + tl.program_id(0), splits):
            s = sum_planes(planes_ptr, splits, stride_plane, m0, r0, R, 1, M, r_end, BLOCK_M, BLOCK_R)
            store_tile(s_ptr, s, m0, r0, R, 1, M, r_end, BLOCK_M, BLOCK_R)
    else:
        store_tile(s_ptr, s, m0, r0, R, 1, M, r_end, BLOCK_M, BLOCK_R)


def stacked(matrices: Sequence[torch.Tensor], by_columns: bool, dtype: torch.dtype | None) -> torch.Tensor:
    """The rows of the matrices, or of their transposes, under one pointer, as a kernel can read them; in ``dtype``."""
    matrices = [m.t() for m in matrices] if by_columns else list(matrices)
    rows = addressable(matrices[0] if len(matrices) == 1 else torch.cat(matrices))
    return rows if dtype is None else rows.to(dtype)


def is_single(matrices: Sequence[torch.Tensor]) -> bool:
    """Whether they need no copy: one matrix that the kernels can read where it lies."""
    return len(matrices) == 1 and addressable(matrices[0]) is matrices[0]


def adapter_table(ranks: Sequence[int], dropout: Sequence[float]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(rank_ends, bounds): what the kernels know of each adapter besides its scales and its seed."""
    return tuple(accumulate(ranks)), tuple(threshold(p) - 32768 for p in dropout)


def lora_shrink(
    x: torch.Tensor,
    P: Sequence[torch.Tensor],
    scales: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """S_i = scales_i * (mask_i * x) P_i^T, fp32 [M, sum of ranks]. One launch.

    x [M, K] and P_i [r_i, K] of any strides, e.g. lora_A of the forward with scales 1 / (1 - p). seeds: int64, one for
    each adapter, None for no mask.
    """
    return prepare_shrink(x, P, scales, dropout, seeds is not None and any(dropout), config)(x, P, seeds)


def prepare_shrink(
    x: torch.Tensor,
    P: Sequence[torch.Tensor],
    scales: Sequence[float],
    dropout: Sequence[float],
    drop: bool,
    config: LaunchConfig | None = None,
    by_columns: bool = False,
) -> Callable[..., torch.Tensor]:
    """``lora_shrink`` as a function of (x, P, seeds), for tensors of these shapes, strides and dtypes.

    by_columns: the function takes the transposes of P, as they are stored.
    """
    (M, K), ranks, device = x.shape, [p.shape[0] for p in P], x.device
    size, f32 = (M, sum(ranks)), torch.float32
    if 0 in size:
        return lambda x, P, seeds: x.new_empty(size, dtype=f32)
    wide = any(p.dtype != x.dtype for p in P)
    config = config or pick("shrink", M, 0, K, max(ranks), x.dtype, drop, capability(device), wide)
    copied = config.copied(x.dtype)
    single, fits, p = is_single(P) and not copied, is_single([x]), stacked(P, False, copied)
    ends, bounds = adapter_table(ranks, dropout)
    blocks = sum(-(-r // config.BLOCK_R) for r in ranks)
    programs, splits = blocks * -(-M // config.BLOCK_M), config.SPLIT_K
    launch = Launch(
        (programs, splits),
        ends, bounds, tuple(map(float, scales)), M, K, sum(ranks), blocks, *addressable(x).stride(), *p.stride(),
        NUM_ADAPTERS=len(ranks), DROP=drop, UPCAST=config.upcasts(p.dtype, x.dtype), PRECISION=precision(x.dtype),
        SPLIT=splits > 1,
        BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R, **config.options(),
    ).__call__  # fmt: skip
    kernel = _lora_shrink_kernel

    def run(x, P, seeds):
        S, planes, sync = torch.empty(*size, dtype=f32, device=device), None, None
        if splits > 1:
            planes, sync = S.new_empty(splits, *size), counters(programs, device)
        P = P[0] if single else stacked(P, by_columns, copied)
        launch(kernel, x if fits else addressable(x), P, S, seeds if drop else None, planes, sync)
        return S

    return run
