"""The dropout mask: Philox4x32-10, drawn in registers, eight elements a call.

    counter = (k // 8, row, 0, 0)        key = (low, high half of the seed)
    kept(row, k) = (16-bit piece k % 8 of the four output words, signed) >= threshold - 32768

A mask depends on (seed, row, k, p) alone: not on tiles, grids or the number of rows, so the forward, the input gradient
and the weight gradient each draw it again instead of storing it. One call costs 20 multiplies of 32 bits. With the
comparisons, and 16-bit elements masked in pairs, a loop of sm_90 has 8 to 10 instructions more an element, 5 of which
add, shift, compare or select: a pass over x nearly hides them, a GEMM that drew the mask in every column tile would
not, so each launch draws an element's mask once wherever it can.

The seed is read from device memory: a captured CUDA graph sees a fresh one at every replay.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import DEFAULTS

LANES = tl.constexpr(8)  # 16-bit lanes in one block of Philox4x32
_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)
_TOPS = tl.constexpr(0x80008000)  # the highest bit of either 16-bit piece
_ALL = tl.constexpr(0xFFFFFFFF)


def threshold(p: float) -> int:
    """p in units of 2^-16, as the specification rounds it: 0 only for p = 0, 65536 only for p = 1."""
    return int(p * 65536) if p in (0.0, 1.0) else min(max(round(p * 65536), 1), 65535)


@lru_cache(maxsize=256)
def keep_scale(p: float) -> float:
    """1 / (1 - p) for the p that the threshold applies; 0 for p = 1."""
    return 0.0 if threshold(p) == 65536 else 65536.0 / (65536 - threshold(p))


@triton.jit
def _philox(seed, c0, c1):
    """The four 32-bit words of counters (c0, c1, 0, 0), integers of shapes that fit, under ``seed`` (int64 scalar)."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0, c1 = tl.broadcast(c0.to(tl.uint32), c1.to(tl.uint32))
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * _M0
        b = c2.to(tl.uint64) * _M1
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = a.to(tl.uint32)
        k0 += _W0
        k1 += _W1
    return c0, c1, c2, c3


@triton.jit
def _kept(word, low, above):
    """The highest bit of either 16-bit piece of ``word``: 1 where the signed piece + 2^15 is at least t. Others: any.

    low: the 15 low bits of t in both halves; above: ~t in both. A difference of 15 bits borrows from a 1 put above it.
    """
    difference = (word | _TOPS) - low
    flipped = word ^ _ALL  # no ~: older interpreters have none for unsigned numbers
    return (flipped & difference) | ((flipped | difference) & above)


@triton.jit
def keep_bits(seed, bound, row0, col0, ROWS: tl.constexpr, COLS: tl.constexpr):
    """uint32 [ROWS, COLS / 8]: word w holds columns 8 w ... of the tile at (row0, col0), in the bits of ``_bit_of``."""
    rows = row0 + tl.arange(0, ROWS)
    blocks = col0 // LANES + tl.arange(0, COLS // LANES)
    w0, w1, w2, w3 = _philox(seed, blocks[None, :], rows[:, None])
    both = (tl.full((), 32768, tl.int32) + bound).to(tl.uint32) * 0x10001  # also of a bound of 1, a constant
    # p = 1, whose t has 17 bits: every difference borrows, and nothing is above
    low = tl.where(bound < 32768, both & 0x7FFF7FFF, _TOPS)
    above = tl.where(bound < 32768, both ^ _ALL, 0)
    first = ((_kept(w0, low, above) >> 1) & 0x7FFF7FFF) | (_kept(w1, low, above) & _TOPS)
    second = ((_kept(w2, low, above) >> 1) & 0x40004000) | (_kept(w3, low, above) & _TOPS)
    # a sum inside a thread, over which the compiler moves no layout: else it draws the mask once for each reader's
    return tl.sum(tl.permute(tl.join((first >> 2) & 0x30003000, second), (2, 0, 1)), 0)


@triton.jit
def _bit_of(lane):
    return 12 + (lane >> 1) + 16 * (lane & 1)


@triton.jit
def _lanes(bits, ROWS: tl.constexpr, COLS: tl.constexpr):
    """bool [ROWS, COLS]: one bit of ``keep_bits`` for each element."""
    lanes = (bits[:, :, None] >> _bit_of(tl.arange(0, LANES))[None, None, :]) & 1
    return tl.reshape(lanes, (ROWS, COLS)) != 0


@triton.jit
def keep_mask(seed, bound, row0, col0, ROWS: tl.constexpr, COLS: tl.constexpr):
    """True = kept: the tile [ROWS, COLS] at (row0, col0) of a mask, col0 a multiple of 8.

    seed: int64 scalar; bound: threshold - 32768. Eight elements travel as one word to the threads that hold them.
    """
    return _lanes(keep_bits(seed, bound, row0, col0, ROWS, COLS), ROWS, COLS)


@triton.jit
def zero_dropped(x, bits, ROWS: tl.constexpr, COLS: tl.constexpr):
    """x [ROWS, COLS], 0 where ``bits``, the tile's ``keep_bits``, drop. Two 16-bit elements in one instruction."""
    if x.dtype.primitive_bitwidth == 16:
        low, high = tl.split(tl.reshape(x.to(tl.uint16, bitcast=True), (ROWS, COLS // LANES, LANES // 2, 2)))
        pairs = (bits[:, :, None] >> _bit_of(2 * tl.arange(0, LANES // 2))[None, None, :].to(tl.uint32)) & 0x10001
        both = (low.to(tl.uint32) | (high.to(tl.uint32) << 16)) & (pairs * 0xFFFF)
        both = tl.join(both.to(tl.uint16), (both >> 16).to(tl.uint16))
        x = tl.reshape(both, (ROWS, COLS)).to(x.dtype, bitcast=True)
    else:
        x = tl.where(_lanes(bits, ROWS, COLS), x, 0.0)
    return x


@triton.jit
def all_lanes(seed, row0, col0, ROWS: tl.constexpr, COLS: tl.constexpr):
    """uint32 [ROWS, COLS]: the 16 bits of each element of the tile at (row0, col0), col0 a multiple of 8."""
    rows = row0 + tl.arange(0, ROWS)
    blocks = col0 // LANES + tl.arange(0, COLS // LANES)
    w0, w1, w2, w3 = _philox(seed, blocks[None, :], rows[:, None])
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., 2 (w0 or w2), 2 (or w1 and w3)]: in order of the words
    words = tl.reshape(words, (ROWS, COLS // 2))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, COLS))


@triton.jit
def _dropout_mask_kernel(out_ptr, seed_ptr, bound, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    row0, col0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_K
    keep = keep_mask(tl.load(seed_ptr), bound, row0, col0, BLOCK_M, BLOCK_K)
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
            out, seed, threshold(p) - 32768, M, K, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, num_warps=num_warps, **DEFAULTS
        )
    return out.view(torch.bool)
