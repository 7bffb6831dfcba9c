"""The LoRA linear as torch operators: y = x W^T + b + sum_i s_i D_i(x) A_i^T B_i^T, its gradients, and autocast.

    fused_lora::lora_linear            -> (y [M, N], S [M, sum r_i]), x [M, K]
    fused_lora::lora_linear_backward   -> the gradients that are needed, in the order x, lora_A, lora_B, weight, bias

Saved for the backward: x itself (shared with whoever else holds it), S and the seeds. No mask, no dropped copy of x.
The maths and the mask are those of ``fused_lora.reference``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_lora.ops import cpu, differentiable, flops, plan
from fused_lora.ops._checks import check_linear

_AUTOCAST = ("cpu", "cuda")  # torch refuses the question for devices that have none, as meta


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float] | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b + sum_i scaling_i * D_i(x) lora_A_i^T lora_B_i^T, differentiable, with one mask per adapter.

    Args:
        x: [..., K], fp64, fp32, bf16 or fp16.
        weight: [N, K], dtype of x. bias: [N], any floating dtype, or None; it is added before the one rounding.
        lora_A: [r_i, K] each; lora_B: [N, r_i] each; any floating dtype (fp32 adapters over a 16-bit base are used
            in fp32, without an fp32 copy of x on the kernel path).
        scaling: one float per adapter.
        dropout: one probability per adapter (default: 0 everywhere). It acts in units of 2^-16.
        seeds: int64 [adapters] on x's device; drawn from torch's default generator when a dropout is not 0 and none
            are given. ``fused_lora.dropout_mask(seed, x.shape, p)`` is the mask that a seed stands for.

    Returns:
        y [..., N] in x's dtype (under autocast: in the autocast dtype).

    Raises:
        ValueError: shapes, devices, dropout or scaling do not fit. TypeError: x is no tensor, dtypes do not fit.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not lora_A:
        return torch.nn.functional.linear(x, weight, bias)
    dropout = [0.0] * len(lora_A) if dropout is None else list(dropout)
    if seeds is None and any(dropout):
        seeds = draw_seeds(len(dropout), x.device)
    autocast = _autocast_dtype(x)
    check_linear(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds, autocast)
    # reshaped out here: the operator's own result is no view, so that it may be changed in place
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    arguments = (rows, weight, bias, list(lora_A), list(lora_B), list(scaling), dropout, seeds)
    if _is_direct(rows, weight, *lora_A, *lora_B):
        y = _direct(*arguments, autocast)
    else:
        y = _lora_linear(*arguments)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """int64 [count] from torch's default generator of the device: what makes a run and a recomputation reproducible."""
    return torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device=device)


