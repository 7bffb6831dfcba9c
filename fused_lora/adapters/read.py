"""load_adapter: a PEFT adapter checkpoint into a model, checked against the model before the model is touched."""

from __future__ import annotations

import os
from collections.abc import Container
from typing import Any

import torch
from torch import nn

from fused_lora.adapters.checkpoint import CONFIG_NAME, KEY_PREFIX, MAX_WEIGHT_BYTES, Adapter, Plan, read_checked
from fused_lora.adapters.errors import AdapterError
from fused_lora.modules import auxiliary
from fused_lora.modules.config import LayerTensors, LoraConfig
from fused_lora.modules.inject import (
    LayerSpec,
    attach,
    check_adapter_name,
    check_new_name,
    check_not_wrapped,
    lora_layers,
)
from fused_lora.modules.targets import base_layer_of, candidates, in_out_features, is_supported, literal_targets


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str | None = None,
    *,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    max_bytes: int = MAX_WEIGHT_BYTES,
) -> LoraConfig:
    """Add the adapter in ``directory`` to ``model``, in place. Everything is checked before the model changes.

    The first adapter of a model becomes active. A later one stays inactive until ``set_adapter``.

    Args:
        model: any module. Target layers that have no LoRA yet become LoraLinear.
        directory, max_bytes: as in ``read_adapter``.
        adapter_name: 1 to 64 letters, digits, "_" or "-"; default "default".
        is_trainable: whether A and B (and trained biases) require gradients. Without it the model is put into eval
            mode, as in PEFT, so that its dropout is off.
        autocast_adapter_dtype: as in PEFT. True: A and B are float32 over a 16-bit base. False: they have the base
            weight's dtype.

    Returns:
        The adapter's config.

    Raises:
        AdapterError: a file is malformed, or does not fit the model.
        TypeError: model is no module, adapter_name is no str, or max_bytes no int.
        ValueError: ``adapter_name`` is malformed or taken, or the model has PEFT's LoRA layers.
        RuntimeError: the checkpoint has base biases, and a layer of the model is merged.
    """
    name = check_adapter_name("default" if adapter_name is None else adapter_name)
    check_new_name(model, name)
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(f"max_bytes: expected an int, got {max_bytes!r}")
    check_not_wrapped(model)
    adapter, plan = read_checked(directory, max_bytes, lambda plan: check_model(model, plan))
    if adapter.config.bias != "none" and any(layer.merged_adapters for layer in lora_layers(model).values()):
        raise RuntimeError(f"bias={adapter.config.bias!r} replaces biases of the base model: unmerge before loading")
    adapter.config.inference_mode = not is_trainable
    layers = _specs(model, adapter, plan, autocast_adapter_dtype)
    biases = other_biases(model, adapter.layers)
    values = {path: _cast(plan, plan.biases[path], t, biases[path].dtype) for path, t in adapter.biases.items()}
    beside = _beside(model, adapter, plan, autocast_adapter_dtype)
    attach(model, name, adapter.config, layers, beside)
    with torch.no_grad():
        for path, value in values.items():
            biases[path].copy_(value)
    if not is_trainable:
        model.eval()
    return adapter.config


def _specs(model: nn.Module, adapter: Adapter, plan: Plan, autocast_adapter_dtype: bool) -> dict[str, LayerSpec]:
    """The adapter's layers in the dtypes they will have in ``model``."""
    modules = dict(candidates(model))
    layers = {}
    for path, tensors in adapter.layers.items():
        base: Any = base_layer_of(modules[path])
        base_dtype = base.weight.dtype
        wide = autocast_adapter_dtype and base_dtype in (torch.float16, torch.bfloat16)
        cast = {}
        for field, key in plan.slots[path].items():
            dtype = torch.float32 if wide and field != "base_bias" else base_dtype
            cast[field] = _cast(plan, key, getattr(tensors, field), dtype)
        layers[path] = LayerSpec(*plan.ranks[path], LayerTensors(**cast))
    return layers


def _beside(model: nn.Module, adapter: Adapter, plan: Plan, autocast_adapter_dtype: bool) -> dict[str, torch.Tensor]:
    """What the adapter trained beside LoRA, in the dtypes it will have in ``model``; rows of tokens are widened."""
    wanted = auxiliary.expected_tensors(model, auxiliary.find(model, adapter.config))
    cast = {}
    for name, tensor in adapter.beside.items():
        dtype = wanted[name].dtype
        narrow = dtype in (torch.float16, torch.bfloat16)
        wide = autocast_adapter_dtype and narrow and name.endswith(auxiliary.TOKENS_END)
        cast[name] = _cast(plan, plan.beside[name], tensor, torch.float32 if wide else dtype)
    return cast


