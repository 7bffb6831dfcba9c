"""A 4-bit weight of bitsandbytes (NF4, FP4) as a dense one, in one launch, to the bits that bitsandbytes gives.

    W[i] = round(code[n_i] * scale[i // blocksize])         n_i: four bits, the first of two neighbours in the high half
    scale[j] = absmax[j]                                     fp32, or, double quantised,
    scale[j] = code8[absmax[j]] * absmax8[j // blocksize8] + offset

Each product and sum is rounded to fp32, so nothing may be contracted to an fma. A program takes a run of bytes,
whatever the rows are. The tables of 16 and 256 numbers stay in L1.

Bytes: ``traffic``. N K / 2 packed ones are read and e N K written, so this is bound by what it writes. Few rows need no
dense weight: ``tiles.contract`` reads the same bytes by tiles, with the same two steps to a scale.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import KEPT, Launch

BYTES = 2048  # packed bytes of a program: 16 a thread
Nested = tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]  # code8 [256], absmax8, blocksize8, offset: fp32


def launch_options(nvidia: bool) -> dict[str, int | bool]:
    """128 threads, in warps of 32 or 64, and no contraction."""
    return dict(num_warps=4 if nvidia else 2, enable_fp_fusion=False)


@triton.jit
def load_absmax(absmax_ptr, absmax8_ptr, which, inside, shift8, NESTED: tl.constexpr):
    """What is stored of the scales ``which``: (absmax, and double quantised the absmax8 of each)."""
    absmax = tl.load(absmax_ptr + which, mask=inside, other=0)
    absmax8 = absmax
    if NESTED:
        absmax8 = tl.load(absmax8_ptr + (which >> shift8), mask=inside, other=0.0)
    return absmax, absmax8


@triton.jit
def scale_of(absmax, absmax8, code8_ptr, offset_ptr, NESTED: tl.constexpr):
    """The fp32 scales, to the bit where nothing is contracted to an fma."""
    if NESTED:
        absmax = tl.load(code8_ptr + absmax.to(tl.int32)) * absmax8 + tl.load(offset_ptr)
    return absmax


@triton.jit
def _dequant_4bit_kernel(
    packed_ptr, code_ptr, absmax_ptr, code8_ptr, absmax8_ptr, offset_ptr, out_ptr,
    nbytes, numel, shift, shift8,
    NESTED: tl.constexpr, EVEN: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """shift, shift8: log2 of the bytes to a scale, and of the scales to a scale of theirs. EVEN: nothing is masked."""
    first = tl.program_id(0).to(tl.int64) * BYTES
    at = first + tl.arange(0, BYTES)
    inside = (at < nbytes) | EVEN
    packed = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
    absmax, absmax8 = load_absmax(absmax_ptr, absmax8_ptr, at >> shift, inside, shift8, NESTED)
    scale = scale_of(absmax, absmax8, code8_ptr, offset_ptr, NESTED)
    left = tl.load(code_ptr + (packed >> 4)) * scale
    right = tl.load(code_ptr + (packed & 15)) * scale
    to = 2 * first + tl.arange(0, 2 * BYTES)
    tl.store(out_ptr + to, tl.interleave(left, right).to(out_ptr.dtype.element_ty), mask=(to < numel) | EVEN)


@lru_cache(maxsize=KEPT)
def _launch(nbytes: int, numel: int, blocksize: int, blocksize8: int, nested: bool, *_) -> Launch:
    """Arguments after ``nested``: what else a compiled kernel depends on."""
    shift, shift8 = shifts(blocksize, blocksize8)
    even = nbytes % BYTES == 0 and numel == 2 * nbytes
    fixed = dict(NESTED=nested, EVEN=even, BYTES=BYTES, **launch_options(not torch.version.hip))
    return Launch((triton.cdiv(nbytes, BYTES),), nbytes, numel, shift - 1, shift8, **fixed)  # two values to a byte


def dequant_4bit(
    packed: torch.Tensor,
    code: torch.Tensor,
    absmax: torch.Tensor,
    nested: Nested | None,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight [N, K] in ``dtype`` (fp32, bf16, fp16). One launch.

    packed: uint8 [ceil(N K / 2)]. code: fp32 [16]. absmax: fp32, or with ``nested`` uint8, [ceil(N K / blocksize)].
    blocksize: values to a scale; it and blocksize8 are powers of two. All tensors are contiguous.
    """
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    if out.numel():
        code8, absmax8, blocksize8, offset = nested or (None, None, 0, None)
        key = packed.numel(), out.numel(), blocksize, blocksize8, nested is not None, absmax.dtype, dtype, out.device
        _launch(*key)(_dequant_4bit_kernel, packed, code, absmax, code8, absmax8, offset, out)
    return out


def shifts(blocksize: int, blocksize8: int) -> tuple[int, int]:
    """log2 of the values to a scale, and of the scales to a scale of theirs (0 without one)."""
    return blocksize.bit_length() - 1, max(blocksize8, 1).bit_length() - 1


def tensors_of(packed: torch.Tensor, code: torch.Tensor, absmax: torch.Tensor, nested: Nested | None) -> tuple:
    """The ``w`` of ``tiles.load_4bit_tile``."""
    return (packed, code, absmax, nested[0], nested[1], nested[3]) if nested else (packed, code, absmax)


def held(N: int, K: int, blocksize: int, blocksize8: int = 0) -> int:
    """Bytes of a packed weight with its scales and tables. blocksize8: 0 for fp32 scales."""
    scales = -(-N * K // blocksize)
    nested = scales + 4 * -(-scales // blocksize8) + 4 * 256 + 4 if blocksize8 else 4 * scales
    return -(-N * K // 2) + nested + 4 * 16


def traffic(N: int, K: int, blocksize: int, dtype: torch.dtype, blocksize8: int = 0) -> dict[str, int]:
    """``bytes`` to and from device memory, each operand once, which is the floor too. blocksize8: 0 for fp32 scales."""
    return {"bytes": held(N, K, blocksize, blocksize8) + dtype.itemsize * N * K}
