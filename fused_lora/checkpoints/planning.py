"""Which tensors of a checkpoint adapters change, found from headers alone. Every tensor of an adapter has its place."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_lora.adapters.checkpoint import CONFIG_NAME
from fused_lora.adapters.errors import AdapterError
from fused_lora.adapters.read import check_same
from fused_lora.adapters.tensorfile import TensorEntry
from fused_lora.checkpoints.adapter_file import AdapterFile
from fused_lora.checkpoints.changes import CAST, Change, Item, Segment, Term, rows_of
from fused_lora.checkpoints.check import read_rows
from fused_lora.checkpoints.experts import Adapted, adapted_stacks
from fused_lora.checkpoints.files import Checkpoint, Shard
from fused_lora.checkpoints.names import HEADS, Names, Place, is_embedding, is_transposed
from fused_lora.checkpoints.quantised import Packed, find_quantised
from fused_lora.checkpoints.stream import PIECE_BYTES, read_bytes
from fused_lora.modules.auxiliary import TOKENS_END
from fused_lora.modules.names import some

# parts of the names of models that have a head over the vocabulary, which transformers ties unless a config says no
_WITH_HEAD = ("CausalLM", "LMHead", "MaskedLM", "ConditionalGeneration", "PreTraining", "Vision2Seq", "ImageTextToText")
_WITHOUT_HEAD = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
_WITH_LM_HEAD = ("ForCausalLM", "GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "CTRLLMHeadModel")  # one matrix of that name
_TIED_FURTHER = ("Blt", "NeoMME", "ProphetNet")  # beside the head
# causal models whose head has another name, or that tie more than it
_OTHERWISE = ("BioGpt", "Git", "ModernBert", "Rwkv", "TrOCR", "Whisper", *_TIED_FURTHER)
_RESIZED = " (a resized vocabulary? resize the base's, save it, and merge into that)"
_NEW_HEAD = " (a head of the task? load the base as the class that the adapter is for, save it, and merge into that)"
_OF_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_OTHER_HEADS = ("lm_head.dense.", "cls.predictions.", "generator_predictions.", "embed_in.")  # tensors beside others


@dataclass
class Changes:
    """All changes by the name of their tensor in the output, the config's new entries, and the quantised weights of
    the base where one of them changes: all of them become dense then, else they stay as they are. parameters: which
    one each of PEFT's wrappers of parameters is for, by the wrapper's path."""

    by_name: dict[str, Change]
    config: dict[str, Any]
    packed: dict[str, Packed]
    stays_quantised: bool
    parameters: dict[str, str]


def plan_changes(base: Checkpoint, adapters: Sequence[AdapterFile], rename: Mapping[str, str] | None = None) -> Changes:
    """What the adapters change in the checkpoint.

    Raises:
        AdapterError: a tensor of an adapter has no place in the checkpoint, or not its shape; the weight it is for is
            quantised in an unknown way; or two adapters replace the same tensor.
        ValueError: an entry of ``rename`` fits no path of the adapters.
    """
    packed = find_quantised(base)
    plan = _Planner(base, names_of(base, packed, rename), packed)
    for adapter in adapters:
        plan.add(adapter)
        plan.warn_of_lacking(adapter)
    plan.names.rename.check_used()
    plan.untie()
    dense = any(change.source in packed for change in plan.found.values())
    return Changes(plan.found, plan.config, packed if dense else {}, bool(packed) and not dense, plan.parameters)


def names_of(base: Checkpoint, packed: Mapping[str, Packed], rename: Mapping[str, str] | None = None) -> Names:
    """Of a checkpoint's weights, the quantised ones (``find_quantised``) among them."""
    shapes = {name: entry.shape for name, (_, entry) in base.tensors.items()}
    folder = None if base.config is None else base.folder
    return Names(shapes | {name: p.shape for name, p in packed.items()}, rename, folder)


