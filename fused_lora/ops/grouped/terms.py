"""What is added to which rows: rows by group, and the adapters of each group at a layer.

A *group* is a list of adapters, and the rows that have it; a base row is in no group. Both also hold the tables of the
loops in C: ``Terms`` and ``Member`` there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_lora.ops import native
from fused_lora.ops.checks import as_scaling
from fused_lora.ops.linear.op import PLAIN

_BLOCK = 32  # rows that a thread of C takes at a time: their inputs stay in its cache
_PIECE = 128  # rows whose term torch holds in memory at a time
LEAST = 4  # rows of torch's tiles: fewer take other code in a BLAS, more are waste in a decode step
_GROUPS = 1 << 16  # numbers of groups that C has a table of
_STRIP, _SPAN = 8, 2048  # ranks and columns of a step of C, as there
_MEMBER = np.dtype([(name, "f8" if name == "scale" else "i8") for name in "A B A_pitch B_pitch ranks scale".split()])
Factors = tuple[Tensor, Tensor, float]  # A^T [K, r], B^T [r, N], scale


class RowLayout:
    """Rows sorted by group: made once for a batch, used by all of its layers.

    Args:
        group_of_row: integers [rows]: number of the row's group, or -1 for a base row.
        device: where the rows are.

    Attributes:
        device: as given. rows: how many there are. groups: numbers of the groups that have rows, ascending.

    Raises:
        ValueError: group_of_row is not one-dimensional. TypeError: it is no array of integers.
    """

    def __init__(self, group_of_row: np.ndarray, device: torch.device):
        if not isinstance(group_of_row, np.ndarray) or group_of_row.size and group_of_row.dtype.kind not in "iu":
            raise TypeError(f"group_of_row: expected an array of integers, got {group_of_row!r:.100}")
        if group_of_row.ndim != 1:
            raise ValueError(f"group_of_row: expected one dimension, got shape {group_of_row.shape}")
        self.rows, self.device = len(group_of_row), torch.device(device)
        order = np.argsort(group_of_row, kind="stable")
        self.order = order[np.searchsorted(group_of_row[order], 0) :]
        present, counts = np.unique(group_of_row[self.order], return_counts=True)
        self.groups = tuple(present.tolist())
        self._parts = dict(zip(self.groups, np.split(self.order, np.cumsum(counts[:-1])), strict=False))

    @functools.cached_property
    def numbers(self) -> dict[int, Tensor]:
        """The numbers of each group's rows, int64."""
        return {g: torch.from_numpy(rows).to(self.device) for g, rows in self._parts.items()}

    @functools.cached_property
    def pieces(self) -> dict[int, list[tuple[Tensor, Tensor]]]:
        """Numbers of each group's rows in pieces; and again, filled up to whole tiles by the last of them."""
        each = {g: rows.split(_PIECE) for g, rows in self.numbers.items()}
        return {g: [(p, torch.cat([p, p[-1:].expand(-len(p) % LEAST)])) for p in pieces] for g, pieces in each.items()}

    @functools.cached_property
    def blocks(self) -> tuple[np.ndarray, int, int]:
        """int64 [blocks, 3], group, first place in ``order`` and rows; its address and that of ``order``.

        Together: another thread that works it out, too, may be the last to store it.
        """
        found, place = [], 0
        for g, rows in self._parts.items():
            found += [(g, place + i, min(_BLOCK, len(rows) - i)) for i in range(0, len(rows), _BLOCK)]
            place += len(rows)
        blocks = np.array(found, np.int64).reshape(-1, 3)
        return blocks, blocks.ctypes.data, self.order.ctypes.data


