"""save_adapter: one adapter of a model as a PEFT checkpoint, both files replaced in one step."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fused_lora.adapters.checkpoint import CONFIG_NAME, KEY_PREFIX, SLOTS, WEIGHTS_NAME, path_text
from fused_lora.adapters.patterns import PatternTable
from fused_lora.adapters.read import other_biases
from fused_lora.adapters.staging import replace_directory
from fused_lora.adapters.tensorfile import DTYPES, KNOWN, write_tensors
from fused_lora.adapters.whole import bias_shape, check_whole, gather, once
from fused_lora.modules.auxiliary import TOKENS_END, saved_tensors
from fused_lora.modules.changes import changing
from fused_lora.modules.config import LoraConfig
from fused_lora.modules.experts import LoraStack, file_paths, match_parameters
from fused_lora.modules.inject import adapter_configs, adapter_parameters, check_adapter_name, check_names, lora_layers
from fused_lora.modules.of_peft import refuse
from fused_lora.modules.targets import base_layer_of, base_settings, candidates
from fused_lora.modules.tree import named_modules, own_path, unwrapped


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = "default",
    *,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write ``adapter_name`` of ``model`` to exactly ``directory`` as adapter_config.json + adapter_model.safetensors.

    PEFT loads the folder as it is. The folder is replaced as a whole, and its other files are kept. So readers see
    both old files or both new ones, even if the process is killed or the machine stops. Unlike in PEFT, an adapter
    that is not called "default" gets no folder of its own inside ``directory``.

    The keys are those of the bare model, also under torch.compile, checkpoint_wrapper, DDP and FSDP. What FSDP2 has
    sharded is gathered: all processes make the call, and the first one writes.

    Args:
        model: a model with LoRA layers, merged or not, on any device.
        directory: created if missing. It must not be the current directory or above it, nor a mount point.
        adapter_name: the adapter to write.
        base_model_name_or_path: recorded in the config; default: what the config holds, else the model's
            ``name_or_path``.

    Raises:
        AdapterNotFound: the model has no adapter of that name.
        TypeError: adapter_name or base_model_name_or_path is not a str.
        ValueError: a malformed name; a tensor with NaN or Inf; a dtype other than float32, float16, bfloat16
            and, for buffers of ``modules_to_save``, integers; or an unsuitable ``directory``.
        RuntimeError: base biases cannot be saved while a layer is merged; a layer's rank or alpha differs from the
            config; or a parameter has not the shape of the whole layer, as under DeepSpeed ZeRO-3 and FSDP1. The
            message says how to gather it.
        OSError: from the file system. The folder is then as before.
    """
    refuse(model, "save_adapter", "call peft_model.save_pretrained, of a model of diffusers save_lora_adapter")
    write_adapter(model, directory, adapter_name, base_model_name_or_path)


def write_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str,
    base_model_name_or_path: str | None = None,
    *,
    further: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    here: bool = True,
) -> None:
    """:func:`save_adapter` with ``further`` files of tensors. ``state_dict`` has tensors to write in place of the
    model's own, by their names in the model. ``here``: whether this process writes, when nothing is sharded."""
    check_names(model, [check_adapter_name(adapter_name)])
    folder = path_text("directory", directory)
    if not isinstance(base_model_name_or_path, (str, type(None))):
        raise TypeError(f"base_model_name_or_path: expected a str or None, got {base_model_name_or_path!r}")
    with changing(model, forwards=False):
        check_names(model, [adapter_name])  # again: it may have been deleted meanwhile
        files = {WEIGHTS_NAME: adapter_parts(model, adapter_name, adapter_configs(model)[adapter_name])}
        _warn_of_others(model, [parameter for parameter, _ in files[WEIGHTS_NAME].values()])
        root = unwrapped(model)
        names = {id(held): own_path(name) for name, held in (*root.named_parameters(), *root.named_buffers())}
        entries = _config_entries(model, adapter_name, adapter_configs(model)[adapter_name])
        base = {
            own_path(path): settings
            for path, layer in lora_layers(model).items()
            if adapter_name in layer.adapters
            and not isinstance(layer, LoraStack)
            and (settings := base_settings(layer))
        }
    files |= {name: {key: (t, None) for key, t in tensors.items()} for name, tensors in (further or {}).items()}
    parts = {(name, key): part for name, keys in files.items() for key, part in keys.items()}
    given = None if state_dict is None else {own_path(name): tensor for name, tensor in state_dict.items()}
    tensors = {}
    for place, (parameter, shape) in parts.items():
        name = names.get(id(parameter), place[1])  # FSDP1's views are no parameters
        if given is not None and name not in given:
            raise ValueError(f"state_dict: expected a tensor {name!r}, found none")
        tensors[place] = parameter if given is None else given[name]
        check_whole(name, tensors[place], shape)
    flat, mesh = gather({place: tensor.detach() for place, tensor in tensors.items()})
    for (name, key), tensor in flat.items():
        what = key if name == WEIGHTS_NAME else f"{name}: {key}"
        kinds = DTYPES if key.endswith((*SLOTS, TOKENS_END)) else KNOWN
        if tensor.dtype not in kinds.values():
            raise ValueError(f"{what} must have a dtype of {', '.join(kinds)}, got {tensor.dtype}")
        if tensor.is_meta:
            raise ValueError(
                f"{what} must hold finite values, got no data (meta device): if its layer is offloaded, bring it back "
                "first; for hooks of accelerate, accelerate.hooks.remove_hook_from_submodules(model)"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what} must hold finite values, got NaN or Inf")
    if base_model_name_or_path is not None:
        entries["base_model_name_or_path"] = base_model_name_or_path
    text = config_text(entries)

    def write(stage: str) -> tuple[str, ...]:
        for name in further or ():
            with open(os.path.join(stage, name), "xb", buffering=0) as file:
                write_tensors(file, {key: tensor for (of, key), tensor in flat.items() if of == name})
        weights = {key: tensor for (of, key), tensor in flat.items() if of == WEIGHTS_NAME}
        return *write_files(stage, text, weights, base), *(further or ())

    if here or mesh is not None:
        once(mesh, lambda: replace_directory(folder, write))