class _Planner:
    def __init__(self, base: Checkpoint, names: Names, packed: Mapping[str, Packed]):
        self._base, self.names, self._packed = base, names, packed
        self.found: dict[str, Change] = {}
        self.config: dict[str, Any] = {}
        self.parameters: dict[str, str] = {}
        config: Any = base.config or {}
        self._configs = [config, *(part for part in config.values() if isinstance(part, dict))]
        self._models = [str(name) for name in config.get("architectures") or ()]
        self._causal = any(
            part in name and not name.startswith(_OTHERWISE) for part in _WITH_LM_HEAD for name in self._models
        )

    def add(self, adapter: AdapterFile) -> None:
        """Find the places of all tensors of one adapter."""
        plan = adapter.plan
        stacks = adapted_stacks(plan, self.names)
        layers = [path for path in plan.slots if path not in plan.stacks]
        sizes = {path: plan.entries[plan.slots[path]["lora_B"]].shape[0] for path in layers}
        places = {path: self._places(adapter, path, sizes) for path in layers}
        if lost := [path for path, found in places.items() if not found]:
            key = plan.slots[lost[0]]["lora_A"]
            found = self.names.missing(lost, len(plan.slots))
            raise AdapterError(plan.weights, key, f"the weight of {lost[0]!r} in {self._base.folder!r}", found)
        for path, found in places.items():
            for place in found:
                self._merge(adapter, path, place)
                for end in ("weight", "bias"):
                    if f"{path}.{end}" in plan.copies:
                        self._check_copy(adapter, path, place, end)
            self._biases(adapter, path, found)
        for adapted in stacks:
            self._merge_stack(adapter, adapted)
        for name, key in plan.biases.items():
            self._replace(adapter, name, key)
        for name, key in plan.beside.items():
            self._beside(adapter, name, key)

    def _places(self, adapter: AdapterFile, path: str, sizes: Mapping[str, int]) -> list[Place]:
        plan, keys = adapter.plan, adapter.plan.slots[path]
        try:
            found = self.names.places(path, sizes)
        except ValueError as error:
            raise AdapterError(plan.weights, keys["lora_A"], "one module of the checkpoint", str(error)) from None
        if found or path.rpartition(".")[2] not in HEADS or self._base.config is None:
            return found
        # a head that is not stored is tied to the input embedding; it gets a weight of its own
        shape = sizes[path], plan.entries[keys["lora_A"]].shape[1]
        embedding = self.names.embedding(shape)
        if embedding is None:
            return []
        self._add_head(adapter, keys["lora_A"], path, embedding)
        return [Place(path, 0, shape[0], 0, shape[0])]

    def _add_head(self, adapter: AdapterFile, key: str, path: str, embedding: str) -> None:
        """A weight of its own for a head that is not stored."""
        self._check_untied(adapter, key)
        name = f"{path}.weight"
        if name not in self.found:
            source = self.names.stored(f"{embedding}.weight")
            assert source is not None
            self.found[name] = Change(name, source, "merge", added=True)
            self._untie()

    def _check_untied(self, adapter: AdapterFile, key: str) -> None:
        """AdapterError where other ties would go with the head's, as those of T5's and BART's encoders do."""
        two = any(part.get("is_encoder_decoder") for part in self._configs) and not self._causal
        whisper = any(name.startswith("Whisper") for name in self._models)  # its encoder has no embedding
        if (two and not whisper) or any(name.startswith(_TIED_FURTHER) for name in self._models):
            expected = "a head that is all that is tied to the embedding"
            found = f"that of {some(self._models)}" if self._models else "that of an encoder and decoder"
            raise AdapterError(adapter.plan.weights, key, expected, found)

    def _untie_stored(self, adapter: AdapterFile, key: str) -> None:
        """Of a head that is stored and changes: a config that ties it would put the embedding in its place."""
        tied = (self._base.config or {}).get("tie_word_embeddings")
        apart = all(any(name.endswith(end) for name in self._base.tensors) for end in _OF_SHARED)
        if tied or (tied is None and not apart):
            self._check_untied(adapter, key)
        if tied is not False:
            self._untie()

    def _untie(self) -> None:
        config = self._base.config or {}
        self.config["tie_word_embeddings"] = False
        for key, part in config.items():
            if isinstance(part, dict) and part.get("tie_word_embeddings"):
                self.config[key] = {**part, "tie_word_embeddings": False}

    def _merge(self, adapter: AdapterFile, path: str, place: Place) -> None:
        plan, keys = adapter.plan, adapter.plan.slots[path]
        name = f"{place.path}.weight"
        stored = self.names.stored(name) or self.found[name].source
        shape = self.names.shape_of(stored)
        self._check_dense(adapter, path, stored)
        turned = is_transposed(place.path, self._base.config, plan.config.fan_in_fan_out)
        transposed = turned or path in plan.embeddings
        K = plan.entries[keys["lora_A"]].shape[1]
        expected = (K, place.height) if transposed else (place.height, K)
        if shape != expected or (transposed and not _is_whole([place], adapter, path)):
            how = "an embedding" if path in plan.embeddings else f"fan_in_fan_out={transposed}"
            text = f"a weight {list(expected)} for {path!r}, as {how} stores it"
            words = path in plan.embeddings or path.rpartition(".")[2] in HEADS
            found = f"{list(shape)} in {stored!r}{_RESIZED * (words and shape[1:] == expected[1:])}"
            raise AdapterError(plan.weights, keys["lora_A"], text, found)
        change = self._change_of(adapter, path, stored, transposed, name)
        if "lora_magnitude" in keys:
            self._check_dora(adapter, keys["lora_magnitude"], transposed)
        rows = (0, shape[0]) if transposed else (place.first, place.stop)
        self._add_term(change, *rows, Term(adapter, path, place.skip))
        if path.rpartition(".")[2] in HEADS and self._base.config is not None:
            self._untie_stored(adapter, keys["lora_A"])

    def _merge_stack(self, adapter: AdapterFile, adapted: Adapted) -> None:
        """The delta of each expert goes to its rows of a stack, or to its own tensors."""
        (path, stack, transposed), (experts, height, _) = adapted, adapted.stack.shape
        self.parameters[path] = stack.name
        for stored, expert, skip, rows in stack.matrices:
            self._check_dense(adapter, path, stored)
            change = self._change_of(adapter, path, stored, transposed)
            if expert is not None:
                self._add_term(change, 0, rows, Term(adapter, path, skip, expert))
                continue
            if not change.segments:
                change.segments = [Segment(e * height, (e + 1) * height, []) for e in range(experts)]
            for e, segment in enumerate(change.segments):
                segment.terms.append(Term(adapter, path, 0, e))

    def _change_of(
        self, adapter: AdapterFile, path: str, stored: str, transposed: bool, name: str | None = None
    ) -> Change:
        """The merge of a dense weight, of which a layer may be a part; ``name``: of a tensor added to the base."""
        weights, key = adapter.plan.weights, adapter.plan.slots[path]["lora_A"]
        if stored in self._packed and transposed:
            raise AdapterError(weights, key, f"a delta as {stored!r} is stored, for it is quantised", "transposed")
        place = name if name in self.found else stored
        change = self.found.setdefault(place, Change(stored, stored, "merge", transposed=transposed))
        if change.kind != "merge":
            raise AdapterError(weights, key, f"no other tensor in the place of {stored!r}", "two")
        if not change.segments:
            change.transposed = transposed
        elif change.transposed != transposed:
            expected = f"the orientation of the other adapters of {stored!r}"
            raise AdapterError(weights, key, expected, "transposed" if transposed else "not transposed")
        return change

    def _check_dense(self, adapter: AdapterFile, path: str, stored: str) -> None:
        """AdapterError unless numbers can be added to a stored weight, or to what it is dequantised to."""
        dtype = self._base.tensors[stored][1].dtype
        if stored not in self._packed and (dtype not in CAST or f"{stored}_scale_inv" in self._base.tensors):
            key = adapter.plan.slots[path]["lora_A"]
            expected = f"fp32, bf16, fp16 or fp64 weights of {path!r}, or those of bitsandbytes or block-scaled fp8"
            found = f"{dtype} in {stored!r}, which cannot be dequantised"
            raise AdapterError(adapter.plan.weights, key, expected, found)

    def _add_term(self, change: Change, first: int, stop: int, term: Term) -> None:
        try:
            change.segments = _with_term(change.segments, first, stop, term)
        except ValueError as error:
            plan = term.adapter.plan
            expected = f"one layer for {change.source!r}"
            raise AdapterError(plan.weights, plan.slots[term.path]["lora_A"], expected, str(error)) from None

    def _check_copy(self, adapter: AdapterFile, path: str, place: Place, end: str) -> None:
        """PEFT saves the base's weight, and bias, beside the LoRA of embeddings and heads. It must be the base's to the
        bit."""
        plan, name = adapter.plan, f"{place.path}.{end}"
        key, stored = plan.copies[f"{path}.{end}"], self.names.stored(name)
        if stored is None and name not in self.found:
            raise AdapterError(plan.weights, key, f"a tensor {name!r} in {self._base.folder!r}", "no such name")
        shard, entry = self._base.tensors[stored or self.found[name].source]
        if not _is_whole([place], adapter, path) or plan.entries[key].shape != entry.shape:
            expected = f"a shape {list(entry.shape)}, as the base has {path!r}"
            raise AdapterError(plan.weights, key, expected, f"{list(plan.entries[key].shape)}{_RESIZED}")
        held = adapter.tensor(key)
        with open(shard.path, "rb", buffering=0) as file:
            rows = rows_of(Item(name, None, entry, entry.dtype))
            for first in range(0, rows.height, rows.step):
                stop = min(first + rows.step, rows.height)
                own = read_rows(shard.path, file.fileno(), shard.data + entry.begin, rows, first, stop)
                check_same(plan, f"{path}.{end}", own.view(-1, *entry.shape[1:]), held[first:stop])

    def _check_dora(self, adapter: AdapterFile, key: str, transposed: bool) -> None:
        if adapter.weight != 1:
            expected = f"a weight of 1 for {adapter.folder!r}: the magnitude of DoRA does not grow with it"
            raise AdapterError(adapter.plan.weights, key, expected, adapter.weight)
        if transposed:
            expected = "fan_in_fan_out=False: the rows that DoRA scales must be rows of the file"
            raise AdapterError(adapter.plan.weights, key, expected, True)

    def _biases(self, adapter: AdapterFile, path: str, places: Sequence[Place]) -> None:
        plan, keys = adapter.plan, adapter.plan.slots[path]
        for field in ("lora_bias", "base_bias"):
            if (key := keys.get(field)) is None:
                continue
            place = places[0]
            stored = self.names.stored(f"{place.path}.bias")
            if stored is None or not _is_whole(places, adapter, path):
                found = "none" if stored is None else "a fused layer"
                raise AdapterError(plan.weights, key, f"a bias of {path!r} in the checkpoint", found)
            if field == "base_bias":
                self._replace(adapter, f"{place.path}.bias", key)
            else:
                self._check_shape(adapter, key, stored)
                change = self.found.setdefault(stored, Change(stored, stored, "bias"))
                if change.kind != "bias":
                    raise AdapterError(plan.weights, key, f"one kind of change of {stored!r}", "two")
                change.terms.append(Term(adapter, path, 0))

    def _replace(self, adapter: AdapterFile, name: str, key: str, rows: list[int] | None = None) -> None:
        """The checkpoint's tensor ``name``, or some of its rows, becomes the one under ``key``."""
        weights = adapter.plan.weights
        path, _, end = name.rpartition(".")
        try:
            alias = self.names.alias(path, f".{end}")
        except ValueError as error:
            raise AdapterError(weights, key, "one tensor of the checkpoint", str(error)) from None
        if alias is None:
            found = f"no such name{_NEW_HEAD if name in adapter.plan.beside else ''}"
            raise AdapterError(weights, key, f"a tensor {name!r} in {self._base.folder!r}", found)
        stored = self.names.stored(f"{alias}.{end}")
        assert stored is not None
        self._check_shape(adapter, key, stored, rows)
        if stored in self.found:
            raise AdapterError(weights, key, f"one change of {stored!r}", "another one beside it")
        self.found[stored] = Change(stored, stored, "rows" if rows else "replace", held=(adapter, key), rows=rows or [])

    def _beside(self, adapter: AdapterFile, name: str, key: str) -> None:
        plan = adapter.plan
        if name.endswith(TOKENS_END):
            path = name.removesuffix(TOKENS_END)
            tokens: Any = plan.config.trainable_token_indices
            if isinstance(tokens, dict):
                tokens = next((rows for end, rows in tokens.items() if path == end or path.endswith(f".{end}")), None)
            if tokens is None:
                config = os.path.join(adapter.folder, CONFIG_NAME)
                raise AdapterError(config, "trainable_token_indices", f"the tokens of {path!r}", "none")
            return self._replace(adapter, f"{path}.weight", key, list(tokens))
        path = name.rpartition(".")[0]
        head = path.rpartition(".")[2] in HEADS
        if head and self._base.config is not None and self.names.known(path) is None:
            embedding = self.names.embedding(plan.entries[key].shape)
            if embedding is not None:
                if name in self.found:
                    raise AdapterError(plan.weights, key, f"one change of {name!r}", "another one beside it")
                self._add_head(adapter, key, path, embedding)
                self.found[name].kind, self.found[name].held = "replace", (adapter, key)
                return
        self._replace(adapter, name, key)
        if head:
            self._untie_stored(adapter, key)

    def _check_shape(self, adapter: AdapterFile, key: str, stored: str, rows: list[int] | None = None) -> None:
        entry, held = self._base.tensors[stored][1], adapter.plan.entries[key]
        expected = entry.shape if rows is None else (len(rows), *entry.shape[1:])
        if held.shape != expected:
            found = f"{list(held.shape)}{_RESIZED if len(expected) == 2 else ''}"
            raise AdapterError(adapter.plan.weights, key, f"a shape {list(expected)}, as {stored!r} has", found)
        if rows is not None and max(rows) >= entry.shape[0]:
            raise AdapterError(adapter.plan.weights, key, f"tokens below {entry.shape[0]}", max(rows))
        if entry.dtype not in CAST:
            raise AdapterError(adapter.plan.weights, key, f"numbers to replace in {stored!r}", str(entry.dtype))

    def untie(self) -> None:
        """Where an embedding changes alone and a head is tied to it, the head keeps the old weight, as a tensor of its
        own: the adapted model computes with it. Refused where the head's name is not known."""
        config = self._base.config or {}
        stored = next((f"{found}.weight" for head in HEADS if (found := self.names.known(head))), None)
        with_head = any(part in name for part in _WITH_HEAD for name in self._models)
        headless = bool(self._models) and all(name.endswith(_WITHOUT_HEAD) for name in self._models)
        tied = config.get("tie_word_embeddings", with_head) and not headless
        self._change_copies(stored if tied else None)
        if stored is not None:
            return
        other = any(part in name for part in _OTHER_HEADS for name in self._base.tensors)
        heads = {change.source for change in self.found.values() if change.added}
        for change in list(self.found.values()):
            held = change.held if change.kind != "merge" else change.embedded()
            alone = change.kind != "rows" and tied and not heads and self._is_of_tokens(change)
            if held is None or not (alone or (change.kind == "rows" and change.source in heads)):
                continue
            if not (alone and self._causal and not other):
                adapter, key = held
                found = f"{change.source!r}, to which the head is tied"
                raise AdapterError(adapter.plan.weights, key, "an embedding of its own", found)
            name = f"{HEADS[0]}.weight"
            self.found[name] = Change(name, change.source, "copy", added=True)
            self._untie()

    def _change_copies(self, head: str | None) -> None:
        """Of tensors that hold an embedding's bytes once more: its trained tokens go into them, too. A ``head`` that
        the config ties to it keeps the old weight where all of the embedding changes, and is untied."""
        for change in list(self.found.values()):
            held = change.held if change.kind != "merge" else change.embedded()
            if held is None or change.source == head or not self._is_of_tokens(change):
                continue
            for copy in self._copies(change, head):
                if change.kind != "rows":
                    if copy == head:
                        self._check_untied(*held)
                        self._untie()
                elif self.found.setdefault(copy, replace(change, name=copy, source=copy)).kind != "rows":
                    adapter, key = held
                    found = f"{change.source!r}, to which {copy!r} is tied"
                    raise AdapterError(adapter.plan.weights, key, "an embedding of its own", found)

    def _copies(self, change: Change, head: str | None) -> list[str]:
        """The head, and of the embedding that T5's and BART's encoder and decoder share those of both. Tokens go into a
        head that the config ties, as in PEFT, though transformers leaves it apart where its bytes are others."""
        source, own = change.source, self._base.tensors[change.source]
        shared = source.endswith("shared.weight") and any(part.get("is_encoder_decoder") for part in self._configs)
        names = [name for name in self._base.tensors if name == head or (shared and name.endswith(_OF_SHARED))]
        found = [name for name in names if _same_bytes(*own, *self._base.tensors[name])]
        if head is not None and head not in (*found, *self.found) and change.kind == "rows":
            same = self._base.tensors[head][1].shape == own[1].shape
            found += [head] * bool(same and (self._base.config or {}).get("tie_word_embeddings"))
        return found

    def _is_of_tokens(self, change: Change) -> bool:
        """Whether it is the embedding of the input's tokens, by its name, or as one that has a row for each."""
        if is_embedding(change.name, of_tokens=True):
            return True
        sizes = [part.get("vocab_size") for part in self._configs]
        return change.embedded() is not None and self.names.shape_of(change.source)[0] in sizes

    def warn_of_lacking(self, adapter: AdapterFile) -> None:
        """Warn where the config names more layers of the checkpoint than the adapter has tensors for."""
        config = adapter.plan.config
        ends = config.target_modules
        if isinstance(ends, str) or not ends or config.layers_to_transform is not None or config.exclude_modules:
            return
        used = {change.source for change in self.found.values()}
        lacking = [
            name
            for name, (_, entry) in self._base.tensors.items()
            if name.endswith(tuple(f".{end}.weight" for end in ends)) and len(entry.shape) == 2 and name not in used
        ]
        if lacking:
            warnings.warn(
                f"{adapter.folder!r}: target_modules names {len(lacking)} layers more than the adapter has tensors "
                f"for: {some(lacking)}",
                stacklevel=4,
            )


