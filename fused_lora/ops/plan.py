"""Which implementation runs: the one place where a kernel takes over from the eager path."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fused_lora.ops import cpu


def forward(
    x: torch.Tensor, weight: torch.Tensor, lora_A: Sequence[torch.Tensor], dropout: Sequence[float]
) -> Callable:
    """The function that computes (y, S) for these arguments; all candidates share one signature."""
    return cpu.lora_linear


def backward(
    g: torch.Tensor, weight: torch.Tensor, lora_A: Sequence[torch.Tensor], dropout: Sequence[float]
) -> Callable:
    """The function that computes (dx, dA, dB, dW, db) for these arguments."""
    return cpu.lora_linear_backward


def shrink_dtype(x: torch.Tensor, lora_A: Sequence[torch.Tensor]) -> torch.dtype:
    """dtype of S, whatever runs."""
    return cpu.accumulate_dtype(x, lora_A)
