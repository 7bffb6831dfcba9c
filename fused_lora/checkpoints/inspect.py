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
from fused_lora.checkpoints.changes import Item, rows_of
from fused_lora.checkpoints.check import adapters_of_rows, read_rows
from fused_lora.checkpoints.experts import name_parameters, parameters_by_config
from fused_lora.checkpoints.factors import decompose, effective_rank, layer_of, norm, product
from fused_lora.checkpoints.files import Checkpoint, Report, open_checkpoint
from fused_lora.checkpoints.planning import Changes, plan_changes
from fused_lora.modules.config import is_neutral
from fused_lora.modules.names import some
from fused_lora.modules.tree import bare_module
from fused_lora.ops.merge import exact

_OUTLIER = 20.0  # times the median norm
_SAME = 1e-6  # of a layer's norm
_FACTORS, _DORA = "s B A", "c (W + s B A) - W"  # what a norm is of; c = magnitude / ||W + s B A||, by rows


@dataclass
class AdapterReport(Report):
    """What an adapter holds.

    Attributes:
        path, sha256: the folder, and of its weights. config: the entries that are not neutral.
        layers: one dict for each layer: path, kind ("LoRA", "DoRA", "LoRA on an embedding", "LoRA on experts"), r,
            scaling, dtype, shape of the weight ([N, K], [num_embeddings, embedding_dim] or [experts, N, K]).
            parameter: the path of the stacked one, where a base tells it. norm: Frobenius, of what ``norm_of`` says:
            "s B A", and for DoRA with a base that it fits "c (W + s B A) - W". largest: singular value of s B A.
            effective_rank: of s B A; of experts their mean.
        targets, ranks: how many layers have this last name, this rank. parameters: numbers in the file.
        beside: keys that belong to no layer, and biases. copies: keys of the base's own weights, which PEFT saves
            beside the LoRA of embeddings and heads. oddities: what looks wrong, in words.
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
    copies: list[str] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)
    fits: bool | None = None
    why_not: str | None = None


@dataclass
class AdapterDiff(Report):
    """How two adapters differ.

    Attributes:
        a, b: their folders. only_a, only_b: layers that one of them has. config: entries that differ, {name: [a, b]}.
            A layer of a parameter has the parameter's path, where the file tells which it is.
        beside: keys that are not of a layer's factors or magnitude, where the tensors differ or one has none.
        layers: of each common layer: path, norms of both deltas s B A and of their difference, the cosine between
            them, and magnitudes_apart, the norm of the difference of DoRA's magnitudes (0 of a layer without one);
            None where neither has one.
        same: whether the two add the same: deltas and magnitudes up to 1e-6 of a layer's, tensors beside them to the
            bit. Entries of the config do not count, but for those that say which rows change:
            ``trainable_token_indices`` and ``alora_invocation_tokens``.
    """

    a: str
    b: str
    only_a: list[str]
    only_b: list[str]
    config: dict[str, list[Any]]
    layers: list[dict[str, Any]]
    beside: list[str]
    same: bool


def inspect_adapter(adapter: str | os.PathLike, base: str | os.PathLike | None = None) -> AdapterReport:
    """Read an adapter's files, layer by layer.

    Args:
        adapter: its folder. base: a checkpoint's folder or file; the report then says whether it fits, and why not.

    Raises AdapterError where a file is malformed or of a kind that is not supported, or the config alone does not tell
    the rank of stacked experts.
    """
    with open_adapters(adapter) as (opened,):
        changes, why_not, dora = None, None, {}
        if base is not None:
            checkpoint = open_checkpoint(base)
            try:
                changes = plan_changes(checkpoint, [opened])
                dora = _dora_norms(checkpoint, changes)
            except AdapterError as error:
                why_not = str(error)
        parameters_by_config(opened.plan)
        parameters = {} if changes is None else changes.parameters
        layers = [_describe(opened, path, parameters.get(path), dora.get(path)) for path in opened.plan.slots]
        names = [layer["parameter"] or bare_module(layer["path"]) for layer in layers]
        return AdapterReport(
            opened.folder,
            opened.sha256,
            {n: value for n, value in opened.plan.config.to_dict().items() if not is_neutral(value)},
            layers,
            dict(Counter(name.rpartition(".")[2] for name in names)),
            dict(Counter(layer["r"] for layer in layers)),
            sum((e.end - e.begin) // e.dtype.itemsize for e in opened.plan.entries.values()),
            _beside(opened),
            list(opened.plan.copies.values()),
            _oddities(layers),
            None if base is None else changes is not None,
            why_not,
        )


def diff_adapters(a: str | os.PathLike, b: str | os.PathLike) -> AdapterDiff:
    """Compare what two adapters add, layer by layer. Ranks and factors may differ where the deltas do not.

    Raises AdapterError where a file is malformed, or a layer has other sizes in the other adapter.
    """
    with open_adapters([a, b]) as (first, second):
        name_parameters([first, second], whole=False)
        paths = [path for path in first.plan.slots if path in second.plan.slots]
        layers, alike = [], []
        for path in paths:
            check_sizes(first, second, path)
            one, two = layer_of(first, path), layer_of(second, path)
            norms, inner = (norm(one), norm(two)), product(one, two)
            apart = max(0.0, norms[0] ** 2 + norms[1] ** 2 - 2 * inner) ** 0.5
            cosine = inner / (norms[0] * norms[1]) if norms[0] * norms[1] else None
            layer = {"path": path, "norm_a": norms[0], "norm_b": norms[1], "apart": apart, "cosine": cosine}
            magnitudes = [_magnitude(adapter, path) for adapter in (first, second)]
            dora = any(m is not None for m in magnitudes)
            one, two = (torch.zeros(1, device="cpu") if m is None else m for m in magnitudes)
            layers.append({**layer, "magnitudes_apart": (one - two).norm().item() if dora else None})
            alike.append(apart <= _SAME * norms[0] and (not dora or (one - two).norm() <= _SAME * one.norm()))
        entries = [plan.config.to_dict() for plan in (first.plan, second.plan)]
        differ = {n: [e.get(n) for e in entries] for n in {**entries[0], **entries[1]}}
        differ = {name: values for name, values in differ.items() if values[0] != values[1]}
        only = [[p for p in x.plan.slots if p not in y.plan.slots] for x, y in ((first, second), (second, first))]
        others = [{key: x.tensor(key) for key in (*_beside(x), *x.plan.copies.values())} for x in (first, second)]
        beside = [k for k in {**others[0], **others[1]} if not _same_tensor(*(held.get(k) for held in others))]
        rows = "trainable_token_indices" in differ or "alora_invocation_tokens" in differ
        same = all(alike) and not (beside or any(only) or rows)
        return AdapterDiff(first.folder, second.folder, only[0], only[1], differ, layers, beside, same)


def check_sizes(first: AdapterFile, other: AdapterFile, path: str) -> None:
    """Raise AdapterError unless a layer has the same K and N in both, and both or none are of an embedding."""
    (experts, _, *wanted), (theirs, _, *found) = first.sizes(path), other.sizes(path)
    embedded = [path in adapter.plan.embeddings for adapter in (first, other)]
    if (experts, wanted, embedded[0]) != (theirs, found, embedded[1]):
        what, got = (
            f"{[n, *size] if n > 1 else size}{' of an embedding' * embedding}"
            for n, size, embedding in ((experts, wanted, embedded[0]), (theirs, found, embedded[1]))
        )
        key = other.plan.slots[path]["lora_A"]
        raise AdapterError(other.plan.weights, key, f"K, N of {what} as in {first.folder!r}", got)


def _beside(adapter: AdapterFile) -> list[str]:
    """Keys that are no factor or magnitude of a layer, and no copy of the base's weight."""
    parts = ("lora_A", "lora_B", "lora_magnitude")
    used = {keys[part] for keys in adapter.plan.slots.values() for part in parts if part in keys}
    return [key for key in adapter.plan.entries if key not in used and key not in adapter.plan.copies.values()]


