"""Expand: the LoRA term scale * mask * (S Q) of a tile of Y, and the epilogue that adds it, the bias and rounds once.

    S [M, R] fp32    Q [R, N]  the adapters' lora_B^T (forward) or lora_A (input gradient), stacked    Y [M, N]

S is converted to the adapters' dtype as the left operand of the dot, so the loop over blocks of ranks is not pipelined
(tiles.py says why). Scales are applied in fp32, after the dot: nothing is rounded twice, and fp16 neither overflows nor
loses small scales. The dot of fp32 adapters over a 16-bit base is tf32: its 11 bits outlast the rounding of Y.
"""

import triton
import triton.language as tl

from .dropout import keep_mask
from .tiles import grouped_order, load_tile, store_tile, sum_planes


@triton.jit
def lora_term(
    acc, s_tile, s_ptr, q_ptr, seeds_ptr, rank_ends, bounds, scales, m0, n0, M, N, R,
    stride_qr, stride_qn,
    NUM_ADAPTERS: tl.constexpr, DROP: tl.constexpr, S_IN_REGISTERS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + sum_i scale_i * mask_i * (S_i Q_i), S from memory or, for one adapter of one rank block, from registers."""
    OPERAND: tl.constexpr = tl.float32 if UPCAST else q_ptr.dtype.element_ty
    EXPAND_PRECISION: tl.constexpr = "tf32" if PRECISION == "tf32x3" else PRECISION
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
            term = tl.dot(s.to(OPERAND), q.to(OPERAND), term, input_precision=EXPAND_PRECISION)
        if DROP:
            keep = keep_mask(tl.load(seeds_ptr + i), bounds[i], m0, n0, N, BLOCK_M, BLOCK_N)
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
def finish(
    acc, s, y_ptr, bias_ptr, s_ptr, q_ptr, seeds_ptr, rank_ends, bounds, scales, m0, n0, M, N, R,
    stride_qr, stride_qn,
    NUM_ADAPTERS: tl.constexpr, VARIANT: tl.constexpr, DROP: tl.constexpr, HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The epilogue: what is missing of LoRA term and bias, one rounding, the store."""
    if VARIANT != "split":
        acc = lora_term(
            acc, s, s_ptr, q_ptr, seeds_ptr, rank_ends, bounds, scales, m0, n0, M, N, R, stride_qr, stride_qn,
            NUM_ADAPTERS, DROP, VARIANT == "recompute", UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    acc = add_bias(acc, bias_ptr, n0, N, HAS_BIAS, BLOCK_N)
    store_tile(y_ptr, acc, m0, n0, N, 1, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def finish_split(
    y_ptr, s_ptr, planes_ptr, bias_ptr, splits, stride_plane, M, N, R,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of Y, and of S in column 0, from the planes of all programs that share it."""
    pid_m, pid_n = grouped_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0, n0 = pid_m * BLOCK_M, pid_n * BLOCK_N
    y = sum_planes(planes_ptr, splits, stride_plane, m0, n0, N, 1, M, N, BLOCK_M, BLOCK_N)
    y = add_bias(y, bias_ptr, n0, N, HAS_BIAS, BLOCK_N)
    store_tile(y_ptr, y, m0, n0, N, 1, M, N, BLOCK_M, BLOCK_N)
    if pid_n == 0:
        s_planes = planes_ptr + (tl.full((), 0, tl.int64) + M) * N  # a plane holds Y, then S
        s = sum_planes(s_planes, splits, stride_plane, m0, 0, R, 1, M, R, BLOCK_M, BLOCK_R)
        store_tile(s_ptr, s, m0, 0, R, 1, M, R, BLOCK_M, BLOCK_R)
