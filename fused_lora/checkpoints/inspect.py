"""What is in an adapter's files, and how two of them differ."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_lora.adapters.errors import AdapterError
from fused_lora.checkpoints.adapter_file import AdapterFile, open_adapters
from fused_lora.checkpoints.factors import decompose, effective_rank, layer_of, norm, product
from fused_lora.checkpoints.files import open_checkpoint
from fused_lora.checkpoints.planning import plan_changes
from fused_lora.modules.config import is_neutral
from fused_lora.modules.names import some

_OUTLIER = 20.0  # times the median norm


@dataclass
class AdapterReport:
    """What an adapter holds.

    Attributes:
        path, sha256: the folder, and of its weights. config: the entries that are not neutral.
        layers: one dict for each layer: path, r, scaling, shape [N, K], dtype, norm of s B A (Frobenius), its largest
            singular value and effective rank.
        targets, ranks: how many layers have this last name, this rank. parameters: numbers in the file.
        beside: keys that are not lora_A and lora_B of a layer. oddities: what looks wrong, in words.
        fits: None without a base; else whether it fits, and ``why_not``.
    """

    path: str
    sha256: str
    config: dict[str, Any]
    layers: list[dict[str, Any]]
    targets: dict[str, int]
    ranks: dict[int, int]
    parameters: int
    beside: list[str] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)
    fits: bool | None = None
    why_not: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


@dataclass
class AdapterDiff:
    """How two adapters differ.

    Attributes:
        a, b: their folders. only_a, only_b: layers that one of them has. config: entries that differ, {name: [a, b]}.
        beside: keys that are not lora_A and lora_B of a layer, where the tensors differ or one has none.
        layers: of each common layer: path, norms of both deltas and of their difference, and the cosine between them.
        same: whether the two add the same: the deltas up to 1e-6 of a layer's norm, tensors beside them to the bit.
            Entries of the config do not count, but for ``trainable_token_indices``, the rows of such tensors.
    """

    a: str
    b: str
    only_a: list[str]
    only_b: list[str]
    config: dict[str, list[Any]]
    layers: list[dict[str, Any]]
    beside: list[str]
    same: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


def inspect_adapter(adapter: str | os.PathLike, base: str | os.PathLike | None = None) -> AdapterReport:
    """Read an adapter's files, layer by layer.

    Args:
        adapter: its folder. base: a checkpoint's folder or file; the report then says whether it fits, and why not.

    Raises AdapterError where a file is malformed or of a kind that is not supported.
    """
    with open_adapters(adapter) as (opened,):
        layers = [_describe(opened, path) for path in opened.plan.slots]
        report = AdapterReport(
            opened.folder,
            opened.sha256,
            {n: value for n, value in opened.plan.config.to_dict().items() if not is_neutral(value)},
            layers,
            dict(Counter(path.rpartition(".")[2] for path in opened.plan.slots)),
            dict(Counter(layer["r"] for layer in layers)),
            sum((e.end - e.begin) // e.dtype.itemsize for e in opened.plan.entries.values()),
            _beside(opened),
            _oddities(layers),
        )
        if base is not None:
            try:
                plan_changes(open_checkpoint(base), [opened])
                report.fits = True
            except AdapterError as error:
                report.fits, report.why_not = False, str(error)
    return report


def diff_adapters(a: str | os.PathLike, b: str | os.PathLike) -> AdapterDiff:
    """Compare what two adapters add, layer by layer. Ranks and factors may differ where the deltas do not.

    Raises AdapterError where a file is malformed, or a layer has other sizes in the other adapter.
    """
    with open_adapters([a, b]) as (first, second):
        paths = [path for path in first.plan.slots if path in second.plan.slots]
        layers = []
        for path in paths:
            check_sizes(first, second, path)
            one, two = layer_of(first, path), layer_of(second, path)
            norms, inner = (norm(one), norm(two)), product(one, two)
            apart = max(0.0, norms[0] ** 2 + norms[1] ** 2 - 2 * inner) ** 0.5
            cosine = inner / (norms[0] * norms[1]) if norms[0] * norms[1] else None
            layers.append({"path": path, "norm_a": norms[0], "norm_b": norms[1], "apart": apart, "cosine": cosine})
        entries = [plan.config.to_dict() for plan in (first.plan, second.plan)]
        differ = {n: [e.get(n) for e in entries] for n in {**entries[0], **entries[1]}}
        differ = {name: values for name, values in differ.items() if values[0] != values[1]}
        only = [[p for p in x.plan.slots if p not in y.plan.slots] for x, y in ((first, second), (second, first))]
        others = [{key: x.tensor(key) for key in _beside(x)} for x in (first, second)]
        beside = [k for k in {**others[0], **others[1]} if not _same_tensor(*(held.get(k) for held in others))]
        same = not (beside or any(only) or "trainable_token_indices" in differ)
        same = same and all(layer["apart"] <= 1e-6 * layer["norm_a"] for layer in layers)
        return AdapterDiff(first.folder, second.folder, only[0], only[1], differ, layers, beside, same)


def sizes(adapter: AdapterFile, path: str) -> tuple[int, int, int]:
    """(r, K, N) of a layer."""
    keys, entries = adapter.plan.slots[path], adapter.plan.entries
    (r, K), (N, _) = entries[keys["lora_A"]].shape, entries[keys["lora_B"]].shape
    return r, K, N


def check_sizes(first: AdapterFile, other: AdapterFile, path: str) -> None:
    """Raise AdapterError unless a layer has the same K and N in both."""
    wanted, found = sizes(first, path)[1:], sizes(other, path)[1:]
    if wanted != found:
        key = other.plan.slots[path]["lora_A"]
        raise AdapterError(other.plan.weights, key, f"K, N of {list(wanted)} as in {first.folder!r}", list(found))


def _beside(adapter: AdapterFile) -> list[str]:
    """Keys that are not lora_A and lora_B of a layer."""
    used = {keys[part] for keys in adapter.plan.slots.values() for part in ("lora_A", "lora_B")}
    return [key for key in adapter.plan.entries if key not in used]


def _same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _describe(adapter: AdapterFile, path: str) -> dict[str, Any]:
    r, K, N = sizes(adapter, path)
    layer = layer_of(adapter, path)
    S = decompose(layer).S
    dtype = str(adapter.plan.entries[adapter.plan.slots[path]["lora_A"]].dtype).removeprefix("torch.")
    found = {"path": path, "r": r, "shape": [N, K], "dtype": dtype, "scaling": adapter.scaling(path)}
    found |= {"norm": S.square().sum().sqrt().item(), "largest": S.max().item(), "effective_rank": effective_rank(S)}
    return found


def _oddities(layers: list[dict[str, Any]]) -> list[str]:
    found = []
    if still := [layer["path"] for layer in layers if layer["norm"] == 0]:
        found.append(f"{len(still)} of {len(layers)} layers add nothing (untrained?): {some(still)}")
    if wide := [layer["path"] for layer in layers if layer["r"] > min(layer["shape"])]:
        found.append(f"the rank is above the layer's own size: {some(wide)}")
    middle = sorted(layer["norm"] for layer in layers)[len(layers) // 2]
    if large := [layer["path"] for layer in layers if layer["norm"] > _OUTLIER * middle > 0]:
        found.append(f"a norm above {_OUTLIER:g} times the median, {middle:.3g}: {some(large)}")
    scalings = Counter(layer["scaling"] for layer in layers)
    if extreme := [f"{s:g}" for s in scalings if not 1e-3 <= abs(s) <= 1e2]:
        found.append(f"an unusual scaling: {some(extreme)}")
    return found
