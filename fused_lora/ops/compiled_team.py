"""How loops are compiled by numba, and the threads that run them: see :mod:`fused_lora.ops.compiled`."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fused_lora.ops.merge import workers as merge_workers


def _compile(compiler: Callable, function: Callable, **options: bool) -> Callable:
    """``function`` by one of numba's compilers, and what that makes of it kept on disk."""
    options |= dict(error_model="numpy", boundscheck=False)
    try:
        return compiler(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor a home directory can be written: compile in every process
        return compiler(**options)(function)


def jit(function: Callable) -> Callable:
    """Compiled at the first call with arguments of a kind; lets go of the interpreter lock."""
    return _compile(numba.njit, function, nogil=True)


def on_work(kind: type[ctypes.Structure]) -> Callable[[Callable], Callable]:
    """A C function of a pointer to a ``kind``, whose fields are int64; every thread of a team calls it: :func:`run`.

    Fields that :func:`run` sets, and that :func:`rounds_as_caller` reads: ``probe``, ``flushes``.
    """
    pointer = types.CPointer(numba.from_dtype(np.dtype(kind)))
    return partial(_compile, partial(numba.cfunc, types.void(pointer)))


@intrinsic
def take(context: Any, work: types.Type, field: types.Type, count: types.Type) -> tuple:
    """The field with that index, which is ``count`` more for whoever comes next: pieces of work, or of memory."""

    def generate(context, builder, signature, arguments):
        fields = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", builder.gep(fields, [arguments[1]]), arguments[2], "monotonic")

    return types.int64(work, types.int64, types.int64), generate


@intrinsic
def pointer(context: Any, address: types.Type, element: types.Type) -> tuple:
    """The address as a pointer to elements of that kind."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(element)(types.int64, element), generate


def _parallel() -> Callable | None:
    """Runs a function in all threads of torch's own OpenMP: others would wait for these, which spin for milliseconds.

    None where torch has none of GNU's interface, which LLVM's and Intel's have as well.
    """
    run = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None) if sys.platform == "linux" else None
    if run is not None:
        run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return run


_run_parallel = _parallel()
_PROBE = np.full(1, 1e-40, np.float32)


@jit
def rounds_as_caller(work: np.void) -> bool:
    """Whether this thread flushes denormal numbers as the caller does or does not: the setting is a thread's."""
    probe = numba.carray(pointer(work.probe, np.float32(0)), 1)[0]
    return (probe + probe == 0) == (work.flushes != 0)


def run(function: Callable, work: ctypes.Structure, alone: bool = False) -> None:
    """Call a function of :func:`on_work` in as many threads as torch has; in this one, if ``alone``."""
    work.probe, work.flushes = _PROBE.ctypes.data, bool(_PROBE + _PROBE == 0)
    if alone:
        function.ctypes(ctypes.byref(work))
    elif _run_parallel is not None and not merge_workers.forked:
        # asked for, because a new thread's OpenMP does not know yet what torch was told
        _run_parallel(function.address, ctypes.addressof(work), torch.get_num_threads(), 0)
    else:
        call, failures = partial(function.ctypes, ctypes.byref(work)), []
        merge_workers.beside(torch.get_num_threads(), call, call, failures)
        if failures:
            raise failures[0]
