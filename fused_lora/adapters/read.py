"""load_adapter: a PEFT adapter checkpoint into a model, checked against the model before the model is touched."""

from __future__ import annotations

import os
import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fused_lora.adapters.checkpoint import CONFIG_NAME, KEY_PREFIX, MAX_WEIGHT_BYTES, Adapter, Plan, read_checked
from fused_lora.adapters.errors import AdapterError, short
from fused_lora.adapters.expert_files import Stacked
from fused_lora.modules import auxiliary
from fused_lora.modules.arguments import check_int
from fused_lora.modules.changes import changing, undone_on_error
from fused_lora.modules.config import HEADS, FieldError, LayerTensors, LoraConfig, check_bool
from fused_lora.modules.experts import Stack, all_parameters, file_paths, form_of, match_parameters, stack_at
from fused_lora.modules.inject import (
    LayerSpec,
    attach,
    check_adapter_name,
    check_new_name,
    check_not_wrapped,
    lora_layers,
)
from fused_lora.modules.names import mismatch, some
from fused_lora.modules.targets import (
    adapter_dtype,
    base_layer_of,
    base_settings,
    candidates,
    in_out_features,
    is_supported,
    literal_targets,
    why_not_linear,
    why_not_supported,
)
from fused_lora.reference import bits


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str | None = None,
    *,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    max_bytes: int = MAX_WEIGHT_BYTES,
    allow_partial: bool = False,
) -> LoraConfig:
    """Add the adapter in ``directory`` to ``model``, in place. Everything is checked before the model changes.

    Every tensor of the file is used, or the file is refused with a list of what does not fit and the likely rename.

    The first adapter of a model becomes active. A later one stays inactive until ``set_adapter``.

    Args:
        model: any module. Target layers that have no LoRA yet get LoRA layers.
        directory, max_bytes: as in ``read_adapter``.
        adapter_name: 1 to 64 letters, digits, "_" or "-"; default "default".
        is_trainable: whether A and B (and trained biases) require gradients. Without it the model is put into eval
            mode, as in PEFT, so that its dropout is off.
        autocast_adapter_dtype: as in PEFT. True: A and B are float32 over a 16-bit base. False: they have the base
            weight's dtype.
        allow_partial: leave out, with a warning that names them, layers that the model does not have and tensors that
            are not of LoRA layers. At least one layer must fit, and each layer must be whole.

    Returns:
        The adapter's config.

    Raises:
        AdapterError: a file is malformed, or does not fit the model.
        TypeError: model is no module, adapter_name is no str, directory no path, max_bytes no int, or a flag no bool.
        ValueError: ``adapter_name`` is malformed or taken, or the model has PEFT's LoRA layers.
        RuntimeError: the checkpoint has base biases, and a layer of the model is merged.
    """
    name = check_adapter_name("default" if adapter_name is None else adapter_name)
    check_not_wrapped(model)
    check_new_name(model, name)
    check_int("max_bytes", max_bytes)
    flags = dict(is_trainable=is_trainable, autocast_adapter_dtype=autocast_adapter_dtype, allow_partial=allow_partial)
    for flag, value in flags.items():
        check_bool(flag, value)
    adapter, plan = read_checked(
        directory,
        max_bytes,
        lambda plan: check_model(model, plan, allow_partial),
        allow_partial=allow_partial,
        **of_model(model),
    )
    check_copies(model, adapter, plan)
    if adapter.config.bias != "none" and any(layer.merged_adapters for layer in lora_layers(model).values()):
        raise RuntimeError(f"bias={adapter.config.bias!r} replaces biases of the base model: unmerge before loading")
    adapter.config.inference_mode = not is_trainable
    layers = _specs(model, adapter, plan, autocast_adapter_dtype)
    biases = other_biases(model, adapter.layers)
    values = {path: _cast(plan, plan.biases[path], t, biases[path].dtype) for path, t in adapter.biases.items()}
    beside = _beside(model, adapter, plan, autocast_adapter_dtype)
    trained = adapter.config.bias != "none"
    written = [p for key, p in model.named_parameters() if trained and key.endswith("bias")]
    with changing(model), undone_on_error(model, written):
        attach(model, name, adapter.config, layers, beside)
        with torch.no_grad():
            for path, value in values.items():
                biases[path].copy_(value)
        if not is_trainable:
            model.eval()
    warn_left_out(model, plan)
    warn_of_another_base(model, plan)
    return adapter.config


