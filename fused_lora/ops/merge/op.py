"""Merge and exact unmerge: W <- round(W + D) in place and back to the same bits, D = sum_i s_i B_i A_i in fp32.

Subtracting D again gives W back for 88 to 99.6 % of the elements only, because the merge rounds. So the merge keeps,
for every element where round(Wm - D) is not W to the bit, its position and its value: 6 bytes (fp32) or 4 bytes
(16-bit) for 0.2 to 10 % of the elements, and never more than a plain copy of W.

That is right only if D has the same bits at merge and at unmerge. Both compute it from frozen copies of A, B and s in
the same order: contiguous CPU weights by compiled loops where numba is installed (``merge_units``), CUDA weights by the
Triton kernel (``merge_kernel``), and in row blocks by the same single-threaded fp32 GEMM what neither does, what might
overflow and what has so many corrections that a copy is smaller. So neither the thread count nor a later edit of the
adapter matters, and a fingerprint of W (integer sums of its bit patterns, which see every change of a single element)
is compared for each block or unit before it is written back.

A block is written last, in one copy, after everything that can fail. A failure in block k takes blocks 0..k-1 back, so
a weight is either merged whole or not touched.

Traffic per weight element: one read and one write of W; D, Wm and the candidate stay in a block that fits the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fused_lora.ops.checks import FLOAT_DTYPES
from fused_lora.ops.merge import launch as merge_kernel
from fused_lora.ops.merge import units as merge_units
from fused_lora.ops.merge.blocks import Block, Workspace
from fused_lora.ops.merge.workers import Team

_BLOCK_ELEMENTS = 1 << 18  # CPU block: 1 MiB of fp32 fits the cache and hides the call overhead
_DEVICE_BLOCK_ELEMENTS = 1 << 24
_WORKSPACE_SHARE = 0.047  # of the weight's own bytes, for all CPU blocks in flight: with the record, a tenth at most
_MIN_BLOCK_ELEMENTS = 1 << 17  # smaller blocks cost more in calls than they save in memory


@dataclass
class MergeRecord:
    """What was added to one weight, frozen, and what it takes to get the old bits back.

    ``left`` [rows, R] and ``right`` [R, columns] are copies in fp32 (fp64 for an fp64 weight) with the scaling inside;
    their product is the delta as the weight is stored. ``nbytes`` counts everything that the record holds.
    """

    left: torch.Tensor
    right: torch.Tensor
    dtype: torch.dtype
    transposed: bool
    block_rows: int
    blocks: list[Block] = field(default_factory=list)
    units: merge_units.Units | None = None  # of the compiled loops, in place of blocks
    device_corrections: Any = None  # of the kernel, in place of blocks

    @property
    def nbytes(self) -> int:
        tensors = [self.left, self.right]
        for part in [*self.blocks, *([self.units] if self.units else [])]:
            tensors += part.tensors
        on_device = 0 if self.device_corrections is None else self.device_corrections.nbytes
        return on_device + sum(t.numel() * t.element_size() for t in tensors)

    @property
    def corrections(self) -> int:
        """How many elements need their value kept."""
        if self.device_corrections is not None:
            return self.device_corrections.values.numel()
        if self.units is not None:
            return sum(values.numel() for values in self.units.values)
        return sum(b.values.numel() for b in self.blocks if b.values is not None)

    def workspace(self, W: torch.Tensor) -> Callable[[], Workspace]:
        """What makes the buffers to merge W (as stored) with these factors, or to unmerge it."""
        return lambda: Workspace(W, self.left, self.right, self.block_rows)


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
        TypeError: weight is not fp64, fp32, bf16 or fp16. RuntimeError: it is on the meta device or
            an expanded tensor.
    """
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight: expected float64, float32, bfloat16 or float16, got {weight.dtype}")
    if weight.is_meta:
        raise RuntimeError("weight: expected numbers to add to, got a tensor on the meta device")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected two dimensions, got shape {tuple(weight.shape)}")
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        raise RuntimeError("weight: expected memory of its own for every number, got an expanded tensor")
    W = weight.detach()
    if merge_kernel.applies(W):
        left, right = _factors(weight, lora_A, lora_B, scaling, fan_in_fan_out)
        if W.stride(0) < W.stride(1):  # the kernel takes all three transposed
            left, right = left.t().contiguous().t(), right.t().contiguous().t()
        return MergeRecord(left, right, W.dtype, False, 0, device_corrections=merge_kernel.merge(W, left, right))
    with Team(W.device) as team:
        left, right = _factors(weight, lora_A, lora_B, scaling, fan_in_fan_out)
        transposed = W.stride(0) < W.stride(1) and W.t().is_contiguous()
        if transposed:  # rows of the storage are what a block should hold
            W, left, right = W.t(), right.t().contiguous(), left.t().contiguous()
        record = MergeRecord(left, right, W.dtype, transposed, _block_rows(W, team.threads))
        check_finite = not _cannot_overflow(left, right, W.dtype)
    if not check_finite and right.numel() and merge_units.applies(W):
        record.units = merge_units.merge(W, left, right)
        if record.units is not None:  # no call from here on: in one an interrupt would lose the record
            return record
    with Team(W.device) as team:
        _merge_blocks(W, record, team, check_finite)
    return record


