"""Read PEFT adapter checkpoints: adapter_config.json + adapter_model.safetensors, with every entry checked.

All checks against the config and the model come before the model is changed. Nothing in a file is run: no pickle and no
import. The layers are those that have tensors, and a tensor's shape gives the rank. An alpha_pattern is applied in a
bounded number of steps (``patterns``).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from fused_lora.adapters.errors import AdapterError
from fused_lora.adapters.expert_files import LAYOUT, LAYOUTS, Stacked, Stacks, as_peft
from fused_lora.adapters.kinds import not_read
from fused_lora.adapters.patterns import PatternTable
from fused_lora.adapters.tensorfile import (
    DTYPES,
    LFS_POINTER,
    POINTER,
    TensorEntry,
    check_unchanged,
    open_regular,
    parse_json,
    read_exactly,
    read_header,
    read_tensors,
    state_of,
)
from fused_lora.modules.auxiliary import TOKENS_END
from fused_lora.modules.config import HEADS, MAX_RANK, FieldError, LayerTensors, LoraConfig
from fused_lora.modules.names import renamed, some
from fused_lora.modules.tree import above, bare_module, own_path

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHT_BYTES = 16 << 30
SLOTS = {  # end of a key -> field of LayerTensors
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "lora_bias",
    ".base_layer.bias": "base_bias",
    ".lora_magnitude_vector": "lora_magnitude",
}
EMBEDDING_SLOTS = {".lora_embedding_A": "lora_A", ".lora_embedding_B": "lora_B"}
_MAX_PATTERN_CHECKS = 2_000_000
_LISTED = 1000  # entries of a folder that are looked at for a message


class Adapter(NamedTuple):
    """A checkpoint: its config, the tensors of each module path, with ``bias="all"`` the biases of other modules by
    parameter path, what trained beside LoRA (modules_to_save, trainable_token_indices) by key without prefix, and
    copies of the base's parameters by their paths. Of stacked experts the path is that of the parameter."""

    config: LoraConfig
    layers: dict[str, LayerTensors]
    biases: dict[str, torch.Tensor]
    beside: dict[str, torch.Tensor]
    copies: Mapping[str, torch.Tensor] = MappingProxyType({})


class Plan(NamedTuple):
    """What the file headers say before a tensor is read: for each path its keys by field, its rank and its alpha;
    the keys of what trained beside LoRA, by key without prefix; the keys that ``allow_partial`` leaves out; how the
    base was quantised, by path; the keys of copies of the base's parameters, by their paths; the paths that are
    embeddings, whose lora_A is [r, num_embeddings] and lora_B [embedding_dim, r]; of stacked experts, how many by the
    parameter's path; and the paths that are PEFT's wrappers of parameters (target_parameters), with the names that the
    parameter may have, where no model says which. Of these the rank is not known yet: lora_A [experts * r, K] and
    lora_B [N, r * experts] do not tell it."""

    config: LoraConfig
    weights: str
    entries: dict[str, TensorEntry]
    slots: dict[str, dict[str, str]]
    biases: dict[str, str]
    ranks: dict[str, tuple[int, float]]
    beside: dict[str, str]
    left_out: tuple[str, ...] = ()
    base: Mapping[str, Mapping[str, str]] = MappingProxyType({})
    copies: Mapping[str, str] = MappingProxyType({})
    embeddings: Set[str] = frozenset()
    experts: Mapping[str, int] = MappingProxyType({})
    stacks: Mapping[str, tuple[str, ...]] = MappingProxyType({})


def read_adapter(directory: str | os.PathLike, *, max_bytes: int = MAX_WEIGHT_BYTES) -> Adapter:
    """The checkpoint in ``directory``, on the CPU, in the dtypes of the file.

    Args:
        directory: local folder with adapter_config.json and adapter_model.safetensors as PEFT (0.10 or later) or
            ``save_adapter`` writes them.
        max_bytes: largest weights file that is read.

    Raises:
        AdapterError: a file is malformed. The error has file, key, expected and found.
    """
    return read_checked(directory, max_bytes, lambda plan: plan)[0]


