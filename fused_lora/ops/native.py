"""The loops of csrc/cpu_loops.c, called through ctypes. Where they are missing or do not work, plain torch runs.

setup.py builds them into ``_cpu_loops.so`` beside this file if there is a C compiler. At their first use in a process
they are compared with torch: products with dropout masks here, merges in :mod:`fused_lora.ops.merge.blocks`, LoRA
terms of many adapters in :mod:`fused_lora.ops.grouped.loops`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fused_lora.reference import dropout_lanes

T = TypeVar("T")
LIBRARY = Path(__file__).with_name("_cpu_loops.so")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MERGE, UNMERGE, MERGE_AGAIN = range(3)  # what Work is run for
DONE, LOST, FULL, CHANGED, TORN = range(5)  # and how that ends
_VARIANTS = "plain C", "C for AVX2", "C for AVX-512"
_SHARE = 1 << 14  # elements for which one more thread is worth its start
_TRIAL = (137, 1099), (3, 1099), (137, 3)  # shapes of x, A and dS
_PANEL = 1024  # columns of x that C has at a time: PANEL there

_rejected: list[str] = []  # why the loops are not used although they are there
_PROCESS = os.getpid()  # in a forked child OpenMP would wait for the threads of the parent


class Work(ctypes.Structure):
    """One weight, and what a merge notes of it: ``Work`` in C. Pointers are addresses."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in "rows columns row_stride ranks height width weight_type weight left right row_scale column_scale "
        "counts starts checksums merged corrections room used dithered first_row seed".split()
    ]


# ``Products`` in C: rows columns ranks cut threads variant height panels seed x A dS turned S dx dA
_products = struct.Struct("16q")
# ``Terms`` in C: x x_stride K y_type type outputs groups columns starts members strips spans blocks block order S pitch
# threads variant y y_stride
_terms = struct.Struct("21q")


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library and its best variant's name, or None and why there is none."""
    if not LIBRARY.exists():
        return None, "the package was built without a C compiler"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        variant = library.fused_lora_variant()
        layout = library.fused_lora_layout()
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY.name} cannot be loaded: {error}"
    if layout != ctypes.sizeof(Work) << 20 | _products.size << 10 | _terms.size:
        return None, f"{LIBRARY.name} is of another version: build it again"
    if variant < 0:
        return None, "this processor has no fused multiply-add"
    openmp = hasattr(library, "omp_get_max_threads")  # of what it is linked with
    return library, _VARIANTS[variant] + (" with OpenMP" if openmp else ", one thread")


@functools.cache
def _products_agree() -> bool:
    # rows by numpy: torch's default dtype may be another
    x, A, dS = (torch.from_numpy(np.arange(m * n, dtype=np.float32).reshape(m, n) % 7) for m, n in _TRIAL)
    keep = (dropout_lanes(7, 0, *_TRIAL[0])[:, : _TRIAL[0][1]] >= -20000).numpy()
    kept, term = x.numpy() * keep, keep * (dS.numpy() @ A.numpy())  # sums of small integers are exact
    found = _run_products(7, -20000, x, A, dS, (True, True, True))
    expected = kept @ A.numpy().T, term, dS.numpy().T @ kept
    if not all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)):
        reject("products with a dropout mask differ")
    return not _rejected


def usable() -> bool:
    """Whether the loops run; otherwise :func:`describe` says why not."""
    return _loaded()[0] is not None and not _rejected and _products_agree()


def describe() -> str:
    """Which code does merges, dropout masks and the LoRA terms of mixed batches on this CPU, and why: one line."""
    if usable():
        return _loaded()[1]
    return f"plain torch: {'; '.join(_rejected) or _loaded()[1]}"


def reject(reason: str) -> None:
    """Never use the loops again in this process: they gave other bits than torch. Warns."""
    _rejected.append(reason)
    warnings.warn(f"fused_lora: the C loops are not used, plain torch runs instead: {reason}", stacklevel=3)


@functools.cache
def variant() -> int:
    """The best set of instructions here, as an index: plain, AVX2, AVX-512."""
    return _loaded()[0].fused_lora_variant()


