"""``save_pretrained`` of an injected model: its adapter, or the merged model, or an error that says what to call.

transformers' own would write ``...base_layer.weight``, which ``from_pretrained`` does not find: it would draw every
adapted layer anew. So each module with LoRA layers and a ``save_pretrained`` gets a subclass of its class as its class.
Trainer calls the method for checkpoints, too.
"""

from __future__ import annotations

import copyreg
import functools
import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fused_lora.adapters.checkpoint import CONFIG_NAME
from fused_lora.adapters.write import write_adapter
from fused_lora.modules.auxiliary import SavedModule, auxiliary_modules, breaks_a_tie
from fused_lora.modules.experts import place_of
from fused_lora.modules.inject import (
    AFTER_CHANGE,
    active_adapters,
    adapter_configs,
    adapter_parameters,
    lora_layers,
    mergeable_layers,
)
from fused_lora.modules.tree import own_path

RESUME_NAME = "model.safetensors"  # where Trainer looks for the weights of a checkpoint
_WHOLE = ("config.json", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class SavesAdapters:
    """A module class with ``save_pretrained``, for the time that there are LoRA layers in the module."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write the active adapter, or, where adapters are merged, the model as a plain one of its class.

        With the adapter goes ``model.safetensors`` with everything that trains: Trainer resumes from it.

        Args:
            save_directory: an adapter replaces the adapter in it and keeps its other files.
            is_main_process: whether this process writes. Under FSDP2 all processes call, and the first one writes.
            state_dict: tensors by their names in the model, used in place of the model's own (gathered ones).
            kwargs: for the class's own method, which writes a merged model. An adapter needs none.

        Raises:
            ValueError: no adapter or several are active; or ``push_to_hub`` for an adapter.
            RuntimeError: merged and unmerged adapters are in effect at once, or the folder holds an adapter that would
                hide the merged model; or the module is a part of the model that was injected. The message says what
                to call. Also what ``save_adapter`` raises.
        """
        model: Any = self
        layers = mergeable_layers(model).values()
        if layers and not any(layer.merged for layer in layers):
            return _save_adapter(model, save_directory, is_main_process, state_dict, kwargs)
        if layers:
            _check_merged(model, save_directory)
            state_dict = plain_state_dict(model, state_dict)
        own: Any = super()
        return own.save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        how, args, *state = super().__reduce_ex__(protocol)
        if how is not copyreg.__newobj__ or "_plain_class" not in vars(args[0]):
            return how, args, *state
        return _new, (args[0]._plain_class, *args[1:]), *state


@functools.cache
def _class_that_saves(plain: type) -> type:
    return type(
        plain.__name__,
        (SavesAdapters, plain),
        {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "_plain_class": plain},
    )


def _new(plain: type, *args: Any) -> Any:
    """Where a copy or an unpickled module begins: its class has no name of its own."""
    return plain.__new__(_class_that_saves(plain), *args)


def plain_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """``model.state_dict()`` (or these tensors under the same names) as the same model without adapters names it."""
    tensors = {own_path(name): tensor for name, tensor in (state_dict or model.state_dict()).items()}
    used = {place_of(path, layer): "base_layer." for path, layer in lora_layers(model).items()}
    for path, wrapper in auxiliary_modules(model).items():
        saved = wrapper.in_effect() if isinstance(wrapper, SavedModule) else None
        original = "original_module." if isinstance(wrapper, SavedModule) else "base_layer."
        used[path] = original if saved is None else f"modules_to_save.{saved}."
    for path, part in used.items():
        held = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{path}.")}
        base = f"{path}.{part}"
        tensors |= {f"{path}.{name.removeprefix(base)}": t for name, t in held.items() if name.startswith(base)}
    return tensors


def _save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    is_main_process: bool,
    state_dict: Mapping[str, Tensor] | None,
    kwargs: dict[str, Any],
) -> None:
    if not adapter_configs(model):
        raise RuntimeError(
            f"save_pretrained: this {type(model).__name__} is a part of the model that has the adapters. Call "
            "fused_lora.save_adapter(model, folder) with the whole model, or fused_lora.merge(model) before this"
        )
    names = active_adapters(model)
    if len(names) != 1:
        raise ValueError(
            f"save_pretrained: expected one active adapter, got {names}. Call fused_lora.save_adapter(model, folder, "
            "name) for each, or fused_lora.merge(model) first to save the merged model"
        )
    if kwargs.get("push_to_hub"):
        raise ValueError("push_to_hub: not supported for an adapter; call model.push_to_hub(name)")
    whole = [name for name in _WHOLE if os.path.exists(os.path.join(folder, name))]
    further = {}
    if whole:
        warnings.warn(
            f"{os.fspath(folder)!r} holds a whole model ({whole[0]}): the adapter is written beside it, without the "
            f"{RESUME_NAME} that Trainer resumes from",
            stacklevel=3,
        )
    else:
        further[RESUME_NAME] = _what_trains(model)
    write_adapter(model, folder, names[0], further=further, state_dict=state_dict, here=is_main_process)


def _what_trains(model: nn.Module) -> dict[str, nn.Parameter]:
    """All adapters, and whatever else requires a gradient, by their names in the model."""
    ours = {id(parameter) for parameter in adapter_parameters(model)}
    return {own_path(n): p for n, p in model.named_parameters() if id(p) in ours or p.requires_grad}


def _check_merged(model: nn.Module, folder: str | os.PathLike) -> None:
    active = active_adapters(model)
    for path, layer in mergeable_layers(model).items():
        rest = layer._present(active)
        if rest and not layer.merged:
            raise RuntimeError(
                f"save_pretrained: {path!r} has no merged adapter but {rest} active, so this is neither an adapter nor "
                "a plain model. Call fused_lora.merge(model), or fused_lora.unmerge(model) to save the adapter"
            )
    if breaks_a_tie(model):
        raise RuntimeError(
            "save_pretrained: the config ties the two embeddings, and the adapter has one of its own. Call "
            "fused_lora.unload(model, merge_adapters=True) first, which unties them"
        )
    if os.path.exists(os.path.join(folder, CONFIG_NAME)):
        raise RuntimeError(
            f"save_directory: {os.fspath(folder)!r} holds an adapter, which from_pretrained would load in place of the "
            "merged model; choose another folder"
        )


def _change_classes(model: nn.Module) -> None:
    """Give the modules with LoRA layers inside and a ``save_pretrained`` ours, and all others back what they had."""
    for module in model.modules():
        kind = type(module)
        if not callable(getattr(kind, "save_pretrained", None)):
            continue
        if not lora_layers(module):
            module.__class__ = vars(kind).get("_plain_class", kind)
        elif not issubclass(kind, SavesAdapters):
            module.__class__ = _class_that_saves(kind)


AFTER_CHANGE.append(_change_classes)
