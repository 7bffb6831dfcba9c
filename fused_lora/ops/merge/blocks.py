"""One row block of a weight: merged, with what it takes to get its bits back, and restored.

Per block: D = left @ right by one GEMM, Wm = round(W + D), R = round(Wm - D); where R is not W to the bit, the position
and the value are kept. W itself is written last, in one copy, after everything that can fail.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from fused_lora.ops.merge.arrays import CHUNK, Arrays, Block, counts_of, fingerprint, put_back
from fused_lora.reference import bits


class Workspace:
    """The buffers of one worker over blocks of W: [rows, columns] of at most ``block_rows`` rows.

    A block's temporaries are views of them, so nothing grows with the weight. ``left`` [rows of W, R] and ``right``
    [R, columns] are the factors of D in fp32, or fp64 for an fp64 weight.
    """

    def __init__(self, W: torch.Tensor, left: torch.Tensor, right: torch.Tensor, block_rows: int):
        shape = min(block_rows, W.shape[0]), W.shape[1]
        self.W, self.right, self.block_rows = W, right, block_rows
        self.left = left.split(block_rows)  # views made once: every torch call in a block hands the interpreter over
        self._delta = torch.empty(shape, dtype=right.dtype, device=W.device)
        self._arrays = Arrays.of(W, self._delta)

    @cached_property
    def _total(self) -> torch.Tensor:
        return torch.empty_like(self._delta)

    @cached_property
    def _rounded(self) -> torch.Tensor:
        # a weight of the delta's dtype needs no rounded copy of the total
        return self._total if self.W.dtype == self._delta.dtype else torch.empty_like(self._delta, dtype=self.W.dtype)

    def merge(self, start: int, stop: int, check_finite: bool, blocks: list[Block]) -> None:
        """W <- round(W + D) in rows [start, stop); the block joins ``blocks`` just before W is written.

        Raises:
            ValueError: with ``check_finite``, where a finite weight would become infinite or NaN; nothing is written.
        """
        if self._arrays is not None and not check_finite:
            self._delta_of(start, stop)
            if self._arrays.merge(start, stop, blocks):
                return
        w = self.W[start:stop]
        original = w if w.is_contiguous() else w.contiguous()
        delta = self._delta_of(start, stop)
        merged = self._combine(original, delta, 1)
        if check_finite and not bool((torch.isfinite(merged) | ~torch.isfinite(original)).all()):
            raise ValueError("NaNs or infinities detected in the merged weights: the adapter seems to be broken")
        block = Block(start, stop, fingerprint(original))
        _encode(block, original, self._combine(merged, delta, -1))
        # the sum again, from the cache: cheaper than a second buffer
        if w.dtype == delta.dtype and block.offsets is not None:
            blocks.append(block)
            torch.add(w, delta, out=w)
        else:
            merged = self._combine(original, delta, 1)
            block.merged = fingerprint(merged) if block.offsets is None else None
            blocks.append(block)
            w.copy_(merged)

    def take_back(self, block: Block) -> None:
        """Undo a :meth:`merge` that may have been stopped before it wrote."""
        if not self._is_original(block):
            self.restore(block)

    def merge_again(self, block: Block) -> None:
        """Undo a :meth:`restore` that may have been stopped before it wrote: a merge always gives the same bits."""
        if self._is_original(block):
            w = self.W[block.start : block.stop]
            w.copy_(self._combine(w, self._delta_of(block.start, block.stop), 1))

    def _is_original(self, block: Block) -> bool:
        return fingerprint(self.W[block.start : block.stop].contiguous()) == block.fingerprint

    def restore(self, block: Block) -> None:
        """The block's bits from before the merge, written back.

        Raises:
            RuntimeError: they cannot be had, because the merged weight was changed. Nothing is written.
        """
        w = self.W[block.start : block.stop]
        changed = block.merged is not None and fingerprint(w.contiguous()) != block.merged
        if not changed and self._arrays is not None and block.offsets is not None:
            self._delta_of(block.start, block.stop)
            changed = not self._arrays.restore(block)
        elif not changed:
            original, _ = self.original(block)
            changed = fingerprint(original) != block.fingerprint
            if not changed:
                w.copy_(original)
        if changed:
            raise RuntimeError(
                f"weight: rows {block.start} to {block.stop} are not what the merge left (changed, cast or loaded "
                "since), so the original bits cannot be restored; nothing was changed"
            )

    def original(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's bits from before the merge, and its delta; both are views of this workspace."""
        delta = self._delta_of(block.start, block.stop)
        candidate = self._combine(self.W[block.start : block.stop], delta, -1)
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


def _encode(block: Block, original: torch.Tensor, candidate: torch.Tensor) -> None:
    """Keep the original bits where the candidate's differ: corrections as in :class:`Block`, or a copy if smaller."""
    flat, other = bits(original).reshape(-1), bits(candidate).reshape(-1)
    if flat.device.type == "cpu":  # numpy compares and searches several times faster than torch
        flat, other = flat.numpy(), other.numpy()
        index = np.flatnonzero(flat != other)
        kept = counts_of(index, flat.size), index.astype(np.uint16), flat.take(index)
        counts, offsets, values = map(torch.from_numpy, kept)
    else:
        index = (flat != other).nonzero().reshape(-1)
        edges = torch.arange(0, flat.numel() + CHUNK, CHUNK, device=index.device)
        counts = torch.searchsorted(index, edges).diff().to(torch.int32)
        offsets, values = (index & (CHUNK - 1)).to(torch.uint16), flat[index]
    if values.numel() * (original.element_size() + 2) < original.nbytes:
        block.counts, block.offsets, block.values = counts, offsets, values
    else:
        block.values = bits(original).clone()


def _decode(block: Block, candidate: torch.Tensor) -> None:
    """The corrections written over the candidate's bits, an integer tensor of the block's shape."""
    if block.offsets is None:
        candidate.copy_(block.values)
    elif candidate.device.type == "cpu":
        put_back(*(t.numpy() for t in (candidate.reshape(-1), block.counts, block.offsets, block.values)))
    else:
        chunk = torch.arange(block.counts.numel(), device=candidate.device) * CHUNK
        index = torch.repeat_interleave(chunk, block.counts.long()) + block.offsets.to(torch.int64)
        candidate.reshape(-1)[index] = block.values
