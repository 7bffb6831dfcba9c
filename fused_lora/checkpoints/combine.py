"""New adapters out of others: combinations as PEFT's add_weighted_adapter makes them, lower ranks, and an adapter out
of a base and what was fine-tuned from it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_lora.adapters.checkpoint import CONFIG_NAME, path_text
from fused_lora.adapters.errors import AdapterError
from fused_lora.adapters.expert_files import pack
from fused_lora.checkpoints.adapter_file import AdapterFile, Weighted, open_adapters
from fused_lora.checkpoints.changes import CAST
from fused_lora.checkpoints.experts import common_parameters
from fused_lora.checkpoints.factors import Layer, Parts, decompose, joined, largest_parts
from fused_lora.checkpoints.files import Checkpoint, Report, open_checkpoint
from fused_lora.checkpoints.inspect import check_sizes
from fused_lora.checkpoints.loading import model_names
from fused_lora.checkpoints.names import HEADS, is_embedding, is_transposed
from fused_lora.checkpoints.output import check_new
from fused_lora.checkpoints.planning import names_of
from fused_lora.checkpoints.quantised import find_quantised
from fused_lora.checkpoints.write import Beside, write_layers
from fused_lora.modules.arguments import check_int
from fused_lora.modules.config import LoraConfig, check_number, check_rank
from fused_lora.modules.names import some

_SEEDS = -(1 << 63), (1 << 64) - 1  # that torch's generators take
METHODS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS += ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


@dataclass
class NewAdapter(Report):
    """What was written: the folder, and of each layer its path, rank and the share of the squared norm that is kept
    (None where nothing was left out). ``left_out``: tensors that an adapter cannot hold."""

    out: str
    layers: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def combine_adapters(
    adapters: Iterable[Weighted],
    out: str | os.PathLike,
    method: str = "svd",
    *,
    base: str | os.PathLike | None = None,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> NewAdapter:
    """Combine adapters into one, layer by layer, by the rules of PEFT's ``add_weighted_adapter``.

    Taken is what has a meaning there: LoRA on linear layers and embeddings, aLoRA with one invocation. So is LoRA on
    parameters (``target_parameters``), which that method refuses: each expert is combined as a layer of its own. Copies
    of the base's weights, which PEFT saves beside the LoRA of embeddings and heads, are carried along.

    Args:
        adapters: pairs (folder, weight), or folders with weight 1.
        out: the new folder, which must not exist, or be empty.
        method: "cat" (exact, the ranks add up), "svd" (the nearest of a rank), "linear" (sums of A and of B), "ties",
            "dare_linear", "dare_ties", "magnitude_prune", or one of the last four with "_svd": on deltas, not factors.
        base: a checkpoint, whose sizes tell which parameter is whose where the files do not.
        rank: of the result, for the svd kinds; None: the largest rank of the adapters.
        density: share of the numbers that pruning keeps, in (0, 1], for ties, dare and magnitude_prune.
        majority_sign: "total" or "frequency", for ties.
        seed: of what DARE drops. dtype: of the file, fp32, bf16 or fp16.

    Raises:
        AdapterError: a file is malformed, or the adapters have a layer in other sizes, other copies of a base's weight
            or other invocations, or hold more than A and B; or it is DoRA; or which parameter is whose is not known.
        ValueError: an unknown method, or a rank or density that does not belong to it or is out of range; different
            ranks with a kind that adds factors; or ``out`` lies in an adapter or the base.
        FileExistsError: ``out`` holds something.
    """
    folder = path_text("out", out)
    _check_method(method, rank, density, majority_sign)
    check_int("seed", seed, *_SEEDS)
    draw = torch.Generator().manual_seed(seed)
    with open_adapters(adapters) as opened:
        model = None if base is None else open_checkpoint(base)
        check_new("out", folder, [*(a.folder for a in opened), *([model.folder] if model and model.whole else ())])
        names = None if model is None else names_of(model, find_quantised(model))
        copies, experts = _check_kinds(opened), common_parameters(opened, names)
        if not any(adapter.acts() for adapter in opened):
            raise ValueError(
                "adapters: expected one that has an effect, got scalings, weights or lora_A and lora_B of 0"
            )
        paths = dict.fromkeys(path for adapter in opened for path in adapter.plan.slots)
        holders = {path: [a for a in opened if path in a.plan.slots] for path in paths}
        most = max(a.sizes(path)[1] for path, held in holders.items() for a in held) if rank is None else rank
        shapes = {}
        for path, held in holders.items():
            for other in held[1:]:
                check_sizes(held[0], other, path)
            shapes[path] = (_rank_of(method, most, path, held), *held[0].sizes(path)[2:])
        report = NewAdapter(folder)
        mix = partial(_mixed, method.removesuffix("_svd"), density=density, sign=majority_sign, draw=draw)

        def make(path: str) -> tuple[Tensor, Tensor]:
            held, r = holders[path], shapes[path][0]
            factors = [[adapter.experts(path, part) for part in ("lora_A", "lora_B")] for adapter in held]
            made, values = [], []
            for each in zip(*(zip(*pair, strict=True) for pair in factors), strict=True):
                found = _of_expert(method, held, path, [(A.float(), B.float()) for A, B in each], mix)
                if isinstance(found, Parts):
                    values.append(found.S)
                    found = _best(found, r)
                made.append(found)
            kept = _kept(torch.stack(values), r) if values else None
            report.layers.append({"path": path, "r": r, "kept": kept})
            A, B = (torch.stack(parts) for parts in zip(*made, strict=True))
            return pack(A, B)

        embeddings = {path for adapter in opened for path in adapter.plan.embeddings}
        config = opened[0].plan.config
        write_layers(folder, config, shapes, make, dtype, embeddings=embeddings, experts=experts, beside=copies)
    return report


def shrink_adapter(
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    rank: int,
    *,
    base: str | os.PathLike | None = None,
    dtype: torch.dtype = torch.float32,
) -> NewAdapter:
    """The nearest adapter of at most this rank, layer by layer, and the share of the squared norm that it keeps.

    ``base`` is that of :func:`combine_adapters`. Raises as it does, and ValueError for a rank below 1.
    """
    return combine_adapters([adapter], out, "svd", base=base, rank=rank, dtype=dtype)


def extract_adapter(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    out: str | os.PathLike,
    rank: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> NewAdapter:
    """An adapter out of two checkpoints: the ``rank`` largest singular values of what fine-tuning changed.

    Weights [N, K] that differ get a layer, embeddings do not. What else differs is in ``left_out``, as embeddings and
    heads of a resized vocabulary. Layers have the names of transformers' model, where it knows the base's config.
    Matrices above 1024 rows and columns are decomposed by random projection; ``seed`` seeds it.

    Raises:
        AdapterError: a file is malformed, or the two do not have the same tensors; or nothing differs.
        ValueError: a rank below 1, or ``out`` lies in a checkpoint.
        FileExistsError: ``out`` holds something.
    """
    folder = path_text("out", out)
    check_rank("rank", rank)
    check_int("seed", seed, *_SEEDS)
    draw = torch.Generator().manual_seed(seed)
    old, new = open_checkpoint(base), open_checkpoint(tuned, "tuned")
    check_new("out", folder, [model.folder for model in (old, new) if model.whole])
    alone = sorted(old.tensors.keys() ^ new.tensors.keys())
    if differ := [name for name in alone if not _is_head(name)]:
        raise AdapterError(new.folder, differ[0], f"the tensors of {old.folder!r}", f"others: {some(differ)}")
    shapes, stored, turned, report = {}, {}, set(), NewAdapter(folder)
    report.left_out += [name for name in alone if not _is_tied(old if name in old.tensors else new, name)]
    names = model_names(old)
    for name, (shard, entry) in old.tensors.items():
        if name in alone:
            continue
        other = new.tensors[name][1]
        if other.shape != entry.shape:
            if other.shape[1:] != entry.shape[1:] or not (is_embedding(name) or _is_head(name)):
                raise AdapterError(new.tensors[name][0].path, name, f"a shape {list(entry.shape)}", list(other.shape))
            report.left_out.append(name)  # of a resized vocabulary
            continue
        if _same(shard.read(name), new.tensors[name][0].read(name)):
            continue
        weight = name.endswith(".weight") and len(entry.shape) == 2 and not is_embedding(name)
        if weight and entry.dtype in CAST and other.dtype in CAST:
            path = names.get(name, name).removesuffix(".weight")
            stored[path] = name
            if is_transposed(name.removesuffix(".weight"), old.config, False):
                turned.add(path)
            N, K = entry.shape[::-1] if path in turned else entry.shape
            shapes[path] = (min(rank, N, K), K, N)
        else:
            report.left_out.append(name)
    if not shapes:
        raise AdapterError(new.folder, None, "weights that differ from the base's", "none")

    def make(path: str) -> tuple[Tensor, Tensor]:
        name = stored[path]
        delta = new.tensors[name][0].read(name).float() - old.tensors[name][0].read(name).float()
        if not bool(delta.isfinite().all()):
            raise AdapterError(new.tensors[name][0].path, name, "weights with a finite difference", "NaN or Inf")
        delta = delta.t() if path in turned else delta
        parts, total = largest_parts(delta, shapes[path][0], draw), delta.double().square().sum().item()
        kept = parts.S.double().square().sum().item() / total if total else None
        report.layers.append({"path": path, "r": shapes[path][0], "kept": kept})
        return _best(parts, shapes[path][0])

    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=set(), fan_in_fan_out=bool(turned), base_model_name_or_path=old.folder
    )
    write_layers(folder, config, shapes, make, dtype)
    return report


def _is_head(name: str) -> bool:
    return name.endswith(".weight") and name.removesuffix(".weight").rpartition(".")[2] in HEADS


def _is_tied(model: Checkpoint, name: str) -> bool:
    """Whether a head is the model's input embedding, stored once more."""
    shard, entry = model.tensors[name]
    names = names_of(model, {})
    path = names.embedding(entry.shape)
    embedding = None if path is None else names.stored(f"{path}.weight")
    return embedding is not None and _same(shard.read(name), model.tensors[embedding][0].read(embedding))


