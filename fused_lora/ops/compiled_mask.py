"""The dropout mask for numba, and how the loops of this package are compiled: see :mod:`fused_lora.ops.compiled`.

numba recompiles a function when its own file changes, so what a loop is made of stands beside it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fused_lora.reference import LANES, PHILOX, WEYL


def _compile(compiler: Callable, function: Callable, **options: bool) -> Callable:
    """``function`` by one of numba's compilers, and what that makes of it kept on disk."""
    options |= dict(error_model="numpy", boundscheck=False)
    try:
        return compiler(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor a home directory can be written: compile in every process
        return compiler(**options)(function)


def jit(function: Callable, nogil: bool = True) -> Callable:
    """Compiled at the first call with arguments of a kind; lets go of the interpreter lock."""
    return _compile(numba.njit, function, nogil=nogil)


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


# elements from which torch, too, takes all its threads, and a fraction that one thread takes at a time
_ENOUGH, _SHARE = 1 << 15, 1 << 14


class _Work(ctypes.Structure):
    """What a team of threads shares: the arguments of :func:`multiply_by_mask`, and ``next``, the first row left."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("next", "step", "M", "K", "seed", "start", "cut", "double", "rows", "out", "in_place")
    ]


_POINTER = types.CPointer(numba.from_dtype(np.dtype(_Work)))


@intrinsic
def _take(context, work, count):
    """The first row left, which is ``count`` further for the next who asks."""

    def generate(context, builder, signature, arguments):
        first = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", first, arguments[1], "monotonic")

    return types.int64(work, types.int64), generate


@intrinsic
def _pointer(context, address, element):
    """The address as a pointer to elements of that kind."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(element)(types.int64, element), generate


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
def _multiply_rows(pointer, work, element):
    """Rows of the work, ``step`` at a time, as long as there are any left."""
    shape = work.M, work.K
    rows = numba.carray(_pointer(work.rows, element), shape)
    out = numba.carray(_pointer(work.out, element), shape)
    in_place = numba.carray(_pointer(work.in_place, element), shape)
    blocks = (work.K + LANES - 1) // LANES
    words = np.empty(4 * blocks, np.uint64)
    lanes = words.view(np.int16)
    while True:
        first = _take(pointer, work.step)
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


@partial(_compile, partial(numba.cfunc, types.void(_POINTER)))
def _work(pointer):
    work = numba.carray(pointer, 1)[0]
    if work.double:
        _multiply_rows(pointer, work, np.float64(0))
    else:
        _multiply_rows(pointer, work, np.float32(0))


def _team() -> Callable | None:
    """Runs a function in all threads of torch's own OpenMP: others would wait for these, which spin for milliseconds.

    None where torch has none of GNU's interface, which LLVM's and Intel's have as well.
    """
    run = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None) if sys.platform == "linux" else None
    if run is not None:
        run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return run


_run = _team()


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
    addresses = (0 if t is None else t.data_ptr() for t in (rows, out, in_place))
    work = _Work(0, max(1, _SHARE // max(K, 1)), M, K, seed, start, cut, like.dtype == torch.float64, *addresses)
    if _run is None or M * K < _ENOUGH:
        _work.ctypes(ctypes.byref(work))
    else:
        _run(_work.address, ctypes.addressof(work), 0, 0)