def of_another_base(trained_on: str | None, model: str) -> bool:
    """Whether an adapter's config names another base than ``model``. Both may be folders: their last parts count."""
    return bool(trained_on) and os.path.basename(trained_on.rstrip("/")) != os.path.basename(model.rstrip("/"))


def path_text(name: str, path: str | os.PathLike) -> str:
    """A path as a str. TypeError for what is none."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"{name}: expected a path, got {path!r}")
    return os.fsdecode(path)


def read_checked(
    directory: str | os.PathLike,
    max_bytes: int,
    check: Callable[[Plan], Plan],
    *,
    inside: str | None = None,
    tensors: bool = True,
    allow_partial: bool = False,
    all_kinds: bool = False,
    stacks: Stacks | None = None,
    modules: Container[str] = (),
) -> tuple[Adapter, Plan]:
    """``read_adapter`` with a check of the headers before any tensor is read; without ``tensors`` that is all.

    ``check`` returns the plan, or one of fewer layers. Both files must lie in the folder ``inside``, if given, once all
    links are followed. ``allow_partial`` leaves out keys that are not read, copies too, instead of refusing the file.
    ``all_kinds``: the file may have LoRA on embeddings and on parameters (``target_parameters``), too, and hold the
    weights of layers that it has LoRA for, as PEFT writes them for an output layer; whoever asks for these compares
    them with the model's. ``stacks``: which parameters of the model ``target_parameters`` are. ``modules``: the paths
    of the model, by which layers are called whose names have another beginning in other releases of transformers.
    """
    folder, tries = path_text("directory", directory), 5
    while True:
        with _folder(folder) as dir_fd:
            try:
                return _read_once(
                    folder, dir_fd, max_bytes, check, inside, tensors, allow_partial, all_kinds, stacks, modules
                )
            except AdapterError:
                tries -= 1
                # a save that replaced the folder meanwhile has deleted the one that is being read
                if not tries or not _replaced(folder, dir_fd):
                    raise


def _read_once(
    folder: str,
    dir_fd: int | None,
    max_bytes: int,
    check: Callable[[Plan], Plan],
    inside: str | None,
    with_tensors: bool,
    allow_partial: bool,
    all_kinds: bool,
    stacks_of: Stacks | None,
    modules: Container[str],
) -> tuple[Adapter, Plan]:
    config_path = os.path.join(folder, CONFIG_NAME)
    if not _exists(config_path, dir_fd):
        found = "none"
        if _exists(os.path.join(folder, "config.json"), dir_fd):
            found = "a model's folder, with config.json"
        elif inner := _inner_adapters(folder, dir_fd):
            found = f"none; it has adapters in {some(inner)}"
        raise AdapterError(folder, None, f"an adapter's folder, with {CONFIG_NAME}", found)
    config, layout = read_config(config_path, dir_fd, inside)
    stacks_of = stacks_of and functools.partial(_stacks, config_path, stacks_of)
    path = os.path.join(folder, WEIGHTS_NAME)
    if not _exists(path, dir_fd):
        raise AdapterError(path, None, "a safetensors file", _instead(folder, dir_fd))
    with open_regular(path, max_bytes, dir_fd, inside) as (file, size):
        state, header = state_of(file.fileno()), read_header(path, file, size)
        entries, config, convert = as_peft(path, header.entries, config, layout, KEY_PREFIX, stacks_of)
        config = with_heads(config_path, config, entries)
        found = _sort_keys(path, entries, config, allow_partial, all_kinds)
        slots, biases, beside, left_out, copies, embeddings = found
        known = _known(config_path, config, stacks_of, all_kinds)
        slots = {known[name].path if name in known else name: keys for name, keys in slots.items()}
        experts = {stack.path: stack.experts for stack in known.values() if stack.path in slots}
        stacks = {} if stacks_of is not None else stacks_in(path, slots, config)
        if names := renamed([name for name in slots if name not in experts], modules):
            _check_patterns(config_path, config, names)
            slots = {names.get(name, name): keys for name, keys in slots.items()}
            paths = {name: name.rpartition(".") for name in copies}
            copies = {f"{names.get(path, path)}.{end}": copies[name] for name, (path, _, end) in paths.items()}
            embeddings = {names.get(name, name) for name in embeddings}
        ranks = _ranks(folder, path, entries, slots, config, experts, stacks)
        others = beside, left_out, header.base, copies, embeddings, experts, stacks
        plan = check(Plan(config, path, entries, slots, biases, ranks, *others))
        if not with_tensors:
            return Adapter(config, {}, {}, {}), plan
        held = read_tensors(path, file, header)
        check_unchanged(path, file.fileno(), state)
        tensors = convert(held)
    layers = {
        name: LayerTensors(**{field: tensors[k] for field, k in keys.items()}) for name, keys in plan.slots.items()
    }
    others = ({name: tensors[key] for name, key in keys.items()} for keys in (plan.biases, plan.beside, plan.copies))
    return Adapter(config, layers, *others), plan


def _names(folder: str, dir_fd: int | None) -> list[str]:
    """What is in the folder, for a message; nothing where it cannot be listed, as once a save has replaced it."""
    try:
        return sorted(os.listdir(folder if dir_fd is None else dir_fd))
    except OSError:
        return []


def _inner_adapters(folder: str, dir_fd: int | None) -> list[str]:
    """The folders in ``folder`` that have an adapter's config, as PEFT writes those of adapters with names."""
    names = _names(folder, dir_fd)[:_LISTED]
    return [name for name in names if os.path.isfile(os.path.join(folder, name, CONFIG_NAME))]