def of_model(model: nn.Module) -> dict[str, Any]:
    """What ``read_checked`` may find in a file that is for ``model``: all kinds of layers."""

    def stacks(config: LoraConfig | None) -> dict[str, Stacked]:
        found = all_parameters(model) if config is None else match_parameters(model, config)
        names = {path: path for path in found} if config is None else file_paths(found)
        return {name: _stacked(found[path]) for path, name in names.items()}

    return dict(all_kinds=True, stacks=stacks, modules={path for path, _ in candidates(model)})


def _stacked(stack: Stack) -> Stacked:
    """What files are read with."""
    interleaved, turned = not getattr(stack.module, "is_concatenated", True), form_of(stack.module).turned
    return Stacked(stack.path, stack.experts, stack.K, stack.N, stack.transposed, interleaved, turned)


def check_copies(model: nn.Module, adapter: Adapter, plan: Plan) -> None:
    """Raise AdapterError unless the weights of the base that the file holds are the model's, bit for bit.

    PEFT saves the weight of an output layer beside its LoRA, trained or not. One that differs would have to replace the
    model's.
    """
    modules = dict(candidates(model))
    for name, held in adapter.copies.items():
        path, _, end = name.rpartition(".")
        own: Any = getattr(base_layer_of(modules[path]), end)
        check_same(plan, name, own.detach(), held)


def check_same(plan: Plan, name: str, weight: torch.Tensor, held: torch.Tensor) -> None:
    """Raise AdapterError unless a parameter of the base and the file's copy of it are the same, bit for bit."""
    wide = torch.promote_types(weight.dtype, held.dtype)
    differ = int((bits(weight.to(wide).cpu()) != bits(held.to(wide))).sum())
    if differ:
        found = f"a parameter of the base model, which an adapter must not replace: {differ} of {held.numel()} elements"
        found += " differ; it was trained over another base, or trained the weight"
        raise AdapterError(plan.weights, plan.copies[name], f"the base's own {name}, bit for bit", found)


def warn_left_out(model: nn.Module, plan: Plan) -> None:
    """Warn of keys that ``allow_partial`` left out, of layers that the config names and the file lacks, of no head."""
    if plan.left_out:
        text = (
            f"{plan.weights}: {len(plan.left_out)} of {len(plan.entries)} tensors are left out: {some(plan.left_out)}"
        )
        warnings.warn(text, stacklevel=3)
    if lacking := set(literal_targets(model, plan.config) or ()) - plan.slots.keys():
        text = f"{plan.weights}: target_modules names {len(lacking)} layers that the file has no tensors for"
        warnings.warn(f"{text}: {some(sorted(lacking))}", stacklevel=3)
    heads = HEADS.get(plan.config.task_type or "", ()) if not plan.config.modules_to_save else ()
    if here := [path for path, _ in candidates(model) if path.endswith(heads) and path not in plan.slots]:
        text = f"{plan.weights}: task_type is {plan.config.task_type!r} and the file has no head"
        warnings.warn(f"{text}; the model's own is used, {some(here)}", stacklevel=3)


