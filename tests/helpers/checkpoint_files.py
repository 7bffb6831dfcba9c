"""Small checkpoints and adapters as files, written by safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fused_lora.checkpoints import changes, stream
from helpers.seeds import shifted

K, N, VOCABULARY = 24, 40, 56


def pieces_of(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Files are read and written in pieces of so many bytes."""
    for module in (changes, stream):
        monkeypatch.setattr(module, "PIECE_BYTES", nbytes)


def decoder(layers: int = 2, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a decoder under Llama's names, without a head of its own."""
    draw = torch.Generator().manual_seed(shifted(seed))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, K), "model.norm.weight": (K,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.self_attn.{p}_proj.weight": (n, K) for p, n in (("q", N), ("k", 16), ("v", 16))}
        shapes |= {f"model.layers.{i}.mlp.down_proj.weight": (K, N), f"model.layers.{i}.mlp.down_proj.bias": (K,)}
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def write_base(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, config: dict | None = None) -> Path:
    """A model's folder with so many shards, a config and a tokenizer."""
    folder.mkdir(parents=True)
    names = list(tensors)
    parts = [names[i::shards] for i in range(shards)]
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else [SINGLE]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, {"format": "pt"})
    if shards > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        names = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]], r: int = 4, seed: int = 1, **config) -> Path:
    """An adapter of rank r for layers {path: (K, N)}, alpha 2 r."""
    draw = torch.Generator().manual_seed(shifted(seed))
    tensors = {}
    for path, (k, n) in shapes.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(r, k, generator=draw)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(n, r, generator=draw) * 0.1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    entries = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": [], **config}
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    return folder


def save_trained(wrapped: Any, folder: Path, seed: int = 1) -> None:
    """Save an adapter of a PEFT model as PEFT does, with drawn numbers so that it does something."""
    draw = torch.Generator().manual_seed(shifted(seed))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=draw))
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    wrapped.save_pretrained(folder)


def change(file: Path, **entries) -> None:
    """Other entries of a JSON file, or of the tensors of a safetensors file; None takes one away."""
    is_json = file.suffix == ".json"
    held = json.loads(file.read_text()) if is_json else load_file(file)
    held = {key: value for key, value in {**held, **entries}.items() if value is not None}
    if is_json:
        file.write_text(json.dumps(held))
    else:
        save_file(held, file, {"format": "pt"})


def read_all(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


SINGLE = "model.safetensors"
