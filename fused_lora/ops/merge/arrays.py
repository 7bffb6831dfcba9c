"""The blocks of a contiguous CPU weight through numpy's views: corrections and fingerprints.

numpy's views keep the interpreter lock and its loops let go of it once each. With several workers that matters: every
torch call, a slice too, hands the lock over, and waiting for it took half of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fused_lora.ops import compiled
from fused_lora.reference import bits

CHUNK = 1 << 16  # corrections are addressed by 16 bits inside chunks of this many elements
_FINGERPRINT_LANES = 1021  # prime, so that rows and columns of usual sizes do not fold onto themselves
WEIGHTS = np.random.Philox(key=2024).random_raw(_FINGERPRINT_LANES).view(np.int64) | 1  # odd: no change is lost
MULTIPLIER = 0x5851F42D4C957F2D


@dataclass
class Block:
    """What one row block needs to come back: corrections (or a copy) and the fingerprint of its original bits."""

    start: int
    stop: int
    fingerprint: tuple[int, ...]
    counts: torch.Tensor | None = None  # int32 [chunks]: corrections in each chunk of 65536 elements
    offsets: torch.Tensor | None = None  # uint16 [n]: position inside the chunk
    values: torch.Tensor | None = None  # integers [n]: original bits; or [rows, columns] when it is a whole copy
    merged: tuple[int, ...] | None = (
        None  # fingerprint of the merged bits, where a whole copy would hide any change of them
    )

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.counts, self.offsets, self.values) if t is not None]

    def __getstate__(self) -> dict:
        state = dict(vars(self))
        if self.offsets is not None:
            state["offsets"] = self.offsets.view(torch.int16)  # pickle knows no unsigned tensors
        return state

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self.offsets is not None:
            self.offsets = self.offsets.view(torch.uint16)


class Arrays:
    """A weight on a CPU and the delta of one block at a time, [rows, columns] each, as numpy arrays.

    A merge costs one read and one write of the block of W beyond the first cache; ``delta`` is overwritten.
    """

    def __init__(self, W: np.ndarray, delta: np.ndarray):
        self._W, self._delta = W, delta
        self._integer = np.dtype(f"i{W.itemsize}")

    @classmethod
    def of(cls, W: torch.Tensor, delta: torch.Tensor) -> Arrays | None:
        """None where numpy cannot do it: not on a CPU, not contiguous, or 16-bit floats."""
        if W.device.type != "cpu" or not W.is_contiguous() or W.dtype != delta.dtype:
            return None
        return cls(W.numpy(), delta.numpy())

    def merge(self, start: int, stop: int, blocks: list[Block]) -> bool:
        """W <- round(W + D) in rows [start, stop); the block joins ``blocks`` just before W is written.

        False, nothing done, where there are too many corrections for it.
        """
        w, d = self._rows(start, stop)
        merged, flat, differs = self._merged[: w.size], w.view(self._integer), self._differs[: w.size]
        np.add(w, d, out=merged)
        np.subtract(merged, d, out=d)
        np.not_equal(d.view(self._integer), flat, out=differs)
        index = np.flatnonzero(differs)
        if index.size * (w.itemsize + 2) >= w.nbytes:
            return False  # a copy would be smaller
        kept = counts_of(index, flat.size), index.astype(np.uint16), flat.take(index)
        blocks.append(Block(start, stop, fold(words_of(w)), *map(torch.from_numpy, kept)))
        self._write(merged, w)
        return True

    def restore(self, block: Block) -> bool:
        """The old bits back in W; False, nothing done, where W is not what the merge left."""
        w, d = self._rows(block.start, block.stop)
        np.subtract(w, d, out=d)
        put_back(d.view(self._integer), *(t.numpy() for t in (block.counts, block.offsets, block.values)))
        if fold(words_of(d)) != block.fingerprint:
            return False
        self._write(d, w)
        return True

    def _rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """A block of the weight and of the delta, flat."""
        return self._W[start:stop].reshape(-1), self._delta[: stop - start].reshape(-1)

    def _write(self, block: np.ndarray, w: np.ndarray) -> None:
        np.copyto(w, block)

    @cached_property
    def _merged(self) -> np.ndarray:
        return np.empty(self._delta.size, self._W.dtype)

    @cached_property
    def _differs(self) -> np.ndarray:
        return np.empty(self._delta.size, np.bool_)


def counts_of(index: np.ndarray, size: int) -> np.ndarray:
    """int32 [chunks]: how many of the ascending ``index`` fall into each chunk of a block of ``size`` elements."""
    edges = [*index.searchsorted(range(CHUNK, size, CHUNK)).tolist(), index.size]
    return np.array([b - a for a, b in zip([0, *edges], edges, strict=False)], np.int32)


def put_back(flat: np.ndarray, counts: np.ndarray, offsets: np.ndarray, values: np.ndarray) -> None:
    """The kept bits written over a block's integers."""
    edges = [0, *np.cumsum(counts).tolist()]
    for i, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        flat[i * CHUNK : (i + 1) * CHUNK][offsets[first:last]] = values[first:last]


def fingerprint(block: torch.Tensor) -> tuple[int, ...]:
    """Integer sums, modulo 2^64, over the rows and columns of the block's bits laid out 1021 words wide, folded.

    Sums of integers are exact in any order, and the weights of the fold are odd: one changed word changes the result
    for certain, two exchanged words change two rows or two columns and with them, all but certainly, a fold.
    """
    if block.device.type == "cpu":
        return fold(words_of(bits(block).numpy()))
    flat = bits(block).reshape(-1)
    if flat.nbytes % 8:
        words = flat.to(torch.int64)
    else:
        words = (flat.clone() if flat.data_ptr() % 8 else flat).view(torch.int64)
    rows = words.numel() // _FINGERPRINT_LANES
    head = words[: rows * _FINGERPRINT_LANES].reshape(rows, _FINGERPRINT_LANES)
    parts = head.sum(0), head.sum(1), words[rows * _FINGERPRINT_LANES :]
    return tuple(_weigh(part.cpu().numpy()) for part in parts)


def words_of(block: np.ndarray) -> np.ndarray:
    """The block's bits as int64 words, or as integers of its elements where its size is no multiple of 8 bytes.

    A view; a copy where the memory starts between two words: the same bits are the same words wherever they lie.
    """
    flat = block.reshape(-1)
    if flat.nbytes % 8:
        return flat.view(f"i{flat.itemsize}")
    return (flat.copy() if flat.ctypes.data % 8 else flat).view(np.int64)


def fold(words: np.ndarray) -> tuple[int, ...]:
    """The fingerprint of a block's words."""
    loops = compiled.loops()
    return fold_in_numpy(words) if loops is None else loops.fold(words, WEIGHTS, MULTIPLIER)


def fold_in_numpy(words: np.ndarray) -> tuple[int, ...]:
    """:func:`fold` without compiled loops."""
    rows = words.size // _FINGERPRINT_LANES
    head = words[: rows * _FINGERPRINT_LANES].reshape(rows, _FINGERPRINT_LANES)
    tail = words[rows * _FINGERPRINT_LANES :]
    return tuple(map(_weigh, (*(np.add.reduce(head, axis, np.int64) for axis in (0, 1)), tail)))


def _weigh(sums: np.ndarray) -> int:
    """sum_i weight_i * sums_i modulo 2^64, in pieces of the weights' length."""
    folded = 0
    for start in range(0, len(sums), len(WEIGHTS)):
        piece = sums[start : start + len(WEIGHTS)]
        folded = folded * MULTIPLIER + int(np.dot(piece, WEIGHTS[: len(piece)]))
    return folded % 2**64