def _cast(plan: Plan, key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        raise AdapterError(plan.weights, key, f"values within the range of {dtype}", "larger ones")
    return cast


def check_model(model: nn.Module, plan: Plan) -> None:
    """Raise AdapterError unless every path is a linear layer of ``model`` that the tensors fit, and every layer that
    the config names has tensors."""
    modules = dict(candidates(model))
    for path, keys in plan.slots.items():
        module = modules.get(path)
        if module is None or not is_supported(module):
            found = "no module of that name" if module is None else f"a {type(base_layer_of(module)).__name__}"
            raise AdapterError(plan.weights, keys["lora_A"], f"a linear layer {path!r} in the model", found)
        K, N = in_out_features(module)
        r = plan.ranks[path][0]
        for field, shape in (("lora_A", (r, K)), ("lora_B", (N, r))):
            if plan.entries[keys[field]].shape != shape:
                found = list(plan.entries[keys[field]].shape)
                raise AdapterError(plan.weights, keys[field], f"a shape {list(shape)} for the layer {path!r}", found)
        if plan.config.bias != "none" and (base_layer_of(module).bias is None) == ("base_bias" in keys):
            has, brings = ("no bias", "a bias") if "base_bias" in keys else ("a bias", "none")
            key = f"{KEY_PREFIX}{path}.base_layer.bias"
            raise AdapterError(plan.weights, key, f"a base bias exactly if the layer has one; it has {has}", brings)
    if plan.config.bias == "all":
        _check_biases(model, plan)
    _check_beside(model, plan)
    named = literal_targets(model, plan.config)
    if named is not None and (difference := set(named) ^ set(plan.slots)):
        path = min(difference)
        what = ("tensors for this module, which target_modules names", "none")
        if path in plan.slots:
            what = ("a module that target_modules names", sorted(plan.config.target_modules or ()))
        raise AdapterError(plan.weights, f"{KEY_PREFIX}{path}.lora_A.weight", *what)


def _check_beside(model: nn.Module, plan: Plan) -> None:
    try:
        wanted = auxiliary.expected_tensors(model, auxiliary.find(model, plan.config))
    except ValueError as error:
        key = "modules_to_save" if "modules_to_save" in str(error) else "trainable_token_indices"
        config = os.path.join(os.path.dirname(plan.weights), CONFIG_NAME)
        raise AdapterError(config, key, "modules of the model that can train beside LoRA", str(error)) from None
    if difference := wanted.keys() ^ plan.beside.keys():
        name = min(difference)
        what = ("a tensor in the file", "none") if name in wanted else ("a tensor of the model", "no such name")
        raise AdapterError(plan.weights, f"{KEY_PREFIX}{name}", *what)
    for name, key in plan.beside.items():
        expected, found = list(wanted[name].shape), list(plan.entries[key].shape)
        if found != expected:
            raise AdapterError(plan.weights, key, f"a shape {expected}", found)


def _check_biases(model: nn.Module, plan: Plan) -> None:
    present = other_biases(model, plan.slots)
    if difference := present.keys() ^ plan.biases.keys():
        name = min(difference)
        what = ("a bias in the file", "none") if name in present else ("a bias of the model", "no such parameter")
        raise AdapterError(plan.weights, f"{KEY_PREFIX}{name}", *what)
    for name, key in plan.biases.items():
        expected, found = list(present[name].shape), list(plan.entries[key].shape)
        if found != expected:
            raise AdapterError(plan.weights, key, f"a shape {expected}", found)


def other_biases(model: nn.Module, layers: Container[str]) -> dict[str, nn.Parameter]:
    """The biases of all modules of ``model`` but those at the paths ``layers``, by parameter path without LoRA
    layers. A bias of lora_B does not count."""
    biases = {}
    for name, module in [("", model), *candidates(model)]:
        bias = base_layer_of(module)._parameters.get("bias")
        if bias is not None and name not in layers:
            biases[f"{name}.bias" if name else "bias"] = bias
    return biases