class Terms:
    """What each group adds at one layer.

    Args:
        outputs: A^T [K, r], B^T [r, N] and the scale of each adapter, by group, of each output of the layer: most
            layers have one. All are of one floating dtype, starting at multiples of 64 bytes. The adapters of a group
            are added up in this order. Groups that add nothing are left out, or have an empty list.
        columns: N of each output; needed if there are several.

    Attributes:
        dtype, device, K: of the factors; None and 0 if there are none. N: columns of all outputs. requires_grad:
            whether a factor does.

    Raises:
        ValueError: the factors are no matrices of one floating dtype on one device that fit each other; float32 cannot
            hold a scale; not one of ``columns`` for each output. TypeError: an output is no mapping, no tensors, a
            scale is no number.
    """

    def __init__(self, *outputs: Mapping[int, Sequence[Factors]], columns: Sequence[int] = ()):
        if len(columns or outputs[:1]) != len(outputs):
            raise ValueError(f"columns: expected one for each of {len(outputs)} outputs, got {columns!r:.100}")
        if not all(isinstance(factors, Mapping) for factors in outputs):
            raise TypeError(f"outputs: expected a mapping of factors by group for each, got {outputs!r:.100}")
        self.outputs = tuple({g: factors[g] for g in sorted(factors) if factors[g]} for factors in outputs)
        every = [member for output in self.outputs for members in output.values() for member in members]
        for A_t, B_t, scale in every:
            if not (isinstance(A_t, Tensor) and isinstance(B_t, Tensor)):
                got = f"{type(A_t).__name__} and {type(B_t).__name__}"
                raise TypeError(f"outputs: expected tensors A^T and B^T of each adapter, got {got}")
            as_scaling(scale)
        first = every[0] if every else None
        self.device: Any = None if first is None else first[0].device
        self.requires_grad = any(A_t.requires_grad or B_t.requires_grad for A_t, B_t, _ in every)
        K, N = ((), ()) if first is None else (first[0].shape[:1], first[1].shape[1:2])
        self.dtype: Any = None if first is None else first[0].dtype
        self.K, self.columns = sum(K), tuple(columns) or (sum(N),)
        self.N = sum(self.columns)
        for output, N in zip(self.outputs, self.columns, strict=True):
            for A_t, B_t, _ in itertools.chain(*output.values()):
                r, dtype, floating = A_t.shape[-1:], A_t.dtype, A_t.is_floating_point()
                fits = A_t.shape == (self.K, *r) and B_t.shape == (*r, N) and floating
                here = A_t.device == B_t.device == self.device and A_t.layout is B_t.layout is torch.strided
                if not (fits and here) or not dtype == B_t.dtype == self.dtype:
                    found = f"{tuple(A_t.shape)} in {dtype} and {tuple(B_t.shape)} in {B_t.dtype}"
                    if not here:
                        found = f"{A_t.layout} on {A_t.device} and {B_t.layout} on {B_t.device}"
                    shape = f"A^T ({self.K}, r) and B^T (r, {N}) in {self.dtype if floating else 'a floating dtype'}"
                    raise ValueError(f"outputs: expected {shape} of each adapter, got {found}")

    @functools.cached_property
    def table(self) -> Table | None:
        """For the loops in C; None where they cannot read the factors."""
        if self.dtype not in native.TYPES or any(max(output, default=0) >= _GROUPS for output in self.outputs):
            return None
        found = [{g: [_member(*f) for f in own] for g, own in output.items() if g >= 0} for output in self.outputs]
        readable = all(member for output in found for members in output.values() for member in members)
        return Table(self, found) if readable else None


def _member(A_t: Tensor, B_t: Tensor, scale: float) -> tuple | None:
    """What C knows of an adapter; None where the rows of A or B^T are not contiguous, or no memory."""
    (K, r), (a_column, a_row), (b_row, b_column) = A_t.shape, A_t.stride(), B_t.stride()
    plain = type(A_t) in PLAIN and type(B_t) in PLAIN and A_t.is_cpu and not (A_t.is_neg() or B_t.is_neg())
    if not (plain and (a_column == 1 or K < 2) and (b_column == 1 or B_t.shape[1] < 2)):
        return None
    return A_t.data_ptr(), B_t.data_ptr(), a_row, b_row, r, scale


class Table:
    """The members of each group at each output, as C reads them.

    Attributes:
        groups: numbers below which all groups are. fields: those of ``Terms`` from ``outputs`` to ``spans``. pitch:
            ranks of a group at one output, at most. elements: of A and B^T of a group at all outputs, at most.
    """

    def __init__(self, terms: Terms, found: Sequence[Mapping[int, Sequence[Any]]]):
        self.groups = 1 + max((g for output in found for g in output), default=-1)
        each = [(i * self.groups + g, m) for i, output in enumerate(found) for g, own in output.items() for m in own]
        cells, size = np.array([cell for cell, _ in each], np.int64), len(found) * self.groups
        self._members = np.array([member for _, member in each], _MEMBER)
        self._starts = np.searchsorted(cells, np.arange(size + 1))
        self._columns = np.array([0, *itertools.accumulate(terms.columns)], np.int64)
        ranks = self._members["ranks"]
        of_cell, strips = (np.bincount(cells, n, size) for n in (ranks, -(-ranks // _STRIP)))
        self.pitch = int(of_cell.max(initial=0))
        wide = of_cell.reshape(len(found), -1) * (terms.K + np.diff(self._columns)[:, None])
        self.elements = int(wide.sum(0).max(initial=0))
        arrays = self._columns, self._starts, self._members
        spans = -(-max(terms.columns) // _SPAN)
        self.fields = len(found), self.groups, *(a.ctypes.data for a in arrays), int(strips.max(initial=0)), spans
