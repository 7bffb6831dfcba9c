"""Parse the arguments of a batch: the adapters of each entry, and the entry of each row."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fused_lora.serving.residency.lease import Lease

Entry = tuple[tuple[str | Lease, float], ...]  # of each adapter, with its weight; empty for the base model


def parse_entry(entry: Any, position: int) -> Entry:
    """An element of ``store.batch([...])`` as ((name, weight), ...): None, a name or lease, or a dict of these with
    weights. A sum is taken in the order of the names, so that equal requests get equal bits.

    Raises:
        TypeError: another type. ValueError: a weight that is not finite.
    """
    if entry is None:
        return ()
    if isinstance(entry, (str, Lease)):
        return ((entry, 1.0),)
    if not isinstance(entry, Mapping):
        raise TypeError(f"names[{position}]: expected a name, None or a dict of names and weights, got {entry!r}")
    for name, weight in entry.items():
        if not isinstance(name, (str, Lease)):
            raise TypeError(f"names[{position}]: expected adapter names as keys, got {name!r}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"names[{position}][{name!r}]: expected a number, got {weight!r}")
        if not abs(weight) <= sys.float_info.max:
            raise ValueError(f"names[{position}][{name!r}]: expected a finite weight, got {str(weight)[:40]}")
    return tuple(sorted(((name, float(w)) for name, w in entry.items()), key=lambda pair: str(pair[0])))


def rows_to_entries(entries: int, rows: Sequence[int] | Tensor | np.ndarray) -> np.ndarray:
    """The entry of each token row, from a tensor or array of entries, or from a list of row counts.

    Raises:
        TypeError: not integers. ValueError: a count is negative; there are more or fewer counts than entries; or an
            index is out of range (-1 means the base model).
    """
    if isinstance(rows, (Tensor, np.ndarray)):
        index = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else rows
        if index.dtype.kind not in "iu":
            raise TypeError(f"rows: expected integers, got {index.dtype}")
        index = index.reshape(-1)
        if len(index) and not -1 <= index.min() <= index.max() < entries:  # before uint64 becomes negative
            raise ValueError(f"rows: expected indices of -1 to {entries - 1}, got {index.min()} to {index.max()}")
        return index.astype(np.int64)
    counts: list[Any] = list(rows) if isinstance(rows, Sequence) and not isinstance(rows, str) else [None]
    if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in counts):
        raise TypeError("rows: expected a list of row counts, or a tensor with the entry of each row")
    if len(counts) != entries or min(counts, default=0) < 0 or sum(counts) >= 2**31:
        raise ValueError(f"rows: expected {entries} counts of 0 or more, got {counts[:20]}")
    return np.repeat(np.arange(entries), counts)
