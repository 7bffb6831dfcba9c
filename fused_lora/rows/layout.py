"""How the rows of a layer's input belong to the sequences of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fused_lora.rows.state import State, Unknown


class Layout(NamedTuple):
    """Index i along ``dim`` of an input with ``ndim`` dimensions belongs to sequence (i // inner) % sequences.

    outer: how often the sequences repeat along it.
    """

    ndim: int
    dim: int
    outer: int
    inner: int

    def stride(self, shape: Sequence[int]) -> int:
        """How many rows in a row are of one sequence in an input of ``shape`` [..., features], all dimensions flat."""
        return max(self.inner * int(np.prod(shape[self.dim + 1 : -1])), 1)

    def sequence_of_row(self, shape: Sequence[int], sequences: int) -> np.ndarray:
        """int64 [rows] for an input of ``shape`` [..., features]."""
        return np.arange(int(np.prod(shape[:-1]))) // self.stride(shape) % sequences


def layout_of(state: State, shape: Sequence[int], sequences: int) -> Layout | str:
    """The layout of a layer's input of ``shape``, or the reason why its rows are not known."""
    if state is None:
        return "its input does not come from the model's inputs"
    if isinstance(state, Unknown):
        return state.reason
    if state.template:
        return "its input has the shape of the batch and none of its values"
    if state.dim == len(shape) - 1:
        return "its features are of different sequences"
    owners, count = state.owners, len(state.owners)
    inner = int(np.argmax(owners != owners[0])) if (owners != owners[:1]).any() else count
    if inner * sequences and count % (inner * sequences) == 0:
        outer = count // (inner * sequences)
        if np.array_equal(owners, np.tile(np.repeat(np.arange(sequences), inner), outer)):
            return Layout(len(shape), state.dim, outer, inner)
    return "it gets some of the batch's rows, or all in another order"


Rows = dict[str | None, slice | np.ndarray]  # of each name: a slice where they lie together, else numbers, int64


def rows_of_names(names: Sequence[str | None], rows: int) -> Rows:
    """Which rows of a batch each name has, where the names share them out in this order."""
    each = rows // max(1, len(names))
    numbers = np.arange(rows, dtype=np.int64).reshape(len(names), each)
    found: Rows = {}
    for name in dict.fromkeys(names):
        places = [i for i, n in enumerate(names) if n == name]
        first, end = places[0], places[-1] + 1
        found[name] = slice(first * each, end * each) if end - first == len(places) else numbers[places].reshape(-1)
    return found


def rows_of_owners(names: Sequence[str | None], owners: np.ndarray) -> Rows:
    """The same where ``owners`` [rows] has for each row the place of its name."""
    found: Rows = {}
    for name in dict.fromkeys(names):
        numbers = np.flatnonzero(np.array([n == name for n in names])[owners])
        first, end = (int(numbers[0]), int(numbers[-1]) + 1) if len(numbers) else (0, 0)
        found[name] = slice(first, end) if end - first == len(numbers) else numbers
    return found
