"""What an adapter trains beside LoRA: whole modules (modules_to_save) and rows of embeddings (trainable_token_indices).

Rules, names and files are PEFT's. Such a module is replaced by a wrapper that keeps the original. A module has one
adapter active at a time. Where the active one has nothing for this module, the original runs.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.modules.changes import CHANGING, wait_for_change
from fused_lora.modules.config import FieldValueError, LoraConfig
from fused_lora.modules.merged_state import MergedState
from fused_lora.modules.mixed import Context, MixedBatch, numbers_of
from fused_lora.modules.names import some
from fused_lora.modules.offload import is_offloaded
from fused_lora.modules.tree import named_modules, places, unwrapped
from fused_lora.rows import same_rows

TOKENS_END = ".token_adapter.trainable_tokens_delta"  # of a key in a checkpoint
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class InPlaceOf(nn.Module):
    """A module that also has the attributes of the one in whose place it stands.

    ``stands_for``: the submodule that must be there for that.
    """

    stands_for = "base_layer"

    def current(self) -> nn.Module:
        """The module whose attributes it has."""
        return self.get_submodule(self.stands_for)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # a hook of accelerate is on that module alone: one on this module must not call that one's forward
            if self.stands_for not in self.__dict__.get("_modules", ()) or name in ("_hf_hook", "_old_forward"):
                raise
        return getattr(self.current(), name)


class Auxiliary(InPlaceOf):
    """One module of the model and what adapters have in its place."""

    def __init__(self, original: nn.Module):
        super().__init__()
        self.active_adapter: str | None = None
        self.disable_adapters = False
        self.context: Context | None = None  # set for the duration of fused_lora.disable_adapters
        self.mixed_batch: MixedBatch | None = None  # set for the duration of fused_lora.adapter_batch
        self.train(original.training)

    @property
    def original(self) -> nn.Module:
        """The module of the base model."""
        raise NotImplementedError

    @property
    def held(self) -> Any:
        """What each adapter has here: name -> module or parameter."""
        raise NotImplementedError

    def run(self, name: str | None, *args: Any, **kwargs: Any) -> Any:
        """The output under one adapter, or of the original."""
        raise NotImplementedError

    def in_effect(self) -> str | None:
        """The adapter that a call uses; None for the original."""
        return None if self.disable_adapters else self.active_adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the part of the adapter in effect. In a mixed batch each row of args[0] [rows, ...] has its own.

        Raises:
            ValueError: in a mixed batch: which rows are whose is not known, they lie along another dimension, or the
                call is not one of a tensor that gives a tensor.
        """
        if CHANGING:
            wait_for_change(self)
        if self.mixed_batch is None or self.disable_adapters:
            return self.run(self.in_effect(), *args, **kwargs)
        held = {name if name in self.held else None for name in self.mixed_batch.names}
        if len(held) == 1:
            return self.run(held.pop(), *args, **kwargs)
        x: Any = args[0] if args else None
        if not isinstance(x, Tensor) or any(isinstance(a, Tensor) for a in (*args[1:], *kwargs.values())):
            self._refuse_batch("a call with one tensor, its first argument")
        rows_of: dict[str | None, list[Tensor]] = {}
        for name, rows in self.mixed_batch.rows(self, x.flatten(1) if x.dim() > 1 else x.unsqueeze(-1)).items():
            rows_of.setdefault(name if name in self.held else None, []).append(numbers_of(rows, x))
        result: Any = None
        for chosen, parts in rows_of.items():
            rows = torch.cat(parts)
            y = self.run(chosen, x[rows], *args[1:], **kwargs)
            if not isinstance(y, Tensor) or y.shape[:1] != rows.shape:
                self._refuse_batch("a tensor with the rows of its input")
            result = y.new_empty((len(x), *y.shape[1:])) if result is None else result
            result[rows] = y
        return same_rows(result, x, 0)

    def _refuse_batch(self, expected: str) -> NoReturn:
        what = f"a {type(self.original).__name__} trained beside LoRA"
        raise ValueError(f"adapter_batch: expected {expected}, of {what}; make a batch of each adapter's sequences")

    def set_adapter(self, names: Sequence[str], inference_mode: bool = False) -> None:
        """Make the one of these adapters that has something here active and trainable, freeze all others."""
        self.active_adapter = next(iter(self._present(names)), None)
        for name, part in self.held.items():
            part.requires_grad_(name == self.active_adapter and not inference_mode)

    def _present(self, names: Iterable[str]) -> list[str]:
        """Those of the adapters that have something here."""
        return [name for name in names if name in self.held]

    def delete_adapter(self, name: str) -> None:
        """Remove what an adapter has here, if it has."""
        if name in self.held:
            del self.held[name]
        if self.active_adapter == name:
            self.active_adapter = None


