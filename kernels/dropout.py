"""The dropout mask: Philox4x64-10, drawn in registers, sixteen elements a call.

    block = row * ceil(K / 16) + k // 16        counter = (block + 1, 0, 0, 0)        key = (seed, 0)
    kept(row, k) = (16-bit piece k % 16 of the four output words, signed) >= threshold - 32768

A mask depends on (seed, row, k, p) alone: not on tiles, grids or the number of rows, so the forward, the input gradient
and the weight gradient each draw it again instead of storing it, and numpy's Philox gives the same bits. One call costs
20 64-bit multiplies of each half, 17 instructions an element: a pass over x nearly hides it, a GEMM that drew it in
every column tile would not, so each launch draws an element's mask once wherever it can.

The seed is read from device memory: a captured CUDA graph sees a fresh one at every replay.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

LANES = tl.constexpr(16)  # 16-bit lanes in one Philox4x64 block
_M0 = tl.constexpr(0xD2E7470EE14C6C93)
_M1 = tl.constexpr(0xCA5A826395121157)
_W0 = tl.constexpr(0x9E3779B97F4A7C15)
_W1 = tl.constexpr(0xBB67AE8584CAA73B)


def threshold(p: float) -> int:
    """p in units of 2^-16, as the specification rounds it: 0 only for p = 0, 65536 only for p = 1."""
    return int(p * 65536) if p in (0.0, 1.0) else min(max(round(p * 65536), 1), 65535)


@lru_cache(maxsize=256)
def keep_scale(p: float) -> float:
    """1 / (1 - p) for the p that the threshold applies; 0 for p = 1."""
    return 0.0 if threshold(p) == 65536 else 65536.0 / (65536 - threshold(p))


@triton.jit
def _philox_words(seed, block):
    """The four 64-bit words of ``block`` (any shape, integer) under ``seed`` (int64 scalar)."""
    c0 = block.to(tl.uint64) + 1
    c1 = tl.zeros_like(c0)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = seed.to(tl.uint64)
    k1 = tl.zeros_like(k0)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full(c0.shape, _M0, tl.uint64))
        high1 = tl.umulhi(c2, tl.full(c2.shape, _M1, tl.uint64))
        low0 = c0 * _M0
        low1 = c2 * _M1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += _W0
        k1 += _W1
    return c0, c1, c2, c3


@triton.jit
def _kept(word, limit):
    """Four bits: which of the 16-bit pieces of ``word`` reach limit / 2^16, a signed number."""
    low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
    # the lower piece of a half does not decide how the upper one compares
    bits = (low << 16 >= limit).to(tl.int32) | ((low >= limit).to(tl.int32) << 1)
    return bits | ((high << 16 >= limit).to(tl.int32) << 2) | ((high >= limit).to(tl.int32) << 3)


@triton.jit
def keep_bits(seed, bound, row0, col0, K, ROWS: tl.constexpr, COLS: tl.constexpr):
    """int32 [ROWS, COLS / 16]: bit b of word w says whether column 16 w + b of the tile at (row0, col0) is kept."""
    rows = row0 + tl.arange(0, ROWS).to(tl.int64)
    blocks = col0 // LANES + tl.arange(0, COLS // LANES)
    block = rows[:, None] * tl.cdiv(K, LANES) + blocks[None, :]
    w0, w1, w2, w3 = _philox_words(seed, block)
    limit = bound << 16
    low, high = _kept(w0, limit) | (_kept(w1, limit) << 4), (_kept(w2, limit) << 8) | (_kept(w3, limit) << 12)
    # a sum inside a thread, over which the compiler moves no layout: else it draws the mask once for each reader's
    bits = tl.sum(tl.permute(tl.join(low, high), (2, 0, 1)), 0)
    return tl.where(bound < 32768, bits, 0)  # p = 1, whose limit is beyond 32 bits


@triton.jit
def keep_mask(seed, bound, row0, col0, K, ROWS: tl.constexpr, COLS: tl.constexpr):
    """True = kept: the tile [ROWS, COLS] at (row0, col0) of a mask of K columns, col0 a multiple of 16.

    seed: int64 scalar; bound: threshold - 32768. Sixteen elements travel as one word to the threads that hold them.
    """
    bits = keep_bits(seed, bound, row0, col0, K, ROWS, COLS)
    lanes = (bits[:, :, None] >> tl.arange(0, LANES)[None, None, :]) & 1
    return tl.reshape(lanes, (ROWS, COLS)) != 0


@triton.jit
def _dropout_mask_kernel(out_ptr, seed_ptr, bound, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    row0, col0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_K
    keep = keep_mask(tl.load(seed_ptr), bound, row0, col0, K, BLOCK_M, BLOCK_K)
    rows = row0 + tl.arange(0, BLOCK_M).to(tl.int64)
    cols = col0 + tl.arange(0, BLOCK_K)
    mask = (rows[:, None] < M) & (cols[None, :] < K)
    tl.store(out_ptr + rows[:, None] * K + cols[None, :], keep.to(tl.uint8), mask=mask)


def dropout_mask(
    seed: torch.Tensor, M: int, K: int, p: float, BLOCK_M: int = 32, BLOCK_K: int = 128, num_warps: int = 4
) -> torch.Tensor:
    """The mask that the kernels draw: bool [M, K] on the device of ``seed`` (int64, one element). One launch."""
    out = torch.empty((M, K), dtype=torch.uint8, device=seed.device)
    if out.numel():
        grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(K, BLOCK_K))
        _dropout_mask_kernel[grid](
            out, seed, threshold(p) - 32768, M, K, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, num_warps=num_warps
        )
    return out.view(torch.bool)
