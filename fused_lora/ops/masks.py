"""A tensor on a GPU times its dropout mask: one launch, or operations of torch, which take about a hundred passes."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.ops import guard
from fused_lora.reference import dropout_lanes, keep_scale, mask_cut


def times_mask(seed: Tensor, p: float, scaled: bool, *tensors: Tensor) -> list[Tensor]:
    """Of each tensor [M, K]: it * mask(seed, p), and * 1 / (1 - p) where ``scaled``, rounded once. No gradient.

    tensors: of one shape and dtype, on a device that is no CPU, but where tests say that kernels run on it. seed:
    int64, one element, on that device.
    """
    rows = tensors[0]
    if not guard.usable(rows.device) or rows.dtype not in guard.DTYPES:
        return _by_torch(seed, p, scaled, *tensors)
    K = 528 if rows.shape[-1] % 16 == 0 else 530  # a row of more than one tile, compiled as these
    check = lambda: _check(K, rows.dtype, rows.device)  # noqa: E731
    key = "dropped", rows.dtype, K, rows.device
    return guard.guarded(key, _by_kernel, _by_torch, check)(seed, p, scaled, *tensors)


def _by_kernel(seed: Tensor, p: float, scaled: bool, *tensors: Tensor) -> list[Tensor]:
    from fused_lora.kernels.dropped import dropped

    return [dropped(rows, seed, p, scaled) for rows in tensors]


def _by_torch(seed: Tensor, p: float, scaled: bool, *tensors: Tensor) -> list[Tensor]:
    M, K = tensors[0].shape
    keep = dropout_lanes(seed, 0, M, K, tensors[0].device)[:, :K] >= mask_cut(p)
    kept = [rows * keep for rows in tensors]
    return [rows.mul_(keep_scale(p)) for rows in kept] if scaled else kept


def _check(K: int, dtype: torch.dtype, device: torch.device) -> str | None:
    x = torch.sin(torch.arange(17 * K, device=device, dtype=torch.float32) * 12.9898).reshape(17, K).to(dtype)
    seed = torch.tensor([7], device=device)
    return guard.compare(_by_kernel(seed, 0.3, True, x), _by_torch(seed, 0.3, True, x.double()), dtype)