def _merge_blocks(W: torch.Tensor, record: MergeRecord, team: Team, check_finite: bool) -> None:
    step = record.block_rows
    tasks = [(start, min(start + step, W.shape[0])) for start in range(0, W.shape[0], step)]

    def merge(ws: Workspace, start: int, stop: int) -> None:
        ws.merge(start, stop, check_finite, record.blocks)

    failure = team.over_blocks(W, tasks, record.workspace(W), merge)
    if failure is not None:
        team.over_blocks(W, [(block,) for block in record.blocks], record.workspace(W), Workspace.take_back)
        raise failure
    record.blocks.sort(key=lambda b: b.start)


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
    if record.units is not None:
        if not merge_units.restore(W, record.left, record.right, record.units):
            raise RuntimeError(merge_kernel.CHANGED)
        return
    begun: list[tuple[Block]] = []

    def restore(ws: Workspace, block: Block) -> None:
        begun.append((block,))
        ws.restore(block)

    with Team(W.device) as team:
        failure = team.over_blocks(W, [(block,) for block in record.blocks], record.workspace(W), restore)
        if failure is not None:
            team.over_blocks(W, begun, record.workspace(W), Workspace.merge_again)
            raise failure


def delta_fidelity(weight: torch.Tensor, record: MergeRecord) -> tuple[float, float]:
    """How much of the delta a merged ``weight`` really holds: (||Wm - W||, ||(Wm - W) - D|| / ||D||), Frobenius norms.

    The second number is the share of the delta that rounding lost: 0 is perfect, 0.8 means that the weights' precision
    is too coarse for this adapter. Reads the merged weight and the record, changes nothing.
    """
    W = weight.detach()
    W = W.t() if record.transposed else W
    moved = lost = wanted = 0.0
    if not record.blocks:
        original = weight.detach().clone()
        unmerge_(original, record)
        original = original.t() if record.transposed else original
        change = W.double() - original.double()
        delta = record.left.double() @ record.right.double()
        moved, lost, wanted = (t.square().sum().item() for t in (change, change - delta, delta))
    ws = record.workspace(W)() if record.blocks else None  # the kernel's record has none
    for block in record.blocks:
        original, delta = ws.original(block)
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


def _block_rows(W: torch.Tensor, threads: int) -> int:
    rows, columns = W.shape
    if W.device.type != "cpu":
        return max(1, _DEVICE_BLOCK_ELEMENTS // max(columns, 1))
    share = int(_WORKSPACE_SHARE * W.numel() * W.element_size() / (9 * threads))
    return max(1, min(_BLOCK_ELEMENTS, max(share, _MIN_BLOCK_ELEMENTS)) // max(columns, 1))