def warn_of_another_base(model: nn.Module, plan: Plan) -> None:
    """Warn where the adapter was saved over layers that were quantised in another way. Only its own files say how."""
    modules, differ = dict(candidates(model)), {}
    for path in plan.slots.keys() - plan.experts.keys():
        there, here = plan.base.get(path, {}), base_settings(modules[path])
        topics = [topic for topic, text in there.items() if not here or here.get(topic, text) != text]
        if topics:
            found = ", ".join(here[topic] for topic in topics) if here else "not quantised"
            differ.setdefault((", ".join(there[topic] for topic in topics), found), []).append(path)
    for (there, here), paths in differ.items():
        text = f"{plan.weights}: the adapter was saved over another base, {short(there, 200)}; here it is {here}"
        warnings.warn(
            f"{text}. Outputs differ by what quantisation changes in {len(paths)} layers: {some(paths)}", stacklevel=3
        )


def _specs(model: nn.Module, adapter: Adapter, plan: Plan, autocast_adapter_dtype: bool) -> dict[str, LayerSpec]:
    """The adapter's layers in the dtypes they will have in ``model``."""
    modules = dict(candidates(model))
    layers = {}
    for path, tensors in adapter.layers.items():
        stack = stack_at(modules, path) if path in plan.experts else None
        base: Any = base_layer_of(modules[path]) if stack is None else None
        own = adapter_dtype(base) if stack is None else stack.parameter.dtype
        wide = autocast_adapter_dtype and own in (torch.float16, torch.bfloat16)
        cast = {}
        for field, key in plan.slots[path].items():
            dtype = base.bias.dtype if field == "base_bias" else torch.float32 if wide else own
            cast[field] = _cast(plan, key, getattr(tensors, field), dtype)
        layers[path] = LayerSpec(*plan.ranks[path], LayerTensors(**cast))
    return layers


def _beside(model: nn.Module, adapter: Adapter, plan: Plan, autocast_adapter_dtype: bool) -> dict[str, torch.Tensor]:
    """What the adapter trained beside LoRA, in the dtypes it will have in ``model``; rows of tokens are widened."""
    wanted = auxiliary.expected_tensors(model, auxiliary.find(model, adapter.config))
    cast = {}
    for name, tensor in adapter.beside.items():
        dtype = wanted[name].dtype
        narrow = dtype in (torch.float16, torch.bfloat16)
        wide = autocast_adapter_dtype and narrow and name.endswith(auxiliary.TOKENS_END)
        cast[name] = _cast(plan, plan.beside[name], tensor, torch.float32 if wide else dtype)
    return cast


