"""Argument checks shared by the operators: what came, what was expected, before anything is computed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST = torch.finfo(torch.float32).max


def check_lists(kind: type = Sized, **lists: Any) -> None:
    """Raise TypeError for what is not of this ``kind`` of list."""
    for name, value in lists.items():
        if not isinstance(value, kind) or isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: expected a list with an entry for each adapter, got {value!r:.100}")


def as_numbers(name: str, numbers: Any) -> Sequence[float]:
    """As floats; TypeError for what is no list of numbers. A tensor is refused, too: no gradient would reach it."""
    check_lists(**{name: numbers})
    if torch.compiler.is_compiling():  # a graph's numbers have no type to ask; the operator's schema refuses others
        return numbers
    for number in numbers:
        if isinstance(number, (torch.Tensor, np.ndarray)) or not hasattr(number, "__float__"):
            raise TypeError(f"{name}: expected a number for each adapter, got {number!r:.100}")
    return [as_float(name, number) for number in numbers]


def check_linear(
    x: torch.Tensor,
    weight: Any,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None,
    autocast: torch.dtype | None = None,
) -> None:
    """Raise ValueError (shapes, values) or TypeError (dtypes) when the arguments of a LoRA linear do not fit.

    weight: a tensor, or a packed weight with ``shape``, ``dtype`` and ``dim()``. seeds: None for seeds that are still
    to be drawn. autocast: the dtype that x and weight are about to be cast to, if any; they may then differ.
    """
    if not (isinstance(weight, torch.Tensor) or hasattr(weight, "dim")):  # Dynamo of torch 2.8 finds none in a tensor
        raise TypeError(f"weight: expected a tensor or a packed weight, got {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [out_features, in_features], got shape {tuple(weight.shape)}")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x: expected [..., {K}] to fit weight {tuple(weight.shape)}, got shape {tuple(x.shape)}")
    differ = weight.dtype != x.dtype and (autocast is None or weight.dtype not in FLOAT_DTYPES)
    if x.dtype not in FLOAT_DTYPES or differ:
        raise TypeError(f"x, weight: expected one floating dtype for both, got {x.dtype} and {weight.dtype}")
    _check_bias(bias, N)
    _check_adapters(x, K, N, lora_A, lora_B, scaling, dropout, seeds, weight=weight, bias=bias)


def check_term(
    y: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: Sequence[torch.Tensor],
    lora_B: Sequence[torch.Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seeds: torch.Tensor | None,
) -> None:
    """The same for a LoRA term onto y: ValueError (shapes, values), TypeError (dtypes), NotImplementedError."""
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        refuse_tangents("lora_term", y, x, *lora_A, *lora_B)
    for name, tensor in (("y", y), ("x", x)):
        if tensor.dim() < 1:
            raise ValueError(f"{name}: expected at least one dimension, got shape ()")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y: expected the rows of x {tuple(x.shape)}, got shape {tuple(y.shape)}")
    K, N = x.shape[-1], y.shape[-1]
    _check_bias(bias, N)
    _check_adapters(x, K, N, lora_A, lora_B, scaling, dropout, seeds, y=y, bias=bias)


def _check_bias(bias: torch.Tensor | None, N: int) -> None:
    if bias is None:
        return
    if not isinstance(bias, torch.Tensor):
        raise TypeError(f"bias: expected a floating tensor [{N}], got {type(bias).__name__}")
    if tuple(bias.shape) != (N,) or bias.dtype not in FLOAT_DTYPES:
        raise ValueError(f"bias: expected a floating tensor [{N}], got {bias.dtype} {tuple(bias.shape)}")


def has_strides(tensor: torch.Tensor) -> bool:
    """Whether this is neither a sparse nor a nested tensor."""
    return tensor.layout is torch.strided and not tensor.is_nested


def refuse_sparse(**tensors: Any) -> None:
    """Raise TypeError for a tensor, or one in a list, that has no strides."""
    for name, given in tensors.items():
        for tensor in given if isinstance(given, Sequence) else (given,):
            if isinstance(tensor, torch.Tensor) and not has_strides(tensor):
                kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
                raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def in_order(seeds: torch.Tensor) -> torch.Tensor:
    """The seeds one after another, as kernels read them.

    Raises:
        TypeError: seeds is no dense tensor.
    """
    if not isinstance(seeds, torch.Tensor):
        raise TypeError(f"seeds: expected an int64 tensor, got {type(seeds).__name__}")
    refuse_sparse(seeds=seeds)
    return seeds.contiguous()


def is_scaling(s: Any) -> bool:
    """Whether the products take this number: it is infinite or in the range of float32."""
    return abs(s) <= _MOST or abs(s) == math.inf


def as_scaling(s: Any) -> float:
    """Read on the host; ValueError where the products do not take it."""
    value = as_float("scaling", s)
    if not is_scaling(value):
        raise ValueError(f"scaling: expected numbers that float32 can hold, got {s}")
    return value


def is_known(s: torch.Tensor) -> bool:
    """Whether a number in a tensor can be read without a wait for a device, and without a trace that loses it."""
    plain = type(s) in (torch.Tensor, torch.nn.Parameter) and s.is_cpu
    return plain and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def as_float(name: str, number: Any) -> float:
    """ValueError where Python raises OverflowError: an int may be larger than any float. TypeError: no number."""
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name}: expected numbers that float32 can hold, got one that float64 cannot") from None
    except (TypeError, ValueError, RuntimeError) as error:  # torch's, of a tensor of several
        raise TypeError(f"{name}: expected a number, got {number!r:.100}") from error


def _check_adapters(x, K, N, lora_A, lora_B, scaling, dropout, seeds, **others: torch.Tensor | None) -> None:
    """``others``: what must be on x's device, too."""
    counts = {len(lora_A), len(lora_B), len(scaling), len(dropout)}
    if len(counts) != 1:
        raise ValueError(
            "lora_A, lora_B, scaling, dropout: expected one entry per adapter in each, got "
            f"{len(lora_A)}, {len(lora_B)}, {len(scaling)} and {len(dropout)}"
        )
    device, elsewhere = x.device, False
    for i, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        if not (isinstance(A, torch.Tensor) and isinstance(B, torch.Tensor)):
            got = f"{type(A).__name__} and {type(B).__name__}"
            raise TypeError(f"adapter {i}: expected tensors lora_A and lora_B, got {got}")
        a, b = A.shape, B.shape
        if len(a) != 2 or a[1] != K or len(b) != 2 or b[0] != N or a[0] != b[1]:
            raise ValueError(
                f"adapter {i}: expected lora_A [r, {K}] and lora_B [{N}, r], got {tuple(A.shape)} and {tuple(B.shape)}"
            )
        if A.dtype not in FLOAT_DTYPES or B.dtype not in FLOAT_DTYPES:
            raise TypeError(f"adapter {i}: expected floating lora_A and lora_B, got {A.dtype} and {B.dtype}")
        elsewhere = elsewhere or A.device != device or B.device != device
    for p in dropout:
        if not (0.0 <= p <= 1.0):
            raise ValueError(f"dropout: expected values in [0, 1], got {p}")
    for s in scaling:
        if not is_scaling(s):
            raise ValueError(f"scaling: expected numbers that float32 can hold, got {s}")
    if any(dropout) and seeds is not None and (seeds.dtype != torch.int64 or tuple(seeds.shape) != (len(dropout),)):
        got = seeds.dtype, tuple(seeds.shape)
        raise ValueError(f"seeds: expected int64 [{len(dropout)}] because dropout is not 0, got {got}")
    others["seeds"] = seeds
    if elsewhere or any(t is not None and t.device != device for t in others.values()):
        named = list(others.items())
        for i, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
            named += [(f"lora_A[{i}]", A), (f"lora_B[{i}]", B)]
        name, found = next((name, t.device) for name, t in named if t is not None and t.device != device)
        raise ValueError(f"{name}: expected device {device} like x, got {found}")


