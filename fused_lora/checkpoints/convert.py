"""Other programs' LoRA files as PEFT's: kohya's and diffusers' names, state dicts with the names of wrappers."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_lora.adapters.checkpoint import (
    CONFIG_NAME,
    KEY_PREFIX,
    MAX_WEIGHT_BYTES,
    WEIGHTS_NAME,
    Plan,
    RankTable,
    path_text,
    read_config,
    stacks_in,
    with_heads,
)
from fused_lora.adapters.errors import AdapterError
from fused_lora.adapters.expert_files import as_peft
from fused_lora.adapters.tensorfile import EVERY, TensorEntry, open_regular, read_exactly, read_header
from fused_lora.checkpoints.changes import CAST
from fused_lora.checkpoints.experts import by_parameter
from fused_lora.checkpoints.files import Report, open_checkpoint
from fused_lora.checkpoints.names import HEADS, Rename
from fused_lora.checkpoints.output import check_new
from fused_lora.checkpoints.planning import names_of
from fused_lora.checkpoints.quantised import find_quantised
from fused_lora.checkpoints.write import DTYPES, Beside, write_layers, write_stacked
from fused_lora.modules.config import MAX_ALPHA, FieldError, LoraConfig, check_alpha, check_bool
from fused_lora.modules.names import some
from fused_lora.modules.tree import above, bare_path

# end of a key -> which part of a layer it is; the adapter's name may stand before ".weight"
_ENDS = (
    (re.compile(r"\.lora_A(?:\.(?!weight$)[^.]+)?\.weight$"), "A"),
    (re.compile(r"\.lora_B(?:\.(?!weight$)[^.]+)?\.weight$"), "B"),
    (re.compile(r"(?:\.lora\.down|\.lora_down|_lora\.down|\.lora_linear_layer\.down)\.weight$"), "A"),
    (re.compile(r"(?:\.lora\.up|\.lora_up|_lora\.up|\.lora_linear_layer\.up)\.weight$"), "B"),
    (re.compile(r"\.alpha$"), "alpha"),
    (re.compile(r"\.lora_embedding_A(?:\.[^.]+)?$"), "embedding A"),
    (re.compile(r"\.lora_embedding_B(?:\.[^.]+)?$"), "embedding B"),
    (re.compile(r"\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?$"), "magnitude"),
    (re.compile(r"\.base_layer\.weight$"), "copy"),  # of the base's, as PEFT writes it for embeddings and heads
    (re.compile(r"\.base_layer\.bias$"), "copied bias"),  # of a head
)
_COPIES = {"copy": "weight", "copied bias": "bias"}
_KOHYA = re.compile(r"^lora_(?:unet|te\d?|transformer|prior_unet)_")
# where diffusers notes the LoraConfig of a model, or those of a pipeline with "unet." and the like before each field
_NOTED = "lora_adapter_metadata"
_WRAPPERS = re.compile(r"^(?:module|model\.base_model\.model|base_model\.model|_forward_module)\.")


@dataclass
class Converted(Report):
    """What was written: the folder, {path of a layer or parameter: [r, alpha]}, {key of the source: path}, and whether
    a layer got its rank as alpha because nothing said another. stacked: paths of the parameters that single experts
    went into."""

    out: str
    layers: dict[str, list[float]]
    renamed: dict[str, str] = field(default_factory=dict)
    assumed: bool = False
    stacked: list[str] = field(default_factory=list)


def convert_adapter(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    rename: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    lora_alpha: float | None = None,
    stack_experts: bool = False,
) -> Converted:
    """Write a PEFT adapter with the tensors of another kind of LoRA file.

    Known are kohya's keys (``lora_unet_..._to_q.lora_down.weight`` with ``.alpha``), diffusers'
    (``to_q.lora_A.weight``, ``to_q.lora.down.weight``) and state dicts (``lora_A.default.weight``). The names of
    torch.compile, FSDP, DDP, DeepSpeed and PEFT before or inside them go. Every key must be of LoRA on a linear layer
    or a 1x1 convolution, as which PEFT takes it where the base, or without one the file, has four dimensions: lora_A,
    lora_B, alpha. Under PEFT's names it may be of DoRA or of LoRA on an embedding, too, and with the config
    beside it of parameters (``target_parameters``). Copies of the base's weights, which PEFT writes for embeddings and
    heads, are carried along in their dtype. What trains beside LoRA by the config (``bias``, ``lora_bias``, tokens,
    ``modules_to_save``) takes ``dtype``, if one is given. The scaling of a diffusers file is that of the configs in its
    header.

    Args:
        source: a .safetensors file, or a folder with adapter_model.safetensors. An adapter_config.json beside a file of
            that name is read.
        out: the new folder, which must not exist, or be empty.
        base: a checkpoint whose module names kohya's underscores are resolved with, and whose sizes must fit. They
            tell which parameter is whose where the file does not.
        rename: beginnings of paths -> what stands in their place.
        dtype: fp32, bf16 or fp16; None: as the first tensor, fp32 where that is none of them.
        lora_alpha: where neither the file nor its header nor its config has one, not 0; None: the rank, so that the
            scaling is 1.
        stack_experts: layers of single experts (``experts.3.gate_proj``, ``experts.3.w1``) become adapters of the
            stacked parameters that transformers 5 has (``target_parameters``), gate and up of one.

    Raises:
        AdapterError: a malformed file, a key that is not known, a layer without A or B or some without a magnitude, an
            alpha of 0 for all layers, a name that no module of ``base`` has or that two have, sizes that do not fit, a
            wrapper of a parameter that is not known, or one beside single experts that are to be stacked.
        TypeError, ValueError: stack_experts is no bool, lora_alpha no finite number or 0, rename no mapping of names,
            or no path begins with one of its entries; or ``out`` lies in the source or base.
        FileExistsError: ``out`` holds something.
    """
    text, folder = path_text("source", source), path_text("out", out)
    check_bool("stack_experts", stack_experts)
    if lora_alpha is not None:
        check_alpha("lora_alpha", lora_alpha)
        if lora_alpha == 0:
            raise ValueError("lora_alpha: expected another number than 0, with which the adapter has no effect")
    check_new("out", folder, [os.fspath(held) for held in (text, base) if held is not None and os.path.isdir(held)])
    file_path = os.path.join(text, WEIGHTS_NAME) if os.path.isdir(text) else text
    beside = os.path.basename(file_path) == WEIGHTS_NAME  # PEFT's pair: without the config the scaling is lost
    config_path = os.path.join(os.path.dirname(file_path), CONFIG_NAME)
    config, layout = read_config(config_path) if beside and os.path.lexists(config_path) else (None, None)
    table = None if config is None else RankTable(config_path, file_path, config)
    with open_regular(file_path, MAX_WEIGHT_BYTES) as (file, size):
        header = read_header(file_path, file, size, EVERY)
        config = None if config is None else with_heads(config_path, config, header.entries)
        noted = {} if config is not None else _noted(file_path, header.metadata)
        model = None if base is None else open_checkpoint(base)
        weights = {} if model is None else model.tensors
        modules = None if base is None else _by_underscores(weights)
        layers: dict[str, dict[str, str]] = {}
        beginnings, embedded, trained = Rename(rename), set(), {}
        for key in header.entries:
            if config is not None and _trains(config, key):
                path = _path(file_path, key, key, None)
                trained[key] = path if (other := beginnings(path)) is None else other
                continue
            path, part = _split(file_path, key)
            path = _path(file_path, key, path, modules)
            if part.startswith("embedding"):
                embedded.add(path)
                part = part[-1]
            if part in layers.setdefault(path, {}):
                raise AdapterError(file_path, key, f"one {part} of {path!r}", layers[path][part])
            layers[path][part] = key
        if not layers:
            raise AdapterError(file_path, None, "at least one layer", "no tensors")
        taken = {path: key for key, path in trained.items()}
        if lost := [key for key, path in trained.items() if taken[path] != key]:
            raise AdapterError(file_path, lost[0], "a name that no other tensor gets by rename", trained[lost[0]])
        shapes, alphas, unknown = {}, {}, False

        def tensor(key: str) -> Tensor:
            entry = header.entries[key]
            data = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
            file.seek(len(header.raw) + entry.begin)
            read_exactly(file_path, file, data.numpy())
            return data.view(entry.dtype).view(entry.shape)

        for path, parts in layers.items():
            if path.endswith((".base_layer", ".experts")) and (config is None or not config.target_parameters):
                expected = f"a {CONFIG_NAME} beside it whose target_parameters name the parameters of {path!r}"
                raise AdapterError(file_path, next(iter(parts.values())), expected, "none")
            for part in "AB":
                if part not in parts:
                    raise AdapterError(file_path, path, f"a lora_{part}", f"only {some(parts.values())}")
            for part in ("A", "B", "magnitude", *_COPIES):
                if part in parts and not (kind := header.entries[parts[part]].dtype).is_floating_point:
                    raise AdapterError(file_path, parts[part], "a floating dtype", kind)
            if alpha := parts.get("alpha"):
                entry = header.entries[alpha]
                if entry.dtype.is_complex or math.prod(entry.shape) != 1:
                    raise AdapterError(file_path, alpha, "one real number", f"{entry.dtype} {list(entry.shape)}")
            A, B = (_matrix(header.entries[parts[part]].shape) for part in "AB")
            if 0 in (*A, *B):
                key = parts["A" if 0 in A else "B"]
                raise AdapterError(file_path, key, "a matrix with numbers", list(header.entries[key].shape))
            if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
                key = parts["A" if len(A) != 2 else "B"]
                expected = "a linear layer's [r, K]" if len(A) != 2 else f"a linear layer's [N, {A[0]}]"
                raise AdapterError(file_path, key, expected, list(header.entries[key].shape))
        counts: Mapping[str, int] = {}
        if config is not None:
            as_peft(file_path, header.entries, config, layout, KEY_PREFIX, None)  # in no other layout
            slots = {path: {f"lora_{part}": parts[part] for part in "AB"} for path, parts in layers.items()}
            stacks = stacks_in(file_path, slots, config)
            names = names_of(model, find_quantised(model), rename) if model is not None and stacks else None
            plan = by_parameter(Plan(config, file_path, header.entries, slots, {}, {}, {}, stacks=stacks), base=names)
            layers, counts = dict(zip(plan.slots, layers.values(), strict=True)), plan.experts
        in_config = {path if (other := beginnings(path)) is None else other: path for path in layers}
        beginnings.check_used()
        if len(in_config) < len(layers):
            lost = next(iter(layers.keys() - in_config.values()))
            raise AdapterError(
                file_path, layers[lost]["A"], "a name that no other layer gets by rename", beginnings(lost)
            )
        layers = dict(zip(in_config, layers.values(), strict=True))
        experts = {path: counts[named] for path, named in in_config.items() if named in counts}
        embeddings = {path for path, named in in_config.items() if named in embedded}
        convolutions = set()
        for path, parts in layers.items():
            (rows, K), (N, _) = (_matrix(header.entries[parts[part]].shape) for part in "AB")
            count = experts.get(path, 1)
            shapes[path] = (rows // count, K, N)
            wide = weights.get(path if path in experts else f"{path}.weight", (None, None))[1]
            if len(header.entries[parts["A"]].shape if wide is None else wide.shape) == 4:
                convolutions.add(path)
            # of floating weights alone: what is quantised has another shape; transposed as in GPT-2
            if wide is not None and wide.dtype in CAST:
                sizes = _matrix(wide.shape)
                if (math.prod(sizes[:-2]), sorted(sizes[-2:])) != (count, sorted((N, K))):
                    text = f"sizes of {path!r} as in the base, {list(wide.shape)}"
                    raise AdapterError(file_path, parts["B"], text, [count, N, K] if count > 1 else [N, K])
            if "alpha" in parts:
                alphas[path] = float(tensor(parts["alpha"]))
                if not abs(alphas[path]) <= MAX_ALPHA:
                    expected = f"a finite alpha of at most {MAX_ALPHA:.0f} in size"
                    raise AdapterError(file_path, parts["alpha"], expected, alphas[path])
            elif table is not None:
                alphas[path] = table.alpha(in_config[path])
            else:
                alpha = _noted_alpha(noted, _split(file_path, parts["A"])[0], rows)
                unknown = unknown or alpha is None
                alphas[path] = float(rows if lora_alpha is None else lora_alpha) if alpha is None else alpha
        _check_further(file_path, layers, embeddings, header.entries, config)
        if not (trained or any(alphas.values()) or any("magnitude" in parts for parts in layers.values())):
            raise AdapterError(file_path, None, "an alpha other than 0, with which the adapter has no effect", "0")
        first = header.entries[next(iter(layers.values()))["A"]].dtype
        kind = dtype or (first if first in DTYPES else torch.float32)

        def make(path: str) -> tuple[Tensor, Tensor]:
            (_, K, N), parts = shapes[path], layers[path]
            return tensor(parts["A"]).view(-1, K), tensor(parts["B"]).view(N, -1)

        def finite(key: str, dtype: torch.dtype) -> Tensor:
            found = tensor(key).to(dtype)
            if not bool(found.isfinite().all()):
                raise ValueError(f"{key}: expected finite numbers in {dtype}, got others")
            return found

        target = LoraConfig(r=1, lora_alpha=1, target_modules=set())
        if config is not None:
            target = _with_names(config_path, config, trained, beginnings)
        further: dict[str, Beside] = {}
        for path, parts in layers.items():
            if key := parts.get("magnitude"):
                entry = TensorEntry(kind, header.entries[key].shape, 0, 0)
                further[f"{KEY_PREFIX}{path}.lora_magnitude_vector"] = entry, partial(finite, key, kind)
                target = LoraConfig.from_dict({**target.to_dict(), "use_dora": True})
            for part, end in _COPIES.items():
                if key := parts.get(part):
                    entry = header.entries[key]
                    further[f"{KEY_PREFIX}{path}.base_layer.{end}"] = entry, partial(finite, key, entry.dtype)
        for key, path in trained.items():
            entry = header.entries[key]
            held = dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype
            further[f"{KEY_PREFIX}{path}"] = TensorEntry(held, entry.shape, 0, 0), partial(finite, key, held)
        found = shapes, make, kind, alphas
        if not stack_experts:
            kinds = {"embeddings": embeddings, "convolutions": convolutions}
            stacked = write_layers(folder, target, *found, experts=experts, beside=further, **kinds)
        elif further or embeddings or experts or convolutions:
            other = next(iter((*further, *embeddings, *experts, *convolutions)))
            raise AdapterError(file_path, other, "LoRA on linear layers alone with stack_experts", "another kind")
        else:
            stacked = write_stacked(folder, target, *found, source=file_path)
    written = {path: [shapes[path][0], alphas[path]] for path in shapes}
    renamed = trained | {key: path for path, parts in layers.items() for key in parts.values()}
    return Converted(folder, written, renamed, unknown and lora_alpha is None, stacked or [])


def _trains(config: LoraConfig, key: str) -> bool:
    """Whether a key is of a bias, tokens or a module that train beside A and B."""
    if config.lora_bias and key.endswith(".lora_B.bias"):
        return True
    if config.trainable_token_indices and key.endswith(".trainable_tokens_delta"):
        return True
    if config.bias != "none" and key.endswith(".bias") and ".lora_" not in key:
        return True
    if any(end.search(key) for end, _ in _ENDS) or ".lora_" in key:
        return False
    return _under(key, config.modules_to_save or ())


def _under(key: str, names: Iterable[str]) -> bool:
    """Whether a tensor is of a module whose path ends with one of these names, as PEFT reads ``modules_to_save``."""
    ends = tuple(names)
    return any(path.endswith(ends) for path in above(key))


def _with_names(path: str, config: LoraConfig, trained: Mapping[str, str], beginnings: Rename) -> LoraConfig:
    """The config with the names that modules which train beside LoRA have after ``rename``."""

    def renamed(field: str, name: str) -> str:
        lost = [new for key, new in trained.items() if _under(key, [name]) and not _under(new, [name])]
        found = (beginnings(name) or name) if lost else name
        if not all(_under(new, [found]) for new in lost):
            raise AdapterError(path, field, "a module's whole path, where rename changes an end of it", name)
        return found

    fields, tokens = config.to_dict(), config.trainable_token_indices
    if saved := config.modules_to_save:
        fields["modules_to_save"] = [renamed("modules_to_save", name) for name in saved]
    if isinstance(tokens, dict):
        fields["trainable_token_indices"] = {renamed("trainable_token_indices", n): ids for n, ids in tokens.items()}
    return LoraConfig.from_dict(fields)


def _noted(file_path: str, metadata: Mapping[str, str]) -> dict[str, RankTable]:
    """{component of a pipeline, "" in a model's file: its config} of a header of diffusers."""
    if _NOTED not in metadata:
        return {}
    try:
        fields = json.loads(metadata[_NOTED])
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise AdapterError(file_path, _NOTED, "a JSON object", f"{metadata[_NOTED]:.100}")
    found: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        component, _, entry = name.rpartition(".")
        found.setdefault(component, {"peft_type": "LORA"})[entry] = value
    try:
        configs = {component: LoraConfig.from_dict(entries) for component, entries in found.items()}
    except FieldError as error:
        raise AdapterError(file_path, f"{_NOTED}: {error.field}", error.expected, error.found) from None
    return {name: RankTable(file_path, file_path, config, f"{_NOTED}: ") for name, config in configs.items()}


def _noted_alpha(tables: Mapping[str, RankTable], path: str, r: int) -> float | None:
    """The alpha that gives a layer without rsLoRA the scaling of its config."""
    for component, table in tables.items():
        if not component or path.startswith(f"{component}."):
            alpha = table.alpha(path.removeprefix(f"{component}."))
            return alpha * r**0.5 if table.config.use_rslora else alpha
    return None


def _split(file_path: str, key: str) -> tuple[str, str]:
    """(path, which part of the layer) of a key."""
    for end, part in _ENDS:
        if found := end.search(key):
            return key[: found.start()].replace(".processor.to_", ".to_"), part
    expected = "lora_A, lora_B, alpha or a magnitude of a linear layer, or LoRA on an embedding"
    raise AdapterError(file_path, key, expected, "another kind of key")


def _check_further(
    file_path: str,
    layers: Mapping[str, Mapping[str, str]],
    embeddings: Container[str],
    entries: Mapping[str, TensorEntry],
    config: LoraConfig | None,
) -> None:
    """What may be beside A and B: a magnitude of all linear layers or none, copies of embeddings and heads."""
    dora = any("magnitude" in parts for parts in layers.values()) or (config is not None and config.use_dora)
    for path, parts in layers.items():
        key = parts.get("magnitude")
        sizes = entries[parts["B"]].shape[0], entries[parts["A"]].shape[1]
        wanted = {"copy": sizes[::-1] if path in embeddings else sizes, "copied bias": sizes[:1]}
        for part, end in _COPIES.items():
            if (copied := parts.get(part)) is None:
                continue
            if path not in embeddings and path.rpartition(".")[2] not in HEADS:
                expected = f"a base's {end} of an embedding or a head alone"
                raise AdapterError(file_path, copied, expected, "another layer's")
            if entries[copied].shape != wanted[part]:
                text = f"a base's {end} {list(wanted[part])}"
                raise AdapterError(file_path, copied, text, list(entries[copied].shape))
        if path in embeddings and dora:
            raise AdapterError(file_path, parts["A"], "LoRA on linear layers alone beside DoRA", "an embedding")
        if dora and (key is None or entries[key].shape != (entries[parts["B"]].shape[0],)):
            found = "none" if key is None else list(entries[key].shape)
            raise AdapterError(file_path, key or path, "a magnitude [N] of each layer of DoRA", found)


def _path(file_path: str, key: str, path: str, modules: Mapping[str, list[str]] | None) -> str:
    path = bare_path(path)
    while found := _WRAPPERS.match(path):
        path = path[found.end() :]
    if found := _KOHYA.match(path):
        if modules is None:
            raise AdapterError(file_path, key, "names with dots, or a base to resolve kohya's underscores with", path)
        places = modules.get(path[found.end() :], [])
        if len(places) != 1:
            raise AdapterError(file_path, key, "the name of one module of the base", some(places))
        path = places[0]
    return path


def _by_underscores(tensors: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in tensors:
        path = bare_path(name.removesuffix(".weight"))
        if name.endswith(".weight"):
            found.setdefault(path.replace(".", "_"), []).append(path)
    return found


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution is a linear layer."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
