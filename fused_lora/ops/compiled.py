"""CPU loops compiled by numba, where the extra ``cpu`` is installed: the bits of the numpy code, in one pass.

numba compiles them at their first use on a machine (about three seconds) and keeps the result on disk. They are
compared with the numpy code once in every process before they are used; what differs or fails is not used, with a
warning. Without numba the numpy code runs.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import numpy as np
import torch

from fused_lora.reference import dropout_lanes


@functools.cache
def loops() -> ModuleType | None:
    """:mod:`fused_lora.ops.compiled_loops`, or None where numba is missing or does not work here."""
    try:
        from fused_lora.ops import compiled_loops

        wrong = _first_difference(compiled_loops)
    except Exception as e:  # numba refuses versions of numpy, LLVM processors: whatever it is, numpy can do the work
        if isinstance(e, ModuleNotFoundError) and e.name == "numba":
            return None
        wrong = f"{type(e).__name__}: {e}"
    if wrong is None:
        return compiled_loops
    warnings.warn(f"numba is installed but its loops cannot be used, numpy's take their place: {wrong}", stacklevel=2)
    return None


def _first_difference(loops: ModuleType) -> str | None:
    """Which loop gives other bits than numpy."""
    draw = np.random.default_rng(0)
    w, delta = (draw.standard_normal(300, np.float32) * scale for scale in (1, np.float32(0.1)))
    merged, back = w + delta, w + delta - delta
    kept = np.flatnonzero(back != w)
    offsets, values = np.empty(len(w) + loops.MARGIN, np.uint16), np.empty(len(w) + loops.MARGIN, np.int32)
    counts, total = np.empty(1, np.int32), delta.copy()
    weights, multiplier = np.arange(1, 8), 3
    rest = offsets, values, counts, weights, multiplier
    n, print_of_w = loops.merge(w, w.view(np.int32), w.view(np.int64), total, None, *rest)
    if not (n == len(kept) == counts[0] and np.array_equal(offsets[:n], kept) and np.array_equal(total, merged)):
        return "a merged block differs"
    places = delta.view(np.int32), delta.view(np.int64), counts, offsets[:n], values[:n]
    if loops.restore(total, delta, None, *places, weights, multiplier) != print_of_w:
        return "a fingerprint differs"
    if not np.array_equal(delta, w):
        return "a restored block differs"
    rows = np.resize(w, (40, 1000))  # enough for all threads
    out = torch.empty(rows.shape)
    loops.multiply_by_mask(7, 2, 5, torch.from_numpy(rows), out, None)
    mask = dropout_lanes(7, 2, *rows.shape)[:, : rows.shape[1]] >= 5
    return None if np.array_equal(out.numpy(), rows * mask) else "a dropout mask differs"