def _check_method(method: Any, rank: Any, density: Any, majority_sign: Any) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r:.100}")
    if rank is not None:
        check_rank("rank", rank)
        if not method.endswith("svd"):
            raise ValueError(f"rank: expected none with method {method!r}, got {rank}")
    prunes = method not in ("linear", "cat", "svd")
    if density is not None:
        check_number("density", density)
    if prunes != (density is not None) or (density is not None and not 0 < density <= 1):
        wanted = "a share above 0, at most 1" if prunes else "none"
        raise ValueError(f"density: expected {wanted} with method {method!r}, got {density!r}")
    if majority_sign not in ("total", "frequency"):
        raise ValueError(f"majority_sign: expected 'total' or 'frequency', got {majority_sign!r:.100}")


def _check_kinds(adapters: Sequence[AdapterFile]) -> dict[str, Beside]:
    """The copies of the base's weights by key; AdapterError for what PEFT does not combine, or not as a whole."""
    copies: dict[str, tuple[AdapterFile, str]] = {}
    for adapter in adapters:
        plan, config = adapter.plan, os.path.join(adapter.folder, CONFIG_NAME)
        if plan.config.use_dora:
            expected = "null or false: factors alone are combined or shrunk, so the magnitudes would be lost"
            raise AdapterError(config, "use_dora", expected, True)
        tokens, first = plan.config.alora_invocation_tokens or None, adapters[0].plan.config.alora_invocation_tokens
        if tokens != (first or None):
            expected = f"the invocation of {adapters[0].folder!r}, {first}"
            raise AdapterError(config, "alora_invocation_tokens", expected, tokens)
        used = {keys[part] for keys in plan.slots.values() for part in ("lora_A", "lora_B")} | {*plan.copies.values()}
        if more := [key for key in plan.entries if key not in used]:
            raise AdapterError(plan.weights, more[0], "lora_A and lora_B alone", f"{some(more)}")
        for path, key in plan.copies.items():
            other, name = copies.setdefault(path, (adapter, key))
            if other is not adapter and not _same(other.tensor(name), adapter.tensor(key)):
                raise AdapterError(plan.weights, key, f"the base's weight as in {other.folder!r}", "another")
    return {key: (adapter.plan.entries[key], partial(adapter.tensor, key)) for adapter, key in copies.values()}


