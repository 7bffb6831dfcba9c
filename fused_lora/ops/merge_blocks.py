"""One row block of a weight: merged, with what it takes to get its bits back, and restored.

Per block: D = left @ right by one GEMM, Wm = round(W + D), R = round(Wm - D); where R is not W to the bit, the position
and the value are kept. W itself is written last, in one copy, after everything that can fail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fused_lora.reference import bits

_CHUNK = 1 << 16  # corrections are addressed by 16 bits inside chunks of this many elements
_FINGERPRINT_LANES = 1021  # prime, so that rows and columns of usual sizes do not fold onto themselves
_WEIGHTS = np.random.Philox(key=2024).random_raw(_FINGERPRINT_LANES).view(np.int64) | 1  # odd: no change is lost


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


class Workspace:
    """The buffers of one worker over blocks of W: [rows, columns] of at most ``block_rows`` rows.

    A block's temporaries are views of them, so nothing grows with the weight. ``left`` [rows of W, R] and ``right``
    [R, columns] are the factors of D in fp32, or fp64 for an fp64 weight.
    """

    def __init__(self, W: torch.Tensor, left: torch.Tensor, right: torch.Tensor, block_rows: int):
        shape, dtype = (min(block_rows, W.shape[0]), W.shape[1]), right.dtype
        self.W, self.right, self.block_rows = W, right, block_rows
        self.left = left.split(block_rows)  # views made once: every torch call in a block hands the interpreter over
        self._delta = torch.empty(shape, dtype=dtype, device=W.device)
        self._total = torch.empty(shape, dtype=dtype, device=W.device)
        # a weight of the delta's dtype needs no rounded copy of the total
        self._rounded = self._total if W.dtype == dtype else torch.empty(shape, dtype=W.dtype, device=W.device)
        self._differs = torch.empty(shape, dtype=torch.bool, device=W.device)
        self._numpy = None
        if W.device.type == "cpu" and W.dtype == dtype and W.is_contiguous():
            self._numpy = W.numpy(), self._delta.numpy(), self._total.numpy(), self._differs.numpy()

    def add_delta(self, start: int, stop: int) -> None:
        """round(W + D) written to rows [start, stop): what a merge does, without the bookkeeping."""
        w = self.W[start:stop]
        w.copy_(self._combine(w, self._delta_of(start, stop), 1))

    def merge(self, start: int, stop: int, check_finite: bool) -> Block:
        """W <- round(W + D) in rows [start, stop).

        Raises:
            ValueError: with ``check_finite``, where a finite weight would become infinite or NaN; nothing is written.
        """
        done = None if self._numpy is None or check_finite else self._merge_in_numpy(start, stop)
        if done is not None:
            return done
        w = self.W[start:stop]
        original = w if w.is_contiguous() else w.contiguous()
        delta = self._delta_of(start, stop)
        merged = self._combine(original, delta, 1)
        if check_finite and not bool((torch.isfinite(merged) | ~torch.isfinite(original)).all()):
            raise ValueError("NaNs or infinities detected in the merged weights: the adapter seems to be broken")
        block = Block(start, stop, fingerprint(original))
        _encode(block, original, self._differences(self._combine(merged, delta, -1), original))
        # the sum again, from the cache: cheaper than a second buffer
        if w.dtype == delta.dtype and block.offsets is not None:
            torch.add(w, delta, out=w)
        else:
            merged = self._combine(original, delta, 1)
            block.merged = fingerprint(merged) if block.offsets is None else None
            w.copy_(merged)
        return block

    def _merge_in_numpy(self, start: int, stop: int) -> Block | None:
        """The same for a contiguous fp32 or fp64 weight on a CPU; None, nothing done, where a copy would be smaller.

        numpy's views keep the interpreter lock and its loops let go of it once each. With several workers that
        matters: every torch call, a slice too, hands the lock over, and waiting for it took half of the time.
        """
        self._delta_of(start, stop)
        w, d, t, differs = (buffer[: stop - start] for buffer in (self._numpy[0][start:], *self._numpy[1:]))
        integers = np.int32 if w.itemsize == 4 else np.int64
        flat = w.reshape(-1).view(integers)
        np.add(w, d, out=t)
        np.subtract(t, d, out=d)
        np.not_equal(d.reshape(-1).view(integers), flat, out=differs.reshape(-1))
        (index,) = differs.reshape(-1).nonzero()
        if index.size * (w.itemsize + 2) >= w.nbytes:
            return None
        kept = (_counts(index, flat.size), index.astype(np.uint16), flat.take(index))
        block = Block(start, stop, _fold(_words_of(w)), *map(torch.from_numpy, kept))
        np.copyto(w, t)
        return block

    def restore(self, block: Block) -> None:
        """The block's bits from before the merge, written back.

        Raises:
            RuntimeError: they cannot be had, because the merged weight was changed. Nothing is written.
        """
        original, _ = self.original(block)
        w = self.W[block.start : block.stop]
        hidden = block.merged is not None and fingerprint(w.contiguous()) != block.merged
        if hidden or fingerprint(original) != block.fingerprint:
            raise RuntimeError(
                f"weight: rows {block.start} to {block.stop} are not what the merge left (changed, cast or loaded "
                "since), so the original bits cannot be restored; nothing was changed"
            )
        if self._numpy is None:
            w.copy_(original)
        else:
            np.copyto(self._numpy[0][block.start : block.stop], original.numpy())

    def original(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's bits from before the merge, and its delta; both are views of this workspace."""
        delta = self._delta_of(block.start, block.stop)
        if self._numpy is None:
            candidate = self._combine(self.W[block.start : block.stop], delta, -1)
        else:
            candidate, rows = self._total[: len(delta)], len(delta)
            w, d, t = (buffer[:rows] for buffer in (self._numpy[0][block.start :], *self._numpy[1:3]))
            np.subtract(w, d, out=t)
        _decode(block, bits(candidate))
        return candidate, delta

    def _delta_of(self, start: int, stop: int) -> torch.Tensor:
        left = self.left[start // self.block_rows]
        full = len(left) == len(self._delta)
        return torch.mm(left, self.right, out=self._delta if full else self._delta[: len(left)])

    def _combine(self, w: torch.Tensor, delta: torch.Tensor, alpha: int) -> torch.Tensor:
        """round(w + alpha * delta) in a buffer that the next call overwrites; ``w`` may be that buffer."""
        total, rounded = self._total[: len(w)], self._rounded[: len(w)]
        if w.dtype == delta.dtype:
            return torch.add(w, delta, alpha=alpha, out=total)
        total.copy_(w).add_(delta, alpha=alpha)
        return rounded.copy_(total)

    def _differences(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """bool: where the bits of two blocks differ."""
        out = self._differs[: len(a)]
        if a.device.type == "cpu":  # numpy's integer comparison is vectorised, torch's single-threaded one is not
            np.not_equal(bits(a).numpy(), bits(b).numpy(), out=out.numpy())
            return out
        return torch.ne(bits(a), bits(b), out=out)


def _counts(index: np.ndarray, size: int) -> np.ndarray:
    """int32 [chunks]: how many of the ascending ``index`` fall into each chunk of a block of ``size`` elements."""
    edges = [*index.searchsorted(range(_CHUNK, size, _CHUNK)).tolist(), index.size]
    return np.array([b - a for a, b in zip([0, *edges], edges, strict=False)], np.int32)


def _encode(block: Block, original: torch.Tensor, differs: torch.Tensor) -> None:
    """Keep the original bits where ``differs``: chunk counts + 16-bit offsets + values, or a whole copy if smaller."""
    flat = bits(original).reshape(-1)
    if flat.device.type == "cpu":  # numpy's flatnonzero, take and searchsorted are several times faster than torch's
        index = np.flatnonzero(differs.numpy())
        counts = torch.from_numpy(_counts(index, flat.numel()))
        offsets, values = torch.from_numpy(index.astype(np.uint16)), torch.from_numpy(flat.numpy().take(index))
    else:
        index = differs.reshape(-1).nonzero().reshape(-1)
        edges = torch.arange(0, flat.numel() + _CHUNK, _CHUNK, device=index.device)
        counts = torch.searchsorted(index, edges).diff().to(torch.int32)
        offsets, values = (index & (_CHUNK - 1)).to(torch.uint16), flat[index]
    if values.numel() * (flat.element_size() + 2) < flat.numel() * flat.element_size():
        block.counts, block.offsets, block.values = counts, offsets, values
    else:
        block.values = flat.clone().reshape(original.shape)


def _decode(block: Block, candidate: torch.Tensor) -> None:
    """The corrections written over the candidate's bits, an integer tensor of the block's shape."""
    if block.offsets is None:
        candidate.copy_(block.values)
    elif candidate.device.type == "cpu":
        flat, offsets, values = (t.numpy() for t in (candidate.reshape(-1), block.offsets, block.values))
        edges = [0, *np.cumsum(block.counts.numpy()).tolist()]
        for i, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            flat[i * _CHUNK : (i + 1) * _CHUNK][offsets[first:last]] = values[first:last]
    else:
        chunk = torch.arange(block.counts.numel(), device=candidate.device) * _CHUNK
        index = torch.repeat_interleave(chunk, block.counts.long()) + block.offsets.to(torch.int64)
        candidate.reshape(-1)[index] = block.values


def fingerprint(block: torch.Tensor) -> tuple[int, ...]:
    """Integer sums, modulo 2^64, over the rows and columns of the block's bits laid out 1021 words wide, folded.

    Sums of integers are exact in any order, and the weights of the fold are odd: one changed word changes the result
    for certain, two exchanged words change two rows or two columns and with them, all but certainly, a fold.
    """
    if block.device.type == "cpu":
        return _fold(_words_of(bits(block).numpy()))
    flat = bits(block).reshape(-1)
    whole = flat.numel() * flat.element_size() % 8 == 0 and flat.data_ptr() % 8 == 0
    words = flat.view(torch.int64) if whole else flat.to(torch.int64)
    rows = words.numel() // _FINGERPRINT_LANES
    head = words[: rows * _FINGERPRINT_LANES].reshape(rows, _FINGERPRINT_LANES)
    parts = head.sum(0), head.sum(1), words[rows * _FINGERPRINT_LANES :]
    return tuple(_weigh(part.cpu().numpy()) for part in parts)


def _words_of(block: np.ndarray) -> np.ndarray:
    """The block's bits as int64 words, or as widened integers where its size is no multiple of 8 bytes."""
    flat = block.reshape(-1)
    if flat.nbytes % 8 or flat.ctypes.data % 8:
        return flat.view(f"i{flat.itemsize}").astype(np.int64)
    return flat.view(np.int64)


def _fold(words: np.ndarray) -> tuple[int, ...]:
    rows = words.size // _FINGERPRINT_LANES
    head = words[: rows * _FINGERPRINT_LANES].reshape(rows, _FINGERPRINT_LANES)
    tail = words[rows * _FINGERPRINT_LANES :]
    return tuple(map(_weigh, (np.add.reduce(head, 0), np.add.reduce(head, 1), tail)))


def _weigh(sums: np.ndarray) -> int:
    """sum_i weight_i * sums_i modulo 2^64, in pieces of the weights' length."""
    folded = 0
    for start in range(0, len(sums), len(_WEIGHTS)):
        piece = sums[start : start + len(_WEIGHTS)]
        folded = folded * 0x5851F42D4C957F2D + int(np.dot(piece, _WEIGHTS[: len(piece)]))
    return folded % 2**64
