"""LoRA terms of rows under many adapters by the C loops, for one layer whose slots lie in memory at equal distances.

Rows are read and written where they lie, A and B once for a few rows. A row's term has the same bits in any batch, but
not those of the products of torch in :mod:`fused_lora.ops.grouped.op`.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fused_lora.ops import native

KEPT = torch.float32, torch.bfloat16  # what A and B may be held in
_terms = struct.Struct("16q").pack  # ``Terms`` in C
_BLOCK = 32  # rows that a thread takes at a time: their inputs stay in its cache


class Blocks:
    """Rows by slot, in blocks. slot_of_row: int32 [rows], -1 for a base row."""

    def __init__(self, slot_of_row: np.ndarray):
        order = np.argsort(slot_of_row, kind="stable")
        self._order = order[np.searchsorted(slot_of_row[order], 0) :]
        slots, counts = np.unique(slot_of_row[self._order], return_counts=True)
        blocks, place = [], 0
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            blocks += [(slot, place + i, min(_BLOCK, count - i)) for i in range(0, count, _BLOCK)]
            place += count
        self._table = np.array(blocks, np.int64)
        self.places, self.count = len(self._order), len(blocks)
        self.addresses = self._table.ctypes.data, self._order.ctypes.data


class Factors:
    """A [slots, r, K] and B^T [slots, r, N] of each output, all fp32 or all bf16 on the CPU, matrices contiguous.

    ranks: of each output, of each slot, 0 where it adds nothing.
    """

    def __init__(self, A: Sequence[Tensor], B_t: Sequence[Tensor], ranks: Sequence[Sequence[int]]):
        self._alive, self._ranks = (*A, *B_t), np.array(ranks, np.int64)
        self.outputs, self.most, self.K, self.type = len(A), A[0].shape[1], A[0].shape[2], native.TYPES[A[0].dtype]
        columns = [b.shape[2] for b in B_t]
        first = itertools.accumulate(columns, initial=0)
        self._table = np.array(
            [
                (a.data_ptr(), b.data_ptr(), a.stride(0), b.stride(0), n, start, own.ctypes.data)
                for a, b, n, start, own in zip(A, B_t, columns, first, self._ranks, strict=False)
            ],
            np.int64,
        )
        self.address = self._table.ctypes.data
        self.elements = sum(self.most * (self.K + n) for n in columns)  # of one adapter


def add_terms_(y: Tensor, x: Tensor, blocks: Blocks, factors: Factors) -> bool:
    """y [rows, N_g one beside the other] += B_g A_g x, rounded once; False: not done, for the loops do not run or have
    not this dtype. y may have further columns. x: on the CPU."""
    if not blocks.places:
        return True
    fits = y.dtype in native.TYPES and x.dtype in native.TYPES and y.stride(1) == 1 == x.stride(1)
    if not (fits and native.usable() and _agree()):
        return False
    _run(y, x, blocks, factors)
    return True


def _run(y: Tensor, x: Tensor, blocks: Blocks, factors: Factors) -> None:
    x, dtype = x.float(), y.dtype
    S = torch.empty(blocks.places * factors.outputs * factors.most, dtype=torch.float32)
    native.add_terms(
        _terms(
            x.data_ptr(), x.stride(0), factors.K, factors.outputs, native.TYPES[dtype], factors.type,
            factors.address, blocks.count, *blocks.addresses, S.data_ptr(), factors.most,
            native.threads(blocks.count * factors.elements), native.variant(),
            y.data_ptr(), y.stride(0) * dtype.itemsize,
        )
    )  # fmt: skip


@functools.cache
def _agree() -> bool:
    """Compares C with torch on small whole numbers, whose sums are exact, once in a process."""
    rng = np.random.default_rng(0)

    def whole(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(-4, 5, shape).astype(np.float32))

    slots, ranks, widths = (
        np.repeat(np.array([0, -1, 1, 2], np.int32), (1, 2, 37, 6)),
        [[5, 8, 1], [3, 0, 8]],
        (150, 19),
    )
    A, B_t = [whole(3, 8, 37) for _ in widths], [whole(3, 8, n) for n in widths]
    x, y = whole(len(slots), 37), whole(len(slots), sum(widths)) / 8
    exact = y.clone()
    for g, part in enumerate(exact.split(widths, 1)):
        for slot, r in enumerate(ranks[g]):
            rows = torch.from_numpy(slots == slot)
            part[rows] += x[rows] @ A[g][slot, :r].t() @ B_t[g][slot, :r]
    for dtype, kept in itertools.product(native.TYPES, KEPT):
        found = y.to(dtype, copy=True)
        held_A, held_B = ([matrices.to(kept) for matrices in side] for side in (A, B_t))
        _run(found, x.to(dtype), Blocks(slots), Factors(held_A, held_B, ranks))
        if not torch.equal(found, exact.to(dtype)):
            native.reject(f"a LoRA term in {dtype} differs")
            return False
    return True