@functools.cache
def mkl_is_slow() -> bool:
    """Whether torch's BLAS library is MKL on an AMD processor with AVX-512, which it does not use there."""
    return usable() and variant() == 2 and bool(_loaded()[0].fused_lora_amd()) and torch.backends.mkl.is_available()


def threads(elements: int) -> int:
    """How many of torch's threads share so much work. One in a forked child, which has no others."""
    return 1 if os.getpid() != _PROCESS or elements < 2 * _SHARE else min(torch.get_num_threads(), elements // _SHARE)


def safe_in_a_child(function: Callable[..., T]) -> Callable[..., T]:
    """``function`` with torch in one thread in a forked child, where OpenMP would wait for the parent's threads.

    What merges has two arguments: Python handles signals behind a call with stars, and an interrupt loses its result.
    """

    @functools.wraps(function)
    def safe(first: Any, second: Any, *others: Any) -> T:
        if os.getpid() != _PROCESS and torch.get_num_threads() > 1:
            with one_thread():
                return function(first, second, *others)
        return function(first, second, *others) if others else function(first, second)

    return safe


def in_a_child() -> contextlib.AbstractContextManager[None]:
    """torch in one thread inside in a forked child, where it is not already."""
    return one_thread() if os.getpid() != _PROCESS and torch.get_num_threads() > 1 else contextlib.nullcontext()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch in one thread inside."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def run(works: Sequence[Work], mode: int) -> int:
    """Merge or unmerge all of these weights or nothing; returns how that ended. Python's signals wait until then."""
    pointers = struct.pack(f"{len(works)}P", *map(ctypes.addressof, works))
    share = threads(sum(work.rows * work.columns for work in works))
    return _loaded()[0].fused_lora_run(pointers, ctypes.c_int64(len(works)), share, variant(), mode)


def products(
    seed: Any, cut: int, x: torch.Tensor, A: Any, dS: Any, wanted: tuple[bool, bool, bool]
) -> tuple[Any, Any, Any] | None:
    """(D(x) A^T, mask * (dS A), dS^T D(x)), None for what is not wanted, with D(x) = x * mask; None: not done.

    Without dS the second is D(x) itself.

    Not done where the loops do not run, a tensor is not fp32, or r is 0. A row's results do not depend on other rows.

    Args:
        seed: of the mask (lane >= cut), a signed integer of 64 bits. cut: mask_cut of
            :mod:`fused_lora.reference`. x: [M, K]. A: [r, K], or None, as dS: [M, r], where no product takes it.
    """
    for tensor in (x, A, dS):
        if tensor is not None and (tensor.dtype is not torch.float32 or not tensor.is_cpu):
            return None
    # a matrix without elements has no address, which means there that it is not given
    if not usable() or (A is not None and not A.shape[0]):
        return None
    return _run_products(seed, cut, x.contiguous(), A if A is None else A.resolve_neg().contiguous(), dS, wanted)


def _run_products(seed, cut, x, A, dS, wanted) -> tuple[Any, Any, Any]:
    (M, K), r = x.shape, 1 if A is None else A.shape[0]
    need_S, need_x, need_A = wanted
    height = max(128, 8 * r)  # all parts of dA are at most an eighth of x
    turned, panels = None, -(-K // _PANEL)
    if dS is not None:
        dS, turned = dS.contiguous(), dS.t().contiguous()
    S = x.new_empty((panels, M, r)) if need_S else None
    dx = torch.empty_like(x) if need_x else None
    dA = x.new_empty((-(-M // height), r, K)) if need_A else None
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (x, A, dS, turned, S, dx, dA)]
    sizes = M, K, r, cut, threads(M * K), variant(), height, panels, seed
    _loaded()[0].fused_lora_products(_products.pack(*sizes, *addresses))
    return _sum(S), dx, _sum(dA)


def _sum(parts: torch.Tensor | None) -> torch.Tensor | None:
    return parts if parts is None else parts[0] if len(parts) == 1 else parts.sum(0)


def add_terms(*fields: int) -> None:
    """The LoRA terms of rows under many adapters, of :mod:`fused_lora.ops.grouped.loops`."""
    _loaded()[0].fused_lora_terms(_terms.pack(*fields))
