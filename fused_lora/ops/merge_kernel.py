"""Merge and exact unmerge by the Triton kernel: the same contract as ``ops/merge.py``, four passes on the device.

The kernel's delta is a chain of fused multiply-adds in a fixed order, so merge and unmerge see the same bits whatever
tiles they use. Merge and unmerge read the weight once to check and once more to write; nothing is written before the
check has passed. The first use in a process is tried on a small weight, in both directions.
"""

from __future__ import annotations

from typing import Any

import torch

from fused_lora.ops import kernel
from fused_lora.reference import bits

CHANGED = (
    "weight: it is not what the merge left (changed, cast or loaded since), so the original bits cannot be restored; "
    "nothing was changed"
)


def applies(weight: torch.Tensor) -> bool:
    """Whether the kernel does this weight: a CUDA tensor of fp32, bf16 or fp16, and the first-use check has passed."""
    device, dtype = weight.device, weight.dtype
    if not kernel.usable(device) or not kernel.fits(weight, (), ()):
        return False
    return kernel.passes(("merge", device, dtype), lambda: _check(device, dtype))


def merge(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Any:
    """weight <- round(weight + left @ right) in place; returns the kernel's corrections.

    Raises ValueError, with nothing written, when a finite weight would not stay finite.
    """
    from fused_lora.kernels import merge as kernels

    scan = kernels.merge_scan(weight, right, left)
    corrections, lost = scan.totals.tolist()
    if lost:
        raise ValueError("NaNs or infinities detected in the merged weights: the adapter seems to be broken")
    record = kernels.new_corrections(weight, scan, corrections)
    kernels.merge_apply(weight, right, left, record)
    return record


def unmerge(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, record: Any) -> None:
    """The original bits back in place. Raises RuntimeError, with nothing written, if the weight was changed since."""
    from fused_lora.kernels import merge as kernels

    if not record.matches(kernels.unmerge_scan(weight, right, left, record)):
        raise RuntimeError(CHANGED)
    kernels.unmerge_apply(weight, right, left, record)


def _check(device: torch.device, dtype: torch.dtype) -> str | None:
    rows, columns, r = 65, 300, 5
    line = torch.arange(rows * columns, device=device, dtype=torch.float32)
    W = (torch.sin(line * 12.9898) * 0.1).reshape(rows, columns).to(dtype)
    left = (torch.sin(line[: rows * r] * 7.1) * 0.05).reshape(rows, r)
    right = torch.sin(line[: r * columns] * 3.3).reshape(r, columns)
    merged = W.clone()
    record = merge(merged, left, right)
    exact = W.double() + left.double() @ right.double()
    summed = torch.finfo(torch.float32).eps * r * (left.abs() @ right.abs())  # what the fp32 sums may be off by
    if ((merged.double() - exact).abs() > torch.finfo(dtype).eps * exact.abs() + summed + 1e-7).any():
        return "a small weight was merged wrongly"
    unmerge(merged, left, right, record)
    return None if torch.equal(bits(merged), bits(W)) else "a small weight did not come back to the bit"
