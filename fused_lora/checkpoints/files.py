"""A model's checkpoint as files: safetensors shards, their index, the config, and what lies beside them.

Only headers are read here. Shards are read with plain reads, never mapped.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fused_lora.adapters.checkpoint import CONFIG_NAME, WEIGHTS_NAME, no_such_folder, path_text
from fused_lora.adapters.errors import AdapterError
from fused_lora.adapters.tensorfile import (
    EVERY,
    LFS_POINTER,
    POINTER,
    Header,
    TensorEntry,
    check_unchanged,
    open_regular,
    parse_json,
    read_exactly,
    read_header,
    state_of,
)
from fused_lora.checkpoints.stream import read_tensor
from fused_lora.modules.names import some

MODEL_CONFIG = "config.json"
_INDEX_END = ".safetensors.index.json"
_PART = re.compile(r"-\d+-of-(\d+)\.safetensors$")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz")
_PLAIN = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # what from_pretrained takes, beside others
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json")
_TOKENIZER += ("added_tokens.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json")
_MOST_PLACES = 100  # that are looked at for a message
_MAX_JSON_BYTES = 64 << 20
_MAX_SHARD_BYTES = 1 << 50


class Report:
    """What was done with files, or found in them."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name in the checkpoint, where it is, and its header."""

    name: str
    path: str
    state: tuple[int, int]  # as of tensorfile.state_of
    header: Header

    @property
    def data(self) -> int:
        """Where the tensors' bytes begin."""
        return len(self.header.raw)

    @property
    def size(self) -> int:
        """Of the file."""
        return self.state[0]

    def read(self, name: str) -> Tensor:
        """One of its tensors."""
        with open(self.path, "rb", buffering=0) as file:
            found = read_tensor(self.path, file.fileno(), self.data, self.header.entries[name])
            check_unchanged(self.path, file.fileno(), self.state)
            return found


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are read and agree with its index.

    Attributes:
        folder: the real path of its folder. whole: whether all of the folder was named, not one file of it.
        tensors: {name: (shard, entry)}.
        index, config: the parsed JSON files, or None. index_name: of the index file.
        others: files to carry along, by path in the folder. left_out: files of weights that do not belong to it.
    """

    folder: str
    whole: bool
    shards: list[Shard]
    tensors: dict[str, tuple[Shard, TensorEntry]]
    index_name: str | None = None
    index: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    others: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """SHA-256 of names, sizes and headers of the shards: which tensors these are, not their values."""
        found = hashlib.sha256()
        for shard in self.shards:
            found.update(f"{shard.name}\0{shard.size}\0".encode())
            found.update(shard.header.raw)
        return found.hexdigest()


def open_checkpoint(path: str | os.PathLike, argument: str = "base") -> Checkpoint:
    """Read the headers of the checkpoint in a folder, or of one safetensors file.

    Raises:
        AdapterError: no such checkpoint; two in one folder; only pickles; a shard is missing, truncated or malformed;
            or index and shards do not name the same tensors.
    """
    text = path_text(argument, path)
    if os.path.isfile(text):
        if not text.endswith(".safetensors"):
            raise AdapterError(text, None, "a folder or a .safetensors file", "another kind of file")
        folder, name = os.path.split(os.path.realpath(os.path.dirname(text) or ".") + os.sep + os.path.basename(text))
        shard = read_shard(folder, name)
        return Checkpoint(folder, False, [shard], _all_tensors([shard]))
    if not os.path.isdir(text):
        raise AdapterError(text, None, "a folder with a checkpoint, or a .safetensors file", no_such_folder(text))
    folder = os.path.realpath(text)
    names = sorted(os.listdir(folder))
    found = [name for name in names if name.endswith(_INDEX_END)]
    single = [n for n in names if n.endswith(".safetensors") and n != WEIGHTS_NAME]
    if not found:
        single = [n for n in single if n in _PLAIN] or single
    if not found and (parts := [n for n in single if (part := _PART.search(n)) and int(part[1]) > 1]):
        index_name = _PART.sub(_INDEX_END, parts[0])
        raise AdapterError(folder, None, f"{index_name}, the index of its shards", f"no such file beside {some(parts)}")
    if len(found) > 1 or (not found and len(single) > 1):
        raise AdapterError(folder, None, "one checkpoint; name the .safetensors file", some(found or single))
    index_name, index = found[0] if found else None, None
    if index_name is not None:
        index = read_json(os.path.join(folder, index_name))
        shard_names = _names_of(os.path.join(folder, index_name), index)
        if single and "model.safetensors" in single and "model.safetensors" not in shard_names:
            expected = "one checkpoint; from_pretrained takes the one file: name it, or move it away"
            raise AdapterError(folder, None, expected, f"{index_name!r} and 'model.safetensors'")
    elif single:
        shard_names = single
    else:
        pickled = [name for name in names if name.endswith(_WEIGHTS) and name != WEIGHTS_NAME]
        text = f"only {some(pickled)}; save the model with safetensors first" if pickled else _elsewhere(folder)
        text = "an adapter's alone" if WEIGHTS_NAME in names and not pickled else text
        raise AdapterError(folder, None, "a checkpoint of .safetensors files", text)
    shards = [read_shard(folder, name) for name in shard_names]
    tensors = _all_tensors(shards)
    if index_name is not None and index is not None:
        _check_index(os.path.join(folder, index_name), index["weight_map"], tensors)
    path = os.path.join(folder, MODEL_CONFIG)
    config = _read_config(path) if os.path.lexists(path) else None
    carried = _others(folder, {*shard_names, *found, MODEL_CONFIG})
    return Checkpoint(folder, True, shards, tensors, index_name, index, config, *carried)


def _elsewhere(folder: str) -> str:
    """That a folder has no weights, and which of those inside have: a pipeline of diffusers, or the cache of a hub."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(name.endswith(".safetensors") for name in names):
            found.append(os.path.relpath(where, folder))
        if len(found) == _MOST_PLACES:
            break
        if where.count(os.sep) - folder.count(os.sep) >= 2:
            folders.clear()
    return f"no file of weights; there are some in {some(found)}: name that folder" if found else "no file of weights"


