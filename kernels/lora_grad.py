"""Both weight gradients in one launch: they are shrinks of the transposed inputs.

    dA_i^T [K, r_i] = keep_scale_i * (mask_i * x)^T dS_i        dB_i^T [r_i, N] = s_i * (g^T S_i)^T

    x [M, K], g [M, N]  bf16 / fp16 / fp32      S = D(x) A^T, dS = s g B  [M, R] fp32      sums fp32

The first programs form dA, a block of K columns each, the others dB, a block of N columns each; the contraction over
the M tokens is split over SPLIT_K programs, whose partial sums land in planes. The last of them to arrive adds the
planes, always in the same order, so the same inputs give the same bits. The mask is drawn again, in registers.
Bytes: e M (K + N), the floor (one pass over x and g), + 4 M R (ceil(K / BLOCK_M) + ceil(N / BLOCK_M)) of S and dS from
L2, + 8 SPLIT_K R (K + N) for the planes; a rank above BLOCK_R reads x and g again from L2. Flops 2 M R (K + N).
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from .config import LaunchConfig, capability, pick, precision
from .dropout import keep_scale
from .launch import Launch
from .lora_shrink import adapter_of, adapter_table
from .sync import counters, last_to_arrive
from .tiles import addressable, contract, store_tile, sum_planes


@triton.jit
def _weight_grad_tile(
    out_ptr, planes_ptr, sync_ptr, x_ptr, s_ptr, seeds_ptr,
    rank_ends, bounds, scales,
    col_block, rank_block,
    M, N, R,
    stride_xm, stride_xn,
    stride_or, stride_on,
    stride_plane,
    NUM_ADAPTERS: tl.constexpr, DROP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out [R, N] = scale * S^T (mask * x) for one block of ranks and of columns of x [M, N]."""
    adapter, r0, r_end, bound, scale = adapter_of(rank_block, rank_ends, bounds, scales, NUM_ADAPTERS, BLOCK_R)
    seed = tl.load(seeds_ptr + adapter) if DROP else 0
    begin, end = 0, M
    if SPLIT:
        chunk = tl.cdiv(tl.cdiv(M, BLOCK_K), tl.num_programs(1)) * BLOCK_K
        begin = tl.program_id(1) * chunk
        end = tl.minimum(M, begin + chunk)
    n0 = col_block * BLOCK_M
    # the contraction of the K loop runs over the tokens, its "rows" are the columns of x
    _, acc = contract(
        0.0, tl.zeros((BLOCK_R, BLOCK_M), tl.float32), x_ptr, x_ptr, s_ptr, n0, 0, r0, begin, end, N, 0, M, r_end,
        stride_xn, stride_xm, 0, 0, 1, R, seed, bound,
        False, True, DROP, True, False, False, UPCAST, PRECISION, BLOCK_M, 16, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    acc *= scale
    if SPLIT:
        plane = planes_ptr + tl.program_id(1).to(tl.int64) * stride_plane
        store_tile(plane, acc, r0, n0, stride_or, stride_on, r_end, N, BLOCK_R, BLOCK_M)
        if last_to_arrive(sync_ptr + tl.program_id(0), tl.num_programs(1)):
            splits = tl.num_programs(1)
            acc = sum_planes(planes_ptr, splits, stride_plane, r0, n0, stride_or, stride_on, r_end, N, BLOCK_R, BLOCK_M)
            store_tile(out_ptr, acc, r0, n0, stride_or, stride_on, r_end, N, BLOCK_R, BLOCK_M)
    else:
        store_tile(out_ptr, acc, r0, n0, stride_or, stride_on, r_end, N, BLOCK_R, BLOCK_M)


@triton.jit
def _lora_weight_grad_kernel(
    dA_ptr, dB_ptr, x_ptr, g_ptr, s_ptr, ds_ptr, planes_ptr, seeds_ptr, sync_ptr,
    rank_ends, bounds, scales_A, scales_B,
    M, N, K, R, num_rank_blocks,
    stride_xm, stride_xk,
    stride_gm, stride_gn,
    stride_plane,
    NUM_ADAPTERS: tl.constexpr, DROP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # rank blocks are the fast axis: the programs of one block of columns share its x or g in L2
    rank_block = tl.program_id(0) % num_rank_blocks
    col_block = tl.program_id(0) // num_rank_blocks
    num_k = tl.cdiv(K, BLOCK_M)
    if col_block < num_k:
        _weight_grad_tile(
            dA_ptr, planes_ptr, sync_ptr, x_ptr, ds_ptr, seeds_ptr,
            rank_ends, bounds, scales_A, col_block, rank_block,
            M, K, R, stride_xm, stride_xk, K, 1, stride_plane,
            NUM_ADAPTERS, DROP, UPCAST, PRECISION, SPLIT, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    else:
        if SPLIT:
            planes_ptr += (tl.full((), 0, tl.int64) + R) * K  # a plane holds dA, then dB
        _weight_grad_tile(
            dB_ptr, planes_ptr, sync_ptr, g_ptr, s_ptr, seeds_ptr,
            rank_ends, bounds, scales_B, col_block - num_k, rank_block,
            M, N, R, stride_gm, stride_gn, 1, R, stride_plane,
            NUM_ADAPTERS, False, UPCAST, PRECISION, SPLIT, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip


def lora_linear_weight_grad(
    g: torch.Tensor,
    x: torch.Tensor,
    S: torch.Tensor,
    dS: torch.Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None,
    ranks: Sequence[int],
    dtype: torch.dtype = torch.float32,
    config: LaunchConfig | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """dA_i = dS_i^T D_i(x) [r_i, K] and dB_i = s_i g^T S_i [N, r_i], each list in the order of ``ranks``.

    g [M, N], x [M, K] of one dtype and any strides; S, dS fp32 [M, sum(ranks)] as :mod:`.lora_linear` returns them.
    dtype: the adapters' dtype, which the fp32 sums are rounded to once; it also decides the precision of the products
    (16-bit S and dS for adapters of x's dtype and for ``config.rounds``, fp32 otherwise). One launch.
    """
    drop = seeds is not None and any(dropout)
    return prepare_weight_grad(g, x, scaling, dropout, drop, ranks, dtype, config)(g, x, S, dS, seeds)


def prepare_weight_grad(
    g: torch.Tensor,
    x: torch.Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    drop: bool,
    ranks: Sequence[int],
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
) -> Callable[..., tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """``lora_linear_weight_grad`` as a function of (g, x, S, dS, seeds), for these shapes, strides and dtypes."""
    (M, K), N, R, ranks, device = x.shape, g.shape[1], sum(ranks), list(ranks), x.device
    launch, planes_size = None, None
    config = config or pick("weight_grad", M, N, K, max(ranks), x.dtype, drop, capability(device), dtype != x.dtype)
    blocks = sum(-(-r // config.BLOCK_R) for r in ranks)
    tiles = blocks * (-(-K // config.BLOCK_M) + -(-N // config.BLOCK_M))
    if tiles:
        split, stride = config.SPLIT_K > 1, R * (K + N) if config.SPLIT_K > 1 else 0
        planes_size = (config.SPLIT_K, stride) if split else None
        launch = Launch(
            (tiles, config.SPLIT_K),
            *adapter_table(ranks, dropout), tuple(keep_scale(p) for p in dropout), tuple(map(float, scaling)),
            M, N, K, R, blocks, *addressable(x).stride(), *addressable(g).stride(), stride,
            NUM_ADAPTERS=len(ranks), DROP=drop, UPCAST=config.upcasts(dtype, x.dtype), PRECISION=precision(x.dtype),
            SPLIT=split,
            BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K, BLOCK_R=config.BLOCK_R, **config.options(),
        ).__call__  # fmt: skip
    kernel = _lora_weight_grad_kernel

    def run(g, x, S, dS, seeds):
        dA, dB = x.new_empty(R, K, dtype=dtype), x.new_empty(N, R, dtype=dtype)
        if launch:
            planes = sync = None
            if planes_size:
                planes, sync = S.new_empty(*planes_size), counters(tiles, device)
            launch(kernel, dA, dB, addressable(x), addressable(g), S, dS, planes, seeds if drop else None, sync)
        if len(ranks) == 1:
            return [dA], [dB]
        return list(dA.split(ranks)), list(dB.split(ranks, dim=1))

    return run
