"""Find the bug behind an error that exceeds its bound, or one that hides in a weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fused_lora.diagnostics.tables import dtype_name
from fused_lora.diagnostics.verification import report
from fused_lora.diagnostics.verification.layers import Layer
from fused_lora.diagnostics.verification.report import Finding, LayerCheck, Verification
from fused_lora.modules.merging import LEAST_SURVIVING, memory_of, parameter_owners


def add_findings(model: nn.Module, layers: list[Layer], result: Verification) -> None:
    """Append to ``result.findings`` the cause of every error out of bounds. Each layer is reported once."""
    checks = {check.path: check for check in result.layers}
    broken = [layer for layer in layers if layer.broken]
    if broken:
        result.findings.append(_why_broken(broken, checks))
    known = {path for finding in result.findings for path in finding.layers}
    merged = {path for layer in layers if layer.merged for path in layer.paths}
    rules = (
        (report.FORWARD, lambda c: c.unmerged > 1, "the output is not that of the weight and its adapters"),
        (report.STALE, lambda c: c.weight > 1 and c.path in merged, "the merged weight is not W + D of this adapter"),
        (report.MERGE, lambda c: c.weight > 1 and c.path not in merged, "merging does not give W + D"),
        (report.MERGED_FORWARD, lambda c: c.merged > 1, "the merged layer's output is not x Wm^T + b"),
    )
    for cause, applies, text in rules:
        found = [c for path, c in checks.items() if path not in known and applies(c)]
        if found:
            worst = max(c.ratio for c in found)
            text = f"{text} within rounding, up to {worst:.1e} times the bound"
            result.findings.append(Finding(cause, text, tuple(c.path for c in found)))
    result.findings += _stale_tokens(model)
    lost = [check for check in result.layers if 1 - check.lost < LEAST_SURVIVING]
    if lost and not result.findings:
        kept = min(max(0.0, 1 - check.lost) for check in lost)
        dtypes = ", ".join(sorted({dtype_name(check.dtype) for check in lost}))
        packed = any(isinstance(check.dtype, str) for check in lost)
        wider = "unload(model, merge_adapters=True, dtype=...)" if packed else "merge into float32"
        text = (
            f"a merge into {dtypes} keeps only {kept:.0%} of the adapter in the worst of {len(lost)} layers, "
            f"below {LEAST_SURVIVING:.0%}: {wider}, or do not merge"
        )
        result.findings.append(Finding(report.LOST, text, tuple(check.path for check in lost)))
    result.findings += _shared(model, layers)
    if not any(adapter.lora_B.any() for layer in layers for adapter in layer.adapters()):
        result.notes.append("every lora_B is zero: the adapter changes nothing (new, or not loaded)")


def _stale_tokens(model: nn.Module) -> list[Finding]:
    """A finding for embeddings whose merged token rows are not those of the adapters, ours or PEFT's."""
    found: list[str] = []
    module: Any
    for path, module in model.named_modules():
        held = module._modules.get("trainable_tokens_delta")
        if held is None:
            continue
        for name in module.merged_adapters:
            weight, tokens = module.base_layer.weight, module.token_indices[name]
            if max(tokens) >= len(weight) or not torch.equal(weight[tokens], held[name].to(weight)):
                found.append(path)
    text = "the merged token rows are not those of this adapter"
    return [Finding(report.STALE, text, tuple(dict.fromkeys(found)))] if found else []


def _why_broken(broken: list[Layer], checks: dict[str, LayerCheck]) -> Finding:
    """The finding for weights that their correction records do not match: merged again, rounded, or replaced."""
    paths = tuple(path for layer in broken for path in layer.paths)
    if holds_delta([checks[path] for path in paths if path in checks]):
        return Finding(report.DOUBLE, "the merged weight holds the adapter once more than was merged", paths)
    for dtype in (torch.bfloat16, torch.float16):
        weights = [weight for layer in broken for weight in layer.weights().values()]
        if all(w.dtype != dtype and torch.equal(w.to(dtype).to(w.dtype), w) for w in weights):
            text = f"the merged weight was rounded to {dtype_name(dtype)} after the merge"
            return Finding(report.QUANTISED, text, paths)
    return Finding(report.BASE, "the merged weight is not what the merge left, it was replaced since", paths)


def holds_delta(checks: list[LayerCheck]) -> bool:
    """Whether W already contains D: <W, D> / <D, D> is about 1, and 10 standard deviations away from 0."""
    weights = {c.path: c.inside_std**-2 for c in checks if 0 < c.inside_std < math.inf}
    total = sum(weights.values())
    if not total:
        return False
    mean, std = sum(weights[c.path] * c.inside for c in checks if c.path in weights) / total, total**-0.5
    fits = [abs(c.inside - 1) <= 5 * c.inside_std + 0.1 for c in checks if c.path in weights]
    return mean >= 10 * std and abs(mean - 1) <= 0.1 + 5 * std and sum(fits) >= 0.9 * len(fits)


def _shared(model: nn.Module, layers: list[Layer]) -> list[Finding]:
    owners = parameter_owners(model)
    weights = [(path, weight) for layer in layers for path, weight in layer.parameters.items()]
    found = tuple(path for path, weight in weights if len(owners.get(memory_of(weight), ())) > 1)
    text = "the base weight also belongs to another module, whose output a merge would change"
    return [Finding(report.SHARED, text, found)] if found else []
