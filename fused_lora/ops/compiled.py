"""CPU loops compiled by numba, where the extra ``cpu`` is installed: a pass instead of numpy's or torch's many.

numba compiles them at their first use on a machine (up to five seconds each for merging in a dtype and for dropout) and
keeps the result on disk. They are compared with numpy's or torch's operations once in every process before they are
used; what differs or fails is not used, with a warning. Without numba the code of numpy and torch runs.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch

from fused_lora.reference import dropout_lanes

T = TypeVar("T")


@functools.cache
def loops() -> ModuleType | None:
    """:mod:`fused_lora.ops.compiled_loops`, or None where numba is missing or does not work here."""
    return tried(_import, _first_difference)


def tried(make: Callable[[], T | None], first_difference: Callable[..., str | None], *arguments: object) -> T | None:
    """What ``make`` returns; None, with a warning, where that fails or differs from what numpy or torch computes."""
    try:
        made = make()
        wrong = None if made is None else first_difference(made, *arguments)
    except Exception as e:  # numba refuses versions of numpy, LLVM processors: whatever it is, numpy can do the work
        wrong = f"{type(e).__name__}: {e}"
    if wrong is None:
        return made
    warnings.warn(f"numba is installed but its loops cannot be used, numpy's take their place: {wrong}", stacklevel=3)
    return None


def _import() -> ModuleType | None:
    try:
        from fused_lora.ops import compiled_loops
    except ModuleNotFoundError as e:
        if e.name != "numba":
            raise
        return None
    return None if compiled_loops.numba.config.DISABLE_JIT else compiled_loops


def _first_difference(loops: ModuleType) -> str | None:
    """Which loop gives other bits than numpy; those of a merge are tried by :mod:`~fused_lora.ops.merge.units`."""
    from fused_lora.ops.merge import arrays as merge_arrays

    rows = np.random.default_rng(0).standard_normal((40, 1000), np.float32)  # enough for all threads
    out, mask = torch.from_numpy(np.empty_like(rows)), dropout_lanes(7, 2, *rows.shape)[:, : rows.shape[1]] >= 5
    loops.multiply_by_mask(7, 2, 5, torch.from_numpy(rows), out, None)
    if not np.array_equal(out.numpy(), rows * mask):
        return "a dropout mask differs"
    words = rows.reshape(-1).view(np.int64)
    ours = loops.fold(words, merge_arrays.WEIGHTS, merge_arrays.MULTIPLIER)
    return None if ours == merge_arrays.fold_in_numpy(words) else "a fingerprint differs"
