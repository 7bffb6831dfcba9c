"""The dropout mask for numba, and how the loops of this package are compiled: see :mod:`fused_lora.ops.compiled`.

numba recompiles a function when its own file changes, so what a loop is made of stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fused_lora.reference import LANES, PHILOX, WEYL


def jit(function: Callable, nogil: bool = True) -> Callable:
    """Compiled at the first call with arguments of a kind, and kept on disk; lets go of the interpreter lock."""
    options = dict(nogil=nogil, error_model="numpy", boundscheck=False)
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor a home directory can be written: compile in every process
        return numba.njit(**options)(function)


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
def multiply_by_mask(
    seed: np.uint64,
    start: int,
    stop: int,
    K: int,
    cut: int,
    rows: np.ndarray | None,
    out: np.ndarray | None,
    in_place: np.ndarray | None,
) -> None:
    """out = rows * (lane >= cut) and in_place *= (lane >= cut), all [stop - start, K], from row ``start`` of the mask.

    None for rows and out, or for in_place, leaves that out.
    """
    blocks = (K + LANES - 1) // LANES
    words = np.empty(4 * blocks, np.uint64)
    lanes = words.view(np.int16)
    for row in range(stop - start):
        counter = np.uint64(start + row) * np.uint64(blocks) + np.uint64(1)
        for block in range(blocks):
            a, b, c, d = _philox(seed, counter + np.uint64(block))
            words[4 * block] = a
            words[4 * block + 1] = b
            words[4 * block + 2] = c
            words[4 * block + 3] = d
        if rows is not None:
            _select(rows[row], lanes, cut, out[row])
        if in_place is not None:
            _select(in_place[row], lanes, cut, None)
