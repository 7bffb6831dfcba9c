"""LoRA on a whole model: add, activate, disable and remove adapters, and mixed batches.

Names and rules are PEFT's. An adapter has the same name in all layers. The first adapter is active, later ones are
inactive until :func:`set_adapter`. Everything is checked before the model changes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fused_lora.modules import auxiliary, of_peft
from fused_lora.modules.activated import Activation
from fused_lora.modules.auxiliary import TrainedTokens, auxiliary_modules
from fused_lora.modules.changes import alone, changing, undone_on_error, watch
from fused_lora.modules.config import LayerTensors, LoraConfig, as_lora_config, check_bool
from fused_lora.modules.embedding import LoraEmbedding
from fused_lora.modules.experts import (
    LoraExperts,
    LoraStack,
    Stack,
    form_of,
    match_parameters,
    place_of,
    stack_at,
    with_parameters,
)
from fused_lora.modules.layer import LoraLayer, deleted_active
from fused_lora.modules.linear import LoraLinear, go_back, snapshot, unmerge_all
from fused_lora.modules.mixed import Context, MixedBatch, check_eval
from fused_lora.modules.mixin import BASE
from fused_lora.modules.names import some
from fused_lora.modules.offload import check_places
from fused_lora.modules.reads import FirstForward, why_never_called, why_not_called_in_eval
from fused_lora.modules.targets import base_layer_of, is_supported, match_targets, warn_unused
from fused_lora.modules.tree import CONFIGS, named_modules, own_path, parent_of, unwrapped, watchers

# what the modules above this one do to a model that has got its first LoRA layers, further ones, or lost all
AFTER_CHANGE: list[Callable[[nn.Module], None]] = []


class AdapterNotFound(KeyError):
    """The model has no adapter of this name. The message names at most eight, those near the wrong name."""

    def __str__(self) -> str:
        return str(self.args[0])


class NotForPeft(dict):
    """The value of ``model.peft_config``. It refuses PEFT's attempt to add a config, before PEFT changes anything.

    PEFT does not know our layers. It would wrap the linears inside them, or stop with "Target module ... is not
    supported".
    """

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            "this model carries fused_lora's own LoRA layers, PEFT cannot wrap it. "
            "fused_lora.load_adapter(model, path, adapter_name) loads a PEFT checkpoint into it, "
            "fused_lora.inject(model, config, adapter_name) adds an adapter, and fused_lora.unload(model, "
            "merge_adapters=True) gives the plain model back"
        )

    def __setitem__(self, key: Any, value: Any) -> None:
        self._refuse()

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._refuse()

    def setdefault(self, key: Any, default: Any = None) -> Any:
        self._refuse()


@dataclass
class LayerSpec:
    """One layer's new adapter: rank, alpha and tensors (None: drawn at random); ranks of single experts, if any."""

    r: int
    lora_alpha: float
    tensors: LayerTensors | None = None
    ranks: list[int] | None = None


