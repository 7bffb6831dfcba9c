"""Merge and exact unmerge: W <- round(W + D) in place and back to the same bits, D = sum_i s_i B_i A_i in fp32.

Subtracting D again gives W back for 88 to 99.6 % of the elements only, because the merge rounds. So the merge keeps,
for every element where round(Wm - D) is not W to the bit, its position and its difference, and never more than a copy
of W. Both ways compute D from frozen copies of A, B and s, every element's sum in a fixed order: on a CPU in C or torch
(``blocks``), on a GPU in a Triton kernel (``launch``). An unmerge compares a checksum before it writes.
"""

from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_lora.ops import native
from fused_lora.ops.checks import FLOAT_DTYPES, as_float, check_lists, is_dense, overlaps_itself
from fused_lora.ops.merge import blocks, launch
from fused_lora.ops.merge.blocks import Dither, Factors, Scales
from fused_lora.ops.merge.exact import in_double
from fused_lora.ops.native import MERGE, MERGE_AGAIN, UNMERGE


@dataclass
class MergeRecord:
    """What was added to one weight, frozen, and what it takes to get the old bits back.

    ``factors`` are copies; their product is the delta as the weight is stored. ``nbytes`` counts all that is held.
    """

    factors: Factors
    dtype: torch.dtype
    transposed: bool
    units: blocks.Units | None = None
    device_corrections: Any = None  # of the kernel, in place of units

    @property
    def nbytes(self) -> int:
        tensors = [*self.factors.tensors, *(self.units.tensors if self.units else [])]
        on_device = 0 if self.device_corrections is None else self.device_corrections.nbytes
        return on_device + sum(t.numel() * t.element_size() for t in tensors)


def merge_(
    weight: torch.Tensor,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    row_scale: torch.Tensor | None = None,
    seed: int | None = None,
    *,
    fan_in_fan_out: bool = False,
) -> MergeRecord:
    """In place: weight <- round(weight + sum_i scaling_i * lora_B_i @ lora_A_i), one rounding for all adapters.

    With ``row_scale`` u: weight <- round(u_j weight_j + sum_i ...) for each output j, as a merge of DoRA needs it.

    Args:
        weight: [N, K], or [K, N] with ``fan_in_fan_out``; fp64, fp32, bf16 or fp16, any strides, any device.
        lora_A: [r_i, K] each; lora_B: [N, r_i] each; any floating dtype. scaling: one float each.
        row_scale: [N], finite, or None.
        seed: 64 bits: sums are rounded to bf16 or fp16 at random, so that the expectation of a weight is its sum. The
            same seed gives the same bits. None: to the nearest.

    Returns:
        The record that :func:`unmerge_` needs. Later changes of lora_A, lora_B or scaling do not affect it.

    Raises:
        ValueError: shapes do not fit, a finite weight would become infinite or NaN, or a seed is for a weight of more
            than 16 bits. The weight is unchanged.
        TypeError: weight is not fp64, fp32, bf16 or fp16, an adapter is not floating, seed no int, or no list came.
        RuntimeError: weight is on the meta device, or overlaps itself as an expanded tensor.
    """
    adapters = lora_A, lora_B, scaling, row_scale, seed
    record, sweep = _prepared(weight, adapters, fan_in_fan_out)
    sweep.alone(MERGE)
    return record  # no call from here on: in one an interrupt would lose the record


def switch_(
    weight: torch.Tensor,
    record: MergeRecord,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    row_scale: torch.Tensor | None = None,
    seed: int | None = None,
    *,
    fan_in_fan_out: bool = False,
) -> MergeRecord:
    """In place: the bits and the record of :func:`unmerge_` with ``record`` and :func:`merge_` with the rest.

    In the kernel it is one read and one write of the weight, where neither merge has a ``row_scale``. On a CPU sums
    take most of the time, and it is the two calls.

    Args:
        record: of the merge that ``weight`` holds. The others: as for :func:`merge_`.

    Raises what :func:`unmerge_` and :func:`merge_` raise; the weight is unchanged then, and ``record`` holds on.
    """
    adapters = lora_A, lora_B, scaling, row_scale, seed
    _merged(weight, record)
    new, sweep = _prepared(weight, adapters, fan_in_fan_out, record)
    if sweep is not None and sweep.alone(MERGE):
        return new
    back = _to_unmerge(weight, record)
    try:
        back.alone(UNMERGE)
        return merge_(weight, lora_A, lora_B, scaling, row_scale, seed, fan_in_fan_out=fan_in_fan_out)
    except BaseException:  # the same factors give the same bits, so the record holds again
        back.undo(MERGE_AGAIN)
        raise