def _same_bytes(shard: Shard, entry: TensorEntry, other: Shard, second: TensorEntry) -> bool:
    if (entry.dtype, entry.shape) != (second.dtype, second.shape):
        return False
    size, begins = entry.end - entry.begin, (shard.data + entry.begin, other.data + second.begin)
    with open(shard.path, "rb", buffering=0) as a, open(other.path, "rb", buffering=0) as b:
        for at in range(0, size, PIECE_BYTES):
            count = min(PIECE_BYTES, size - at)
            parts = (
                read_bytes(shard.path, a.fileno(), begins[0] + at, count),
                read_bytes(other.path, b.fileno(), begins[1] + at, count),
            )
            if not torch.equal(*parts):
                return False
    return True


def _is_whole(places: Sequence[Place], adapter: AdapterFile, path: str) -> bool:
    """Whether the layer is one whole module of the checkpoint, too."""
    rows = adapter.plan.entries[adapter.plan.slots[path]["lora_B"]].shape[0]
    return [(p.first, p.stop, p.height) for p in places] == [(0, rows, rows)]


def _with_term(segments: list[Segment], first: int, stop: int, term: Term) -> list[Segment]:
    """The segments with a term more on the rows [first, stop)."""
    edges = sorted({first, stop, *(edge for s in segments for edge in (s.first, s.stop))})
    found = []
    for a, b in zip(edges, edges[1:], strict=False):
        over = next((s for s in segments if s.first <= a and b <= s.stop), None)
        terms = [] if over is None else [t._replace(skip=t.skip + a - over.first) for t in over.terms]
        if first <= a and b <= stop:
            if any(t.adapter is term.adapter for t in terms):
                raise ValueError(f"{terms[-1].path!r} and {term.path!r}")
            terms.append(term._replace(skip=term.skip + a - first))
        if terms:
            found.append(Segment(a, b, terms))
    return found
