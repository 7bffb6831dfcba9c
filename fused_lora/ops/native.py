"""The loops of csrc/cpu_loops.c, called through ctypes. Where they are missing or do not work, plain torch runs.

setup.py builds them into ``_cpu_loops.so`` beside this file if there is a C compiler. At their first use in a process
they are compared with torch: masks here, merges in :mod:`fused_lora.ops.merge.blocks`, LoRA terms of many adapters in
:mod:`fused_lora.ops.grouped.loops`.
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
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from fused_lora.reference import dropout_lanes

P = ParamSpec("P")
T = TypeVar("T")
LIBRARY = Path(__file__).with_name("_cpu_loops.so")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MERGE, UNMERGE, MERGE_AGAIN, CHECKSUM = range(4)  # what Work is run for
DONE, LOST, FULL, CHANGED, TORN = range(5)  # and how that ends
_VARIANTS = "plain C", "C for AVX2", "C for AVX-512"
_SHARE = 1 << 14  # elements for which one more thread is worth its start

_rejected: list[str] = []  # why the loops are not used although they are there
_forked = False  # OpenMP would wait for the threads of the parent


class Work(ctypes.Structure):
    """One weight, and what a merge notes of it: ``Work`` in C. Pointers are addresses."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in "rows columns row_stride ranks height width weight_type weight left right row_scale column_scale "
        "counts starts checksums merged corrections room used dithered first_row seed old".split()
    ]


_mask = struct.Struct("11q").pack  # ``Mask`` in C: rows columns start cut is_double threads variant seed x out in_place


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library and its best variant's name, or None and why there is none."""
    if not LIBRARY.exists():
        return None, "the package was built without a C compiler"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        variant = library.fused_lora_variant()
        if library.fused_lora_work_bytes() != ctypes.sizeof(Work) or not hasattr(library, "fused_lora_terms"):
            return None, f"{LIBRARY.name} is of another version: build it again"
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY.name} cannot be loaded: {error}"
    if variant < 0:
        return None, "this processor has no fused multiply-add"
    return library, _VARIANTS[variant] + (" with OpenMP" if library.fused_lora_openmp() else ", one thread")


@functools.cache
def _masks_agree() -> bool:
    # rows by numpy: torch's default dtype may be another
    rows, cut = torch.from_numpy(np.linspace(-1, 1, 40 * 999, dtype=np.float32).reshape(40, 999)), -20000
    out, mask = torch.empty_like(rows), dropout_lanes(7, 2, 40, 999)[:, :999] >= cut
    _multiply(7, 2, cut, rows, out, None)
    if not np.array_equal(out.numpy(), rows.numpy() * mask.numpy()):
        reject("a dropout mask differs")
    return not _rejected


def usable() -> bool:
    """Whether the loops run; otherwise :func:`describe` says why not."""
    return _loaded()[0] is not None and not _rejected and _masks_agree()


def describe() -> str:
    """Which code does merges, dropout masks and the LoRA terms of vLLM on this CPU, and why: one line."""
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


def threads(elements: int) -> int:
    """How many of torch's threads share so much work. One in a forked child, which has no others."""
    return 1 if _forked or elements < 2 * _SHARE else min(torch.get_num_threads(), elements // _SHARE)


def safe_in_a_child(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` with torch in one thread in a forked child, where OpenMP would wait for the parent's threads."""

    @functools.wraps(function)
    def safe(*args: P.args, **kwargs: P.kwargs) -> T:
        if _forked and torch.get_num_threads() > 1:
            with one_thread():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return safe


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch in one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(works: Sequence[Work], mode: int) -> int:
    """Merge or unmerge all of these weights or nothing; returns how that ended. Python's signals wait until then."""
    pointers = struct.pack(f"{len(works)}P", *map(ctypes.addressof, works))
    share = threads(sum(work.rows * work.columns for work in works))
    return _loaded()[0].fused_lora_run(pointers, ctypes.c_int64(len(works)), share, variant(), mode)


def multiply_by_mask(
    seed: int, start: int, cut: int, rows: torch.Tensor | None, out: torch.Tensor | None, in_place: torch.Tensor | None
) -> bool:
    """out = rows * (lane >= cut) and in_place *= (lane >= cut), from row ``start`` of the mask; False: not done.

    [M, K], all fp32 or all fp64. None for rows and out, or for in_place, leaves that out. Not done where the loops do
    not run, a tensor is not contiguous or has another dtype.

    Args:
        seed: as a signed integer of 64 bits. cut: :func:`~fused_lora.reference.dropout_threshold` - 32768.
    """
    if not usable():
        return False
    for tensor in (rows, out, in_place):
        if tensor is not None and not (tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.float64)):
            return False
    _multiply(seed, start, cut, rows, out, in_place)
    return True


def _multiply(seed, start, cut, rows, out, in_place) -> None:
    like = rows if in_place is None else in_place
    M, K = like.shape
    addresses = [0 if t is None else t.data_ptr() for t in (rows, out, in_place)]
    is_double, share = like.dtype is torch.float64, threads(M * K)
    _loaded()[0].fused_lora_mask(_mask(M, K, start, cut, is_double, share, variant(), seed, *addresses))


def add_terms(packed: bytes) -> None:
    """The LoRA terms of rows under many adapters: ``Terms`` in C, of :mod:`fused_lora.ops.grouped.loops`."""
    _loaded()[0].fused_lora_terms(packed)


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