def other_tokenizer(folder: str, base: Checkpoint) -> list[str]:
    """Files of a tokenizer or template in the folder of an adapter that the base does not have so, by path."""
    found = []
    for name in sorted(_TOKENIZER):
        path, own = os.path.join(folder, name), os.path.join(base.folder, name)
        if os.path.isfile(path) and not (os.path.isfile(own) and filecmp.cmp(path, own, shallow=False)):
            found.append(path)
    return found


def read_shard(folder: str, name: str) -> Shard:
    """Read the header of one file."""
    path = os.path.join(folder, name)
    with open_regular(path, _MAX_SHARD_BYTES) as (file, size):
        state = state_of(file.fileno())
        return Shard(name, path, state, read_header(path, file, size, EVERY))


def read_text(path: str, max_bytes: int = _MAX_JSON_BYTES) -> bytes:
    """All of a small regular file."""
    with open_regular(path, max_bytes) as (file, size):
        raw = bytearray(size)
        read_exactly(path, file, raw)
    return bytes(raw)


def read_json(path: str) -> dict[str, Any]:
    """A JSON object, as strictly as of adapters."""
    return parse_json(path, read_text(path))


def _read_config(path: str) -> dict[str, Any]:
    """A model's config, in which some models have Infinity."""
    raw = read_text(path)
    if raw.startswith(LFS_POINTER):
        raise AdapterError(path, None, "a JSON object", POINTER)
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterError(path, None, "valid JSON in UTF-8", f"{type(error).__name__}: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(path, None, "a JSON object", f"a JSON {type(config).__name__}")
    return config


def told(path: str) -> str:
    """An absolute path as text that UTF-8 can hold: no reader takes a file that has half a surrogate pair in it."""
    return os.fsencode(os.path.abspath(path)).decode(errors="backslashreplace")


def json_bytes(entries: dict[str, Any]) -> bytes:
    """As transformers writes it."""
    return (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode()


def _names_of(path: str, index: dict[str, Any]) -> list[str]:
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise AdapterError(path, "weight_map", "an object of file names", names)
    for name in names.values():
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise AdapterError(path, "weight_map", "names of .safetensors files in the same folder", name)
    return sorted(set(names.values()))


def _all_tensors(shards: list[Shard]) -> dict[str, tuple[Shard, TensorEntry]]:
    tensors: dict[str, tuple[Shard, TensorEntry]] = {}
    for shard in shards:
        for name, entry in shard.header.entries.items():
            if name in tensors:
                raise AdapterError(shard.path, name, "one tensor of that name", f"another in {tensors[name][0].name}")
            tensors[name] = shard, entry
    return tensors


def _check_index(path: str, names: dict[str, str], tensors: dict[str, tuple[Shard, TensorEntry]]) -> None:
    for name, file in names.items():
        if name not in tensors or tensors[name][0].name != file:
            raise AdapterError(path, name, f"a tensor of {file!r}", "no such tensor in that file")
    missing = sorted(tensors.keys() - names.keys())
    if missing:
        raise AdapterError(path, missing[0], "an entry of weight_map", f"none; so for {some(missing)}")


def _others(folder: str, used: set[str]) -> tuple[list[str], list[str]]:
    """(files to carry along, weights to leave out), by path in the folder. Links to folders are not followed."""
    others, left_out = [], []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.relpath(os.path.join(where, name), folder)
            if path in used or name.startswith("."):
                continue
            # an adapter beside the base would be loaded on top of the merged model
            is_weights = name.endswith((*_WEIGHTS, ".index.json")) or name in (CONFIG_NAME, WEIGHTS_NAME)
            kept = not is_weights and os.path.isfile(os.path.join(where, name))
            (others if kept else left_out).append(path)
    return others, left_out
