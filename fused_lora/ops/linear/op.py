"""The LoRA linear as torch operators: y = x W^T + b + sum_i s_i D_i(x) A_i^T B_i^T, its gradients, and autocast.

    fused_lora::lora_linear            -> (y [M, N], S [M, sum r_i]), x [M, K]
    fused_lora::lora_linear_backward   -> the gradients that are needed, in the order x, lora_A, lora_B, weight, bias

Saved for the backward: x itself (shared with whoever else holds it), S and the seeds. No mask, no dropped copy of x.
The maths and the mask are those of ``fused_lora.reference``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_lora.ops import guard
from fused_lora.ops.alike import Alike, modes
from fused_lora.ops.checks import (
    FLOAT_DTYPES,
    as_numbers,
    check_linear,
    check_lists,
    has_strides,
    in_order,
    refuse_sparse,
    refuse_tangents,
    refuse_transforms,
    warn_of_redraws,
)
from fused_lora.ops.linear import double_backward, flops, plan
from fused_lora.ops.linear import eager as cpu


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
        weight: [N, K], dtype of x. bias: [N], any floating dtype, or None; a library's product takes it in x's dtype.
        lora_A: [r_i, K] each; lora_B: [N, r_i] each; any floating dtype (fp32 adapters over a 16-bit base are used
            in fp32, without an fp32 copy of x on the kernel path).
        scaling: one float per adapter.
        dropout: one probability per adapter (default: 0 everywhere). It acts in units of 2^-16.
        seeds: int64 [adapters] on x's device; drawn from torch's default generator when a dropout is not 0 and none
            are given. ``fused_lora.dropout_mask(seed, x.shape, p)`` is the mask that a seed stands for.

    Returns:
        y [..., N] in x's dtype (under autocast: in the autocast dtype).

    Raises:
        ValueError: shapes, devices, dropout or scaling do not fit. TypeError: x is no tensor, one is not dense, or
            dtypes do not fit.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    check_lists(lora_A=lora_A, lora_B=lora_B)
    scaling = as_numbers("scaling", scaling)
    dropout = [0.0] * len(lora_A) if dropout is None else as_numbers("dropout", dropout)
    seeds = None if seeds is None else in_order(seeds)
    if not lora_A:
        refuse_sparse(x=x, weight=weight, bias=bias)
        check_linear(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds, _autocast_dtype(x))
        return torch.nn.functional.linear(x, weight, bias if bias is None else bias.to(x.dtype))
    if not is_direct(x, weight, *lora_A, *lora_B, *(() if bias is None else (bias,))):
        refuse_sparse(x=x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B)
        refuse_transforms("lora_linear")
        return _by_dispatcher(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds)
    if forward_ad._current_level >= 0:
        refuse_tangents("lora_linear", x, weight, *lora_A, *lora_B)
    if _autocasts(x):
        return _under_autocast(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds)
    return _direct(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds)


def is_direct(*tensors: Tensor) -> bool:
    """Whether these are torch's own tensors, whose memory is their values, and nothing but autograd looks on."""
    if torch.compiler.is_compiling() or _stack() or _transforms() or _is_tracing():
        return False
    for tensor in tensors:
        if type(tensor) not in PLAIN or _is_wrapped(tensor) or tensor.is_neg() or not has_strides(tensor):
            return False
    return True


def keeps_inference(tensors: Sequence[Tensor], others: Iterable[Tensor | None]) -> bool:
    """Whether a backward may have to keep one of these, which was made in inference mode; torch refuses that.

    others: further tensors of the call, which may want a gradient; None for one that it lacks.
    """
    if not torch.is_grad_enabled() or not any(t.is_inference() for t in tensors):
        return False
    return any(t is not None and t.requires_grad for t in (*tensors, *others))


def _direct(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds, rounded=None) -> Tensor:
    """The operator past the dispatcher, whose bookkeeping takes longer than a small layer.

    rounded: as of :func:`plan.forward`.
    """
    run = plan.forward(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds, rounded)
    return _run(run, x, weight, bias, lora_A, lora_B, seeds)


def _run(run, x, weight, bias, lora_A, lora_B, seeds) -> Tensor:
    if run.masked and seeds is None:
        seeds = draw_seeds(len(lora_A), x.device)
    if run.grad and torch.is_grad_enabled():
        free = () if run.frozen else (weight, bias)
        found = _apply((run, x, weight, bias, lora_A, lora_B, seeds), x, *lora_A, *lora_B, *free)
        return found if run.keeps_x else found[0]
    return run(x, weight, bias, lora_A, lora_B, seeds)[0]


