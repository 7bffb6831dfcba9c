"""The dropout mask for numba: see :mod:`fused_lora.ops.compiled`."""

from __future__ import annotations

import ctypes

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fused_lora.ops.compiled_team import jit, on_work, pointer, rounds_as_caller, run, take
from fused_lora.reference import LANES, PHILOX, WEYL


@intrinsic
def _multiply(context, a, b):
    """(high, low) word of a product of two 64-bit words."""

    def generate(context, builder, signature, arguments):
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(word, wide) for word in arguments))
        high = builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))
        return context.make_tuple(builder, signature.return_type, (high, builder.trunc(product, ir.IntType(64))))

    return types.UniTuple(types.uint64, 2)(types.uint64, types.uint64), generate


_MULTIPLIER_0, _MULTIPLIER_1 = (np.uint64(word) for word in PHILOX)
_WEYL_0, _WEYL_1 = (np.uint64(word) for word in WEYL)


@jit
def _philox(seed, counter):
    """Philox4x64-10 at one counter: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011)."""
    c0, c1, c2, c3 = counter, np.uint64(0), np.uint64(0), np.uint64(0)
    k0, k1 = seed, np.uint64(0)
    for _ in range(10):
        high_0, low_0 = _multiply(_MULTIPLIER_0, c0)
        high_1, low_1 = _multiply(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 += _WEYL_0
        k1 += _WEYL_1
    return c0, c1, c2, c3


# elements from which torch, too, takes all its threads, and a share that one thread takes at a time
_ENOUGH, _SHARE = 1 << 15, 1 << 14


class _Work(ctypes.Structure):
    """The arguments of :func:`multiply_by_mask` for a team; ``next`` is the first row that is left."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("next", "probe", "flushes", "step", "M", "K", "seed", "start", "cut", "double"),
            *("rows", "out", "in_place"),
        )
    ]


@jit
def _select(rows, lanes, cut, out):
    """out (None: rows) = rows * (lane >= cut)."""
    for k in range(rows.size):
        kept = rows[k] * rows.dtype.type(lanes[k] >= cut)
        if out is None:  # decided when compiling; two names of one memory would not be vectorised
            rows[k] = kept
        else:
            out[k] = kept


@jit
def _multiply_rows(shared, work, element):
    """Rows of the work, ``step`` at a time, as long as there are any left."""
    shape = work.M, work.K
    rows = numba.carray(pointer(work.rows, element), shape)
    out = numba.carray(pointer(work.out, element), shape)
    in_place = numba.carray(pointer(work.in_place, element), shape)
    blocks = (work.K + LANES - 1) // LANES
    words = np.empty(4 * blocks, np.uint64)
    lanes = words.view(np.int16)
    while True:
        first = take(shared, 0, work.step)
        if first >= work.M:
            return
        for row in range(first, min(first + work.step, work.M)):
            counter = np.uint64(work.start + row) * np.uint64(blocks) + np.uint64(1)
            for block in range(blocks):
                a, b, c, d = _philox(np.uint64(work.seed), counter + np.uint64(block))
                words[4 * block] = a
                words[4 * block + 1] = b
                words[4 * block + 2] = c
                words[4 * block + 3] = d
            if work.rows != 0:
                _select(rows[row], lanes, work.cut, out[row])
            if work.in_place != 0:
                _select(in_place[row], lanes, work.cut, None)


@on_work(_Work)
def _function(shared):
    work = numba.carray(shared, 1)[0]
    if not rounds_as_caller(work):
        return
    if work.double:
        _multiply_rows(shared, work, np.float64(0))
    else:
        _multiply_rows(shared, work, np.float32(0))


def multiply_by_mask(
    seed: int,
    start: int,
    cut: int,
    rows: torch.Tensor | None,
    out: torch.Tensor | None,
    in_place: torch.Tensor | None,
) -> None:
    """out = rows * (lane >= cut) and in_place *= (lane >= cut), from row ``start`` of the mask, in torch's threads.

    Contiguous [M, K], all in fp32 or all in fp64. None for rows and out, or for in_place, leaves that out.

    Args:
        seed: as a signed integer of 64 bits. cut: :func:`~fused_lora.reference.dropout_threshold` - 32768.
    """
    like = rows if in_place is None else in_place
    M, K = like.shape
    addresses = [0 if t is None else t.data_ptr() for t in (rows, out, in_place)]
    work = _Work(
        step=max(1, _SHARE // max(K, 1)), M=M, K=K, seed=seed, start=start, cut=cut, double=like.dtype == torch.float64,
        rows=addresses[0], out=addresses[1], in_place=addresses[2],
    )  # fmt: skip
    run(_function, work, alone=M * K < _ENOUGH)
    if work.next < M:
        raise MemoryError("dropout: no memory for the buffers of a mask")
