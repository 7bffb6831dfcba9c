"""A dense model out of a quantised one: each quantised layer becomes an nn.Linear with dequant(W) + its adapters."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases import base_of
from fused_lora.bases.base import Factors
from fused_lora.bases.foreign import has_packed_weight
from fused_lora.bases.requantised import rounded_bias
from fused_lora.bases.torchao import is_of_torchao
from fused_lora.modules.mixin import FusedLoraBehaviour
from fused_lora.modules.names import some
from fused_lora.modules.tree import named_modules, places
from fused_lora.modules.variants import has_magnitude
from fused_lora.ops.checks import FLOAT_DTYPES

DENSE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# what transformers notes on a quantised model, and on its config
_ON_MODELS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
_ON_CONFIGS = ("quantization_config", "_pre_quantization_dtype")

Parts = dict[nn.Module, tuple[Tensor, Tensor | None]]  # a quantised module: the weight [N, K] and bias [N] to come


def dense_parts(model: nn.Module, merge_adapters: bool, dtype: torch.dtype | None) -> Parts:
    """What each quantised layer of ``model`` will hold, with its active adapters added; none where dtype is None.

    Nothing is changed.

    Raises:
        TypeError: dtype is no torch.dtype.
        ValueError: dtype is none of the three or given without ``merge_adapters``, the model has no quantised layer,
            or a number would not be finite.
        RuntimeError: a layer is quantised in an unknown way, is merged already, stands in several places, or has an
            adapter that is no plain LoRA or belongs to PEFT alone. The message begins with its path.
    """
    if dtype is None:
        return {}
    if not merge_adapters:
        raise ValueError(f"dtype: expected None without merge_adapters=True, got {dtype}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r:.100}")
    if dtype not in DENSE_DTYPES:
        raise ValueError(f"dtype: expected one of {DENSE_DTYPES}, got {dtype}")
    modules = dict(named_modules(model))
    layers = {id(base): m for m in modules.values() if (base := lora_base(m)) is not None}
    held = Counter(id(module) for _, _, module in places(model))
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        layer, path = layers.get(id(module)), path.removesuffix(".base_layer")
        if why := _why_not_dense(module, layer):
            raise RuntimeError(f"{path}: {why}")
        if id(module) in layers and held[id(module)] > 1:
            raise RuntimeError(
                f"{path}: the layer stands in {held[id(module)]} places; a merge would change all of them"
            )
        if base_of(module).bits:
            found[path] = module
    if not found:
        raise ValueError(f"dtype: expected a model with quantised layers, found none: leave it out, got {dtype}")
    parts: Parts = {}
    for path, module in found.items():
        try:
            parts[module] = _parts_of(module, layers.get(id(module)), dtype)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"{path}: {error}; nothing was merged") from error
    return parts


def become_dense(model: nn.Module, parts: Parts) -> None:
    """Make the modules nn.Linear, in place of their LoRA layers, inside an ``undone_on_error`` of the caller."""
    adapted = [place for place in places(model) if lora_base(place[2]) in parts]
    for path, parent, layer in adapted:
        setattr(parent, path.rpartition(".")[2], layer.base_layer)
    for module, (weight, bias) in parts.items():
        base_of(module).become_linear(module, weight, bias)


def warn_of_other_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    """Warn where a dense layer has another dtype than the layers that were quantised: they do not cast their inputs."""
    others = {f"{name}: {p.dtype}" for name, p in model.named_parameters() if p.dtype is not dtype}
    if others:
        warnings.warn(
            f"unload: layers that were not quantised keep their dtype ({some(sorted(others))}); "
            f"model.to({dtype}) casts them",
            stacklevel=5,
        )


def forget_quantisation(model: nn.Module) -> None:
    """Take away what transformers notes on a quantised model, so that it is saved and loaded as a dense one."""
    for module in model.modules():
        for name in _ON_MODELS:
            vars(module).pop(name, None)
        config = getattr(module, "config", None)
        for name in _ON_CONFIGS if hasattr(config, "__dict__") else ():
            vars(config).pop(name, None)


def lora_base(module: nn.Module) -> nn.Module | None:
    """The quantised layer under a LoRA layer, ours or PEFT's; None for any other module."""
    base = module._modules.get("base_layer")
    return base if base is not None and "lora_A" in module._modules and base_of(base).bits else None


def _parts_of(module: Any, layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if layer is not None:
        return layer.dense_parts(dtype)
    return base_of(module).dense_weight(module, Factors([], [], []), dtype), rounded_bias(module.bias, dtype)


def _why_not_dense(module: Any, layer: Any) -> str | None:
    """None for a module without a quantised weight, and where its LoRA layer, if any, can be merged."""
    if not base_of(module).bits:
        other = [p for p in module._parameters.values() if p is not None and p.dtype not in FLOAT_DTYPES]
        other += [p for p in module._parameters.values() if hasattr(p, "quant_state") or is_of_torchao(p)]
        other += [module.qweight] if has_packed_weight(module) else []
        if other:
            kind = f"{type(module).__name__} with a {type(other[0]).__name__} of {other[0].dtype}"
            return f"a {kind} cannot be dequantised here, only bitsandbytes', torchao's and block-scaled fp8 weights"
        return None
    if why := base_of(module).why_not_dense(module):
        return why
    own = vars(module).get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return "the base layer has its forward replaced (by a hook of accelerate?); take it off first"
    if layer is None:
        return None
    if layer.merged_adapters:
        where = f"adapters {some(layer.merged_adapters)} are merged into {base_of(module).bits} bits"
        return f"{where}: call fused_lora.unmerge(model) first"
    if not isinstance(layer, FusedLoraBehaviour):
        return f"a {type(layer).__name__} of PEFT's; call fused_lora.accelerate(model) first"
    variants = [
        name
        for name in layer._present(layer.active_adapters)
        if has_magnitude(layer, [name]) or name in getattr(layer, "lora_variant", ())
    ]
    return f"adapters {some(variants)} are DoRA or another variant, which is not W + s B A" if variants else None