def merge_later(
    weight: torch.Tensor, adapters: Any, fan_in_fan_out: bool, old: MergeRecord | None = None
) -> tuple[MergeRecord, Any] | None:
    """The same of (lora_A, lora_B, scaling, row_scale, seed) for :func:`run_together`, and the record that holds once
    it has run; in place of an ``old`` merge, :func:`switch_`.

    None where neither the C loops nor the kernel take it in one pass with others. Raises what :func:`merge_` does
    before it writes.
    """
    if old is not None:
        _merged(weight, old)
        if old.units is not None:
            return None
    record, sweep = _prepared(weight, adapters, fan_in_fan_out, old)
    return (record, sweep) if sweep is not None and sweep.joins() else None


def run_together(sweeps: Sequence[Any], mode: int) -> int:
    """Merge, unmerge or switch all of these, which are of one ``kind``, or none; returns how that ended."""
    return (launch if isinstance(sweeps[0], launch.Sweep) else blocks).run_together(sweeps, mode)


def unmerge_(weight: torch.Tensor, record: MergeRecord) -> None:
    """In place: the bits that ``weight`` had before the :func:`merge_` that returned ``record``.

    Raises:
        RuntimeError: the weight was changed, cast or moved since the merge, so that its original bits cannot be
            restored. Nothing is changed.
    """
    _to_unmerge(weight, record).alone(UNMERGE)


def unmerge_later(weight: torch.Tensor, record: MergeRecord) -> Any:
    """The same for :func:`run_together`, or None as for :func:`merge_later`."""
    sweep = _to_unmerge(weight, record)
    return sweep if sweep.joins() else None


def _to_unmerge(weight: torch.Tensor, record: MergeRecord) -> Any:
    W, factors, units = _merged(weight, record), record.factors, record.units
    if units is None:
        return launch.Sweep(W, factors.left, factors.right, corrections=record.device_corrections)
    return blocks.restoring(W, factors, units)


@native.safe_in_a_child
def delta_fidelity(weight: torch.Tensor, record: MergeRecord) -> float:
    """The share of the delta that rounding lost of a merged ``weight``: ||(Wm - W) - D|| / ||D||, Frobenius norms.

    0 is perfect, 0.8 means that the weights' precision is too coarse for this adapter. Reads the merged weight and the
    record, changes nothing.
    """
    original, held = weight.detach().clone(), record.device_corrections
    if held is not None:  # in its table an unmerge notes what a way back would merge again, and this is none of W
        record = replace(record, device_corrections=replace(held, table=held.table.clone()))
    unmerge_(original, record)
    before = in_double(original)
    change = in_double(weight.detach()) - before
    left, right, scales, _ = record.factors
    delta = in_double(left) @ in_double(right)
    if scales is not None:
        W = before.t() if record.transposed else before
        delta += W * (in_double(scales.rows[0, :, None]) * in_double(scales.columns[0]) - 1)
    delta = delta.t() if record.transposed else delta
    lost, wanted = (t.square().sum().item() for t in (change - delta, delta))
    return math.sqrt(lost / wanted) if wanted else 0.0


def factors(
    record: MergeRecord, fan_in_fan_out: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float], torch.Tensor | None, int | None]:
    """The record's frozen adapters as one (lora_A [R, K], lora_B [N, R], scaling 1, row_scale, seed), to merge them
    again."""
    swapped = fan_in_fan_out != record.transposed
    left, right, scales, dither = record.factors.t() if swapped else record.factors
    rows, seed = None if scales is None else scales.rows[0], None if dither is None else dither.seed
    return [right], [left], [1.0], rows, seed