class SavedModule(Auxiliary):
    """A module that adapters train as a whole, each its own copy: an entry of ``modules_to_save``."""

    stands_for = "original_module"

    def __init__(self, original_module: nn.Module):
        super().__init__(original_module)
        self.original_module = original_module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict()

    @property
    def original(self) -> nn.Module:
        return self.original_module

    @property
    def held(self) -> nn.ModuleDict:
        return self.modules_to_save

    def current(self) -> nn.Module:
        """The module that a call uses."""
        name = self.in_effect()
        return self.original_module if name is None else self.modules_to_save[name]

    def run(self, name: str | None, *args: Any, **kwargs: Any) -> Any:
        return (self.original_module if name is None else self.modules_to_save[name])(*args, **kwargs)


class TrainedTokens(MergedState, Auxiliary):
    """An embedding, or a head that shares its weight, with rows of adapters in place of its own.

    Args:
        base_layer: nn.Embedding with a weight [tokens, K], or nn.Linear with a weight [tokens, K].
        tied: the wrapper of the embedding whose weight ``base_layer`` shares; its rows are used here, too.
    """

    def __init__(self, base_layer: nn.Module, tied: TrainedTokens | None = None):
        super().__init__(base_layer)
        self.base_layer = base_layer.requires_grad_(False)
        self._tied = [] if tied is None else [tied]  # in a list it is no submodule, and has no second set of keys
        if tied is None:
            self.trainable_tokens_delta = nn.ParameterDict()
            self.token_indices: dict[str, list[int]] = {}
            self.merged_adapters: list[str] = []
            self.merge_state: dict[str, tuple[Tensor, Tensor]] | None = None  # rows before and after, by adapter

    @property
    def owner(self) -> TrainedTokens:
        """The wrapper that has the rows: itself, or the one that it is tied to."""
        return self._tied[0] if self._tied else self

    @property
    def original(self) -> nn.Module:
        return self.base_layer

    @property
    def held(self) -> nn.ParameterDict:
        return self.owner.trainable_tokens_delta

    @property
    def merged(self) -> bool:
        """Whether rows of an adapter are in the base weight."""
        return bool(self.owner.merged_adapters)

    @property
    def weight(self) -> Tensor:
        """The weight that a call uses, [tokens, K]."""
        weight: Any = self.base_layer.weight
        name = None if self.merged else self.in_effect()
        return weight if name is None else weight.index_copy(0, self._indices(name), self.held[name].to(weight.dtype))

    def add_adapter(self, name: str, indices: list[int], rows: Tensor) -> None:
        """Add an adapter, inactive and frozen: ``rows`` [n, K] in place of the rows ``indices`` of the weight."""
        self.token_indices[name] = indices
        self.trainable_tokens_delta[name] = nn.Parameter(rows, requires_grad=False)

    def delete_adapter(self, name: str) -> None:
        if name in self.owner.merged_adapters:
            raise ValueError(f"Cannot delete adapter(s) {[name]} while they are merged. Please unmerge them first.")
        super().delete_adapter(name)
        self.owner.token_indices.pop(name, None)

    def run(self, name: str | None, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        y = base(*args, **kwargs)
        if name is None or self.merged:
            return y
        x, rows, indices = args[0], self.held[name], self._indices(name)
        rows = rows.to(base.weight.dtype)
        if isinstance(base, nn.Linear):
            bias = None if base.bias is None else base.bias[indices]
            return y.index_copy(-1, indices, F.linear(x, rows, bias).to(y.dtype))
        ordered, order = indices.sort()
        place = torch.searchsorted(ordered, x.to(ordered.dtype)).clamp(max=len(ordered) - 1)
        hit = ordered[place] == x
        padding = [i for i, token in enumerate(self.owner.token_indices[name]) if token == base.padding_idx]
        own = F.embedding(order[place], rows, padding_idx=padding[0] if padding else None)
        scale = getattr(base, "embed_scale", 1.0)
        scale = scale.to(own.dtype) if isinstance(scale, Tensor) else scale  # as Gemma's own forward rounds it
        return torch.where(hit.unsqueeze(-1), (own * scale).to(y.dtype), y)

    def merge(self, safe_merge: bool, names: list[str]) -> None:
        """Write the rows of these adapters into the base weight. They are restored by :meth:`unmerge`.

        Raises:
            ValueError: two adapters have the same token, or a value is not finite in the weight's dtype.
        """
        weight, state = self._weight(), dict(self.merge_state or {})
        taken = [token for name in (*self.merged_adapters, *names) for token in self.token_indices[name]]
        if len(set(taken)) != len(taken):
            raise ValueError(f"trainable_token_indices: {[*self.merged_adapters, *names]} train the same tokens")
        for name in names:
            rows, indices = self.held[name].detach().to(weight), self._indices(name)
            if not torch.isfinite(rows).all():
                raise ValueError(
                    f"NaNs or infinities detected in the token rows; the adapter {name} seems to be broken"
                )
            state[name] = (weight[indices], rows)
        self._write(state, [*self.merged_adapters, *names], {name: state[name][1] for name in names})

    def unmerge(self) -> None:
        """Give the base weight its own rows back. RuntimeError if a row was changed or cast while merged."""
        weight, state = self._weight(), self.merge_state
        if state is None:
            return
        for name, (_, after) in state.items():
            here = weight.dtype == after.dtype and max(self.token_indices[name]) < len(weight)
            if not here or not torch.equal(weight[self._indices(name)], after.to(weight.device)):
                raise RuntimeError("base_layer.weight was changed or cast while merged; nothing was unmerged")
        self._write(None, [], {name: before for name, (before, _) in state.items()})

    def restore_merge(self, state: dict[str, tuple[Tensor, Tensor]], names: list[str]) -> None:
        """Go back to a merge that :meth:`unmerge` just ended."""
        self._write(state, names, {name: state[name][1] for name in names})

    def _write(self, state: dict[str, tuple[Tensor, Tensor]] | None, names: list[str], rows: dict[str, Tensor]) -> None:
        """Write the rows of these adapters and note what is merged now, or nothing, also where an interrupt comes."""
        attributes, merged, weight = self.__dict__, self.merged_adapters, self._weight()
        indices = torch.cat([self._indices(name) for name in rows])
        new, before = torch.cat([part.to(weight.device) for part in rows.values()]), weight[indices]
        try:
            weight.index_copy_(0, indices, new)
            attributes["merge_state"], merged[:] = state, names  # no call in between
        except BaseException:
            weight.index_copy_(0, indices, before)
            raise

    def _weight(self) -> Tensor:
        return self.get_submodule("base_layer").get_parameter("weight").data

    def _indices(self, name: str) -> Tensor:
        device = self.get_submodule("base_layer").get_parameter("weight").device
        return torch.tensor(self.owner.token_indices[name], device=device)


class Found(NamedTuple):
    """What a config trains beside LoRA in one model: paths of whole modules, tokens by path, and tied path -> path."""

    saved: list[str]
    tokens: dict[str, list[int]]
    tied: dict[str, str]


def auxiliary_modules(model: nn.Module) -> dict[str, Auxiliary]:
    """The wrappers of a model: path -> wrapper."""
    return {path: module for path, module in named_modules(model) if isinstance(module, Auxiliary)}


def parameters_beside(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """Everything that the wrappers of a model hold, for one adapter or for all."""
    found: list[nn.Parameter] = []
    for module in auxiliary_modules(model).values():
        for name, part in module.held.items():
            if adapter_name in (None, name):
                found += [part] if isinstance(part, nn.Parameter) else part.parameters()
    return found


def find(model: nn.Module, config: LoraConfig) -> Found:
    """What ``config`` trains beside LoRA in ``model``: names match the end of a path, as in PEFT.

    Raises:
        ValueError: trainable_token_indices names no module, or a module that is no plain embedding, or tokens that it
            does not have; modules_to_save names a list of modules, or one with LoRA layers inside; or both name the
            same module.
    """
    if not config.modules_to_save and not config.trainable_token_indices:
        return Found([], {}, {})
    modules = dict(named_modules(model))
    inside = tuple(f"{path}." for path, module in modules.items() if isinstance(module, Auxiliary))
    paths = [path for path in modules if path and not path.startswith(inside)]
    uses = Counter(id(module) for _, _, module in places(model))
    saved: list[str] = []
    for path in paths:
        if path.endswith(tuple(config.modules_to_save or ())) and not path.startswith(tuple(f"{p}." for p in saved)):
            saved.append(path)
            _check_saved(path, modules[path])
    tokens: dict[str, list[int]] = {}
    wanted = config.trainable_token_indices
    if wanted is not None and not isinstance(wanted, dict):
        wanted = {_input_embedding(model, modules): wanted}
    for name, indices in (wanted or {}).items():
        here = [path for path in paths if path.endswith(name)]
        if not here:
            raise ValueError(f"trainable_token_indices: no module of the model has a path that ends in {name!r}")
        for path in here:
            if tokens.get(path, list(indices)) != list(indices):
                raise ValueError(
                    f"trainable_token_indices: two of {some(wanted or ())} mean {path!r}, with other tokens"
                )
            _check_tokens(path, modules[path], indices)
            tokens[path] = list(indices)
    for path in {*saved} & {*tokens}:
        raise ValueError(f"{path!r} is in modules_to_save and in trainable_token_indices: expected one of them")
    tied = _tied(model, modules, paths, tokens)
    for path in (*saved, *tokens, *tied):
        if uses[id(modules[path])] > 1:
            raise ValueError(f"{path!r} is used at several places of the model, so it cannot be trained beside LoRA")
        if is_offloaded(modules[path]):
            raise ValueError(f"{path!r} is offloaded (meta device), so it cannot be trained beside LoRA")
    return Found(saved, {path: indices for path, indices in tokens.items() if path not in tied}, tied)


def expected_tensors(model: nn.Module, found: Found) -> dict[str, Tensor]:
    """The tensors of the base model in whose place a checkpoint has tensors: key without prefix -> tensor."""
    modules = dict(named_modules(model))
    tensors = {}
    for path in found.saved:
        state = _original(modules[path]).state_dict(keep_vars=True)
        tensors |= {f"{path}.{name}": tensor for name, tensor in state.items()}
    for path, indices in found.tokens.items():
        weight = _original(modules[path]).get_parameter("weight")
        tensors[f"{path}{TOKENS_END}"] = weight[: len(indices)]
    return tensors


def saved_tensors(model: nn.Module, adapter_name: str) -> dict[str, tuple[Tensor, tuple[int, ...] | None]]:
    """What an adapter trains beside LoRA, as a checkpoint has it: key without prefix -> (tensor, its whole shape)."""
    tensors: dict[str, tuple[Tensor, tuple[int, ...] | None]] = {}
    for path, module in auxiliary_modules(model).items():
        if adapter_name not in module.held:
            continue
        if isinstance(module, SavedModule):
            state = module.modules_to_save[adapter_name].state_dict(keep_vars=True)
            tensors |= {f"{path}.{name}": (tensor, None) for name, tensor in state.items()}
        elif isinstance(module, TrainedTokens) and module.owner is module:
            rows = module.trainable_tokens_delta[adapter_name]
            tensors[f"{path}{TOKENS_END}"] = (rows, (len(module.token_indices[adapter_name]), rows.shape[-1]))
    return tensors


def build(model: nn.Module, found: Found, values: Mapping[str, Tensor]) -> dict[str, nn.Module | Tensor]:
    """What a new adapter gets at each path: a copy of the module, or rows [n, K], filled from ``values``."""
    modules, parts = dict(named_modules(model)), {}
    for path in found.saved:
        parts[path] = copied = copy.deepcopy(_original(modules[path])).requires_grad_(False)
        for name, tensor in copied.state_dict(keep_vars=True).items():
            if values:
                tensor.data.copy_(values[f"{path}.{name}"])
    for path, indices in found.tokens.items():
        weight = _original(modules[path]).get_parameter("weight").detach()
        rows = values.get(f"{path}{TOKENS_END}", weight[indices])
        narrow = weight.dtype in (torch.float16, torch.bfloat16)
        parts[path] = rows.to(weight.device, torch.float32 if narrow and not values else rows.dtype).clone()
    return parts


def attach_parts(places: Mapping[str, tuple[nn.Module, str]], adapter_name: str, found: Found, parts: Mapping) -> None:
    """Put the ``parts`` of :func:`build` into the model: ``places`` has the holder and attribute of each path."""
    wrappers: dict[str, Any] = {path: getattr(*places[path]) for path in (*parts, *found.tied)}
    for path, part in parts.items():
        if not isinstance(wrappers[path], Auxiliary):
            kind = SavedModule if path in found.saved else TrainedTokens
            wrappers[path] = kind(wrappers[path])
            setattr(*places[path], wrappers[path])
        if path in found.saved:
            wrappers[path].modules_to_save[adapter_name] = part.train(wrappers[path].training)
        else:
            wrappers[path].add_adapter(adapter_name, found.tokens[path], part)
    for path, owner in found.tied.items():
        if not isinstance(wrappers[path], Auxiliary):
            setattr(*places[path], TrainedTokens(wrappers[path], wrappers[owner]))


def embeddings(model: nn.Module) -> list[nn.Module]:
    """Input and output embedding of a transformers model, those that it has."""
    root: Any = unwrapped(model)
    try:
        ends = [root.get_input_embeddings(), root.get_output_embeddings()]
    except (AttributeError, NotImplementedError):  # no such model
        return []
    return [module for module in ends if module is not None]


def breaks_a_tie(model: nn.Module) -> bool:
    """Whether the config ties two embeddings, and an adapter in effect has one of them as a module of its own."""
    tied = getattr(getattr(unwrapped(model), "config", None), "tie_word_embeddings", False)
    ends = embeddings(model) if tied else []
    return len(ends) == 2 and any(isinstance(end, SavedModule) and end.in_effect() is not None for end in ends)


def check_tying(model: nn.Module, config: LoraConfig, paths: Iterable[str]) -> None:
    """Raise FieldValueError where ``ensure_weight_tying`` asks for one LoRA, or copy, of a tied embedding and head."""
    ends = embeddings(model) if config.extra.get("ensure_weight_tying") else []
    bases: list[Any] = [getattr(_original(end), "base_layer", _original(end)) for end in ends]
    if len({id(base._parameters.get("weight")) for base in bases}) == len(bases):
        return
    modules = dict(named_modules(model))
    for path in paths:
        if any(part in ends for part in modules[path].modules()):
            expected = f"False for {path!r}, whose weight is that of the embedding and of the head; here each has an"
            expected += " adapter of its own. fused_lora.accelerate takes PEFT's model of such a config"
            raise FieldValueError("ensure_weight_tying", expected, True)


def _original(module: nn.Module) -> nn.Module:
    return module.original if isinstance(module, Auxiliary) else module


def _check_saved(path: str, module: nn.Module) -> None:
    if isinstance(module, _CONTAINERS):
        raise ValueError(f"modules_to_save: {path!r} is a {type(module).__name__}, which cannot be called")
    if isinstance(module, TrainedTokens):
        raise ValueError(f"modules_to_save: another adapter trains tokens of {path!r}")
    if not isinstance(module, SavedModule) and any(hasattr(part, "lora_A") for part in module.modules()):
        raise ValueError(f"modules_to_save: {path!r} has LoRA layers of another adapter")


def _check_tokens(path: str, module: nn.Module, indices: Sequence[int]) -> None:
    base: Any = _original(module)
    plain = isinstance(base, nn.Linear) or (
        isinstance(base, nn.Embedding) and base.max_norm is None and not base.scale_grad_by_freq
    )
    if isinstance(module, SavedModule) or not plain or not base.weight.dtype.is_floating_point:
        raise ValueError(
            f"trainable_token_indices: expected {path!r} to be an nn.Embedding without max_norm and "
            f"scale_grad_by_freq, or an nn.Linear, got a {type(module).__name__}"
        )
    if max(indices) >= len(base.weight):
        raise ValueError(f"trainable_token_indices: {path!r} has {len(base.weight)} tokens, got {max(indices)}")


def _input_embedding(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """The path of the model's input embedding, or PEFT's guess."""
    found = embeddings(model)[:1]
    return next((path for path, module in modules.items() if module in found), "embed_tokens")


def _tied(
    model: nn.Module, modules: Mapping[str, nn.Module], paths: list[str], tokens: Mapping[str, list[int]]
) -> dict[str, str]:
    """{path of a module that shares an embedding's weight, which the model's config says it does: the embedding's}."""
    if not getattr(getattr(modules[""], "config", None), "tie_word_embeddings", False):
        return {}
    owner = _input_embedding(model, modules)
    if owner not in tokens:
        return {}
    weight = _original(modules[owner])._parameters.get("weight")
    shared = [
        path
        for path in paths
        if path != owner and weight is not None and _original(modules[path])._parameters.get("weight") is weight
    ]
    for path in shared:
        _check_tokens(path, modules[path], tokens[owner])
    return {path: owner for path in shared if tokens.get(path, tokens[owner]) == tokens[owner]}