@torch.library.custom_op("fused_lora::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    run = plan.forward(x, weight, bias, lora_A, lora_B, dropout)
    return run(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds)


@_lora_linear.register_fake
def _(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds):
    y = x.new_empty((x.shape[0], weight.shape[0]))
    return y, x.new_empty((x.shape[0], sum(A.shape[0] for A in lora_A)), dtype=cpu.shrink_dtype(x, lora_A))


def _gradients(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    S: Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: Tensor | None,
    bias_dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    n, (need_x, *rest) = len(lora_A), needs
    need_A, need_B, need_weight, need_bias = rest[:n], rest[n : 2 * n], rest[2 * n], rest[2 * n + 1]
    rows = g.new_empty((g.shape[0], weight.shape[1])) if x is None else x
    run = plan.backward(g, weight, lora_A, lora_B, dropout, need_x and all(need_A) and all(need_B))
    dx, dA, dB, dW, db = run(
        g, rows, weight, lora_A, lora_B, S, scaling, dropout, seeds, need_x, need_A, need_B, need_weight, need_bias
    )
    db = None if db is None else db.to(bias_dtype)
    return [t for t in (dx, *dA, *dB, dW, db) if t is not None]


_lora_linear_backward = torch.library.custom_op("fused_lora::lora_linear_backward", mutates_args=())(_gradients)


@_lora_linear_backward.register_fake
def _(g, x, weight, lora_A, lora_B, S, scaling, dropout, seeds, bias_dtype, needs):
    bias = None if bias_dtype is None else weight.new_empty((weight.shape[0],), dtype=bias_dtype)
    shapes = [g.new_empty((g.shape[0], weight.shape[1])), *lora_A, *lora_B, weight, bias]
    return [t.new_empty(t.shape) for t, need in zip(shapes, needs, strict=True) if need]


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    _keep(ctx, ctx.needs_input_grad, *inputs, output[1])


def _keep(ctx, needs, x, weight, bias, lora_A, lora_B, scaling, dropout, seeds, S) -> None:
    """For the backward; ``needs`` has one flag per tensor: x, weight, bias, n times lora_A, n times lora_B."""
    n = len(lora_A)
    need_x, need_weight, need_bias, *rest = needs
    need_A, need_B = rest[:n], rest[n : 2 * n]
    ctx.needs = [need_x, *need_A, *need_B, need_weight, need_bias]
    ctx.adapters, ctx.scaling, ctx.dropout = n, scaling, dropout
    ctx.bias_dtype = bias.dtype if need_bias else None
    keep_x = x if need_weight or any(need_A) else None  # only dA and dW read it
    ctx.save_for_backward(keep_x, weight, S, seeds, *lora_A, *lora_B)


def _backward(ctx, g, _):
    n = ctx.adapters
    if g is None:
        return (None, None, None, [None] * n, [None] * n, None, None, None)
    dx, dA, dB, dW, db = _all_gradients(ctx, g, _lora_linear_backward)
    return dx, dW, db, dA, dB, None, None, None


def _all_gradients(ctx, g, gradients):
    """dx, dA, dB, dW, db with None for what is not needed; ``gradients`` computes the others."""
    n = ctx.adapters
    x, weight, S, seeds, *adapters = ctx.saved_tensors
    A, B = adapters[:n], adapters[n:]
    if torch.is_grad_enabled():  # create_graph: someone wants to differentiate what comes next
        with torch.autocast(g.device.type, enabled=False):
            dx, *rest = differentiable.lora_linear_backward(
                g, x, weight, A, B, ctx.scaling, ctx.dropout, seeds, ctx.bias_dtype, ctx.needs
            )
    else:
        arguments = (g, x, weight, A, B, S, ctx.scaling, ctx.dropout, seeds, ctx.bias_dtype, ctx.needs)
        found = iter(gradients(*arguments))
        dx, *rest = (next(found) if need else None for need in ctx.needs)
    return dx, rest[:n], rest[n : 2 * n], rest[2 * n], rest[2 * n + 1]


_lora_linear.register_autograd(_backward, setup_context=_setup_context)
flops.register()


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    if x.dtype == torch.float64 or kind not in _AUTOCAST or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(x.device.type)


def _as_autocast(adapters: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Rounded as eager rounds them, for 16-bit products on tensor cores; a CPU computes in fp32 and keeps them."""
    return [t.to(dtype) if t.is_cuda else t for t in adapters]


def _register_autocast(device_type: str, key: str) -> None:
    """Under autocast x and W take its dtype, as in F.linear, and on CUDA the adapters; their gradients keep theirs."""

    def forward(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds):
        dtype = _autocast_dtype(x)
        with torch.autocast(device_type, enabled=False):
            if dtype is not None:
                x, weight = x.to(dtype), weight.to(dtype)
                lora_A, lora_B = _as_autocast(lora_A, dtype), _as_autocast(lora_B, dtype)
            return _lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds)

    def backward(*args):
        with torch.autocast(device_type, enabled=False):
            return _lora_linear_backward(*args)

    _library.impl("lora_linear", forward, key)
    _library.impl("lora_linear_backward", backward, key)


class _Direct(torch.autograd.Function):
    """The same operator past the dispatcher, whose bookkeeping takes longer than a small layer."""

    @staticmethod
    def forward(ctx, x, weight, bias, n, scaling, dropout, seeds, *adapters):
        arguments = (x, weight, bias, adapters[:n], adapters[n:], scaling, dropout, seeds)
        y, S = plan.forward(*arguments[:5], dropout)(*arguments)
        _keep(ctx, (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[7:]), *arguments, S)
        return y

    @staticmethod
    def backward(ctx, g):
        dx, dA, dB, dW, db = _without_autocast(g, lambda: _all_gradients(ctx, g, _gradients))
        return dx, dW, db, None, None, None, None, *dA, *dB


def _direct(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds, autocast) -> Tensor:
    """y; differentiable."""
    if autocast is not None:
        x, weight = x.to(autocast), weight.to(autocast)
        lora_A, lora_B = _as_autocast(lora_A, autocast), _as_autocast(lora_B, autocast)
    tensors = (x, weight, bias, *lora_A, *lora_B)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _without_autocast(
            x, lambda: _Direct.apply(x, weight, bias, len(lora_A), scaling, dropout, seeds, *lora_A, *lora_B)
        )
    arguments = (x, weight, bias, lora_A, lora_B, scaling, dropout, seeds)
    return _without_autocast(x, lambda: plan.forward(*arguments[:5], dropout)(*arguments)[0])


def _without_autocast(x: Tensor, call: Callable):
    if x.device.type not in _AUTOCAST or not torch.is_autocast_enabled(x.device.type):
        return call()
    with torch.autocast(x.device.type, enabled=False):
        return call()


def _is_direct(*tensors: Tensor) -> bool:
    """Whether these are real tensors, and nothing but autograd looks on."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or any(type(t) is not Tensor and type(t) is not torch.nn.Parameter for t in tensors)
    )


_library = torch.library.Library("fused_lora", "FRAGMENT")
_register_autocast("cuda", "AutocastCUDA")
_register_autocast("cpu", "AutocastCPU")
