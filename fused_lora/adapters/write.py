"""save_adapter: one adapter of a model as a PEFT checkpoint, both files replaced in one step."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import nn

from fused_lora.adapters.checkpoint import CONFIG_NAME, KEY_PREFIX, SLOTS, WEIGHTS_NAME
from fused_lora.adapters.patterns import PatternTable
from fused_lora.adapters.read import other_biases
from fused_lora.adapters.staging import replace_directory
from fused_lora.adapters.tensorfile import DTYPES, write_tensors
from fused_lora.modules.changes import changing
from fused_lora.modules.config import LoraConfig
from fused_lora.modules.inject import adapter_configs, check_adapter_name, check_names, lora_layers
from fused_lora.modules.of_peft import refuse
from fused_lora.modules.targets import candidates

_ENDS = {field: end for end, field in SLOTS.items()}


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

    Args:
        model: a model with LoRA layers, merged or not, on any device.
        directory: created if missing. It must not be the current directory or above it, nor a mount point.
        adapter_name: the adapter to write.
        base_model_name_or_path: recorded in the config; default: what the config holds, else the model's
            ``name_or_path``.

    Raises:
        AdapterNotFound: the model has no adapter of that name.
        TypeError: adapter_name or base_model_name_or_path is not a str.
        ValueError: a malformed name; a tensor with NaN or Inf; a dtype other than float32, float16 and bfloat16; or
            an unsuitable ``directory``.
        RuntimeError: base biases cannot be saved while a layer is merged; or a layer's rank or alpha differs from
            the config.
        OSError: from the file system. The folder is then as before.
    """
    refuse(model, "save_adapter", "call peft_model.save_pretrained")
    check_names(model, [check_adapter_name(adapter_name)])
    if not isinstance(base_model_name_or_path, (str, type(None))):
        raise TypeError(f"base_model_name_or_path: expected a str or None, got {base_model_name_or_path!r}")
    config = adapter_configs(model)[adapter_name]
    with changing(model, forwards=False):
        tensors = adapter_tensors(model, adapter_name, config)
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{key} must be float32, float16 or bfloat16, got {tensor.dtype}")
        if tensor.is_meta or not torch.isfinite(tensor).all():
            raise ValueError(
                f"{key} must hold finite values, got {'no data (meta)' if tensor.is_meta else 'NaN or Inf'}"
            )
    entries = _config_entries(model, adapter_name, config)
    if base_model_name_or_path is not None:
        entries["base_model_name_or_path"] = base_model_name_or_path
    text = config_text(entries)
    replace_directory(os.fsdecode(directory), lambda stage: write_files(stage, text, tensors))


def config_text(entries: dict[str, Any]) -> str:
    """adapter_config.json. Only its top level is sorted: the first key of rank_pattern that matches decides."""
    return json.dumps(dict(sorted(entries.items())), indent=2, allow_nan=False)


def write_files(folder: str, config: str, tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    """Write both files of a checkpoint into ``folder``, where they must not be yet; their names."""
    with open(os.path.join(folder, WEIGHTS_NAME), "xb", buffering=0) as file:
        write_tensors(file, tensors)
    with open(os.path.join(folder, CONFIG_NAME), "x", encoding="utf-8") as file:
        file.write(config)
    return CONFIG_NAME, WEIGHTS_NAME


def adapter_tensors(model: nn.Module, adapter_name: str, config: LoraConfig) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint under PEFT's keys, detached, on the devices they are on."""
    layers = {path: layer for path, layer in lora_layers(model).items() if adapter_name in layer.lora_A}
    if config.bias != "none" and any(layer.merged_adapters for layer in lora_layers(model).values()):
        raise RuntimeError(f"bias={config.bias!r} saves biases of the base model: unmerge before saving")
    ranks = PatternTable(config.rank_pattern, config.r)
    alphas = PatternTable(config.alpha_pattern, config.lora_alpha)
    tensors = {}
    for path, layer in layers.items():
        has = (layer.r[adapter_name], layer.lora_alpha[adapter_name])
        if has[0] not in ranks.possible(path) or has[1] not in alphas.possible(path):
            raise RuntimeError(f"layer {path!r} has (r, lora_alpha) = {has}, which the config does not give it")
        parts = {
            "lora_A": layer.lora_A[adapter_name].weight,
            "lora_B": layer.lora_B[adapter_name].weight,
            "lora_bias": layer.lora_B[adapter_name].bias,
            "base_bias": layer.base_layer.bias if config.bias != "none" else None,
        }
        tensors |= {f"{KEY_PREFIX}{path}{_ENDS[k]}": v.detach() for k, v in parts.items() if v is not None}
    if config.bias == "all":
        tensors |= {f"{KEY_PREFIX}{name}": bias.detach() for name, bias in other_biases(model, layers).items()}
    return tensors


def _config_entries(model: nn.Module, adapter_name: str, config: LoraConfig) -> dict:
    entries = config.to_dict()
    entries["inference_mode"] = True  # as PEFT writes it
    if entries["base_model_name_or_path"] is None:
        entries["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        entries["target_modules"] = _shortest_names(model, adapter_name)
    return entries


def _shortest_names(model: nn.Module, adapter_name: str) -> list[str]:
    """Names that pick exactly the adapted modules: the last part of a path where that is unambiguous, else the path."""
    targets = {path for path, layer in lora_layers(model).items() if adapter_name in layer.lora_A}
    others = {path.rpartition(".")[2] for path, _ in candidates(model) if path not in targets}
    return sorted({path if (last := path.rpartition(".")[2]) in others else last for path in targets})
