"""Which implementation adds the LoRA term: two launches, a shrink and an expand that adds to y, or the eager path.

Keys, choices, trials before the first use and what happens to a failure are those of ``ops/linear``; the gradients are
that operator's own, without the product with W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fused_lora import reference
from fused_lora.ops import guard
from fused_lora.ops.linear import eager, plan
from fused_lora.ops.linear import launch as kernel
from fused_lora.ops.linear.plan import Case, Plan


def forward(
    y: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
) -> Callable:
    """The function that computes (y + bias + terms, S) for these arguments; all candidates share one signature."""
    if x.device.type != guard.DEVICE or x.dtype != y.dtype:
        return eager.lora_term
    bias_dtype = None if bias is None else bias.dtype
    key = "term", plan.layout(y, x, *lora_A, *lora_B), bias_dtype, *scaling, *dropout
    found = plan.kept.get(key)
    if found is None:
        call = _case(x, y.shape[1], x.shape[1], lora_A, lora_B, dropout, bias_dtype)
        found = plan.keep(key, _forward(call))
    return found


def backward(
    g: torch.Tensor,
    x: torch.Tensor,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    needs: tuple[bool, ...],
) -> Callable:
    """The function that computes (dx, dA, dB, None, db), with the signature that the LoRA linear's has.

    needs: one flag for x, each lora_A, each lora_B and bias.
    """
    if g.device.type != guard.DEVICE or x.dtype != g.dtype:
        return eager.lora_linear_backward
    key = "term", plan.layout(g, x, *lora_A, *lora_B), needs, *scaling, *dropout
    found = plan.kept.get(key)
    if found is None:
        call = _case(g, g.shape[1], lora_A[0].shape[1], lora_A, lora_B, dropout, None)
        found = plan.keep(key, _backward(call, all(needs[:-1])))
    return found


def _case(x, N, K, lora_A, lora_B, dropout, bias_dtype) -> Case:
    """All that a plan depends on; ``x`` is the gradient of y in the backward."""
    adapters = tuple([(A.shape[0], A.dtype, B.dtype) for A, B in zip(lora_A, lora_B, strict=True)])
    return Case(x.shape[0], N, K, x.device, x.dtype, adapters, tuple(dropout), bias_dtype, x_by_rows=x.stride(1) == 1)


def _forward(call: Case) -> Callable:
    chosen = _plan(call)
    if chosen.variant == "eager":
        return eager.lora_term
    case = plan.small_case_of(chosen, call)

    def check() -> str | None:
        x, W, bias, A, B, scaling, p, seeds = plan.small_case(case)
        y = reference.lora_linear(x, W, None, [], [], [], [])[0].to(x.dtype)
        exact = reference.lora_term(y, x, A, B, scaling, p, seeds, bias)
        args = y, x, bias, A, B, scaling, p, seeds
        return guard.compare(kernel.lora_term(chosen, *args)(*args), exact, case.dtype)

    return plan.prepared(("term", chosen, case), kernel.lora_term, eager.lora_term, check)


def _backward(call: Case, whole: bool) -> Callable:
    chosen = plan.planned("backward", call, call.inputs, call.outputs, whole)
    if chosen.variant == "eager":
        return eager.lora_linear_backward
    case = plan.small_case_of(chosen, call)

    def check() -> str | None:
        x, W, _, A, B, scaling, p, seeds = plan.small_case(case)
        y, S = reference.lora_linear(x, W, None, A, B, scaling, p, seeds)
        g, needed = y.to(x.dtype), [True] * len(A)
        # with W: the terms of the small layer cancel, and dS rounded to 16 bits would be most of dx
        args = g, x, W, A, B, S.float(), scaling, p, seeds, True, needed, needed, False, False
        dx, dA, dB, _, _ = kernel.lora_linear_backward(chosen, *args)(*args)
        exact_dx, exact_dA, exact_dB, _, _ = reference.lora_linear_backward(g, x, W, A, B, scaling, p, seeds)
        return guard.compare([dx, *dA, *dB], [exact_dx, *exact_dA, *exact_dB], x.dtype, library=True)

    key = "term backward", chosen, case
    return plan.prepared(key, kernel.lora_linear_backward, eager.lora_linear_backward, check)


def _plan(call: Case) -> Plan:
    dtypes = {dtype for _, *both in call.adapters for dtype in both}
    if not call.rows or not guard.usable(call.device) or not {call.dtype, *dtypes} <= guard.DTYPES:
        return Plan("eager")
    from fused_lora.kernels.config import capability, pick

    r, upcast, chip = max(r for r, *_ in call.adapters), dtypes != {call.dtype}, capability(call.device)
    if chip < 80:
        return Plan("eager")  # untried chips keep to the library
    rest = chip, upcast
    return Plan(
        "term",
        pick("expand", call.rows, call.outputs, 0, r, call.dtype, False, *rest),
        pick("shrink", call.rows, 0, call.inputs, r, call.dtype, any(call.dropout), *rest),
    )