def _instead(folder: str, dir_fd: int | None) -> str:
    """What is in a folder that has no weights of an adapter by PEFT's name."""
    names = _names(folder, dir_fd)
    if PICKLE_NAME in names:
        with open_regular(os.path.join(folder, PICKLE_NAME), sys.maxsize, dir_fd) as (file, _):
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"only {PICKLE_NAME}, {POINTER}"
        load = f'torch.load("{PICKLE_NAME}", "cpu", weights_only=True)'
        convert = f'safetensors.torch.save_file({load}, "{WEIGHTS_NAME}")'
        return f"only {PICKLE_NAME}, a pickle, which is not read; convert it, in its folder: {convert}"
    others = [name for name in names if name.endswith((".safetensors", ".npz", ".gguf"))]
    return f"no such file; the folder has {some(others)}" if others else "no such file, nor other weights"


def read_config(path: str, dir_fd: int | None = None, inside: str | None = None) -> tuple[LoraConfig, str | None]:
    """The config, and how it says that lora_B of stacked experts is packed."""
    with open_regular(path, MAX_CONFIG_BYTES, dir_fd, inside) as (file, size):
        raw = bytearray(size)
        read_exactly(path, file, raw)
    entries = parse_json(path, bytes(raw))
    layout: Any = entries.pop(LAYOUT, None)
    if layout not in (None, *LAYOUTS):
        raise AdapterError(path, LAYOUT, f"one of {', '.join(LAYOUTS)}", layout)
    try:
        return LoraConfig.from_dict(entries), layout
    except FieldError as error:
        found = entries.get(error.field, "no such entry")
        if error.field == "peft_type" and "peft_type" not in entries:
            mlx = ", an adapter of MLX, which mlx_lm.fuse merges into its model" * ("lora_parameters" in entries)
            found = f"no such entry: no config of PEFT{mlx}; it has {some(sorted(entries))}"
        raise AdapterError(path, error.field, error.expected, found) from None