def config_text(entries: dict[str, Any]) -> str:
    """adapter_config.json. Only its top level is sorted: the first key of rank_pattern that matches decides.

    Raises ValueError for half a surrogate pair, as in the name of a folder that is no UTF-8: no reader would take it.
    """
    for key, value in entries.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{key} must be text that UTF-8 can hold, got {value!r}") from None
    return json.dumps(dict(sorted(entries.items())), indent=2, allow_nan=False)


def write_files(
    folder: str,
    config: str,
    tensors: dict[str, torch.Tensor],
    base: dict[str, dict[str, str]] | None = None,
) -> tuple[str, str]:
    """Write both files of a checkpoint into ``folder``, where they must not be yet; their names."""
    with open(os.path.join(folder, WEIGHTS_NAME), "xb", buffering=0) as file:
        write_tensors(file, tensors, base)
    with open(os.path.join(folder, CONFIG_NAME), "x", encoding="utf-8") as file:
        file.write(config)
    return CONFIG_NAME, WEIGHTS_NAME


def _warn_of_others(model: nn.Module, saved: list[torch.Tensor]) -> None:
    """Warn of parameters that train and are in no adapter."""
    known = {id(parameter) for parameter in (*saved, *adapter_parameters(model))}
    biased = any(config.bias != "none" for config in adapter_configs(model).values())  # which another save writes
    others = [
        own_path(name)
        for name, parameter in unwrapped(model).named_parameters()
        if parameter.requires_grad and id(parameter) not in known and not (biased and name.endswith("bias"))
    ]
    if others:
        warnings.warn(
            f"{len(others)} parameters train and are not saved with the adapter, {others[0]!r} for one: name their "
            "modules in modules_to_save, or save them yourself",
            stacklevel=4,
        )


def adapter_parts(
    model: nn.Module, adapter_name: str, config: LoraConfig
) -> dict[str, tuple[torch.Tensor, tuple[int, ...] | None]]:
    """The parameters of a checkpoint under PEFT's keys, each with its shape when whole (None: not known)."""
    layers = {path: layer for path, layer in lora_layers(model).items() if adapter_name in layer.adapters}
    names = file_paths(match_parameters(model, config))
    if config.bias != "none" and any(layer.merged_adapters for layer in lora_layers(model).values()):
        raise RuntimeError(f"bias={config.bias!r} saves biases of the base model: unmerge before saving")
    ranks = PatternTable(config.rank_pattern, config.r)
    alphas = PatternTable(config.alpha_pattern, config.lora_alpha)
    tensors = {}
    for path, layer in layers.items():
        has = (layer.r[adapter_name], layer.lora_alpha[adapter_name])
        if has[0] not in ranks.possible(path) or has[1] not in alphas.possible(path):
            raise RuntimeError(f"layer {path!r} has (r, lora_alpha) = {has}, which the config does not give it")
        parts = layer.file_tensors(adapter_name)
        if config.bias != "none":
            parts[".base_layer.bias"] = (getattr(layer.base_layer, "bias", None), (layer.out_features,))
        place = names[path] if isinstance(layer, LoraStack) else path
        tensors |= {f"{place}{end}": part for end, part in parts.items() if part[0] is not None}
    if config.bias == "all":
        modules = dict(named_modules(model))
        for name, bias in other_biases(model, layers).items():
            tensors[name] = (bias, bias_shape(base_layer_of(modules[name.rpartition(".")[0]])))
    tensors |= saved_tensors(model, adapter_name)
    return {f"{KEY_PREFIX}{name}": part for name, part in tensors.items()}


def _config_entries(model: nn.Module, adapter_name: str, config: LoraConfig) -> dict:
    entries = config.to_dict()
    entries["inference_mode"] = True  # as PEFT writes it
    if entries["base_model_name_or_path"] is None:
        entries["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        entries["target_modules"] = _shortest_names(model, adapter_name)
    entries["alpha_pattern"] = _plain_alphas(model, adapter_name, config)
    return entries


def _plain_alphas(model: nn.Module, adapter_name: str, config: LoraConfig) -> dict[str, float]:
    """alpha_pattern, or a path for each layer if a key is an expression that the reader of a file does not decide."""
    table = PatternTable(config.alpha_pattern, config.lora_alpha)
    alphas = {p: m.lora_alpha[adapter_name] for p, m in lora_layers(model).items() if adapter_name in m.lora_alpha}
    if all(len(table.possible(path)) == 1 for path in alphas):
        return config.alpha_pattern
    return {"^" + path.replace(".", "\\."): a for path, a in alphas.items() if a != config.lora_alpha}


def _shortest_names(model: nn.Module, adapter_name: str) -> list[str]:
    """Names that pick exactly the adapted modules: the last part of a path where that is unambiguous, else the path."""
    held = {path for path, layer in lora_layers(model).items() if adapter_name in layer.adapters}
    modules = {path for path, _ in candidates(model)}
    targets = held & modules  # the others are parameters
    others = {path.rpartition(".")[2] for path in modules - targets}
    return sorted({path if (last := path.rpartition(".")[2]) in others else last for path in targets})
