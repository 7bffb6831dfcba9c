"""Merge and exact unmerge by the Triton kernel: the same contract as ``ops/merge.py``, one pass each way.

The kernel's delta is a chain of fused multiply-adds in a fixed order, so merge and unmerge see the same bits whatever
tiles they use. Either is one launch and one wait: every program checks what it holds before it writes it, and if one of
them refuses, a second launch takes back what the others wrote, to the bit. The first use in a process is tried on a
small weight, in both directions.
"""

from __future__ import annotations

from typing import Any

import torch

from fused_lora.ops import guard
from fused_lora.reference import bits

CHANGED = (
    "weight: it is not what the merge left (changed, cast or loaded since), so the original bits cannot be restored; "
    "nothing was changed"
)

# Memory for corrections, in numbers a weight: a quarter more than the last such merge of this dtype needed. A wrong
# guess costs the way back and a second merge, of a known size.
_share: dict[tuple[torch.dtype, bool], float] = {}
_way_back: set[tuple] = set()


def applies(weight: torch.Tensor) -> bool:
    """Whether the kernel does this weight: a CUDA tensor of fp32, bf16 or fp16, and the first-use check has passed."""
    device, dtype = weight.device, weight.dtype
    if not guard.usable(device) or dtype not in guard.DTYPES:
        return False
    return guard.passes(("merge", device, dtype), lambda: _check(device, dtype))


def merge(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    dither: Any = None,
    old: tuple[torch.Tensor, torch.Tensor, Any] | None = None,
) -> Any:
    """weight <- round(weight + left @ right) in place; returns the kernel's corrections.

    dither: the seed and first row of a rounding at random, as ``blocks.Dither``; kept with what is returned.
    old: (left, right, corrections) of a merge that the same launch takes off before. Then None, with the weight as it
    was, says that the two have other units and need a launch each.

    Raises ValueError, with the weight as it was, when a finite weight would not stay finite; with ``old`` also what
    :func:`unmerge` raises.
    """
    from fused_lora.kernels import merge as kernels

    factors = right, left
    step = weight.numel() // 64 + 4096  # few sizes: a launch is prepared for each
    how = weight.dtype, dither is not None
    room = int(weight.numel() * _share.get(how, 1 / 16 if dither is None else 1 / 2)) // step * step + step
    while True:
        record = kernels.new_record(weight, room, dither=dither)
        if old is not None and old[2].unit != record.unit:
            return None
        kind = (weight.device, weight.dtype, weight.shape, weight.stride(), left.stride(), right.stride())
        kind += () if old is None else (old[0].stride(), old[1].stride())
        if kind not in _way_back:  # compiled and loaded before it is needed; it finds nothing to take back
            _take_back(weight, factors, record, None if old is None else (*old[:2], record))
            _way_back.add(kind)
        refused = 0
        try:
            if old is None:
                kernels.merge(weight, *factors, record)
            else:
                kernels.switch(weight, (old[1], old[0], old[2]), (*factors, record))
                refused = old[2].refused.item()
            found, lost = record.totals()
        except BaseException:
            _take_back(weight, factors, record, old)
            raise
        if not lost and not refused and found <= room:
            _share[how] = 1.25 * found / max(weight.numel(), 1)
            return record.trimmed(found, slack=weight.numel() // 64 + 4096)
        _take_back(weight, factors, record, old)  # what was merged before a program met the reason not to
        if refused:
            raise RuntimeError(CHANGED)
        if lost:
            raise ValueError("NaNs or infinities detected in the merged weights: the adapter seems to be broken")
        room = found


def _take_back(weight: torch.Tensor, factors: tuple, record: Any, old: Any) -> None:
    from fused_lora.kernels import merge as kernels

    kernels.unmerge(weight, *factors, record)
    if old is not None:
        merge_again(weight, *old)


def unmerge(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, record: Any) -> None:
    """The original bits back in place. Raises RuntimeError, with the weight as it was, if it was changed since."""
    from fused_lora.kernels import merge as kernels

    try:
        kernels.unmerge(weight, right, left, record)
        refused = record.refused.item()
    except BaseException:
        merge_again(weight, left, right, record)
        raise
    if refused:
        merge_again(weight, left, right, record)
        raise RuntimeError(CHANGED)


def merge_again(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, record: Any) -> None:
    """Undo the :func:`unmerge` with this record, to the bit."""
    from fused_lora.kernels import merge as kernels

    kernels.merge_again(weight, right, left, record)


def _check(device: torch.device, dtype: torch.dtype) -> str | None:
    rows, columns, r = 65, 300, 5
    line = torch.arange(rows * columns, device=device, dtype=torch.float32)
    W = (torch.sin(line * 12.9898) * 0.1).reshape(rows, columns).to(dtype)
    first = (torch.sin(line[: rows * r] * 7.1) * 0.05).reshape(rows, r)
    right = torch.sin(line[: r * columns] * 3.3).reshape(r, columns)
    merged, old = W.clone(), None
    for left in (first, first * -0.5):  # the second in the place of the first
        record = merge(merged, left, right, old=old)
        exact = W.double() + left.double() @ right.double()
        summed = torch.finfo(torch.float32).eps * r * (left.abs() @ right.abs())  # what the fp32 sums may be off by
        if ((merged.double() - exact).abs() > torch.finfo(dtype).eps * exact.abs() + summed + 1e-7).any():
            return "a small weight was merged wrongly"
        old = left, right, record
    unmerge(merged, left, right, record)
    return None if torch.equal(bits(merged), bits(W)) else "a small weight did not come back to the bit"
