"""Which implementation adds the LoRA term: two launches, a shrink and an expand that adds to y, or the eager path.

Keys, choices, trials before the first use and what happens to a failure are those of ``ops/linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fused_lora import reference
from fused_lora.ops import guard
from fused_lora.ops.linear import eager, plan
from fused_lora.ops.linear import launch as kernel


def forward(
    y: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    rounded: torch.dtype | None = None,
) -> Callable:
    """The function that computes (y + bias + terms, S) for these arguments; all candidates share one signature.

    rounded: as of :func:`plan.forward`.
    """
    if x.device.type != guard.DEVICE or x.dtype != y.dtype:
        return plan.on_rounded(eager.lora_term, rounded)
    key = "term", plan.layout(y, x, *lora_A, *lora_B), None if bias is None else bias.dtype, rounded, *scaling, *dropout
    found = plan.kept.get(key)
    if found is None:
        call = plan.case_of(x, y.shape[1], x.shape[1], bias, lora_A, lora_B, dropout, rounded=rounded)
        found = plan.keep(key, _forward(call))
    return found


def _forward(call: plan.Case) -> Callable:
    chosen = plan.planned("term", call, call.outputs, call.inputs)
    otherwise = plan.on_rounded(eager.lora_term, call.rounded)
    if chosen.variant == "eager":
        return otherwise
    case = plan.small_case_of(chosen, call)

    def check() -> str | None:
        x, W, bias, A, B, scaling, p, seeds = plan.small_case(case)
        y = reference.lora_linear(x, W, None, [], [], [], [])[0].to(x.dtype)
        args = y, x, bias, A, B, scaling, p, seeds
        ours = kernel.lora_term(chosen, *args)(*args)
        if case.rounded:
            A, B = plan.as_rounded(A, case.rounded), plan.as_rounded(B, case.rounded)
        return guard.compare(ours, reference.lora_term(y, x, A, B, scaling, p, seeds, bias), case.dtype)

    return plan.prepared(("term", chosen, case), kernel.lora_term, otherwise, check)
