"""DoRA adapters in the forward of a LoRA layer: PEFT's loop over the active adapters, with as few roundings as it has.

    c_i = m_i / ||W + s_i B_i A_i||, by rows        the norm has no gradient
    y <- y + s_i D_i(x) A_i^T B_i^T                                     for LoRA
    y <- c_i (y - b + s_i x A_i^T B_i^T) + b                            for DoRA without dropout, as in eval()
    y <- y + (c_i - 1) D_i(x) W^T + c_i s_i D_i(x) A_i^T B_i^T          for DoRA with dropout in training

So the adapters before the first DoRA adapter, and it, are one call of the LoRA operator and a scale of its columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases import base_of
from fused_lora.bases.base import Adapters, Factors
from fused_lora.bases.foreign import why_not_added
from fused_lora.ops.checks import as_float
from fused_lora.ops.dora.op import dropped, scale_columns
from fused_lora.ops.linear.op import _autocast_dtype, _rows, draw_seeds, without_autocast
from fused_lora.ops.term.op import lora_term

_NONE: Mapping[str, Tensor] = MappingProxyType({})


class Magnitude(nn.Module):
    """The magnitude m [N] of one DoRA adapter, trained beside A and B."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


def has_magnitude(layer: Any, names: list[str]) -> bool:
    """Whether one of these adapters is a DoRA adapter."""
    held = layer._modules["lora_magnitude_vector"]._modules
    return len(held) > 0 and any(name in held for name in names)  # torch 2.11 compiles no bool of a dict


def why_not_dora(layer: Any, names: list[str]) -> str | None:
    """Why the DoRA adapters among these run in PEFT's own way; None when they do not."""
    held, base = layer._modules["lora_magnitude_vector"]._modules, layer._modules["base_layer"]
    if why := base_of(base).why_not_dense(base):
        return f"DoRA over this base layer: {why}"
    if any(p is not None and p.requires_grad for name, p in base._parameters.items() if name != "bias"):
        return "DoRA over a base weight that trains"
    N = base_of(base).features(base)[1]
    for name in names:
        magnitude = held[name]._parameters.get("weight") if name in held else None
        if name in held and (type(magnitude) is not nn.Parameter or magnitude.shape != (N,)):
            return "the magnitude is no vector of out_features"
        if name in held and layer._modules["lora_B"]._modules[name]._parameters["bias"] is not None:
            return "DoRA whose lora_B has a bias"  # which PEFT counts in its norms
    return None


