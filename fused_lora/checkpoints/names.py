"""Which tensors of a checkpoint the layers of an adapter mean.

An adapter names modules of the model it was trained on. A checkpoint may name them otherwise: transformers renames
tensors while it loads them, and other programs fuse projections that transformers keeps apart. What no rule below
resolves to exactly one tensor is refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fused_lora.checkpoints.loading import Loaded, loaded_names
from fused_lora.modules.names import TEXT_INSIDE, likely_rename, other_beginnings, some
from fused_lora.modules.tree import own_path

# further beginnings, of one part of a model or of another around it
_AROUND = (
    TEXT_INSIDE,
    ("model.", ""),  # a bare backbone
    ("transformer.", ""),
    ("bert.", ""),
    ("roberta.", ""),
    ("base_model.", ""),
)
# projections in one matrix, in the order of its rows
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# the codes of a quantised weight, in its place -> the library that lays them out
_PACKED = {"qweight": "GPTQ or AWQ", "_weight_qdata": "torchao", "weight_packed": "compressed-tensors", "W_q": "HQQ"}
_PACKED |= {"codes": "AQLM"}
# models whose blocks have transformers' Conv1D, with weights [K, N], and what these layers are called
_WITH_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
_CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")
HEADS = ("lm_head", "embed_out", "proj_out")
_OF_TOKENS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared", "embeddings"}
_OF_TOKENS |= {"tokens_embed", "word_embedding", "w"}  # the last is CTRL's
_EMBEDDINGS = _OF_TOKENS | {"wpe", "positions_embed", "embed_positions", "position_embeddings", "token_type_embeddings"}
_EMBEDDINGS |= {"relative_attention_bias", "position_embedding", "word_token_embedding", "word_position_embedding"}


class Place(NamedTuple):
    """Where a layer is in a checkpoint: its lora_B from row ``skip`` on belongs to the rows [first, stop) of the weight
    of the module ``path``, which must have ``height`` rows."""

    path: str
    first: int
    stop: int
    skip: int
    height: int


class Rename:
    """Beginnings of paths -> what stands in their place; the first that fits is taken. TypeError for other things."""

    def __init__(self, pairs: Mapping[str, str] | None):
        if pairs is not None and not (
            isinstance(pairs, Mapping) and all(isinstance(name, str) for pair in pairs.items() for name in pair)
        ):
            raise TypeError(f"rename: expected a mapping of names to names, got {pairs!r:.100}")
        self._pairs, self._used = dict(pairs or {}), set()

    def __call__(self, path: str) -> str | None:
        """The path with its new beginning; None where none fits."""
        old = next((old for old in self._pairs if path.startswith(old)), None)
        if old is None:
            return None
        self._used.add(old)
        return self._pairs[old] + path.removeprefix(old)

    def check_used(self) -> None:
        """ValueError for a beginning that no path had."""
        if unused := [old for old in self._pairs if old not in self._used]:
            raise ValueError(f"rename: no path of the adapter begins with {some(unused)}")


class Names:
    """The modules of a checkpoint that have a weight, under the paths a model gives them.

    Args:
        shapes: {tensor: shape} of the checkpoint.
        rename: beginnings of the adapter's paths -> what stands in the checkpoint in their place.
        folder: with the model's config, by which transformers is asked for its names where no rule here knows.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        rename: Mapping[str, str] | None = None,
        folder: str | None = None,
    ):
        self.rename = Rename(rename)
        self._folder = folder
        self._loaded: dict[str, Loaded] | None = None if folder else {}
        self._stored = {own_path(name): name for name in shapes}
        self._shapes = shapes

    def stored(self, name: str) -> str | None:
        """The checkpoint's own name of a parameter, or None."""
        return self._stored.get(name)

    def shape(self, path: str) -> tuple[int, ...]:
        """Of the weight of a module."""
        return self._shapes[self._stored[f"{path}.weight"]]

    def shape_of(self, stored: str) -> tuple[int, ...]:
        """Of a tensor under the checkpoint's own name."""
        return self._shapes[stored]

    def near(self, path: str) -> str:
        """Tensors of the checkpoint, those whose names are like ``path`` first."""
        has = f"it has {some(list(self._stored), near=path)}"
        packed = next((n for n in self._stored if n.startswith(f"{path}.") and n.endswith("_blocks")), None)
        return f"{has}; {packed} is of MXFP4, which cannot be dequantised here" if packed else has

    def alias(self, path: str, end: str = ".weight") -> str | None:
        """As :meth:`known`, and else by transformers' own rules, which takes seconds."""
        if (found := self.known(path, end)) is not None:
            return found
        place = self._as_loaded(f"{path}{end}")
        stored = own_path(place.stored) if place is not None and place.parts == 1 else ""
        return stored.removesuffix(end) if stored and stored.endswith(end) else None

    def known(self, path: str, end: str = ".weight") -> str | None:
        """The path under which the checkpoint has the module ``path``; None for none.

        Raises ValueError where several rules give several modules.
        """
        if (other := self.rename(path)) is not None:
            return other if f"{other}{end}" in self._stored else None
        if f"{path}{end}" in self._stored:
            return path
        found = {other for other in other_beginnings(path, _AROUND) if f"{other}{end}" in self._stored}
        if len(found) > 1:
            raise ValueError(f"{path!r} may be {some(sorted(found))}: say which with rename")
        return found.pop() if found else None

    def _as_loaded(self, name: str) -> Loaded | None:
        """Where a parameter of the model is by transformers' own rules; None with ``rename``, which says it."""
        if self._loaded is None:
            self._loaded = loaded_names(self._folder or "", self._shapes)
        return None if self.rename(name) is not None else self._loaded.get(name)

    def places(self, path: str, sizes: Mapping[str, int]) -> list[Place]:
        """Where the layer ``path`` is; empty for nowhere. ``sizes``: {path: rows of lora_B} of the whole adapter."""
        if (found := self.known(path)) is not None:
            return [Place(found, 0, sizes[path], 0, sizes[path])]
        parent, _, last = path.rpartition(".")
        for fused, parts in _FUSED.items():
            if last == fused and (places := self._apart(parent, parts, sizes[path])):
                return places
            if last in parts and (found := self.known(_join(parent, fused))) is not None:
                return self._inside(found, parent, parts, last, sizes)
        if (place := self._as_loaded(f"{path}.weight")) is not None and place.stored.endswith(".weight"):
            rows = sizes[path]
            whole, first = own_path(place.stored).removesuffix(".weight"), rows * place.part
            return [Place(whole, first, first + rows, 0, rows * place.parts)]
        return []

    def _apart(self, parent: str, parts: tuple[str, ...], total: int) -> list[Place]:
        """A layer that is fused in the adapter and in parts in the checkpoint."""
        places, skip = [], 0
        for part in parts:
            if (found := self.known(_join(parent, part))) is None:
                return []
            rows = self.shape(found)[0]
            places.append(Place(found, 0, rows, skip, rows))
            skip += rows
        return places if skip == total else []

    def _inside(
        self, fused: str, parent: str, parts: tuple[str, ...], last: str, sizes: Mapping[str, int]
    ) -> list[Place]:
        """A layer that is one part of a fused weight: the other parts' sizes say where. Keys and values are equal."""
        known = {part: sizes[path] for part in parts if (path := _join(parent, part)) in sizes}
        if len(parts) == 3:
            pair = known.get(parts[1], known.get(parts[2]))
            known |= {} if pair is None else dict.fromkeys(parts[1:], pair)
        total, lacking = self.shape(fused)[0], [part for part in parts if part not in known]
        if len(lacking) == 1:
            known[lacking[0]] = total - sum(known.values())
        elif len(lacking) == 2 and len(parts) == 3:  # queries alone: what is left is shared
            known |= dict.fromkeys(lacking, (total - known[parts[0]]) // 2)
        if sum(known.values()) != total or min(known.values()) < 1:
            return []
        first = sum(known[part] for part in parts[: parts.index(last)])
        return [Place(fused, first, first + known[last], 0, total)]

    def embedding(self, shape: tuple[int, ...]) -> str | None:
        """The path of the one input embedding of this shape, which a head that is not stored is tied to."""
        found = [
            name.removesuffix(".weight")
            for name, stored in self._stored.items()
            if is_embedding(name, of_tokens=True) and self._shapes[stored] == shape
        ]
        return found[0] if len(found) == 1 else None

    def missing(self, paths: Iterable[str], total: int) -> str:
        """What to say of layers that are nowhere."""
        paths = list(paths)
        modules = [name.removesuffix(".weight") for name in self._stored if name.endswith(".weight")]
        modules = [path for path in modules if len(self.shape(path)) == 2]
        text = f"{len(paths)} of the adapter's {total} layers are not in the checkpoint: {some(paths)}"
        stacked = sorted(
            {name for name in self._stored if ".experts." in name and len(self._shapes[self._stored[name]]) > 2}
        )
        if stacked and any(".experts." in path for path in paths):
            return f"{text}. The checkpoint has its experts stacked, in {some(stacked)}: not for LoRA of single experts"
        for path, end in ((path, end) for end in _PACKED for path in paths):
            if f"{path}.{end}" in self._stored:
                return f"{text}. The checkpoint has {path}.{end}, of {_PACKED[end]}: these cannot be dequantised here"
        likely = likely_rename(paths, modules)
        hint = f"; likely rename: {likely[0]!r} -> {likely[1]!r}" if likely else ""
        if self._folder and "transformers.conversion_mapping" not in sys.modules:
            hint += "; transformers 5 was not asked, for it is not installed: it may know these names"
        return f"{text}{hint}; it has {some(modules, near=paths[0])}"


def is_embedding(name: str, of_tokens: bool = False) -> bool:
    """Whether this tensor is an embedding, or that of the input's tokens, by its name."""
    path = name.removesuffix(".weight")
    return path != name and path.rpartition(".")[2] in (_OF_TOKENS if of_tokens else _EMBEDDINGS)


def is_transposed(path: str, model: Mapping[str, Any] | None, otherwise: bool) -> bool:
    """Whether a linear layer's weight is stored as [K, N], by the model's config where that tells; ``otherwise`` of a
    model without a kind or with code of its own. An adapter's ``fan_in_fan_out`` need not be true: it is one for all
    layers, and loading an adapter asks the module's class instead."""
    configs = [] if model is None else [model, *(part for part in model.values() if isinstance(part, dict))]
    known = any(config.get("model_type") in _WITH_CONV1D for config in configs)
    if known:
        return path.rpartition(".")[2] in _CONV1D
    return otherwise and (model is None or "model_type" not in model or "auto_map" in model)


def _join(parent: str, last: str) -> str:
    return f"{parent}.{last}" if parent else last