def with_heads(path: str, config: LoraConfig, keys: Iterable[str]) -> LoraConfig:
    """The config, read from ``path``, with the heads of its task in modules_to_save if one of the ``keys`` is of them.

    PEFT's models of a task save their head, and older releases of PEFT do not name it in the config. The bias of one
    may be there by the config's ``bias``.
    """
    heads = tuple(HEADS.get(config.task_type or "", ()))
    whole = [key for key in keys if heads and ".lora_" not in key and not key.endswith(".bias")]
    if not any(under.endswith(heads) for key in whole for under in above(key)):
        return config
    try:
        return config.with_heads()
    except FieldError as error:
        text = f"{error.expected}, as the file has the head of {config.task_type}"
        raise AdapterError(path, error.field, text, error.found) from None


def _sort_keys(
    path: str,
    entries: dict[str, TensorEntry],
    config: LoraConfig,
    allow_partial: bool,
    all_kinds: bool,
) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str], tuple[str, ...], dict[str, str], set[str]]:
    """Keys of each module path by field of LayerTensors, keys of other biases by parameter path, keys of what trained
    beside LoRA, keys left out, keys of copies of the base's by parameter path, and the paths of embeddings."""
    slots: dict[str, dict[str, str]] = {}
    biases: dict[str, str] = {}
    beside: dict[str, str] = {}
    unread: list[str] = []
    wanted = ["lora_A", "lora_B"] + ["lora_bias"] * config.lora_bias + ["lora_magnitude"] * config.use_dora
    named: dict[str, str] = {}
    embedded: dict[str, str] = {}
    plain: dict[str, str] = {}
    slot_ends = SLOTS | EMBEDDING_SLOTS if all_kinds else SLOTS
    for key in entries:
        name = own_path(key)  # older savers wrote the names of torch's wrappers, too
        end = next((end for end in slot_ends if name.endswith(end)), "")
        field = slot_ends.get(end)
        if name in named:
            raise AdapterError(path, key, f"one tensor for {name}", f"a second one beside {named[name]}")
        named[name] = key
        prefixed = name.startswith(KEY_PREFIX)
        name = name.removeprefix(KEY_PREFIX)
        if prefixed and (field in wanted or (field == "base_bias" and config.bias != "none")):
            layer = name.removesuffix(end)
            slots.setdefault(layer, {})[field] = key
            (embedded if end in EMBEDDING_SLOTS else plain)[layer] = key
        elif prefixed and field is None and config.bias == "all" and (name == "bias" or name.endswith(".bias")):
            biases[name] = key
        elif prefixed and field is None and _is_beside(name, config):
            beside[name] = key
        else:
            unread.append(key)
        dtype = entries[key].dtype
        if not dtype.is_floating_point and (name not in beside or name.endswith(TOKENS_END)):
            raise AdapterError(path, key, f"dtype {', '.join(DTYPES)}", str(dtype))
    copies: dict[str, str] = {}
    for key in unread if all_kinds and not allow_partial else ():
        layer, _, end = own_path(key).removeprefix(KEY_PREFIX).rpartition(".")
        layer = layer.removesuffix(".base_layer")
        if end in ("weight", "bias") and layer in slots:
            copies[f"{layer}.{end}"] = key
    unread = [key for key in unread if key not in copies.values()]
    # a layer without one of its parts is another layer, which nobody can mean
    parts = [key for key in unread if key.rpartition(".lora_")[0].removeprefix(KEY_PREFIX) in slots]
    if unread and (parts or not allow_partial or not slots):
        key = (parts or unread)[0]
        ends = ", ".join(end for end, field in SLOTS.items() if field in wanted)
        raise AdapterError(
            path, key, f"a key {KEY_PREFIX}<layer> that ends in {ends}", not_read(unread, key, len(entries))
        )
    if not slots:
        raise AdapterError(path, None, "tensors of at least one layer", "none")
    if config.use_dora and not any("lora_magnitude" in keys for keys in slots.values()):
        raise AdapterError(path, "use_dora", "a lora_magnitude_vector for each layer", "none")
    for name in embedded:
        if name in plain:  # of an embedding alone these are a bias or a magnitude
            raise AdapterError(
                path, plain[name], "lora_embedding_A and lora_embedding_B alone of an embedding", "DoRA or a bias"
            )
    for name, keys in slots.items():
        for field in wanted:
            if field not in keys:
                table = {**EMBEDDING_SLOTS, **SLOTS} if name in embedded else SLOTS
                end = next(end for end, f in table.items() if f == field)
                raise AdapterError(path, f"{KEY_PREFIX}{name}{end}", "a tensor", "no such key")
    return slots, biases, beside, tuple(unread), copies, set(embedded)