def _magnitude(adapter: AdapterFile, path: str) -> Tensor | None:
    key = adapter.plan.slots[path].get("lora_magnitude")
    return None if key is None else adapter.tensor(key).double()


def _dora_norms(base: Checkpoint, changes: Changes) -> dict[str, float]:
    """{path of a DoRA layer: norm of what it changes}, in fp64, a few rows of the base at a time."""
    squares: dict[str, float] = {}
    for change in changes.by_name.values():
        shard, entry = base.tensors[change.source]
        rows = rows_of(Item(change.name, change, entry, entry.dtype, changes.packed.get(change.source)))
        with open(shard.path, "rb", buffering=0) as file:
            for segment in change.segments:
                path = segment.terms[0].path
                for first in range(segment.first, segment.stop, rows.step) if segment.terms[0].dora else ():
                    stop = min(first + rows.step, segment.stop)
                    at = shard.data + entry.begin
                    W = read_rows(shard.path, file.fileno(), at, rows, first, stop).double()
                    delta = exact.change(W, adapters_of_rows(change, segment, first, stop)).delta(W)
                    squares[path] = squares.get(path, 0.0) + delta.square().sum().item()
    return {path: square**0.5 for path, square in squares.items()}


def _same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _describe(adapter: AdapterFile, path: str, parameter: str | None, dora: float | None) -> dict[str, Any]:
    """One layer; ``dora``: the norm of its change, where the base is known and it is DoRA."""
    plan, (experts, r, K, N) = adapter.plan, adapter.sizes(path)
    kind, shape = "LoRA", [N, K]
    if path in plan.embeddings:
        kind, shape = "LoRA on an embedding", [K, N]
    elif path in plan.stacks and experts > 1:  # not a router, a matrix
        kind, shape = "LoRA on experts", [experts, N, K]
    elif "lora_magnitude" in plan.slots[path]:
        kind = "DoRA"
    S = decompose(layer_of(adapter, path)).S
    dtype = str(plan.entries[plan.slots[path]["lora_A"]].dtype).removeprefix("torch.")
    found = {"path": path, "kind": kind, "r": r, "shape": shape, "dtype": dtype, "scaling": adapter.scaling(path)}
    norm_of, size = (_FACTORS, S.square().sum().sqrt().item()) if dora is None else (_DORA, dora)
    found |= {"norm": size, "norm_of": norm_of, "largest": S.max().item(), "effective_rank": effective_rank(S)}
    return {**found, "parameter": parameter}


def _magnitude_hides(layer: dict[str, Any]) -> bool:
    """Whether a DoRA layer may change the weight although s B A is 0, which only a base tells."""
    return layer["kind"] == "DoRA" and layer["norm_of"] == _FACTORS


def _oddities(layers: list[dict[str, Any]]) -> list[str]:
    found = []
    if still := [layer["path"] for layer in layers if layer["norm"] == 0 and not _magnitude_hides(layer)]:
        found.append(f"{len(still)} of {len(layers)} layers add nothing (untrained?): {some(still)}")
    if wide := [layer["path"] for layer in layers if layer["r"] > min(layer["shape"][-2:])]:
        found.append(f"the rank is above the layer's own size: {some(wide)}")
    middle = sorted(layer["norm"] for layer in layers)[len(layers) // 2]
    if large := [layer["path"] for layer in layers if layer["norm"] > _OUTLIER * middle > 0]:
        found.append(f"a norm above {_OUTLIER:g} times the median, {middle:.3g}: {some(large)}")
    scalings = Counter(layer["scaling"] for layer in layers)
    if extreme := [f"{s:g}" for s in scalings if not 1e-3 <= abs(s) <= 1e2]:
        found.append(f"an unusual scaling: {some(extreme)}")
    return found
