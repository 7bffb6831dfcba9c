"""Merge and exact unmerge: W <- round(W + D) in place and back to the same bits, D = sum_i s_i B_i A_i in fp32.

Subtracting D again gives W back for 88 to 99.6 % of the elements only, because the merge rounds. So the merge keeps,
for every element where round(Wm - D) is not W to the bit, its position and its value: 6 bytes (fp32) or 4 bytes
(16-bit) for 0.2 to 10 % of the elements, and never more than a plain copy of W.

That is right only if D has the same bits at merge and at unmerge. Both walk the same row blocks with the same
single-threaded fp32 GEMM on frozen copies of A, B and s, so neither the thread count nor a later edit of the adapter
matters, and a fingerprint of W (integer sums of its bit patterns, which see every change of a single element) is
compared for each block before a block is written back.

A block is written last, in one copy, after everything that can fail. A failure in block k takes blocks 0..k-1 back, so
a weight is either merged whole or not touched.

Traffic per weight element: one read and one write of W; D, Wm and the candidate stay in a block that fits the cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fused_lora.ops import merge_kernel
from fused_lora.ops._checks import FLOAT_DTYPES
from fused_lora.reference import bits

_CHUNK = 1 << 16  # corrections are addressed by 16 bits inside chunks of this many elements
_FINGERPRINT_LANES = 1021  # prime, so that rows and columns of usual sizes do not fold onto themselves
_BLOCK_ELEMENTS = 1 << 18  # CPU block: 1 MiB of fp32 fits the cache and hides the call overhead
_DEVICE_BLOCK_ELEMENTS = 1 << 24
_WORKSPACE_SHARE = 0.045  # of the weight's own bytes, for all CPU blocks in flight
_MIN_BLOCK_ELEMENTS = 1 << 17  # smaller blocks cost more in calls than they save in memory
_THREADED_ELEMENTS = 1 << 19  # below this one thread is faster than starting several


@dataclass
class _Block:
    """What one row block needs to come back: corrections (or a copy) and the fingerprint of its original bits."""

    start: int
    stop: int
    fingerprint: bytes
    counts: torch.Tensor | None = None  # int32 [chunks]: corrections in each chunk of 65536 elements
    offsets: torch.Tensor | None = None  # uint16 [n]: position inside the chunk
    values: torch.Tensor | None = None  # integers [n]: original bits; or [rows, columns] when it is a whole copy
    merged: bytes | None = None  # fingerprint of the merged bits, where a whole copy would hide any change of them


@dataclass
class MergeRecord:
    """What was added to one weight, frozen, and what it takes to get the old bits back.

    ``left`` [rows, R] and ``right`` [R, columns] are fp32 copies with the scaling inside; ``left @ right`` is the
    delta as the weight is stored. ``nbytes`` counts everything that the record holds.
    """

    left: torch.Tensor
    right: torch.Tensor
    dtype: torch.dtype
    transposed: bool
    block_rows: int
    blocks: list[_Block] = field(default_factory=list)
    device_corrections: Any = None  # of the kernel, in place of blocks

    @property
    def nbytes(self) -> int:
        tensors = [self.left, self.right]
        for block in self.blocks:
            tensors += [t for t in (block.counts, block.offsets, block.values) if t is not None]
        if self.device_corrections is not None:
            tensors += [t for t in vars(self.device_corrections).values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def corrections(self) -> int:
        """How many elements need their value kept."""
        if self.device_corrections is not None:
            return self.device_corrections.values.numel()
        return sum(b.values.numel() for b in self.blocks if b.values is not None)


def merge_(
    weight: torch.Tensor,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    *,
    fan_in_fan_out: bool = False,
) -> MergeRecord:
    """In place: weight <- round(weight + sum_i scaling_i * lora_B_i @ lora_A_i), one rounding for all adapters.

    Args:
        weight: [N, K], or [K, N] with ``fan_in_fan_out``; fp64, fp32, bf16 or fp16, any strides, any device.
        lora_A: [r_i, K] each; lora_B: [N, r_i] each; any floating dtype. scaling: one float each.

    Returns:
        The record that :func:`unmerge_` needs. Later changes of lora_A, lora_B or scaling do not affect it.

    Raises:
        ValueError: shapes do not fit, or a finite weight would become infinite or NaN. The weight is unchanged.
        TypeError: weight is not fp64, fp32, bf16 or fp16.
    """
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight: expected float64, float32, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected two dimensions, got shape {tuple(weight.shape)}")
    left, right = _factors(weight, lora_A, lora_B, scaling, fan_in_fan_out)
    W = weight.detach()
    if merge_kernel.applies(W):
        return MergeRecord(left, right, W.dtype, False, 0, device_corrections=merge_kernel.merge(W, left, right))
    transposed = W.stride(0) < W.stride(1) and W.t().is_contiguous()
    if transposed:  # rows of the storage are what a block should hold
        W, left, right = W.t(), right.t().contiguous(), left.t().contiguous()
    record = MergeRecord(left, right, W.dtype, transposed, _block_rows(W))
    check_finite = not _cannot_overflow(left, right, W.dtype)
    done = _for_blocks(W, record, lambda ws, start, stop: _merge_block(W, record, ws, start, stop, check_finite))
    if isinstance(done, BaseException):
        _for_blocks(W, record, lambda ws, block: _unmerge_block(W, record, ws, block), record.blocks)
        raise done
    record.blocks.sort(key=lambda b: b.start)
    return record


def unmerge_(weight: torch.Tensor, record: MergeRecord) -> None:
    """In place: the bits that ``weight`` had before the :func:`merge_` that returned ``record``.

    Raises:
        RuntimeError: the weight was changed, cast or moved since the merge, so that its original bits cannot be
            restored. Nothing is changed. On a CPU a change of elements that all have their original on record is not
            noticed: the original bits come back, the change is lost.
    """
    W = weight.detach()
    W = W.t() if record.transposed else W
    expected = (record.left.shape[0], record.right.shape[1])
    place = (expected, record.dtype, record.left.device)
    if (tuple(W.shape), W.dtype, W.device) != place:
        raise RuntimeError(
            f"weight: expected shape, dtype and device as at merge, {place}, got {(tuple(W.shape), W.dtype, W.device)}"
        )
    if record.device_corrections is not None:
        return merge_kernel.unmerge(W, record.left, record.right, record.device_corrections)
    restored: list[_Block] = []

    def restore(ws: _Workspace, block: _Block) -> None:
        _unmerge_block(W, record, ws, block)
        restored.append(block)

    failure = _for_blocks(W, record, restore, record.blocks)
    if isinstance(failure, BaseException):
        # the merge of a block is deterministic, so merging again undoes the part that was already restored
        _for_blocks(W, record, lambda ws, b: _add_delta(W, record, ws, b.start, b.stop), restored)
        raise failure


def delta_fidelity(weight: torch.Tensor, record: MergeRecord) -> tuple[float, float]:
    """How much of the delta a merged ``weight`` really holds: (||Wm - W||, ||(Wm - W) - D|| / ||D||), Frobenius norms.

    The second number is the share of the delta that rounding lost: 0 is perfect, 0.8 means that the weights' precision
    is too coarse for this adapter. Reads the merged weight and the record, changes nothing.
    """
    W = weight.detach()
    W = W.t() if record.transposed else W
    moved = lost = wanted = 0.0
    if record.device_corrections is not None:
        original = W.clone()
        merge_kernel.unmerge(original, record.left, record.right, record.device_corrections)
        change = W.double() - original.double()
        delta = record.left.double() @ record.right.double()
        moved, lost, wanted = (t.square().sum().item() for t in (change, change - delta, delta))
    ws = _Workspace(W, record)
    for block in record.blocks:
        original, delta = _original_block(W, record, ws, block)
        change = W[block.start : block.stop].double() - original.double()
        moved += change.square().sum().item()
        lost += (change - delta).square().sum().item()
        wanted += delta.double().square().sum().item()
    return math.sqrt(moved), math.sqrt(lost / wanted) if wanted else 0.0


def factors(record: MergeRecord, fan_in_fan_out: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """The record's frozen adapters as one (lora_A [R, K], lora_B [N, R], scaling 1), to merge them again."""
    left, right = record.left, record.right
    if record.transposed != fan_in_fan_out:
        left, right = right.t(), left.t()
    return [right], [left], [1.0]


