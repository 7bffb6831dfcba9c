"""A tensor on a GPU times its dropout mask: one launch, or operations of torch, which take about a hundred passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_lora.ops import guard
from fused_lora.reference import dropout_lanes, dropout_threshold, keep_scale


def times_mask(rows: Tensor, seed: Tensor, p: float, scaled: bool = True) -> Tensor:
    """rows [M, K] * mask(seed, p), and * 1 / (1 - p) where ``scaled``, rounded once. No gradient.

    seed: int64, one element, on the device of rows, which is no CPU but where tests say that kernels run on it.
    """
    if not guard.usable(rows.device) or rows.dtype not in guard.DTYPES:
        return _by_torch(rows, seed, p, scaled)
    from fused_lora.kernels.dropped import dropped as kernel

    K = 528 if rows.shape[-1] % 16 == 0 else 530  # a row of more than one tile, compiled as these
    check = lambda: _check(kernel, K, rows.dtype, rows.device)  # noqa: E731
    return guard.guarded(("dropped", rows.dtype, K), kernel, _by_torch, check)(rows, seed, p, scaled)


def _by_torch(rows: Tensor, seed: Tensor, p: float, scaled: bool) -> Tensor:
    M, K = rows.shape
    kept = rows * (dropout_lanes(seed, 0, M, K, rows.device)[:, :K] >= dropout_threshold(p) - 32768)
    return kept.mul_(keep_scale(p)) if scaled else kept


def _check(kernel: Callable, K: int, dtype: torch.dtype, device: torch.device) -> str | None:
    x = torch.sin(torch.arange(17 * K, device=device, dtype=torch.float32) * 12.9898).reshape(17, K).to(dtype)
    seed = torch.tensor([7], device=device)
    return guard.compare([kernel(x, seed, 0.3, True)], [_by_torch(x.double(), seed, 0.3, True)], dtype)
