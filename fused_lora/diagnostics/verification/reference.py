"""Compare a model's weights with a reference by name: the base, each adapter and all other parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases import base_of
from fused_lora.bases.base import Factors, why_not_plain_weight
from fused_lora.diagnostics.verification import report
from fused_lora.diagnostics.verification.experts import ExpertsLayer
from fused_lora.diagnostics.verification.find import find_layers
from fused_lora.diagnostics.verification.layers import Layer, keep
from fused_lora.diagnostics.verification.report import Finding
from fused_lora.diagnostics.verification.weights import Relation, relate
from fused_lora.modules.tree import bare_path
from fused_lora.ops.merge.exact import Adapter

_INNER = re.compile(r"\.(base_layer|modules_to_save\.[^.]+)(?=\.)")


def plain_name(name: str) -> str:
    """A parameter's name in the bare model: without PEFT's, DDP's and torch.compile's wrappers."""
    return _INNER.sub("", bare_path(name))


def compare_weights(
    model: nn.Module, layers: Sequence[Layer], reference: nn.Module | Mapping[str, Tensor]
) -> tuple[list[Finding], list[str], dict[str, Relation]]:
    """Findings, notes, and how each layer's base weight relates to the reference's (path -> relation).

    Raises:
        ValueError: the reference has no parameter of any name that the model has, or a shape differs.
    """
    stacks = {plain_name(f"{s.path}."): s for layer in layers if isinstance(layer, ExpertsLayer) for s in layer.stacks}
    names = {bare_path(f"{stack.file_path}.lora_"): f"{path}lora_" for path, stack in stacks.items()}
    theirs, ours = _by_plain_name(reference, names), _by_plain_name(model, names)
    if not _without_adapters(theirs) & _without_adapters(ours):
        raise ValueError(f"reference: expected parameters named as in the model, got {sorted(theirs)[:3]}")
    relations, seen, biases = {}, set(), []
    grids = {plain_name(f"{path}.")[:-1]: base_of(module).grid(module) for path, module in _quantised(reference)}
    for layer in layers:
        with layer.shown(False):
            weights, grid = layer.weights(), base_of(layer.base).grid(layer.base)
            biases += _other_bias(layer, theirs)
        changes = layer.changes()
        for path, weight in weights.items():
            stem = plain_name(f"{path}.")[:-1]
            key = stem if isinstance(layer, ExpertsLayer) else f"{stem}.weight"
            seen |= {n for n in ours if n == key or n.startswith(f"{stem}.")}
            other = theirs.get(key)
            if other is None:
                continue
            relations[path] = _relate(key, layer, weight, other, changes[path], grid, grids.get(stem))
    findings, notes = _judge_base(relations)
    unmerged = _unmerged_paths(reference)
    taken = {path: r for path, r in relations.items() if r.times == -1 and plain_name(path) in unmerged}
    if taken:
        text = "the base weight is the reference's with the adapter taken away, as by an unmerge of what was not merged"
        findings.append(Finding(report.BASE, text, tuple(taken)))
    findings += _judge_adapters(layers, theirs)
    differ = *biases, *(n for n in sorted(ours.keys() & theirs.keys() - seen) if not _equal(ours[n], theirs[n]))
    if differ:
        text = "parameters that are no LoRA layer's weight are not the reference's"
        text = f"{text} (trained, but not saved with the adapter?)"
        findings.append(Finding(report.PARAMETERS, text, differ))
    return findings, notes, relations


def _relate(
    key: str, layer: Layer, weight: Tensor, other: Tensor, changes: list[list[Adapter]], grid: Any, other_grid: Any
) -> Relation:
    """How a weight, as it is stored, relates to the reference's: of experts what holds for all of them."""
    why = None if weight.dim() == other.dim() == 3 else why_not_plain_weight(other)
    if why:
        raise ValueError(f"reference: {key}: {why}; expected a whole floating matrix, dequantised")
    ours, theirs = layer.matrices(weight), layer.matrices(other)
    shapes = [(len(found), *found[0].shape)[len(weight.shape) == 2 :] for found in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"reference: expected {key} {shapes[0]}, got {shapes[1]}")
    found = [relate(W, R, own, grid, other_grid) for W, R, own in zip(ours, theirs, changes, strict=True)]
    times = {relation.times for relation in found if relation.changed}
    return Relation(
        0 if not times else times.pop() if len(times) == 1 else None,
        next((relation.grid for relation in found if relation.grid), ""),
        max(relation.distance for relation in found),
        sum(relation.changed for relation in found),
    )


def _other_bias(layer: Layer, theirs: Mapping[str, Tensor]) -> list[str]:
    """The name of an unmerged layer's bias, where the reference has another: with a merged lora_bias or without."""
    key = plain_name(f"{layer.path}.bias")
    bias, other = None if isinstance(layer, ExpertsLayer) else layer.bias, theirs.get(key)
    if bias is None or other is None:
        return []
    ours, reference = bias.double(), other.to(bias.device).double()
    merged = sum((a.scaling * a.bias for a in layer.adapters() if a.bias is not None), ours)
    step = max(torch.finfo(t.dtype).eps for t in (bias, other))
    fits = ours.shape == reference.shape and any(
        ((each - reference).abs() <= step * each.abs()).all() for each in (ours, merged)
    )
    return [] if fits else [key]