def _is_beside(name: str, config: LoraConfig) -> bool:
    """Whether the config says that this tensor trained beside LoRA."""
    if name.endswith(TOKENS_END):
        return config.trainable_token_indices is not None
    ends = tuple(config.modules_to_save or ())
    return any(path.endswith(ends) for path in above(name))


def _check_patterns(config_path: str, config: LoraConfig, names: Mapping[str, str]) -> None:
    """AdapterError if the config gives a layer another rank or alpha under its name in the model."""
    for field, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        table = PatternTable(getattr(config, field), default)
        for old, new in names.items():
            if table.possible(old) != table.possible(new):
                text = f"keys that match {new!r}, the model's name of {old!r}, as they match that"
                raise AdapterError(config_path, field, text, list(getattr(config, field)))


def _stacks(config_path: str, stacks_of: Stacks, config: LoraConfig | None) -> Mapping[str, Stacked]:
    """What the model answers; what it does not have is the file's fault."""
    try:
        return stacks_of(config)
    except ValueError as error:
        expected = "stacked experts or routers of the model"
        raise AdapterError(config_path, "target_parameters", expected, str(error)) from None


def _known(config_path: str, config: LoraConfig, stacks_of: Stacks | None, all_kinds: bool) -> Mapping[str, Stacked]:
    """The stacked parameters that the config names, by the paths of the file, where a model says which they are."""
    if not config.target_parameters or (stacks_of is None and all_kinds):
        return {}
    if stacks_of is None:
        expected = "null or empty: stacked experts are read with the model that they are for"
        raise AdapterError(config_path, "target_parameters", expected, config.target_parameters)
    return stacks_of(config)


def stacks_in(weights: str, paths: Iterable[str], config: LoraConfig) -> dict[str, tuple[str, ...]]:
    """Which of the ``paths`` are PEFT's wrappers of parameters, with the names that the parameter may have.

    AdapterError: ``target_parameters`` names some, and the file ``weights`` has none.
    """
    names = config.target_parameters or ()
    stacks = {path: found for path in paths if (found := _parameters_of(path, names))}
    if names and not stacks:
        raise AdapterError(weights, "target_parameters", f"tensors for {list(names)}", "none")
    return stacks


def _parameters_of(path: str, parameters: Sequence[str]) -> tuple[str, ...]:
    """The names of the parameters that ``target_parameters`` means in this module, if it means any."""
    module, found = bare_module(path), []
    for name in parameters:
        end, _, last = name.rpartition(".")
        end = end or "experts"  # PEFT takes the last name alone, too
        if module == end or module.endswith(f".{end}"):
            found.append(last)
    return tuple(dict.fromkeys(found))


class RankTable:
    """The rank and alpha that an adapter's config gives its modules and parameters. A path costs bounded time."""

    def __init__(self, source: str, weights: str, config: LoraConfig, within: str = ""):
        """source: the file that the config is read from. within: what begins the names of its fields there."""
        self.config, self._weights, self._source, self._within = config, weights, source, within
        self._ranks = PatternTable(config.rank_pattern, config.r)
        self._alphas = PatternTable(config.alpha_pattern, config.lora_alpha)

    def possible(self, name: str) -> set[int]:
        """The ranks that the config may give ``name``."""
        return self._ranks.possible(name)

    def of(self, name: str, r: int, key: str) -> tuple[int, float]:
        """(r, lora_alpha) of ``name``, whose tensor under ``key`` has rank r; AdapterError: the config has another."""
        possible = self._ranks.possible(name)
        if r not in possible:
            raise AdapterError(self._weights, key, f"the rank of the config, {sorted(possible)}", f"rank {r}")
        return r, self.alpha(name)

    def alpha(self, name: str) -> float:
        """lora_alpha of ``name``; AdapterError: only an expression that is not run could tell."""
        alphas = self._alphas.possible(name)
        if len(alphas) > 1:
            plain = f"keys of module names or short expressions, to know the alpha of {name}"
            raise AdapterError(self._source, f"{self._within}alpha_pattern", plain, list(self.config.alpha_pattern))
        return alphas.pop()


