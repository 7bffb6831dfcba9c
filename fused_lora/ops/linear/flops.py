"""Flops of the operators for ``torch.utils.flop_counter.FlopCounterMode``, and so for whoever reports MFU with it.

What the formulas of the reference multiply, no more: a kernel that forms S more than once counts once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula


def register() -> None:
    """Give both operators their formula; once, after they are defined."""
    register_flop_formula(torch.ops.fused_lora.lora_linear)(_forward)
    register_flop_formula(torch.ops.fused_lora.lora_linear_backward)(_backward)


def _forward(x: Sequence[int], weight: Sequence[int], bias, lora_A, *_, **__) -> int:
    (M, K), N = x, weight[0]
    return 2 * M * K * N + 2 * M * (K + N) * sum(A[0] for A in lora_A)


def _backward(g, x, weight, lora_A, lora_B, S, scaling, dropout, seeds, bias_dtype, needs, **_) -> int:
    (M, N), K, n = g, weight[1], len(lora_A)
    need_x, need_A, need_B, need_weight = needs[0], needs[1 : n + 1], needs[n + 1 : 2 * n + 1], needs[2 * n + 1]
    return 2 * M * K * N * (need_x + need_weight) + of_terms(M, K, N, lora_A, need_x, need_A, need_B)


def of_terms(
    M: int, K: int, N: int, lora_A: Sequence, need_x: bool, need_A: Sequence[bool], need_B: Sequence[bool]
) -> int:
    """Of the gradients of the LoRA terms: dS = s g B, its share of dx, dA and dB."""
    each = zip((r for r, _ in lora_A), need_A, need_B, strict=True)
    return sum(2 * M * r * (N * (need_x or a) + K * need_x + K * a + N * b) for r, a, b in each)