def _unmerged_paths(reference: nn.Module | Mapping[str, Tensor]) -> set[str]:
    """LoRA layers of the reference whose adapters are not merged."""
    layers = find_layers(reference)[0] if isinstance(reference, nn.Module) else []
    return {plain_name(path) for layer in layers if not layer.merged for path in layer.paths}


def _judge_base(relations: dict[str, Relation]) -> tuple[list[Finding], list[str]]:
    def those(wanted) -> dict[str, Relation]:
        return {path: r for path, r in relations.items() if wanted(r)}

    def distance(found: dict[str, Relation]) -> str:
        worst = max(r.distance for r in found.values())
        return f"in {len(found)} of {len(relations)} layers, ||W - reference|| / ||reference|| up to {worst:.1e}"

    findings, notes = [], []
    here, there = those(lambda r: r.times == 1 and not r.grid), those(lambda r: r.times == -2 and not r.grid)
    grid = those(lambda r: r.grid and r.changed)
    wrong = those(lambda r: r.times is None and not r.grid)
    drift = those(lambda r: r.times == 0 and not r.grid and r.changed)
    if here:
        text = "the base weight is the reference's with the adapter already in it, so it acts twice"
        findings.append(Finding(report.DOUBLE, f"{text}; {distance(here)}", tuple(here)))
    if there:
        text = "the reference's weight is this base weight with the adapter in it twice"
        findings.append(Finding(report.DOUBLE, f"{text}; {distance(there)}", tuple(there)))
    if grid:
        grids = ", ".join(sorted({r.grid for r in grid.values()})[:2])
        text = f"base weight and reference differ by rounding to {grids}"
        findings.append(Finding(report.QUANTISED, f"{text}; {distance(grid)}", tuple(grid)))
    if wrong:
        text = "the base weight is not the reference's, and the adapter does not explain the difference"
        findings.append(Finding(report.BASE, f"{text}; {distance(wrong)}", tuple(wrong)))
    if drift:
        count = sum(r.changed for r in drift.values())
        notes.append(f"{count} base weights are a rounding away from the reference's; {distance(drift)}")
    return findings, notes


def _judge_adapters(layers: Sequence[Layer], theirs: dict[str, Tensor]) -> list[Finding]:
    differ = []
    for layer in layers:
        stem = plain_name(f"{layer.path}.")[:-1]
        for end, held in layer.parts().items():
            key = f"{stem}.{end}"
            of_file = re.sub(r"\.(lora_\w+)\.[^.]+", r".\1", key)  # a checkpoint leaves the name out
            other = next((theirs[k] for k in (key, of_file, of_file.removesuffix(".weight")) if k in theirs), None)
            if other is not None and not _equal(held, other):
                differ.append(key)
    if not differ:
        return []
    text = "adapter weights are not the reference's (loaded from elsewhere, or not at all)"
    return [Finding(report.ADAPTER, text, tuple(differ))]


def _by_plain_name(source: nn.Module | Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors by plain names, quantised weights as their values.

    names: of PEFT's adapters of stacked parameters, how their names begin -> how those of this model begin.
    """
    quantised = _quantised(source)
    with ExitStack() as stack:
        for _, module in quantised:
            stack.callback(keep(module))
            base_of(module).copy_weight(module)  # state_dict takes a repacked weight back, in place
        items = source.state_dict() if isinstance(source, nn.Module) else source
    for path, module in quantised:
        own = [name for name in items if name.startswith(f"{path}.weight")]
        items = {name: tensor for name, tensor in items.items() if name not in own}
        items[f"{path}.weight"] = base_of(module).dense_weight(module, Factors([], [], []), torch.float32)
    found = {n: t for n, t in items.items() if isinstance(t, Tensor) and ".original_module." not in n}
    return {_of_stack(bare_path(n), names) or plain_name(n): t for n, t in found.items()}


def _of_stack(name: str, names: Mapping[str, str]) -> str | None:
    start, lora, end = name.partition(".lora_")
    own = names.get(start + lora)
    return None if own is None else own + end


def _quantised(source: nn.Module | Mapping[str, Tensor]) -> list[tuple[str, nn.Module]]:
    found = source.named_modules() if isinstance(source, nn.Module) else []
    return [(path, m) for path, m in found if base_of(m).bits and not base_of(m).why_not_adapted(m)]


def _without_adapters(names: Mapping[str, Tensor]) -> set[str]:
    """A checkpoint's keys leave the adapter's name out, a model's do not."""
    return {re.sub(r"\.(lora_[AB])\.[^.]+\.weight$", r".\1.weight", name) for name in names}


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.double(), b.to(a.device).double())
