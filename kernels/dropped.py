"""D(x): the input that a product meets after dropout, where it must be whole: DoRA's second base product, experts, and
the eager path on a GPU.

    out[m, k] = x[m, k] keep(m, k) scale        scale = 1 / (1 - p), or 1; rounded once to x's dtype

x [M, K]  bf16 / fp16 / fp32, any strides    out [M, K] contiguous    the mask of ``dropout``, drawn in registers

Bytes: ``traffic``. x is read once and out written once, which is the floor. A tile draws 8 elements a call of Philox.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .dropout import keep_mask, keep_scale, threshold
from .launch import KEPT, Launch
from .tiles import addressable, load_tile, store_tile

BLOCK_M, BLOCK_K = 8, 512


@triton.jit
def _dropped_kernel(
    x_ptr, out_ptr, seed_ptr,
    bound, scale, M, K, stride_xm, stride_xk,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m0, k0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_K
    x = load_tile(x_ptr, m0, k0, stride_xm, stride_xk, M, K, BLOCK_M, BLOCK_K).to(tl.float32)
    keep = keep_mask(tl.load(seed_ptr), bound, m0, k0, BLOCK_M, BLOCK_K)
    # a product, as torch's: what is not finite shows even where it is dropped
    store_tile(out_ptr, x * keep.to(tl.float32) * scale, m0, k0, K, 1, M, K, BLOCK_M, BLOCK_K)


@lru_cache(maxsize=KEPT)
def _launch(M: int, K: int, p: float, scaled: bool, strides: tuple[int, ...], *_) -> Launch:
    """Arguments after ``strides``: what else a compiled kernel depends on."""
    grid = triton.cdiv(M, BLOCK_M), triton.cdiv(K, BLOCK_K)
    fixed = dict(BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, num_warps=4)
    return Launch(grid, threshold(p) - 32768, keep_scale(p) if scaled else 1.0, M, K, *strides, **fixed)


def dropped(x: torch.Tensor, seed: torch.Tensor, p: float, scaled: bool = True) -> torch.Tensor:
    """D(x) [M, K] of x [M, K], fp32, bf16 or fp16, and the mask of (seed int64 [1], p). One launch.

    scaled: times 1 / (1 - p).
    """
    (M, K), out = x.shape, x.new_empty(x.shape)
    if out.numel():
        rows = addressable(x)
        _launch(M, K, float(p), scaled, rows.stride(), x.dtype, x.device)(_dropped_kernel, rows, out, seed)
    return out


def traffic(M: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """``bytes`` to and from device memory, each operand once, which is the floor too."""
    return {"bytes": 2 * dtype.itemsize * M * K}