def _cast(plan: Plan, key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        raise AdapterError(plan.weights, key, f"values within the range of {dtype}", "larger ones")
    return cast


def check_model(model: nn.Module, plan: Plan, allow_partial: bool = False) -> Plan:
    """Raise AdapterError unless every path is a layer of ``model`` that the tensors fit, and every layer that the
    config names has tensors.

    Returns:
        ``plan``, with ``allow_partial`` without the layers that the model does not have.
    """
    modules = dict(candidates(model))
    named = literal_targets(model, plan.config)
    if named is not None and plan.config.target_parameters:
        named += match_parameters(model, plan.config)
    fitting = {path for path in plan.slots if path in plan.experts or path in modules and is_supported(modules[path])}
    missing = [path for path in plan.slots if path not in fitting]
    if missing and (not allow_partial or not fitting):
        path = missing[0]
        kind = "no module of that name"
        if path in modules:
            kind = f"a {type(base_layer_of(modules[path])).__name__}, {why_not_supported(modules[path])}"
        linear = [name for name, module in modules.items() if why_not_linear(module) is None]
        what = "an embedding" if path in plan.embeddings else "a linear layer"
        found = f"{kind}. {mismatch(missing, len(plan.slots), linear)}"
        raise AdapterError(plan.weights, plan.slots[path]["lora_A"], f"{what} {path!r} in the model", found)
    _check_tying(model, plan, [path for path in fitting if path in modules])
    for path in fitting:
        _check_layer(model, modules, path, plan)
    if named is not None:
        if not allow_partial or fitting.isdisjoint(named):
            _check_targets(plan, set(named))
        fitting &= set(named)
    slots = {path: keys for path, keys in plan.slots.items() if path in fitting}
    copies = {name: key for name, key in plan.copies.items() if name.rpartition(".")[0] in fitting}
    for name, key in copies.items():
        path, _, end = name.rpartition(".")
        _check_copy(base_layer_of(modules[path]), end, plan, key)
    left_out = [key for path, keys in plan.slots.items() if path not in fitting for key in keys.values()]
    left_out += [key for name, key in plan.copies.items() if name not in copies]
    plan = plan._replace(slots=slots, left_out=(*plan.left_out, *left_out), copies=copies)
    plan = _check_beside(model, plan, allow_partial)
    if plan.config.bias != "all":
        return plan
    present = other_biases(model, plan.slots)
    biases, left_out = _check_names(plan, plan.biases, present, "bias", allow_partial, allow_partial)
    return plan._replace(biases=biases, left_out=(*plan.left_out, *left_out))


def _check_tying(model: nn.Module, plan: Plan, paths: list[str]) -> None:
    try:
        auxiliary.check_tying(model, plan.config, paths)
    except FieldError as error:
        path = os.path.join(os.path.dirname(plan.weights), CONFIG_NAME)
        raise AdapterError(path, error.field, error.expected, error.found) from None


def _check_beside(model: nn.Module, plan: Plan, allow_partial: bool) -> Plan:
    """Raise AdapterError unless the file has a tensor of the right shape for all that the config trains beside LoRA."""
    try:
        wanted = auxiliary.expected_tensors(model, auxiliary.find(model, plan.config))
    except ValueError as error:
        key = "modules_to_save" if "modules_to_save" in str(error) else "trainable_token_indices"
        config = os.path.join(os.path.dirname(plan.weights), CONFIG_NAME)
        raise AdapterError(config, key, "modules of the model that can train beside LoRA", str(error)) from None
    beside, left_out = _check_names(plan, plan.beside, wanted, "tensor", allow_partial)
    return plan._replace(beside=beside, left_out=(*plan.left_out, *left_out))


def _check_names(
    plan: Plan, held: dict[str, str], wanted: Mapping[str, torch.Tensor], what: str, others: bool, fewer: bool = False
) -> tuple[dict[str, str], list[str]]:
    """(names of the model that the file holds, other keys). Raise AdapterError for a name that is not in both, unless
    the file may hold ``others``, or ``fewer``; and for another shape or kind of numbers."""
    unknown, lacking = sorted(held.keys() - wanted.keys()), sorted(wanted.keys() - held.keys())
    for names, expected, found in (
        (unknown if not others else (), f"a {what} of the model", "no such name"),
        (lacking if not fewer else (), f"a {what} in the file", "none"),
    ):
        if names:
            raise AdapterError(plan.weights, f"{KEY_PREFIX}{names[0]}", expected, f"{found}; so for {some(names)}")
    both = {name: key for name, key in held.items() if name in wanted}
    for name, key in both.items():
        expected, found = list(wanted[name].shape), list(plan.entries[key].shape)
        if found != expected:
            fewer = found[1:] == expected[1:]
            hint = " (another vocabulary, or number of labels? resize_token_embeddings, or num_labels)" * fewer
            raise AdapterError(plan.weights, key, f"a shape {expected}", f"{found}{hint}")
        own, dtype = wanted[name].dtype, plan.entries[key].dtype
        if own != dtype and not (own.is_floating_point and dtype.is_floating_point):
            raise AdapterError(plan.weights, key, f"dtype {own}", str(dtype))
    return both, [held[name] for name in unknown]


def _resized(model: nn.Module, expected: Sequence[int], found: Sequence[int]) -> str:
    """What to do where the two shapes differ in the size of the model's vocabulary alone."""
    differ = [(own, other) for own, other in zip(expected, found, strict=False) if own != other]
    sizes = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    if len(expected) != len(found) or len(differ) != 1 or differ[0][0] not in sizes:
        return ""
    return f" (a resized vocabulary? model.resize_token_embeddings({differ[0][1]}) comes first then)"


def _check_layer(model: nn.Module, modules: Mapping[str, nn.Module], path: str, plan: Plan) -> None:
    """Raise AdapterError unless the tensors of one layer fit it."""
    r, keys = plan.ranks[path][0] * plan.experts.get(path, 1), plan.slots[path]
    base, stack = None, stack_at(modules, path) if path in plan.experts else None
    if stack is None:
        base = base_layer_of(modules[path])
        K, N = in_out_features(base)
        if isinstance(base, nn.Embedding) != (path in plan.embeddings):
            wanted, found = "lora_embedding_A and lora_embedding_B", "lora_A and lora_B"
            if path in plan.embeddings:
                wanted, found = found, wanted
            raise AdapterError(plan.weights, keys["lora_A"], f"{wanted} for {type(base).__name__}", found)
    else:
        K, N = stack.K, stack.N
    shapes = {field: plan.entries[keys[field]].shape for field in ("lora_A", "lora_B")}
    for field, shape in (("lora_A", (r, K)), ("lora_B", (N, r))):
        if shapes[field] != shape:
            found = f"{list(shapes[field])}{_resized(model, shape, shapes[field])}"
            raise AdapterError(plan.weights, keys[field], f"a shape {list(shape)} for the layer {path!r}", found)
    if plan.config.bias != "none" and (getattr(base, "bias", None) is None) == ("base_bias" in keys):
        has, brings = ("no bias", "a bias") if "base_bias" in keys else ("a bias", "none")
        key = f"{KEY_PREFIX}{path}.base_layer.bias"
        text = f"a base bias exactly if the layer has one; it has {has}"
        if plan.config.bias == "lora_only" and brings == "none":
            text += ". PEFT before 0.21 wrote none, so it is lost; with bias 'none' in the config the rest loads"
        raise AdapterError(plan.weights, key, text, brings)


def _check_copy(base: nn.Module, end: str, plan: Plan, key: str) -> None:
    """Raise AdapterError unless the header's copy of a weight or bias of the base can be compared with the model's."""
    weight = base._parameters.get(end)
    if type(weight) is not nn.Parameter or weight.is_meta or not weight.is_floating_point():
        kind = f"no plain {end}" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
        raise AdapterError(
            plan.weights, key, f"no copy of a {end} that cannot be compared", f"one; the layer has {kind}"
        )
    shape = plan.entries[key].shape
    if shape != tuple(weight.shape):
        what = f"a copy of the model's {end}, {list(weight.shape)}"
        raise AdapterError(plan.weights, key, what, f"{list(shape)} (a resized vocabulary?)")


def _check_targets(plan: Plan, named: set[str]) -> None:
    """Raise AdapterError unless the config's lists of names pick exactly the layers that have tensors."""
    config_names = some(sorted(plan.config.target_modules or ()))
    for paths, expected, found in (
        (plan.slots.keys() - named, "a module that target_modules names", f"target_modules {config_names}"),
        (named - plan.slots.keys(), "tensors for this module, which target_modules names", "none"),
    ):
        if paths:
            key = f"{KEY_PREFIX}{min(paths)}.lora_A.weight"
            raise AdapterError(
                plan.weights, key, expected, f"{found}; so for {len(paths)} layers: {some(sorted(paths))}"
            )


def other_biases(model: nn.Module, layers: Container[str]) -> dict[str, nn.Parameter]:
    """The biases of all modules of ``model`` but those at the paths ``layers``, by parameter path without LoRA
    layers. A bias of lora_B does not count."""
    biases = {}
    for name, module in [("", model), *candidates(model)]:
        bias = base_layer_of(module)._parameters.get("bias")
        if bias is not None and name not in layers:
            biases[f"{name}.bias" if name else "bias"] = bias
    return biases