class Memory:
    """What :func:`lora_linear` runs for the tensors of one layer, so that the next call with such tensors asks nothing.

    Only the rows of x (see :mod:`fused_lora.ops.alike`) and the scalings may differ.
    """

    __slots__ = ("_by_numbers", "_kept")

    def __init__(self):
        self._by_numbers, self._kept = {}, plan.kept

    def __reduce__(self):  # copies and files of a layer hold None instead
        return type(None), ()

    def find(self, x: Tensor, operands: tuple) -> tuple[torch.dtype | None, dict, torch.dtype | None] | None:
        """The autocast dtype; what such calls run by layouts of x and scalings, perhaps nothing yet; and what adapters
        round to.

        operands: all that the call depends on besides tensors and scalings; a tensor that stands for a packed weight;
        weight, bias, lora_A, lora_B, scaling and dropout. None when no such call was learnt.
        """
        key, seen, _, bias, lora_A, lora_B, _, _ = operands
        alike = self._by_numbers.get(key)
        if alike is None or self._kept is not plan.kept:  # all plans are made anew
            return None
        tensors = (x, seen, *lora_A, *lora_B) if bias is None else (x, seen, *lora_A, *lora_B, bias)
        for same, answer in alike.entries:  # as Alike.find, written out
            if same(*tensors) and not modes():
                return answer
        return None

    def learn(self, x: Tensor, operands: tuple) -> None:
        """Of a call that has passed, where nobody but autograd looks on."""
        key, seen, weight, bias, lora_A, lora_B, _, _ = operands
        dtype = _autocast_dtype(x)
        if dtype is None and _autocasts(x):
            return  # float64 stays as it is
        tensors: Any = x, *lora_A, *lora_B, *(() if bias is None else (bias,))
        if not is_direct(*tensors, *((weight,) if seen is weight else ())):
            return
        tensors = x, seen, *tensors[1:]
        if self._kept is not plan.kept or len(self._by_numbers) > _NUMBERS:
            self._by_numbers, self._kept = {}, plan.kept
        alike = self._by_numbers.setdefault(key, Alike())
        rounded = None if dtype is None else _of_autocast(lora_A, lora_B, dtype)[2]
        alike.keep((dtype, {}, rounded), tensors, any_rows=True)


def recalled(known: tuple, x: Tensor, operands: tuple) -> Tensor | None:
    """The result, differentiable, of a call for which :meth:`Memory.find` has found ``known``.

    None when autocast is to another dtype now, and for inference tensors that a backward would have to keep.
    """
    (dtype, runs, rounded), (key, seen, weight, bias, lora_A, lora_B, scaling, dropout) = known, operands
    if dtype is not None:
        kind = x.device.type
        if torch.get_autocast_dtype(kind) is not dtype:
            return None
        dense, kernels = seen is weight, kind == guard.DEVICE
        inside = _to(x, dtype) if dense or kernels else x
        weight = _to(weight, dtype) if dense else weight
        if rounded is None and (kernels or kind != "cpu"):
            lora_A, lora_B = [_to(A, dtype) for A in lora_A], [_to(B, dtype) for B in lora_B]
        torch.set_autocast_enabled(kind, False)  # in an eighth of the time that its context manager takes
        try:
            y = recalled((None, runs, rounded), inside, (key, seen, weight, bias, lora_A, lora_B, scaling, dropout))
            return y if dense or y is None else y.to(x.dtype)
        finally:
            torch.set_autocast_enabled(kind, True)
    # what autocast has rounded wants a gradient only where gradients are recorded
    layout = x.shape, x.stride(), (x.data_ptr() | weight.data_ptr()) % 16, torch.is_grad_enabled()
    by_scaling, numbers = runs.get(layout), tuple(scaling)
    run = None if by_scaling is None else by_scaling.get(numbers)
    if run is None:
        if keeps_inference((x, *lora_A, *lora_B), (weight, bias)):
            return None
        if by_scaling is None or len(by_scaling) >= _NUMBERS:  # which a schedule may change in every call
            if len(runs) >= _RUNS:
                runs.clear()
            by_scaling = runs[layout] = {}
        run = by_scaling[numbers] = plan.forward(x, weight, bias, lora_A, lora_B, scaling, dropout, None, rounded)
    return _run(run, x, weight, bias, lora_A, lora_B, None)