@alone
def inject(model: nn.Module, config: LoraConfig | Any, adapter_name: str = "default") -> nn.Module:
    """Add a LoRA adapter to every layer that ``config`` targets, in place. All other parameters are frozen.

    Layers are linear layers and embeddings; ``target_parameters`` adds stacked parameters of transformers' experts, and
    matrices ``weight`` of other modules, as of routers.
    Modules of ``modules_to_save`` and tokens of ``trainable_token_indices`` train beside it. As in PEFT, the task types
    SEQ_CLS, TOKEN_CLS and QUESTION_ANS add the head of the model to ``modules_to_save``.

    The first adapter of a model becomes active and trainable, and its ``bias`` mode says which biases train. Each
    further adapter is added inactive, as PEFT's ``add_adapter`` does, and changes nothing about biases, whichever
    adapter :func:`set_adapter` makes active.

    Warns of names and keys of ``config`` that match nothing, and of weights that "all-linear" does not cover.

    Args:
        model: any nn.Module. Its target layers are replaced by :class:`LoraLinear`, LoraEmbedding and LoraExperts
            around the same weights.
        config: a :class:`LoraConfig`, or a ``peft.LoraConfig``, which is converted.
        adapter_name: 1 to 64 letters, digits, "_" or "-".

    Returns:
        ``model``.

    Raises:
        TypeError: model is not a module, config is not a LoraConfig, or the name is not a str.
        ValueError: the name is taken or malformed; no layer matches; a match is no layer of these kinds; torch's own
            attention or encoder module would read the weight of a match without calling the layer; a module of
            ``modules_to_save`` or ``trainable_token_indices`` cannot train beside LoRA; or a ``peft.LoraConfig`` sets
            a field that is not supported. The message names it.
        RuntimeError: a match is compiled, or wrapped for checkpointing, by itself; or new token rows or magnitudes of
            DoRA would begin as a merge has left the weight.
    """
    config = as_lora_config(config)
    check_not_wrapped(model)
    asked, config = config.target_modules, with_parameters(model, config)
    config = config.with_heads()
    stacks = match_parameters(model, config, all_names=True)
    if config.lora_dropout and (folded := [path for path, stack in stacks.items() if stack.folds]):
        text = f"expected 0.0 for {some(folded)}, whose modules are called with W + s B A"
        raise ValueError(f"lora_dropout: {text}, got {config.lora_dropout}")
    layers, matched = {}, [*match_targets(model, config), *stacks]
    for path in matched:
        r, lora_alpha = config.layer_rank_alpha(path)
        layers[path] = LayerSpec(
            r, lora_alpha, ranks=config.expert_ranks(path, stacks[path].experts) if path in stacks else None
        )
    experts = (
        [f"{path}.{e}" for path, stack in stacks.items() for e in range(stack.experts)] if config.rank_pattern else []
    )
    warn_unused(model, config, matched, experts, asked)  # first, for a warning may be an error
    with undone_on_error(model):
        attach(model, adapter_name, config, layers)
    return model