def dora_forward(layer: Any, x: Tensor, names: list[str], fused: bool, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's output under these adapters, in the dtype of its base's.

    fused: the base layer and adapters may be one operator; otherwise the base is called, with ``args`` and ``kwargs``.
    """
    base, held = layer._modules["base_layer"], layer._modules["lora_magnitude_vector"]._modules
    first = next(i for i, name in enumerate(names) if name in held)
    rest, bias = names, getattr(base, "bias", None)
    if fused and not _drops(layer, names[first]) and not _rounds_gradients(layer, x, names):
        A, B, s, p, lora_bias, _ = layer._adapters(names[: first + 1])
        y = base_of(base).forward(base, x, Adapters(A, B, s, p, lora_bias, base_bias=False))
        dtype, rest = y.dtype, names[first + 1 :]
        y = scale_columns(y, column_scale(layer, names[first]), bias)
    else:
        y = base(x, *args, **kwargs)
        dtype, adapters = y.dtype, layer._adapters(names)
        if why_not_added(y, x, adapters):
            return composed_forward(layer, y, x, names)
        y = y.to(torch.promote_types(dtype, torch.float32))
    for name in rest:
        y = _add(layer, y, x, name, bias)
    return y.to(dtype)


def _rounds_gradients(layer: Any, x: Tensor, names: list[str]) -> bool:
    """Whether wider adapters would get the gradient of a y in x's dtype: PEFT's get that of the sum, in theirs."""
    cast = _autocast_dtype(x)  # of y, or coarser than it, unless bf16 x over a packed weight meets fp16
    if not torch.is_grad_enabled() or (cast is not None and torch.finfo(x.dtype).eps <= torch.finfo(cast).eps):
        return False
    parts = layer._parts(names)
    factors = [part._parameters["weight"] for part in (*parts[::3], *parts[1::3])]
    if all(t.dtype.itemsize <= x.dtype.itemsize for t in factors):
        return False
    return x.requires_grad or any(t.requires_grad for t in factors)


def _add(layer: Any, y: Tensor, x: Tensor, name: str, bias: Tensor | None) -> Tensor:
    """One more adapter onto y, which is fp32 or wider."""
    A, B, s, p, lora_bias, _ = layer._adapters([name])
    if name not in layer._modules["lora_magnitude_vector"]._modules:
        return lora_term(y, x, A, B, s, p, bias=lora_bias)
    c = column_scale(layer, name)
    if not _drops(layer, name):
        return scale_columns(lora_term(y if bias is None else y - bias, x, A, B, s), c, bias)
    seeds = draw_seeds(1, x.device)
    y = torch.addcmul(y, _base_product(layer, dropped(_rows_to_drop(x, A[0]), seeds, p[0])), c - 1)
    return lora_term(y, x, A, [B[0] * c[:, None]], s, p, seeds=seeds)


def _rows_to_drop(x: Tensor, A: Tensor) -> Tensor:
    """x in the dtype of the product with W: on a GPU PEFT's, the adapters' or that of autocast; on a CPU fp32 or
    wider."""
    wide = torch.promote_types(x.dtype, A.dtype)
    if x.is_cpu:
        return x.to(torch.promote_types(wide, torch.float32))
    return x.to(torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else wide)


def _base_product(layer: Any, x: Tensor) -> Tensor:
    base = layer._modules["base_layer"]
    return base_of(base).product(base, x, layer.fan_in_fan_out)


def column_scale(layer: Any, name: str, called: bool = False) -> Tensor:
    """m / ||W + s B A|| of a DoRA adapter: [N], fp32 or wider, differentiable in m. called: as for the norms."""
    magnitude = layer._modules["lora_magnitude_vector"]._modules[name]._parameters["weight"]
    norms = row_norms(layer, name, called) if called else layer._row_norms(name)
    return magnitude.to(norms.dtype) / norms


def row_norms(layer: Any, name: str, called: bool = False) -> Tensor:
    """||W + s B A|| of the base weight as it is now, which must hold no merge.

    called: B A is what calls of lora_B and lora_A make of an identity, for others may change what they return.
    """
    base, s = layer._modules["base_layer"], layer._scaling(name)
    A_layer, B_layer = layer.lora_A[name], layer.lora_B[name]
    A, B = A_layer.weight, B_layer.weight
    if called:
        with torch.no_grad():
            A = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
            B = B_layer(A_layer(A)).t()
    if isinstance(s, Tensor):
        B, s = B.to(torch.promote_types(B.dtype, torch.float32)) * s, 1.0
    return base_of(base).row_norms(base, A, B, s, layer.fan_in_fan_out)


def composed_forward(
    layer: Any,
    result: Tensor,
    x: Tensor,
    names: list[str],
    rows: Mapping[str, Tensor] = _NONE,
) -> Tensor:
    """PEFT's sequence of module calls after that of the base layer, whose output is ``result``.

    rows: of those adapters that change some rows only, their numbers.
    """
    dtype, held = result.dtype, layer._modules["lora_magnitude_vector"]._modules
    bias = getattr(layer._modules["base_layer"], "bias", None)
    for name in names:
        A, B, drop, s = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer._scaling(name)
        if getattr(layer, "cast_input_dtype_enabled", True):  # PEFT's switch
            x = x.to(A.weight.dtype)
        if name in rows:
            here, flat = rows[name], _rows(result)
            term = B(A(drop(_rows(x)[here]))) * s
            with without_autocast(flat):  # as for lora_term_on_rows
                result = flat.index_copy(0, here, (flat[here] + term).to(flat.dtype)).reshape(result.shape)
            continue
        kept = drop(x) if name not in held or _drops(layer, name) else x
        term = B(A(kept)) * s
        if name in held:
            c = column_scale(layer, name, called=layer._why_not_plain([name]) is not None)
            own = _base_product(layer, kept) if _drops(layer, name) else result if bias is None else result - bias
            term = (c - 1) * own + c * term
        result = result + term
    return result.to(dtype)


def _drops(layer: Any, name: str) -> bool:
    """Whether PEFT computes the base product of the dropped input: in training, with a dropout that is not 0."""
    return layer.training and not isinstance(layer._modules["lora_dropout"]._modules[name], nn.Identity)


def factors(layer: Any, names: list[str], onto: Factors | None = None) -> Factors:
    """What a merge of these adapters, in this order, does to the base weight, which holds none of them.

    onto: what was merged before. A DoRA adapter scales the rows of all of it: W <- c (W + s B A).

    Raises RuntimeError for an aLoRA adapter.
    """
    if activated := layer._activated(names):
        raise RuntimeError(
            f"adapters {activated} are aLoRA: rows before an invocation are the base's, no weight has that"
        )
    lora_A, lora_B, scaling, rows, seed = ([], [], [], None, None) if onto is None else (list(onto[0]), *onto[1:])
    seed = seed if layer.rounding_seed is None else layer.rounding_seed
    scaling = list(scaling)
    parts, held = layer._parts(names), layer._modules["lora_magnitude_vector"]._modules
    for name, A, B in zip(names, parts[::3], parts[1::3], strict=True):
        lora_A, lora_B = [*lora_A, A.weight], [*lora_B, B.weight]
        scaling.append(as_float("scaling", layer.scaling[name]))
        if name in held:
            with torch.no_grad():
                norms = layer._row_norms(name)
                c = held[name].weight.to(norms.dtype) / norms
                lora_B = [c[:, None] * part for part in lora_B]
            rows = c if rows is None else c * rows
            layer._note_norms(name, norms)
    return Factors(lora_A, lora_B, scaling, rows, seed)