def _rank_of(method: str, most: int, path: str, held: Sequence[AdapterFile]) -> int:
    ranks = [adapter.sizes(path)[1] for adapter in held]
    if method == "cat":
        return sum(ranks)
    if method == "svd" or method.endswith("_svd"):
        return min(most, *held[0].sizes(path)[2:], sum(ranks) if method == "svd" else most)
    if len(set(ranks)) > 1:
        raise AdapterError(held[0].plan.weights, path, f"equal ranks for method {method!r}", ranks)
    return ranks[0]


def _best(parts: Parts, rank: int) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of the nearest delta of this rank."""
    return parts.Vh[:rank].float(), (parts.U[:, :rank] * parts.S[:rank]).float()


def _kept(S: Tensor, rank: int) -> float | None:
    """The share of the squared norm that the first ``rank`` of the singular values [experts, n] keep."""
    total = S.square().sum().item()
    return S[:, :rank].square().sum().item() / total if total else None


def _of_expert(
    method: str,
    held: Sequence[AdapterFile],
    path: str,
    factors: Sequence[tuple[Tensor, Tensor]],
    mix: Callable[[list[Tensor], list[float]], Tensor],
) -> tuple[Tensor, Tensor] | Parts:
    """What becomes of (lora_A [r, K], lora_B [N, r]) of several adapters, or what the nearest of a rank is part of."""
    scales = [adapter.scaling(path) for adapter in held]
    if method == "cat":  # the scaling goes into A, as in PEFT
        A = torch.cat([A * scale for (A, _), scale in zip(factors, scales, strict=True)])
        return A, torch.cat([B for _, B in factors], 1)
    if method == "svd":
        return decompose(joined([Layer(B * s, A) for (A, B), s in zip(factors, scales, strict=True)]))
    if method.endswith("_svd"):
        own = [adapter.scaling(path, weighted=False) for adapter in held]
        deltas = [B * s @ A for (A, B), s in zip(factors, own, strict=True)]
        U, S, Vh = torch.linalg.svd(mix(deltas, [adapter.weight for adapter in held]), full_matrices=False)
        return Parts(U, S, Vh)
    # A and B one by one, each with the square root of weight and scaling, and the sign on A
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    return mix([A for A, _ in factors], signed), mix([B for _, B in factors], roots)


def _mixed(
    method: str, tensors: list[Tensor], weights: list[float], density: float | None, sign: str, draw: torch.Generator
) -> Tensor:
    """A weighted sum of tensors, pruned before it (TIES: arXiv:2306.01708, DARE: arXiv:2311.03099)."""
    prune: Callable[[Tensor, Any, torch.Generator], Tensor] = _dropped if method.startswith("dare") else _largest
    stacked = torch.stack(tensors if density is None or density == 1 else [prune(t, density, draw) for t in tensors])
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype, device="cpu").view(-1, *[1] * tensors[0].dim())
    if not method.endswith("ties"):
        return weighted.sum(0)
    votes = stacked.sum(0) if sign == "total" else stacked.sign().sum(0)
    agree = stacked.sign() == torch.where(votes >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float, draw: torch.Generator) -> Tensor:
    kept = tensor.abs().view(-1).topk(int(density * tensor.numel())).indices
    return torch.zeros_like(tensor).view(-1).index_copy_(0, kept, tensor.reshape(-1)[kept]).view_as(tensor)


def _dropped(tensor: Tensor, density: float, draw: torch.Generator) -> Tensor:
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=draw) / density


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype == b.dtype:
        return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    return a.dtype in CAST and b.dtype in CAST and torch.equal(a.float(), b.float())