def refuse_tangents(name: str, *tensors: torch.Tensor) -> None:
    """Raise NotImplementedError for a tensor under forward-mode differentiation."""
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        # nothing carries a tangent through the operator: torch.func.jvp would read zeros
        raise NotImplementedError(f"{name} has no forward-mode derivative (torch.func.jvp, forward_ad)")


def refuse_transforms(name: str) -> None:
    """Raise NotImplementedError inside vmap, grad and other transforms of torch.func, for which there are no rules."""
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name} does not run inside torch.func transforms (vmap, grad, jacrev, ...); a LoraLinear layer does, and "
            "so does fused_lora.reference"
        )


def warn_of_redraws() -> None:
    """Warn where torch.compile may draw a forward's seeds again in its backward; no operator can forbid it."""
    from torch._functorch import config

    for name, safe in (("activation_memory_budget", 1), ("aggressive_recomputation", False)):
        if (found := getattr(config, name, safe)) != safe:
            warnings.warn(
                f"torch._functorch.config.{name} = {found} with dropout: torch.compile may draw seeds again in the "
                f"backward, and gradients are of another mask then. Set it to {safe}, or the dropout to 0",
                stacklevel=2,
            )


# as torch.compiler.assume_constant_result, which takes a second: it imports Dynamo
setattr(warn_of_redraws, "_dynamo_marked_constant", True)  # noqa: B010 - unknown to pyright


def is_dense(tensor: Any) -> bool:
    """Whether this is a tensor whose memory, read by its strides, holds its numbers."""
    dense = isinstance(tensor, torch.Tensor) and has_strides(tensor)
    return dense and not (tensor.is_meta or tensor.is_neg())


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a strided tensor's first byte and of the byte behind its last."""
    begin, size = tensor.data_ptr(), tensor.element_size()
    if tensor.is_contiguous():
        return begin, begin + tensor.numel() * size
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * size if tensor.numel() else begin


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether numbers of a strided tensor may share memory, as those of an expanded one, or of windows that slide."""
    last = 0  # place of the last number of the dimensions so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= last:
            return tensor.numel() > 0
        last += stride * max(size - 1, 0)
    return False


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two strided tensors have a byte of memory in common. Takes as much memory as both span."""
    (first, end), (other, stop) = span_of(a), span_of(b)
    if first >= stop or other >= end:
        return False
    first = min(first, other)
    taken = torch.zeros(max(end, stop) - first, dtype=torch.bool, device="cpu")

    def of(t: torch.Tensor) -> torch.Tensor:
        size, strides = t.element_size(), t.stride()
        shape = (n if stride else 1 for n, stride in zip(t.shape, strides, strict=True))  # an expanded one is written
        return taken.as_strided((*shape, size), (*(size * n for n in strides), 1), t.data_ptr() - first)

    of(a).fill_(True)
    return bool(of(b).any())