def _factors(weight, lora_A, lora_B, scaling, fan_in_fan_out) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (weight.shape[1], weight.shape[0]) if fan_in_fan_out else weight.shape
    if not (len(lora_A) == len(lora_B) == len(scaling)) or not lora_A:
        raise ValueError(
            f"lora_A, lora_B, scaling: expected as many of each and at least one, "
            f"got {len(lora_A)}, {len(lora_B)} and {len(scaling)}"
        )
    for i, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        if A.dim() != 2 or A.shape[1] != columns or B.dim() != 2 or tuple(B.shape) != (rows, A.shape[0]):
            raise ValueError(
                f"adapter {i}: expected lora_A [r, {columns}] and lora_B [{rows}, r], "
                f"got {tuple(A.shape)} and {tuple(B.shape)}"
            )
    # copies: whatever happens to the adapter while merged, the same delta is taken away again
    dtype = _delta_dtype(weight)
    A = torch.cat([a.detach().to(weight.device, dtype) for a in lora_A])
    B = torch.cat([b.detach().to(weight.device, dtype) * s for b, s in zip(lora_B, scaling, strict=True)], 1)
    return (A.t().contiguous(), B.t().contiguous()) if fan_in_fan_out else (B.contiguous(), A.contiguous())


def _delta_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _cannot_overflow(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> bool:
    """True when |D| stays below half the spacing of the largest finite numbers, so that no finite W can overflow."""
    if not left.numel() or not right.numel():
        return True
    bound = left.shape[1] * left.abs().max().item() * right.abs().max().item()
    info = torch.finfo(dtype)
    return bound < info.max * info.eps / 8  # False for NaN and infinity


def _block_rows(W: torch.Tensor) -> int:
    rows, columns = W.shape
    if W.device.type != "cpu":
        return max(1, _DEVICE_BLOCK_ELEMENTS // max(columns, 1))
    share = int(_WORKSPACE_SHARE * W.numel() * W.element_size() / (9 * torch.get_num_threads()))
    return max(1, min(_BLOCK_ELEMENTS, max(share, _MIN_BLOCK_ELEMENTS)) // max(columns, 1))


class _Workspace:
    """The buffers of one worker; a block's temporaries are views of them, so nothing grows with the weight."""

    def __init__(self, W: torch.Tensor, record: MergeRecord):
        shape, dtype = (min(record.block_rows, W.shape[0]), W.shape[1]), _delta_dtype(W)
        self._delta = torch.empty(shape, dtype=dtype, device=W.device)
        self._total = torch.empty(shape, dtype=dtype, device=W.device)
        # a weight of the delta's dtype needs no rounded copy of the total
        self._rounded = self._total if W.dtype == dtype else torch.empty(shape, dtype=W.dtype, device=W.device)
        self._differs = torch.empty(shape, dtype=torch.bool, device=W.device)
        self.weight = None
        if W.device.type == "cpu" and W.dtype == dtype and W.is_contiguous():
            self.weight, self.d, self.t = W.numpy(), self._delta.numpy(), self._total.numpy()
            self.differing = self._differs.numpy()

    def delta(self, record: MergeRecord, start: int, stop: int) -> torch.Tensor:
        """D of these rows."""
        return torch.mm(record.left[start:stop], record.right, out=self._delta[: stop - start])

    def combine(self, w: torch.Tensor, delta: torch.Tensor, alpha: int) -> torch.Tensor:
        """round(w + alpha * delta) in a buffer that the next call overwrites; ``w`` may be that buffer."""
        total, rounded = self._total[: len(w)], self._rounded[: len(w)]
        if w.dtype == delta.dtype:
            return torch.add(w, delta, alpha=alpha, out=total)
        total.copy_(w).add_(delta, alpha=alpha)
        return rounded.copy_(total)

    def differs(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """bool: where the bits of two blocks differ."""
        out = self._differs[: len(a)]
        if a.device.type == "cpu":  # numpy's integer comparison is vectorised, torch's single-threaded one is not
            np.not_equal(bits(a).numpy(), bits(b).numpy(), out=out.numpy())
            return out
        return torch.ne(bits(a), bits(b), out=out)


def _for_blocks(W: torch.Tensor, record: MergeRecord, work: Callable, blocks: list[_Block] | None = None):
    """Run ``work(workspace, block)``, or ``work(workspace, start, stop)``, over all blocks; returns a first exception.

    CPU blocks are spread over Python threads with single-threaded torch operations inside: one parallel region per
    weight instead of one per operation, and a GEMM whose bits do not depend on the number of threads.
    """
    if blocks is None:
        tasks = [(i, min(i + record.block_rows, W.shape[0])) for i in range(0, W.shape[0], record.block_rows)]
    else:
        tasks = [(block,) for block in blocks]
    threads = torch.get_num_threads()
    workers = min(threads, max(len(tasks), 1)) if W.device.type == "cpu" and W.numel() >= _THREADED_ELEMENTS else 1
    failures: list[BaseException] = []

    def run(first: int) -> None:
        try:
            # a thread's first parallel operation reads the process-wide count again, which another worker may have
            # restored by then: asking for it now settles this thread, so that its GEMMs stay single-threaded
            torch.get_num_threads()
            torch.set_num_threads(1)
            ws = _Workspace(W, record)
            for task in tasks[first * len(tasks) // workers : (first + 1) * len(tasks) // workers]:
                if failures:
                    return
                work(ws, *task)
        except BaseException as e:  # noqa: B036 - handed to the caller, which rolls back and raises it
            failures.append(e)
        finally:
            torch.set_num_threads(threads)

    with torch.no_grad(), _ieee_matmul(W.device):
        if W.device.type != "cpu" or workers == 1:
            run(0)
        else:
            with ThreadPoolExecutor(workers) as pool:
                try:
                    list(pool.map(run, range(workers)))
                except BaseException as e:  # noqa: B036 - an interrupt of the waiting thread stops the workers too
                    failures.append(e)
    return failures[0] if failures else None


class _ieee_matmul:
    """fp32 products stay fp32 on GPUs whatever the process-wide TF32 switch says."""

    _lock = threading.Lock()

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"

    def __enter__(self) -> None:
        if self._cuda:
            self._lock.acquire()
            self._old = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_) -> None:
        if self._cuda:
            torch.backends.cuda.matmul.allow_tf32 = self._old
            self._lock.release()


def _add_delta(W: torch.Tensor, record: MergeRecord, ws: _Workspace, start: int, stop: int) -> None:
    """A block of round(W + D) written to W: what a merge does, without the bookkeeping."""
    W[start:stop] = ws.combine(W[start:stop], ws.delta(record, start, stop), 1)


def _merge_block(W: torch.Tensor, record: MergeRecord, ws: _Workspace, start: int, stop: int, check_finite: bool):
    if ws.weight is not None and not check_finite and _merge_block_in_numpy(record, ws, start, stop):
        return
    w = W[start:stop]
    original = w if w.is_contiguous() else w.contiguous()
    delta = ws.delta(record, start, stop)
    merged = ws.combine(original, delta, 1)
    if check_finite and not bool((torch.isfinite(merged) | ~torch.isfinite(original)).all()):
        raise ValueError("NaNs or infinities detected in the merged weights: the adapter seems to be broken")
    block = _Block(start, stop, _fingerprint(original))
    _encode(block, original, ws.differs(ws.combine(merged, delta, -1), original))
    # the sum again, from the cache: cheaper than a second buffer
    if w.dtype == delta.dtype and block.offsets is not None:
        torch.add(w, delta, out=w)
    else:
        merged = ws.combine(original, delta, 1)
        block.merged = _fingerprint(merged) if block.offsets is None else None
        w.copy_(merged)
    record.blocks.append(block)


def _merge_block_in_numpy(record: MergeRecord, ws: _Workspace, start: int, stop: int) -> bool:
    """The same for a contiguous fp32 or fp64 weight on a CPU; False, with nothing done, where a copy would be smaller.

    numpy's views keep the interpreter lock and its loops let go of it once each. With several workers that matters:
    every torch call, a slice too, hands the lock over, and waiting for it took half of the time.
    """
    w, d, t, differs = ws.weight[start:stop], ws.d[: stop - start], ws.t[: stop - start], ws.differing[: stop - start]
    ws.delta(record, start, stop)
    np.add(w, d, out=t)
    np.subtract(t, d, out=t)
    integers = np.int32 if w.dtype == np.float32 else np.int64
    np.not_equal(t.view(integers), w.view(integers), out=differs)
    index = np.flatnonzero(differs)
    if index.size * (w.itemsize + 2) >= w.nbytes:
        return False
    flat = w.reshape(-1).view(integers)
    counts = np.diff(index.searchsorted(np.arange(0, flat.size + _CHUNK, _CHUNK))).astype(np.int32)
    kept = (counts, index.astype(np.uint16), flat.take(index))
    block = _Block(start, stop, _sums(_words_of(w)), *map(torch.from_numpy, kept))
    np.add(w, d, out=w)
    record.blocks.append(block)
    return True


def _original_block(W, record, ws, block) -> tuple[torch.Tensor, torch.Tensor]:
    """The block's bits from before the merge, and its delta; both are views of the workspace."""
    delta = ws.delta(record, block.start, block.stop)
    candidate = ws.combine(W[block.start : block.stop], delta, -1)
    _decode(block, bits(candidate))
    return candidate, delta


def _unmerge_block(W: torch.Tensor, record: MergeRecord, ws: _Workspace, block: _Block) -> None:
    original, _ = _original_block(W, record, ws, block)
    hidden = block.merged is not None and _fingerprint(W[block.start : block.stop].contiguous()) != block.merged
    if hidden or _fingerprint(original) != block.fingerprint:
        raise RuntimeError(
            f"weight: rows {block.start} to {block.stop} are not what the merge left (changed, cast or loaded since), "
            "so the original bits cannot be restored; nothing was changed"
        )
    W[block.start : block.stop] = original


def _encode(block: _Block, original: torch.Tensor, differs: torch.Tensor) -> None:
    """Keep the original bits where ``differs``: chunk counts + 16-bit offsets + values, or a whole copy if smaller."""
    flat = bits(original).reshape(-1)
    edges = range(0, flat.numel() + _CHUNK, _CHUNK)
    if flat.device.type == "cpu":  # numpy's flatnonzero, take and searchsorted are several times faster than torch's
        index = np.flatnonzero(differs.numpy())
        counts = torch.from_numpy(np.diff(np.searchsorted(index, edges)).astype(np.int32))
        offsets, values = torch.from_numpy(index.astype(np.uint16)), torch.from_numpy(flat.numpy().take(index))
    else:
        index = differs.reshape(-1).nonzero().reshape(-1)
        counts = torch.searchsorted(index, torch.tensor(edges, device=index.device)).diff().to(torch.int32)
        offsets, values = (index & (_CHUNK - 1)).to(torch.uint16), flat[index]
    if values.numel() * (flat.element_size() + 2) < flat.numel() * flat.element_size():
        block.counts, block.offsets, block.values = counts, offsets, values
    else:
        block.values = flat.clone().reshape(original.shape)


def _decode(block: _Block, candidate_bits: torch.Tensor) -> None:
    if block.offsets is None:
        candidate_bits.copy_(block.values)
        return
    chunk = torch.repeat_interleave(
        torch.arange(block.counts.numel(), device=block.counts.device) * _CHUNK, block.counts.long()
    )
    candidate_bits.reshape(-1)[chunk + block.offsets.to(torch.int64)] = block.values


def _fingerprint(block: torch.Tensor) -> bytes:
    """Integer sums, modulo 2^64, over the rows and columns of the block's bits laid out 1021 words wide.

    Sums of integers are exact in any order; one changed word changes its row and its column for certain, and two
    exchanged words change two rows or two columns.
    """
    if block.device.type == "cpu":
        return _sums(_words_of(bits(block).numpy()))
    flat = bits(block).reshape(-1)
    whole = flat.numel() * flat.element_size() % 8 == 0 and flat.data_ptr() % 8 == 0
    words = flat.view(torch.int64) if whole else flat.to(torch.int64)
    rows = words.numel() // _FINGERPRINT_LANES
    head = words[: rows * _FINGERPRINT_LANES].reshape(rows, _FINGERPRINT_LANES)
    parts = head.sum(0), head.sum(1), words[rows * _FINGERPRINT_LANES :]
    return b"".join(part.cpu().numpy().tobytes() for part in parts)


def _words_of(block: np.ndarray) -> np.ndarray:
    """The block's bits as int64 words, or as widened integers where its size is no multiple of 8 bytes."""
    flat = block.reshape(-1)
    if flat.nbytes % 8 or flat.ctypes.data % 8:
        return flat.view(f"i{flat.itemsize}").astype(np.int64)
    return flat.view(np.int64)


def _sums(words: np.ndarray) -> bytes:
    rows = words.size // _FINGERPRINT_LANES
    head = words[: rows * _FINGERPRINT_LANES].reshape(rows, _FINGERPRINT_LANES)
    tail = words[rows * _FINGERPRINT_LANES :]
    return np.add.reduce(head, 0).tobytes() + np.add.reduce(head, 1).tobytes() + tail.tobytes()