def seed_of(seed: int, name: str) -> int:
    """The seed of one weight, from the seed of a whole merge and the weight's name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")


def dither_of(seed: int | None) -> Dither | None:
    """Random rounding of a whole weight by a seed of 64 bits; None to the nearest."""
    return None if seed is None else Dither((int(seed) + 2**63) % 2**64 - 2**63)  # as a signed integer


@native.safe_in_a_child
def _prepared(
    weight: torch.Tensor, adapters: Any, fan_in_fan_out: bool, old: MergeRecord | None = None
) -> tuple[MergeRecord, Any]:
    """Of a merge, or in place of an ``old`` one a switch: the record that will hold, and the sweep, or None where a
    switch takes two passes. The arguments are checked before, all but ``old``."""
    _check(weight, *adapters, fan_in_fan_out=fan_in_fan_out)
    W, (lora_A, lora_B, scaling, row_scale, seed) = weight.detach(), adapters
    factors = delta_factors(W.dtype, W.device, lora_A, lora_B, scaling, fan_in_fan_out, row_scale)
    factors, turned, before = factors._replace(dither=dither_of(seed)), W.stride(0) < W.stride(1), None
    if row_scale is None and launch.applies(W):
        # the kernel takes all three transposed, and of a weight [K, N] the factors are
        left, right = (t.t().contiguous().t() if turned else t.contiguous() for t in factors[:2])
        record = MergeRecord(factors._replace(left=left, right=right), W.dtype, False)
        if old is not None:
            if old.device_corrections is None:
                return record, None
            before = *old.factors[:2], old.device_corrections
        return record, launch.Sweep(W, left, right, factors.dither, before, record=record)
    turned = turned and W.t().is_contiguous()
    if turned:  # rows of the storage are what a unit should hold
        W, factors = W.t(), factors.t()
    record = MergeRecord(factors, W.dtype, turned)
    if old is not None:
        return record, None
    sweep = blocks.prepared(W, factors)
    record.units = sweep.units
    return record, sweep


def _merged(weight: torch.Tensor, record: MergeRecord) -> torch.Tensor:
    """The weight as it is stored; RuntimeError where it cannot be the one of the record, TypeError without one."""
    if not isinstance(record, MergeRecord):
        raise TypeError(f"record: expected the MergeRecord that merge_ returned, got {record!r:.100}")
    _check_tensor(weight)
    W, factors = weight.detach(), record.factors
    W = W.t() if record.transposed else W
    place = ((len(factors.left), factors.right.shape[1]), record.dtype, factors.left.device)
    if (tuple(W.shape), W.dtype, W.device) != place:
        if W.is_meta:
            raise RuntimeError(
                "weight: expected the merged one, got no data (meta device): its layer was offloaded after the merge. "
                "Bring it back first; for hooks of accelerate, accelerate.hooks.remove_hook_from_submodules(model)"
            )
        raise RuntimeError(
            f"weight: expected shape, dtype and device as at merge, {place}, got {(tuple(W.shape), W.dtype, W.device)}"
        )
    return W


def add_rows_(rows: torch.Tensor, factors: Factors, keep: bool = False) -> blocks.Units | None:
    """In place: some rows of a weight as it is stored, contiguous [n, columns], get left @ right with one rounding.

    The bits are those of :func:`merge_` of the whole weight. ``factors``: of :func:`delta_factors`, left for these
    rows. With ``keep`` it returns what :func:`blocks.restoring` needs (on a CPU only); without, it keeps nothing and
    is twice as fast.

    Raises ValueError if a finite weight would become infinite or NaN. The rows may be partly written then.
    """
    if keep:
        return blocks.merge(rows, factors)
    if launch.applies(rows) and factors.scales is None:
        launch.Sweep(rows, factors.left, factors.right, factors.dither).alone(MERGE)
    else:
        blocks.merge_again(rows, factors)
    return None


def delta_factors(
    dtype: torch.dtype,
    device: torch.device,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    fan_in_fan_out: bool = False,
    row_scale: torch.Tensor | None = None,
) -> Factors:
    """Copies of adapters on ``device`` with the scaling inside B; their product is what a weight of ``dtype`` gets.

    Whatever happens to the adapters while they are merged, the same delta is taken away again. No number travels to the
    device.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    alone = len(lora_A) == 1  # else torch.cat copies them
    A = [part.detach().to(device, wide, copy=alone, memory_format=torch.contiguous_format) for part in lora_A]
    # a product keeps the strides of a transposed B, as tied embeddings have it
    numbers = [as_float("scaling", s) for s in scaling]
    B = [(part.detach().to(device, wide) * s).contiguous() for part, s in zip(lora_B, numbers, strict=True)]
    A, B = A[0] if len(A) == 1 else torch.cat(A), B[0] if len(B) == 1 else torch.cat(B, 1)
    scales = None if row_scale is None else Scales.of_rows(row_scale.detach().to(device, wide), A.shape[1])
    factors = Factors(B, A, scales)
    return factors.t() if fan_in_fan_out else factors