def _under_autocast(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds) -> Tensor:
    dtype, rounded = _autocast_dtype(x), None
    check_linear(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds, dtype)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        lora_A, lora_B, rounded = _of_autocast(lora_A, lora_B, dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _direct(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds, rounded)


def _by_dispatcher(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds) -> Tensor:
    """For whoever looks on: torch.compile, subclasses of tensors, dispatch modes, transforms."""
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        refuse_tangents("lora_linear", x, weight, *lora_A, *lora_B)
    check_linear(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds, _autocast_dtype(x))
    if seeds is None and any(dropout):
        seeds = draw_seeds(len(dropout), x.device)
    # reshaped out here: the operator's own result is no view, so that it may be changed in place
    y, _ = _lora_linear(_rows(x), weight, bias, list(lora_A), list(lora_B), list(scaling), list(dropout), seeds)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def _rows(tensor: Tensor) -> Tensor:
    """[M, columns], the leading dimensions in one."""
    shape = tensor.shape
    return tensor if len(shape) == 2 else tensor.reshape(shape[:-1].numel(), shape[-1])


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """int64 [count] from torch's default generator of the device: what makes a run and a recomputation reproducible."""
    if torch.compiler.is_compiling():
        warn_of_redraws()
    return torch.randint(2**63 - 1, (count,), dtype=torch.int64, device=device)


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
    run = plan.forward(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds)
    return run(x, weight, bias, lora_A, lora_B, seeds)


@_lora_linear.register_fake
def _(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds):
    y = x.new_empty((x.shape[0], weight.shape[0]))
    return y, x.new_empty((x.shape[0], sum(A.shape[0] for A in lora_A)), dtype=cpu.shrink_dtype(x, lora_A))


def _gradients(alike, dtype, rounded, g, x, weight, lora_A, lora_B, S, scaling, dropout, seeds, bias_dtype, needs):
    """dx, dA, dB, dW, db with None for what is not needed; ``needs`` as for :func:`_keep`.

    alike: of the :class:`plan.Forward` that this is the backward of, None for another's. weight: None for the gradients
    of a LoRA term. dtype: x's, where it is not that of g. rounded: as of :func:`plan.forward`.
    """
    n = len(lora_A)
    if not isinstance(weight, Tensor) and weight is not None and g.device.type == guard.DEVICE:
        weight = weight.to(g.dtype)
    rows = g.new_empty((g.shape[0], lora_A[0].shape[1]), dtype=dtype) if x is None else x
    run = None
    if alike is not None and alike.entries and (g.data_ptr() | rows.data_ptr()) % 16 == 0:
        run = alike.find(g, rows, weight, *lora_A, *lora_B)
    if run is None:
        run = plan.backward(g, rows, weight, lora_A, lora_B, scaling, dropout, tuple(needs), alike, rounded)
    wanted = needs[0], needs[1 : n + 1], needs[n + 1 : -2], *needs[-2:]
    found = run(g, rows, weight, lora_A, lora_B, S, scaling, dropout, seeds, *wanted)
    return found if found[-1] is None else (*found[:-1], found[-1].to(bias_dtype))


@torch.library.custom_op("fused_lora::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
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
    arguments = g, x, weight, lora_A, lora_B, S, scaling, dropout, seeds, bias_dtype, needs
    dx, dA, dB, dW, db = _gradients(None, None, None, *arguments)
    return [t for t in (dx, *dA, *dB, dW, db) if t is not None]


@_lora_linear_backward.register_fake
def _(g, x, weight, lora_A, lora_B, S, scaling, dropout, seeds, bias_dtype, needs):
    bias = None if bias_dtype is None else weight.new_empty((weight.shape[0],), dtype=bias_dtype)
    shapes = [g.new_empty((g.shape[0], weight.shape[1])), *lora_A, *lora_B, weight, bias]
    return [t.new_empty(t.shape) for t, need in zip(shapes, needs, strict=True) if need]


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    need_x, need_weight, need_bias, *rest = ctx.needs_input_grad
    x, weight, bias, lora_A, lora_B, scaling, dropout, seeds = inputs
    needs = need_x, *rest[: 2 * len(lora_A)], need_weight, need_bias
    call = len(lora_A), scaling, dropout, None if bias is None else bias.dtype, needs
    kept = x if plan.keeps_x(len(lora_A), needs) else None
    _keep(ctx, call, kept, weight, lora_A, lora_B, seeds, output[1])


def _keep(ctx, call, x, weight, lora_A, lora_B, seeds, S) -> None:
    """For the backward; ``call`` ends with one flag per tensor: x, n times lora_A, n times lora_B, weight, bias.

    x: None where :func:`plan.keeps_x` says so. weight: None of a LoRA term.
    """
    n, needs = call[0], call[-1]
    ctx.call, ctx.materialize_grads = call, False
    dense = isinstance(weight, Tensor)  # else packed
    transposed = ctx.transposed = dense and _is_transposed(weight)
    if transposed:
        weight = weight._base
    if needs[0]:
        ctx.idle = None if dense else (weight, None, None)
        ctx.save_for_backward(x, weight if dense else None, S, seeds, *lora_A, *lora_B)
    else:  # W, A and unused B have a shape to give only: what is saved must not change, and hooks may copy it
        ctx.idle = weight, tuple(lora_A), tuple(lora_B)
        used = [B if need else None for B, need in zip(lora_B, needs[1 : n + 1], strict=True)]
        ctx.save_for_backward(x, None, S, seeds, *[None] * n, *used)


def _is_transposed(weight: Tensor) -> bool:
    """Whether this is a frozen parameter's ``t()``. DeepSpeed ZeRO-3 gives a parameter other memory in the backward: a
    view that is kept would hold that of the forward."""
    base = weight._base
    if type(base) is not torch.nn.Parameter or base.requires_grad or base.dim() != 2 or weight.is_neg():
        return False
    place, turned = weight.storage_offset(), weight.stride()[::-1]
    return (weight.shape, turned, place) == (base.shape[::-1], base.stride(), base.storage_offset())


def _backward(ctx, g, _):
    n = ctx.call[0]
    if g is None:
        return (None, None, None, [None] * n, [None] * n, None, None, None)
    dx, dA, dB, dW, db = _all_gradients(ctx, g, None, partial(_by_operator, _lora_linear_backward))
    return dx, dW, db, dA, dB, None, None, None


def _by_operator(operator, *arguments):
    """The arguments and the results of :func:`_gradients`, by an operator that returns what is needed alone."""
    n, needs = len(arguments[3]), arguments[-1]
    found = iter(operator(*arguments))
    dx, *rest, dW, db = (next(found) if need else None for need in needs)
    return dx, rest[:n], rest[n:], dW, db


def _all_gradients(ctx, g, g_S, compute, dtype: torch.dtype | None = None, rounded: torch.dtype | None = None):
    """dx, dA, dB, dW, db with None for what is not needed, by ``compute`` where nobody follows its operations.

    g_S: gradient of S, which second derivatives have; either of g and g_S may be None. dtype, rounded: as of
    :class:`plan.Forward`.
    """
    n, scaling, dropout, bias_dtype, needs = ctx.call
    x, weight, S, seeds, *adapters = ctx.saved_tensors
    A, B = adapters[:n], adapters[n:]
    if ctx.idle is not None:
        weight, all_A, all_B = ctx.idle
        if all_A is not None:
            A, B = all_A, [B if saved is None else saved for B, saved in zip(all_B, B, strict=True)]
    if ctx.transposed:
        weight = weight.t()
    if x is not None and x.dim() != 2:
        x = x.reshape(S.shape[0], x.shape[-1])
    if g_S is None and not (torch.is_grad_enabled() or is_batched(g)):
        if g.is_neg():  # a kernel would not see the sign
            g = g.resolve_neg()
        return compute(g, x, weight, A, B, S, scaling, dropout, seeds, bias_dtype, needs)
    # create_graph, or a batch of gradients
    if rounded is not None:
        A, B = plan.as_rounded(A, rounded), plan.as_rounded(B, rounded)
    with torch.autocast(S.device.type, enabled=False):
        found = double_backward.lora_linear_backward(
            g, g_S, x, weight, A, B, S, scaling, dropout, seeds, bias_dtype, needs, dtype
        )
    dx, *rest, dW, db = found
    return dx, rest[:n], rest[n:], dW, db


_lora_linear.register_autograd(_backward, setup_context=_setup_context)
flops.register()


def _autocasts(x: Tensor) -> bool:
    if x.is_cpu or x.is_cuda:  # the question below takes as long as this one
        return torch.is_autocast_enabled("cpu" if x.is_cpu else "cuda")
    kind = x.device.type  # torch refuses the question for devices that have none, as meta
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> Any:
    """A context without autocast on x's device; entering one of torch's takes as long as a small product."""
    return torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext()


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) and x.dtype != torch.float64 else None


def _as_autocast(adapters: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Rounded as eager rounds them, for 16-bit products on tensor cores; a CPU computes in fp32 and keeps them."""
    return [t.to(dtype) if t.device.type == guard.DEVICE or not t.is_cpu else t for t in adapters]


def _of_autocast(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], dtype: torch.dtype) -> tuple:
    """The same without copies of fp32 ones, which the launches round themselves; what they round to comes third."""
    adapters = *lora_A, *lora_B
    if dtype.itemsize == 2 and all(t.device.type == guard.DEVICE and t.dtype is torch.float32 for t in adapters):
        return lora_A, lora_B, dtype
    return _as_autocast(lora_A, dtype), _as_autocast(lora_B, dtype), None


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # as tensor.to(dtype), which takes 0.7 us where nothing is to be done, and else a third more than these
    return tensor if tensor.dtype is dtype else _CASTS[dtype](tensor)


def _cast(x, weight, bias, lora_A, lora_B, *others):
    """Under autocast x and W take its dtype, as in F.linear, and but for a CPU the adapters; their gradients keep
    theirs."""
    dtype = _autocast_dtype(x)
    if dtype is None:
        return x, weight, bias, lora_A, lora_B, *others
    return x.to(dtype), weight.to(dtype), bias, _as_autocast(lora_A, dtype), _as_autocast(lora_B, dtype), *others


def _register_autocast(name: str, forward, backward, cast) -> None:
    """``cast`` the arguments of an operator of this package under autocast, and run it and its backward without."""

    def outside(operator, cast):
        def call(*arguments):
            arguments = cast(*arguments)
            with torch.autocast(arguments[0].device.type, enabled=False):
                return operator(*arguments)

        return call

    for kind in ("CUDA", "CPU", "MPS", "XPU", "HPU", "PrivateUse1"):
        _library.impl(name, outside(forward, cast), f"Autocast{kind}")
        _library.impl(f"{name}_backward", outside(backward, lambda *arguments: arguments), f"Autocast{kind}")


def _outside_autocast(backward):
    """The backward of an operator with the results y and S: nothing where neither has a gradient, and no autocast."""

    def inner(ctx, g, g_S=None):
        some = g_S if g is None else g
        if some is None:
            return (None,) * len(ctx.needs_input_grad)
        if not _autocasts(some):
            return backward(ctx, g, g_S)
        with torch.autocast(some.device.type, enabled=False):
            return backward(ctx, g, g_S)

    return inner


class _Direct(torch.autograd.Function):
    """What :func:`_direct` does, differentiable; x of any number of dimensions.

    Where x is not kept, S is a result, so that second derivatives reach x and A through it.
    """

    @staticmethod
    def forward(ctx, call, *_):
        run, x, weight, bias, A, B, seeds = call
        y, S = run.compute(x, weight, bias, A, B, run.call[1], run.call[2], seeds)
        _keep(ctx, run.call, x if run.keeps_x else None, weight, A, B, seeds, S)
        ctx.run = run
        return y if run.keeps_x else (y, S)

    @staticmethod
    @_outside_autocast
    def backward(ctx, g, g_S=None):
        run = ctx.run
        rows = run.rows
        if g is not None and rows is not None:
            g = g.reshape(rows[0], g.shape[-1])
        compute = partial(_gradients, run.alike, None, run.rounded)
        dx, dA, dB, dW, db = _all_gradients(ctx, g, g_S, compute, run.dtype, run.rounded)
        if dx is not None and rows is not None:
            dx = dx.reshape(*run.shape[:-1], rows[1])
        return (None, dx, *dA, *dB) if run.frozen else (None, dx, *dA, *dB, dW, db)


def is_batched(g: Tensor) -> bool:
    """Whether g stands for many gradients: under torch.func.vmap, or ``is_grads_batched`` of torch.autograd.grad."""
    return _transforms() or torch._C._functorch.is_legacy_batchedtensor(g)


# past a wrapper that looks through the arguments for leftovers of torch.func, as is_direct has done
_apply = super(torch.autograd.Function, _Direct).apply
_stack, _transforms = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active
PLAIN = (Tensor, torch.nn.Parameter)  # subclasses bring their own arithmetic
_CASTS = dict(zip(FLOAT_DTYPES, (Tensor.double, Tensor.float, Tensor.bfloat16, Tensor.half), strict=True))
_RUNS, _NUMBERS = 256, 8  # of a layer: numbers of rows; scalings, and dropouts of sets of active adapters
_is_tracing = torch._C._is_tracing
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_library = torch.library.Library("fused_lora", "FRAGMENT")
_register_autocast("lora_linear", _lora_linear, _lora_linear_backward, _cast)
