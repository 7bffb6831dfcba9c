"""Expand: the LoRA term scale * mask * (S Q) of a tile of Y, in the GEMM that has the rest of Y, or alone.

    S [M, R] fp32    Q [R, N]  the adapters' lora_B^T (forward) or lora_A (input gradient), stacked    Y [M, N]

``lora_expand`` is the term as a launch of its own. Before a GEMM of the library that adds to it, Y is written here and
read and written there, and the term is rounded to Y's dtype once more than in the fused kernels, as eager's is. With
``base`` it is added to a Y that somebody else computed, in its place behind a GEMM with a bias: fp32 sums, one
rounding. Bytes: e M N (twice with ``base``) + 4 M R + e R N; flops 2 M R N; floor the same.

S is converted to the adapters' dtype as the left operand of the dot, so the loop over blocks of ranks is not pipelined
(tiles.py says why). Scales are applied in fp32, after the dot: nothing is rounded twice, and fp16 neither overflows nor
loses small scales.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from .config import LaunchConfig, capability, pick, precision
from .dropout import keep_mask
from .launch import Launch
from .lora_shrink import adapter_table, is_single, stacked
from .tiles import addressable, grouped_order, load_tile, store_tile


@triton.jit
def lora_term(
    acc, s_tile, s_ptr, q_ptr, seeds_ptr, rank_ends, bounds, scales, m0, n0, M, N, R,
    stride_qr, stride_qn,
    NUM_ADAPTERS: tl.constexpr, DROP: tl.constexpr, S_IN_REGISTERS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + sum_i scale_i * mask_i * (S_i Q_i), S from memory or, for one adapter of one rank block, from registers.

    OPERAND: the dtype that S and Q take in the product.
    """
    begin = 0
    for i in tl.static_range(NUM_ADAPTERS):
        term = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # num_stages=1: S is converted in registers, which a pipelined wgmma must not read
        for r in tl.range(begin, rank_ends[i], BLOCK_R, num_stages=1):
            if S_IN_REGISTERS:
                s = s_tile
            else:
                s = load_tile(s_ptr, m0, r, R, 1, M, rank_ends[i], BLOCK_M, BLOCK_R)
            q = load_tile(q_ptr, r, n0, stride_qr, stride_qn, rank_ends[i], N, BLOCK_R, BLOCK_N)
            term = tl.dot(s.to(OPERAND), q.to(OPERAND), term, input_precision=PRECISION)
        if DROP:
            keep = keep_mask(tl.load(seeds_ptr + i), bounds[i], m0, n0, BLOCK_M, BLOCK_N)
            term = tl.where(keep, term, 0.0)
        acc += term * scales[i]
        begin = rank_ends[i]
    return acc


@triton.jit
def add_bias(acc, bias_ptr, n0, N, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr):
    if HAS_BIAS:
        cols = n0 + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _lora_expand_kernel(
    s_ptr, q_ptr, y_ptr, base_ptr, bias_ptr, seeds_ptr, rank_ends, bounds, scales, M, N, R,
    stride_qr, stride_qn, stride_bm, stride_bn,
    NUM_ADAPTERS: tl.constexpr, DROP: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = grouped_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
    OPERAND: tl.constexpr = tl.float32 if UPCAST else y_ptr.dtype.element_ty
    acc = lora_term(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), 0.0, s_ptr, q_ptr, seeds_ptr, rank_ends, bounds, scales, m0, n0,
        M, N, R, stride_qr, stride_qn,
        NUM_ADAPTERS, DROP, False, OPERAND, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    if HAS_BASE:
        acc += load_tile(base_ptr, m0, n0, stride_bm, stride_bn, M, N, BLOCK_M, BLOCK_N).to(tl.float32)
    acc = add_bias(acc, bias_ptr, n0, N, HAS_BIAS, BLOCK_N)
    store_tile(y_ptr, acc, m0, n0, N, 1, M, N, BLOCK_M, BLOCK_N)


def lora_expand(
    S: torch.Tensor,
    Q: Sequence[torch.Tensor],
    scales: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """base + sum_i scales_i * mask_i * (S_i Q_i) + bias, [M, N] of ``dtype``. One launch, base is only read.

    S fp32 [M, sum of ranks]; Q_i [r_i, N] of any strides; bias [N] or None; base [M, N] of any strides, or None for
    zeros. seeds: int64, one for each adapter, None for no mask; ``scales`` hold the 1 / (1 - p) of a mask.
    """
    drop = seeds is not None and any(dropout)
    kinds = bias is not None, dtype, config
    return prepare_expand(len(S), Q, scales, dropout, drop, *kinds, base=base)(S, Q, seeds, bias, base)


def prepare_expand(
    M: int,
    Q: Sequence[torch.Tensor],
    scales: Sequence[float],
    dropout: Sequence[float],
    drop: bool,
    has_bias: bool,
    dtype: torch.dtype,
    config: LaunchConfig | None = None,
    by_columns: bool = False,
    base: torch.Tensor | None = None,
    onto: bool = False,
) -> Callable[..., torch.Tensor]:
    """``lora_expand`` as a function of (S, Q, seeds, bias, base), for tensors of these shapes, strides and dtypes.

    by_columns: the function takes the transposes of Q, as they are stored. onto: base is contiguous, and the results
    are written in its place.
    """
    ranks, size, device = [q.shape[0] for q in Q], (M, Q[0].shape[1]), Q[0].device
    if 0 in size:
        return lambda S, Q, seeds, bias, base=None: S.new_empty(size, dtype=dtype)
    wide = any(q.dtype != dtype for q in Q)
    config = config or pick("expand", *size, 0, max(ranks), dtype, drop, capability(device), wide)
    copied = config.copied(dtype)
    single, q = is_single(Q) and not copied, stacked(Q, False, copied)
    base_strides = (size[1], 1) if onto else (0, 0) if base is None else addressable(base).stride()
    ends, bounds = adapter_table(ranks, dropout)
    launch = Launch(
        (-(-M // config.BLOCK_M) * -(-size[1] // config.BLOCK_N),),
        ends, bounds, tuple(map(float, scales)), *size, sum(ranks), *q.stride(), *base_strides,
        NUM_ADAPTERS=len(ranks), DROP=drop, HAS_BASE=onto or base is not None, HAS_BIAS=has_bias,
        UPCAST=config.upcasts(q.dtype, dtype), PRECISION=precision(dtype),
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_R=config.BLOCK_R, GROUP_M=config.GROUP_M,
        **config.options(),
    ).__call__  # fmt: skip
    kernel = _lora_expand_kernel

    def run(S, Q, seeds, bias, base=None):
        y = base if onto else torch.empty(*size, dtype=dtype, device=device)
        Q = Q[0] if single else stacked(Q, by_columns, copied)
        bias = bias if bias is None else bias.contiguous()
        launch(kernel, S, Q, y, None if base is None else addressable(base), bias, seeds if drop else None)
        return y

    return run