def _check_tensor(weight: Any) -> None:
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight: expected a tensor, got {weight!r:.100}")
    if not (weight.is_meta or is_dense(weight)):
        raise RuntimeError("weight: expected numbers in memory, got a sparse or nested tensor, or a lazily negated one")


def _check(weight, lora_A, lora_B, scaling, row_scale, seed, fan_in_fan_out) -> None:
    _check_tensor(weight)
    for name, parts in (("lora_A", lora_A), ("lora_B", lora_B), ("scaling", scaling)):
        check_lists(Sequence, **{name: parts})
        kind, what = ((numbers.Real, torch.Tensor), "numbers") if name == "scaling" else (torch.Tensor, "tensors")
        if wrong := [part for part in parts if not isinstance(part, kind)]:
            raise TypeError(f"{name}: expected {what}, got {wrong[0]!r:.100}")
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight: expected float64, float32, bfloat16 or float16, got {weight.dtype}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed: expected an int or None, got {seed!r:.100}")
    if seed is not None and weight.dtype.itemsize != 2:
        raise ValueError(f"seed: expected None for a weight of {weight.dtype}: only 16 bits are rounded at random")
    if weight.is_meta:
        raise RuntimeError("weight: expected numbers to add to, got a tensor on the meta device")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected two dimensions, got shape {tuple(weight.shape)}")
    if overlaps_itself(weight):
        raise RuntimeError("weight: expected memory of its own for every number, got an expanded tensor or the like")
    rows, columns = (weight.shape[1], weight.shape[0]) if fan_in_fan_out else weight.shape
    if not (len(lora_A) == len(lora_B) == len(scaling)) or not lora_A:
        raise ValueError(
            f"lora_A, lora_B, scaling: expected as many of each and at least one, "
            f"got {len(lora_A)}, {len(lora_B)} and {len(scaling)}"
        )
    floats = isinstance(row_scale, torch.Tensor) and is_dense(row_scale) and row_scale.dtype in FLOAT_DTYPES
    if row_scale is not None and not floats:
        raise TypeError(f"row_scale: expected a dense floating tensor or None, got {row_scale!r:.100}")
    if row_scale is not None and (row_scale.shape != (rows,) or not torch.isfinite(row_scale).all()):
        raise ValueError(
            f"row_scale: expected {rows} finite numbers, got {tuple(row_scale.shape)}, some perhaps not finite"
        )
    for i, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        for name, part in (("lora_A", A), ("lora_B", B)):
            if part.layout is not torch.strided or part.is_nested or part.is_meta:
                raise TypeError(
                    f"{name}[{i}]: expected a dense tensor, got a sparse or nested one, or one without numbers"
                )
        if not (A.is_floating_point() and B.is_floating_point()):
            raise TypeError(f"adapter {i}: expected floating lora_A and lora_B, got {A.dtype} and {B.dtype}")
        if A.dim() != 2 or A.shape[1] != columns or B.dim() != 2 or tuple(B.shape) != (rows, A.shape[0]):
            raise ValueError(
                f"adapter {i}: expected lora_A [r, {columns}] and lora_B [{rows}, r], "
                f"got {tuple(A.shape)} and {tuple(B.shape)}"
            )
