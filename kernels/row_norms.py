"""Row norms of an adapted weight, without the adapted weight: n_j = ||W_j + scale (B A)_j||, which DoRA divides by.

W [N, K]  bf16 / fp16 / fp32, any strides    A [r, K], B [N, r]  lora_A and lora_B    n [N]  fp32

A program takes a block of rows through all of K: the tile of W + scale B A is formed in registers, squared, and summed
in fp32, one sum for each column of the tile, which are added at the end. Bytes: ``traffic``; W is read once, and A is
read again from L2 for every block of rows. Flops 2 N K r. DoRA: arXiv:2402.09353.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import KEPT, Launch
from .tiles import addressable, load_tile

# rows are below the 64 of a wgmma, for B is converted in registers (tiles.py says why); more ranks spill on sm_80
BLOCK_N, BLOCK_K, BLOCK_R = 32, 64, 16


@triton.jit
def _row_norms_kernel(
    w_ptr, a_ptr, b_ptr, out_ptr,
    N, K, R, scale,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """UPCAST: form the product in fp32, for adapters that are not 16-bit of one dtype."""
    n0 = tl.program_id(0) * BLOCK_N
    squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        delta = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for r in range(0, R, BLOCK_R):
            b = load_tile(b_ptr, n0, r, stride_bn, stride_br, N, R, BLOCK_N, BLOCK_R)
            a = load_tile(a_ptr, r, k, stride_ar, stride_ak, R, K, BLOCK_R, BLOCK_K)
            if UPCAST:
                b, a = b.to(tl.float32), a.to(tl.float32)
            delta = tl.dot(b, a, delta, input_precision="ieee")
        w = load_tile(w_ptr, n0, k, stride_wn, stride_wk, N, K, BLOCK_N, BLOCK_K).to(tl.float32)
        total = w + scale * delta
        squares += total * total
    rows = n0 + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + rows, tl.sqrt(tl.sum(squares, 1)), mask=rows < N)


@lru_cache(maxsize=KEPT)
def _launch(N: int, K: int, r: int, scale: float, strides: tuple[int, ...], upcast: bool, *_) -> Launch:
    """Arguments after ``upcast``: what else a compiled kernel depends on."""
    fixed = dict(UPCAST=upcast, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R, num_warps=4, num_stages=2)
    return Launch((triton.cdiv(N, BLOCK_N),), N, K, r, scale, *strides, **fixed)


def row_norms(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float) -> torch.Tensor:
    """n [N] in fp32 of W [N, K], A [r, K] and B [N, r], each fp32, bf16 or fp16. One launch."""
    (N, K), r = weight.shape, lora_A.shape[0]
    out = weight.new_empty(N, dtype=torch.float32)
    if N:
        tensors = addressable(weight), addressable(lora_A), addressable(lora_B)
        upcast = lora_A.dtype != lora_B.dtype or lora_A.dtype == torch.float32
        strides = tuple(stride for tensor in tensors for stride in tensor.stride())
        kinds = [tensor.dtype for tensor in tensors]
        _launch(N, K, r, float(scale), strides, upcast, *kinds, out.device)(_row_norms_kernel, *tensors, out)
    return out


def traffic(N: int, K: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype) -> dict[str, int]:
    """``bytes`` to and from device memory, each operand once, which is the floor too."""
    return {"bytes": dtype.itemsize * N * K + adapter_dtype.itemsize * (N + K) * r + 4 * N}