@alone
def attach(
    model: nn.Module,
    adapter_name: str,
    config: LoraConfig,
    layers: dict[str, LayerSpec],
    values: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Add one adapter to the layers at these paths, inside an :func:`~.changes.undone_on_error` of the caller.

    ``config`` is kept as the adapter's config and gives dropout, bias mode and init. Ranks, alphas and tensors come
    from ``layers``. ``values`` holds what the adapter trains beside LoRA, by the keys of a checkpoint without prefix;
    without them it begins as the model's own.

    Raises:
        ValueError: the name is malformed or taken, a path is no layer that takes LoRA, or the tensors do not fit.
        RuntimeError: one of torch's wrappers holds the layer itself; or tokens of the same embedding are merged, and
            new rows would begin as the merged ones.
    """
    check_not_wrapped(model)
    configs = check_new_name(model, check_adapter_name(adapter_name))
    biased = [name for name, c in configs.items() if c.bias != "none"]
    if biased and config.bias != "none":
        raise ValueError(f"bias: only one adapter may train biases, and {biased[0]!r} does, got bias={config.bias!r}")
    root, modules = unwrapped(model), dict(named_modules(model))
    stacks = {path: stack for path in layers if (stack := stack_at(modules, path)) is not None}
    for path in layers:
        if path in stacks:
            place = stacks[path].place
            if place in layers or isinstance(modules[place], LoraLayer):
                raise ValueError(f"layers: {path!r} is of the layer {place!r}, which has LoRA itself: name one of them")
            _check_called(path, modules[place.rpartition(".")[0]])
        elif path in modules and is_supported(modules[path]):
            place = path
            if isinstance(modules[path], LoraExperts):
                raise ValueError(f"layers: {path!r} has LoRA on a parameter of its own: name that")
            _check_called(path, modules[path.rpartition(".")[0]])
            _check_embedding(path, base_layer_of(modules[path]), config)
        else:
            raise ValueError(f"layers: {path!r} is no linear layer, embedding or stack of experts of the model")
        if not isinstance(modules[place], (LoraLayer, LoraExperts)):
            parent_of(modules, place)
    bases = {path: stacks[path].parameter if path in stacks else base_layer_of(modules[path]) for path in layers}
    check_places(modules, bases, [path for path, spec in layers.items() if spec.tensors is not None])
    if config.bias != "none":
        offloaded = [own_path(n) for n, p in root.named_parameters() if n.endswith("bias") and p.is_meta]
        if offloaded:
            raise ValueError(f"bias: {config.bias!r} trains biases, and {offloaded[0]!r} has no data (meta device)")
        _check_not_merged([m for path in layers if isinstance(m := modules.get(path), LoraLayer)])
    if config.alora_invocation_tokens and getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "alora_invocation_tokens: expected None for an encoder-decoder model, whose tokens are of two texts"
        )
    beside_lora = config.use_dora or config.modules_to_save or config.trainable_token_indices or config.bias != "none"
    if layers and not any(spec.lora_alpha for spec in layers.values()) and not beside_lora:
        text = f"it is 0 for all layers of {adapter_name!r}, so the adapter has no effect until a scale is set"
        warnings.warn(f"lora_alpha: {text}", stacklevel=4)
    found = auxiliary.find(model, config)
    auxiliary.check_tying(model, config, [path for path in (*layers, *found.saved) if path in modules])
    if not values:  # rows begin as the model's own
        _check_not_merged([m for path in found.tokens if isinstance(m := modules[path], TrainedTokens)])
    if found.tokens and hasattr(nn.ParameterDict(), adapter_name):
        raise ValueError(f"adapter_name: {adapter_name!r} is an attribute of nn.ParameterDict, choose another name")
    beside = {path: parent_of(modules, path) for path in (*found.saved, *found.tokens, *found.tied)}
    for path in layers:
        if any(f"{path}.".startswith(f"{other}.") for other in beside):
            raise ValueError(f"layers: {path!r} is trained as a whole or by tokens, it cannot have LoRA too")
    parts = auxiliary.build(model, found, values or {})
    first, active = not configs, active_adapters(model)
    keep = set() if first else {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    contexts = next(iter(lora_layers(model).values()), None)
    built, placed = _build(modules, adapter_name, config, layers, stacks)
    for path, module in placed.items():
        setattr(*parent_of(modules, path), module)
    auxiliary.attach_parts(beside, adapter_name, found, parts)
    watch(root)
    setattr(root, CONFIGS, {**configs, adapter_name: config})
    if config.alora_invocation_tokens:
        activation = next(iter(watchers(root, Activation)), None) or Activation(root)
        for layer in lora_layers(model).values():
            if adapter_name in layer.adapters:
                layer.activated[adapter_name] = activation
    setattr(root, "peft_config", NotForPeft())  # noqa: B010 - torch types every attribute as a tensor or a module
    _freeze(model, keep)
    FirstForward(_called_layers, root)
    if first:
        set_adapter(model, adapter_name, inference_mode=config.inference_mode)
        _train_biases(model, config, list(layers))
    else:
        for layer in built.values():
            layer.set_adapter(active)
        for wrapper in auxiliary_modules(model).values():
            wrapper.active_adapter = next(iter(wrapper._present(active)), None)
        if not config.inference_mode and any(spec.tensors for spec in layers.values()):
            for parameter in adapter_parameters(model, adapter_name):
                parameter.requires_grad_(True)
    if contexts is not None:
        _join(model, contexts)
    for function in AFTER_CHANGE:
        function(root)
    _load_base_biases(lora_layers(model), layers)


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """The adapters of a model: name -> config. Raises RuntimeError if they are PEFT's."""
    check_module(model)
    root = unwrapped(model)
    if not hasattr(root, CONFIGS):
        of_peft.refuse(root, "adapter_configs", "its configs are in peft_model.peft_config")
    return dict(getattr(root, CONFIGS, {}))


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a model: path -> layer, in ``named_modules()`` order.

    That is a LoraLinear, a LoraEmbedding, or a LoraStack, whose path is that of the parameter. Paths are the
    model's own, also under torch.compile, checkpoint_wrapper, DDP and FSDP.

    Raises RuntimeError if the layers are PEFT's.
    """
    check_module(model)
    found = {path: module for path, module in named_modules(model, LoraLayer) if isinstance(module, LoraLayer)}
    if not found:
        of_peft.refuse(model, "lora_layers", "fused_lora.integrations.peft.layer_report(model) lists its layers")
    return found


def mergeable_layers(model: nn.Module) -> dict[str, Any]:
    """What a merge changes: path -> LoRA layer or wrapper of trained tokens."""
    layers: dict[str, Any] = {}
    tokens: dict[str, Any] = {}
    check_module(model)
    for path, module in named_modules(model, LoraLayer):
        if isinstance(module, LoraLayer):
            layers[path] = module
        elif isinstance(module, TrainedTokens) and module.owner is module:
            tokens[path] = module
    return {**(layers or lora_layers(model)), **tokens}  # the call says whose layers are there instead


@of_peft.by_peft(of_peft.active_adapters)
def active_adapters(model: nn.Module) -> list[str]:
    """Names of the active adapters."""
    return next((list(layer.active_adapters) for layer in lora_layers(model).values()), [])


@alone
@of_peft.by_peft(of_peft.set_adapter)
def set_adapter(model: nn.Module, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Activate one adapter or several. All others are inactive and frozen.

    A merged model is unmerged first, with a warning.

    Raises:
        AdapterNotFound: a name that the model does not have. RuntimeError: a weight was changed while merged.
        ValueError: two of these adapters train the same module, by modules_to_save or trainable_token_indices.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else as_list(adapter_names)
    check_names(model, names)
    check_bool("inference_mode", inference_mode)
    layers, wrappers = mergeable_layers(model), auxiliary_modules(model)
    for path, wrapper in wrappers.items():
        if len(wrapper._present(names)) > 1:
            raise ValueError(f"Only one adapter can be set at a time for {path!r}, got {wrapper._present(names)}")
    if any(layer.merged for layer in layers.values()):
        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=4)
    before = snapshot(layers.values())
    try:
        unmerge_all(layers)
        parts = [*layers.values(), *wrappers.values()]
        with undone_on_error(model, changed=parts):
            for part in parts:
                part.set_adapter(names, inference_mode)
    except BaseException:  # an interrupt
        go_back(before)
        raise


@alone
@of_peft.by_peft(of_peft.delete_adapter)
def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter from all layers.

    If it was active, the other active adapters stay; if none is left, the alphabetically first becomes active, with a
    warning.

    Raises:
        AdapterNotFound: the model has no such adapter. ValueError: it is merged.
        RuntimeError: an ``adapter_batch`` with it is open.
    """
    check_names(model, [adapter_name])
    check_no_batch(model, adapter_name)
    layers, wrappers = lora_layers(model).values(), auxiliary_modules(model).values()
    if any(adapter_name in layer.merged_adapters for layer in mergeable_layers(model).values()):
        raise ValueError(f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first.")
    configs = {name: config for name, config in adapter_configs(model).items() if name != adapter_name}
    active = active_adapters(model)
    was_active, rest = adapter_name in active, [name for name in active if name != adapter_name] or sorted(configs)[:1]
    with undone_on_error(model):
        for layer in layers:
            if was_active:
                layer.set_adapter(rest)
            layer.delete_adapter(adapter_name)
        for wrapper in wrappers:
            wrapper.delete_adapter(adapter_name)
            if was_active:
                wrapper.set_adapter(rest)
        setattr(unwrapped(model), CONFIGS, configs)
    if active == [adapter_name] and rest:
        warnings.warn(deleted_active(adapter_name, rest[0]), stacklevel=4)


@of_peft.by_peft(of_peft.disable_adapters)
@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """A context in which all adapters are ignored. Merged ones are unmerged first.

    Raises RuntimeError if a weight was changed while merged.
    """
    check_module(model)
    with _left(model) as contexts:
        with changing(model):
            unmerge_all(mergeable_layers(model))
            contexts.append(context := Context("disable_adapters"))
            _enter(_parts(model), context, {"disable_adapters": True, "context": context})
        yield


@contextmanager
def adapter_batch(model: nn.Module, adapter_names: Sequence[str | None], *, dim: int = 0) -> Iterator[None]:
    """A context in which sequence i of every batch uses the adapter ``adapter_names[i]``.

    None (or "__base__") stands for the base model.

    It works around any forward and around ``model.generate``. A batch of k times as many sequences (beams) repeats
    each name k times. Base rows get the base model's own output. The sequences are followed from the model's inputs to
    each layer, as in ``AdapterStore.batch``. ``dim``: dimension of the inputs that holds them; 1 for [T, B, ...].

    Raises, in the model's forward too:
        AdapterNotFound: a name that the model does not have. TypeError: adapter_names is no list of names.
        ValueError: adapter_names is empty, or the rows of a layer are not known.
        RuntimeError: the model is in training mode, or an adapter is merged.
    """
    of_peft.refuse(model, "adapter_batch", "call peft_model(..., adapter_names=[...])")
    names = [BASE if name is None else name for name in as_list(adapter_names)]
    if not names:
        raise ValueError("adapter_names: expected one entry per row, got none")
    check_names(model, [name for name in names if name != BASE])
    check_eval(model)
    with _left(model) as contexts:
        with changing(model):
            layers, beside = lora_layers(model), auxiliary_modules(model)
            _check_not_merged(mergeable_layers(model).values())
            if dim != 0 and beside:
                raise ValueError(
                    f"dim: expected 0 for a model with modules trained beside LoRA, {some(beside)}, got {dim}"
                )
            batch = MixedBatch(model, {**layers, **beside}, names, dim)
            for other in _batches(model):
                other.check_around()
            contexts.append(batch)
            batch.attach()
            _enter(_parts(model), batch, {"mixed_batch": batch})
        yield


# of each part of a model: the contexts that it is in, (context, attribute, value before), latest last
_contexts: WeakKeyDictionary[nn.Module, list[tuple[Context, str, Any]]] = WeakKeyDictionary()


def _parts(model: nn.Module) -> list[Any]:
    """All LoRA layers, and all modules trained beside them."""
    return [*lora_layers(model).values(), *auxiliary_modules(model).values()]


def _enter(parts: Iterable[nn.Module], context: Context, values: Mapping[str, Any]) -> None:
    """Set these attributes until :func:`_leave`."""
    for part in parts:
        entered = _contexts.setdefault(part, [])
        for attribute, value in values.items():
            entered.append((context, attribute, getattr(part, attribute)))
            setattr(part, attribute, value)


@contextmanager
def _left(model: nn.Module) -> Iterator[list[Context]]:
    """What is put into the list inside is left at the end, also where an interrupt stops that."""
    contexts: list[Context] = []
    try:
        yield contexts
    finally:
        try:
            _leave(model, contexts)
        except BaseException:
            _leave(model, contexts)
            raise


def _leave(model: nn.Module, contexts: Sequence[Context]) -> None:
    """Undo :func:`_enter`, for parts that were added since, too. Contexts may end in any order, as in generators.

    Does nothing the second time.
    """
    for context in contexts:
        if isinstance(context, MixedBatch):
            context.detach()
        _restore(model, context)


def _restore(model: nn.Module, context: Context) -> None:
    with changing(model):
        for part in _parts(model):
            entered = _contexts.get(part, [])
            for i in reversed(range(len(entered))):
                owner, attribute, before = entered[i]
                if owner is not context:
                    continue
                later = next((j for j in range(i + 1, len(entered)) if entered[j][1] == attribute), None)
                if later is None:
                    setattr(part, attribute, before)
                else:
                    entered[later] = entered[later][0], attribute, before
                del entered[i]


def _join(model: nn.Module, layer: LoraLayer) -> None:
    """Put what was added to a model into the contexts that ``layer`` is in."""
    for part in _parts(model):
        if layer in _contexts and part not in _contexts:
            _contexts[part] = list(_contexts[layer])
        for name in ("disable_adapters", "context", "mixed_batch"):
            setattr(part, name, getattr(layer, name))


def _batches(model: nn.Module) -> list[MixedBatch]:
    """The open ones, of any thread, the latest first."""
    layer = next(iter(lora_layers(model).values()), None)
    entered = _contexts.get(layer, []) if layer is not None else []
    return [context for context, _, _ in reversed(entered) if isinstance(context, MixedBatch)]


def check_no_batch(model: nn.Module, adapter_name: str | None = None) -> None:
    """Raise RuntimeError inside of an ``adapter_batch`` (with this adapter): its rows would silently be the base."""
    for batch in _batches(model):
        if adapter_name is None or adapter_name in batch.names:
            raise RuntimeError(f"adapter_batch: a batch of {some(batch.names)} is open; leave its context first")


def as_list(adapter_names: Iterable) -> list:
    """``adapter_names`` as a list. TypeError if it is not iterable, or what would pass for names: the letters of a str,
    the keys of a dict with weights."""
    if isinstance(adapter_names, (str, bytes, Mapping)) or not isinstance(adapter_names, Iterable):
        raise TypeError(f"adapter_names: expected a list of strings, got {adapter_names!r}")
    return list(adapter_names)


def check_adapter_name(name: str) -> str:
    """``name`` if it is 1 to 64 letters, digits, "_" or "-"; else ValueError (TypeError for another type)."""
    if not isinstance(name, str):
        raise TypeError(f"adapter_name must be a str, got {name!r}")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or name == BASE:
        what = f"1 to 64 letters, digits, '_' or '-', and not {BASE!r}, the base model's name"
        raise ValueError(f"adapter_name must be {what}, got {name[:100]!r}")
    return name


def check_new_name(model: nn.Module, name: str) -> dict[str, LoraConfig]:
    """The adapters of ``model``; ValueError when ``name`` is one of them."""
    configs = adapter_configs(model)
    if name in configs:
        raise ValueError(f"adapter_name: {name!r} is taken; adapters of the model: {some(configs, near=name)}")
    return configs


def check_module(model: nn.Module) -> None:
    """Raise TypeError if ``model`` is not a module."""
    if not isinstance(model, nn.Module):
        parts = getattr(model, "components", None)  # of a pipeline of diffusers
        parts = [name for name, part in parts.items() if isinstance(part, nn.Module)] if isinstance(parts, dict) else []
        how = f"; call this for its models, one by one: {', '.join(parts)}" * bool(parts)
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}{how}")


def check_not_wrapped(model: nn.Module) -> None:
    """Raise ValueError if ``model`` has LoRA layers of PEFT, TypeError if it is not a module."""
    check_module(model)
    found = of_peft.peft_layer(model)
    if found is not None:
        raise ValueError(
            f"model: {found[0]!r} is a LoRA layer of PEFT's ({type(found[1]).__module__}). "
            "fused_lora.accelerate(model) makes a PEFT model fast as it is; peft_model.load_adapter and "
            "peft_model.add_adapter give it further adapters"
        )


def check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Raise AdapterNotFound unless the model has all these adapters, TypeError if a name is not a str."""
    known = adapter_configs(model)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"adapter name: expected a str, got {name!r}")
        if name not in known:
            raise AdapterNotFound(f"adapter {name[:100]!r} not found; adapters of the model: {some(known, near=name)}")


def _called_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What is called for each adapted weight; experts may take theirs apart."""
    modules, found = dict(named_modules(model)), lora_layers(model)
    called = {path: modules[place_of(path, layer)] for path, layer in found.items()}
    return {path: m for path, m in called.items() if not isinstance(m, LoraExperts) or form_of(m.base_layer).dim == 2}


def _build(
    modules: Mapping[str, nn.Module],
    adapter_name: str,
    config: LoraConfig,
    layers: Mapping[str, LayerSpec],
    stacks: Mapping[str, Stack],
) -> tuple[dict[str, LoraLayer], dict[str, nn.Module]]:
    """(new layers by path, what comes into the model by its place). Layers that are there get the adapter."""
    built: dict[str, LoraLayer] = {}
    placed: dict[str, nn.Module] = {}
    for path, spec in layers.items():
        numbers = (spec.r, spec.lora_alpha)
        options: dict[str, Any] = dict(
            lora_dropout=config.lora_dropout, use_rslora=config.use_rslora,
            init_lora_weights=config.init_lora_weights, tensors=spec.tensors,
        )  # fmt: skip
        module: Any = modules.get(path)
        if path in stacks:
            if not isinstance(module, LoraStack):
                built[path] = module = _new_stack(modules, placed, stacks[path])
            if stacks[path].folds:  # of a file that says another: PEFT has none here
                options["lora_dropout"] = 0.0
            module.add_adapter(adapter_name, *numbers, **options, ranks=spec.ranks)
            if path in built:
                module.set_adapter(adapter_name)
            continue
        kind: Any = LoraEmbedding if isinstance(base_layer_of(modules[path]), nn.Embedding) else LoraLinear
        if kind is LoraLinear:
            options |= dict(lora_bias=config.lora_bias, use_dora=config.use_dora)
        if isinstance(module, LoraLayer):
            module.add_adapter(adapter_name, *numbers, **options)
        else:
            built[path] = placed[path] = kind(module, *numbers, adapter_name=adapter_name, **options)
    return built, placed


def _new_stack(modules: Mapping[str, nn.Module], placed: dict[str, nn.Module], stack: Stack) -> LoraStack:
    """A layer for a parameter that has none, in what stands around its experts; a new one goes into ``placed``."""
    around = modules[stack.place] if isinstance(modules[stack.place], LoraExperts) else placed.get(stack.place)
    if around is None:
        around = placed[stack.place] = LoraExperts(stack.module)
    layer = LoraStack(stack)
    setattr(around, stack.name, layer)
    return layer


def _check_called(path: str, parent: nn.Module) -> None:
    """Raise ValueError if ``parent`` reads the layer's weight without calling it: an adapter would do nothing."""
    why = why_never_called(parent)
    if why is not None:
        raise ValueError(f"layers: {path!r} {why}: exclude it")
    if why := why_not_called_in_eval(parent):
        how = "exclude it, or call torch.backends.mha.set_fastpath_enabled(False) first"
        raise ValueError(f"layers: {path!r} {why}: {how}")


def _check_embedding(path: str, base: nn.Module, config: LoraConfig) -> None:
    """Raise ValueError for what an embedding does not get."""
    for field, neutral in (("use_dora", False), ("lora_bias", False), ("alora_invocation_tokens", None)):
        if isinstance(base, nn.Embedding) and getattr(config, field):
            raise ValueError(
                f"{field}: expected {neutral} for an embedding, {path!r}: exclude it, got {getattr(config, field)}"
            )


def _load_base_biases(layers: Mapping[str, LoraLayer], specs: dict[str, LayerSpec]) -> None:
    for path, spec in specs.items():
        if spec.tensors is not None and spec.tensors.base_bias is not None:
            layer: Any = layers[path]
            layer.base_layer.bias.data.copy_(spec.tensors.base_bias)


def _freeze(model: nn.Module, keep: set[int]) -> None:
    """Freeze all but adapters and the parameters with an id in ``keep``."""
    ours = {id(parameter) for parameter in adapter_parameters(model)}
    keep = keep - {id(p) for wrapper in auxiliary_modules(model).values() for p in wrapper.original.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in ours:
            parameter.requires_grad_(id(parameter) in keep)


def _train_biases(model: nn.Module, config: LoraConfig, paths: list[str]) -> None:
    """Those of a model's first adapter."""
    if config.bias == "none" or config.inference_mode:
        return
    ours = {id(parameter) for parameter in adapter_parameters(model)}
    for name, parameter in unwrapped(model).named_parameters():
        lora_only = any(own_path(name) == f"{path}.base_layer.bias" for path in paths)
        if name.endswith("bias") and id(parameter) not in ours and (config.bias == "all" or lora_only):
            parameter.requires_grad_(True)


def adapter_parameters(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """The parameters of one adapter or of all: lora_A, lora_B, magnitudes, and what trains beside them."""
    held: list[nn.Module | nn.Parameter] = []
    for kind in ("lora_A", "lora_B", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B"):
        for layer in lora_layers(model).values():
            if kind in layer.kinds_of_parts:
                held += [part for name, part in getattr(layer, kind).items() if adapter_name in (None, name)]
    found = [p for part in held for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]
    return found + auxiliary.parameters_beside(model, adapter_name)


def _check_not_merged(layers: Iterable[Any]) -> None:
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise RuntimeError(f"adapters {merged} are merged: call fused_lora.unmerge(model) first")
