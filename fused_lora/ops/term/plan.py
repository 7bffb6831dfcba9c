"""Which implementation adds the LoRA term: two launches, a shrink and an expand that adds to y, or the eager path.

Choices, trials before the first use and what happens to a failure are those of ``ops/linear``; the gradients are that
operator's own, without the product with W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from fused_lora import reference
from fused_lora.ops.linear import eager, plan
from fused_lora.ops.linear import launch as kernel
from fused_lora.ops.linear.plan import Plan


def forward(
    y: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    dropout: Sequence[float],
) -> Callable:
    """The function that computes (y + bias + terms, S) for these arguments; all candidates share one signature."""
    if x.device.type != kernel.DEVICE or x.dtype != y.dtype:
        return eager.lora_term
    bias_dtype = None if bias is None else bias.dtype
    return _forward(_case(x, y.shape[1], x.shape[1], lora_A, lora_B, dropout, bias_dtype))


def backward(
    g: torch.Tensor,
    dtype: torch.dtype,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    dropout: Sequence[float],
    whole: bool,
) -> Callable:
    """The function that computes (dx, dA, dB, None, db), with the signature that the LoRA linear's has.

    dtype: of x. whole: dx and every dA and dB are wanted; without it the function takes any of them.
    """
    if g.device.type != kernel.DEVICE or dtype != g.dtype:
        return eager.lora_linear_backward
    return _backward(_case(g, g.shape[1], lora_A[0].shape[1], lora_A, lora_B, dropout, None), whole)


def _case(x, N, K, lora_A, lora_B, dropout, bias_dtype) -> kernel.Case:
    """All that a plan depends on; ``x`` is the gradient of y in the backward."""
    adapters = tuple([(A.shape[0], A.dtype, B.dtype) for A, B in zip(lora_A, lora_B, strict=True)])
    return kernel.Case(
        x.shape[0], N, K, x.device, x.dtype, adapters, tuple(dropout), bias_dtype, x_by_rows=x.stride(1) == 1
    )


@lru_cache(maxsize=4096)
def _forward(call: kernel.Case) -> Callable:
    chosen = _plan(call)
    if chosen.variant == "eager":
        return eager.lora_term
    run, case = _kernels(chosen), plan._small_case(chosen, call)

    def check() -> str | None:
        x, W, bias, *adapters = kernel.small_case(case)
        y = reference.lora_linear(x, W, None, [], [], [], [])[0].to(x.dtype)
        exact = reference.lora_term(y, x, *adapters, bias)
        return kernel.compare(run(y, x, bias, *adapters), exact, case.dtype)

    return kernel.guarded(("term", chosen, case), run, eager.lora_term, check)


@lru_cache(maxsize=4096)
def _backward(call: kernel.Case, whole: bool) -> Callable:
    chosen = plan._plan("backward", call, call.inputs, call.outputs, whole)
    if chosen.variant == "eager":
        return eager.lora_linear_backward
    run, case = kernel.lora_linear_backward(chosen.variant, chosen), plan._small_case(chosen, call)

    def check() -> str | None:
        x, W, _, *adapters = kernel.small_case(case)
        A, B, *rest = adapters
        y, S = reference.lora_linear(x, W, None, *adapters)
        g, needed = y.to(x.dtype), [True] * len(A)
        dx, dA, dB, _, _ = run(g, x, None, A, B, S.float(), *rest, True, needed, needed, False, False)
        exact_dx, exact_dA, exact_dB = reference.lora_term_backward(g, x, *adapters)
        return kernel.compare([dx, *dA, *dB], [exact_dx, *exact_dA, *exact_dB], x.dtype)

    return kernel.guarded(("term backward", chosen, case), run, eager.lora_linear_backward, check)


plan.KEPT.extend((_forward, _backward))


def _plan(call: kernel.Case) -> Plan:
    dtypes = {dtype for _, *both in call.adapters for dtype in both}
    if not call.rows or not kernel.usable(call.device) or not {call.dtype, *dtypes} <= kernel.DTYPES:
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


def _kernels(chosen: Plan) -> Callable:
    def run(y, x, bias, lora_A, lora_B, scaling, dropout, seeds):
        from fused_lora.kernels.lora_expand import lora_expand
        from fused_lora.kernels.lora_shrink import lora_shrink

        S = lora_shrink(x, lora_A, [reference.keep_scale(p) for p in dropout], dropout, seeds, chosen.shrink)
        y = y if y.stride(1) == 1 else y.contiguous()
        return lora_expand(S, [B.t() for B in lora_B], scaling, dropout, None, bias, y.dtype, chosen.product, y), S

    return run