def _ranks(
    folder: str,
    path: str,
    entries: dict[str, TensorEntry],
    slots: dict[str, dict[str, str]],
    config: LoraConfig,
    experts: Mapping[str, int],
    stacks: Container[str],
) -> dict[str, tuple[int, float]]:
    """(r, lora_alpha) of each path: the rank of its tensors, in each expert, and the alpha the config gives it."""
    patterns = len(config.rank_pattern) + len(config.alpha_pattern)
    config_path = os.path.join(folder, CONFIG_NAME)
    if patterns * len(slots) > _MAX_PATTERN_CHECKS:
        raise AdapterError(
            config_path, "rank_pattern, alpha_pattern", "fewer keys", f"{patterns} for {len(slots)} layers"
        )
    table, ranks = RankTable(config_path, path, config), {}
    for name, keys in slots.items():
        shape_A, shape_B = entries[keys["lora_A"]].shape, entries[keys["lora_B"]].shape
        each = experts.get(name, 1)
        rows = shape_A[0] if len(shape_A) == 2 else 0
        if not rows or (rows > MAX_RANK * each and name not in stacks) or rows % each:
            wanted = "[r, K]" if each == 1 else f"[{each} experts * r, K]"
            kind = ", of a convolution" * (len(shape_A) > 2)
            raise AdapterError(
                path, keys["lora_A"], f"a shape {wanted}, r at most {MAX_RANK}", f"{list(shape_A)}{kind}"
            )
        if len(shape_B) != 2 or shape_B[1] != rows:
            swapped = "; lora_A and lora_B seem to be swapped" * (shape_A[1] == shape_B[0])
            raise AdapterError(path, keys["lora_B"], f"a shape [N, {rows}]", f"{list(shape_B)}{swapped}")
        r = rows // each
        for field in ("lora_bias", "base_bias", "lora_magnitude"):
            if field in keys and entries[keys[field]].shape != shape_B[:1]:
                raise AdapterError(path, keys[field], f"a shape [{shape_B[0]}]", list(entries[keys[field]].shape))
        if name not in stacks:
            ranks[name] = table.of(name, r, keys["lora_A"])
    return ranks


def _exists(path: str, dir_fd: int | None) -> bool:
    try:
        os.stat(path if dir_fd is None else os.path.basename(path), dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def no_such_folder(path: str) -> str:
    """What to say of a path that is no folder, but may be a name on a hub."""
    hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not os.path.exists(path)
    return "no such folder" + f"; of a hub, pass what huggingface_hub.snapshot_download({path!r}) returns" * bool(hub)


@contextlib.contextmanager
def _folder(folder: str) -> Iterator[int | None]:
    """Descriptor of ``folder``, so that both files come from one directory; None where directories cannot be opened."""
    try:
        if not os.path.isdir(folder):
            raise AdapterError(folder, None, "a local folder with adapter_config.json", no_such_folder(folder))
        fd = os.open(folder, os.O_RDONLY) if os.open in os.supports_dir_fd else None
    except (OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(folder, None, "a readable folder", str(error)) from None
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _replaced(folder: str, dir_fd: int | None) -> bool:
    try:
        return dir_fd is not None and not os.path.samestat(os.stat(folder), os.fstat(dir_fd))
    except FileNotFoundError:
        return True
