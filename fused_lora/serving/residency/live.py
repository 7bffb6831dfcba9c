"""An adapter of a live model, PEFT's or ours: A and B of its layers, and a refusal by name for anything more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fused_lora.modules.activated import is_pefts
from fused_lora.modules.config import check_init, is_neutral
from fused_lora.modules.names import some
from fused_lora.modules.tree import CONFIGS, above, bare_module, bare_path, held_parts

Triples = dict[str, tuple[Tensor, Tensor, float]]
_PLAIN = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")  # by adapter name, in a layer that is served
# config entries for tensors beyond A and B, which adapters that are served beside others do not have
_MORE = ("modules_to_save", "trainable_token_indices", "lora_bias", "use_dora")


def live_adapter(source: nn.Module, name: str, base: nn.Module) -> tuple[Triples, tuple[int, ...]]:
    """``{path: (A [r, K], B [N, r], scaling)}`` of the adapter ``name`` of ``source``, or of its only one, and the
    invocation tokens of an aLoRA.

    Args:
        base: the model that the adapter is to be served on.

    Raises:
        ValueError: no LoRA layers; several adapters and none called ``name``; or the adapter is more than A and B, its
            initialisation has changed the base weights, or ``source`` has parameters of another shape than ``base`` or
            trains parameters besides. The message names the first.
    """
    found: dict[str, Any] = {
        _target(path, module): module
        for path, module in source.named_modules()
        if hasattr(module, "base_layer") and any(isinstance(part, nn.Module) for part in held_parts(module))
    }
    names = sorted({key for module in found.values() for key in held_parts(module)[0]})
    if not names:
        raise ValueError(f"source: the {type(source).__name__} has no LoRA layers with an adapter")
    chosen = name if name in names else names[0]
    if name not in names and len(names) > 1:
        raise ValueError(f"source: the model has several adapters, {some(names)}, and none is called {name!r}")
    invocation = _check_config(source, chosen)
    layers: Triples = {}
    for path, module in found.items():
        lora_A, lora_B = held_parts(module)
        if chosen in lora_A:
            A, B = lora_A[chosen], lora_B[chosen]
            variant = getattr(module, "lora_variant", {}).get(chosen)
            other = variant is not None and not (invocation and is_pefts(variant))
            if other or getattr(B, "bias", None) is not None:
                raise ValueError(
                    f"source: adapter {chosen!r} is more than A and B at {path!r} (DoRA or another variant, a bias of "
                    "lora_B), which is not served"
                )
            A, B = (part if isinstance(part, Tensor) else part.weight for part in (A, B))
            layers[path] = (A, B, float(module.scaling[chosen]))
    _check_parameters(source, base, _check_nothing_else(source, chosen, layers))
    return layers, invocation


def _target(path: str, module: Any) -> str:
    """The path of a layer's base, or of the parameter that a ParamWrapper of PEFT adapts, one around another."""
    path = bare_path(path)
    if type(module).__name__ != "ParamWrapper":
        return path
    return f"{bare_module(path)}.{module.parameter_name}"


def _check_config(source: nn.Module, chosen: str) -> tuple[int, ...]:
    """Refuse by its config what a checkpoint of the adapter would be refused for. Returns its invocation tokens."""
    config: Any = None
    for module in source.modules():  # PEFT's and ours, under whatever wraps the model
        for configs in (vars(module).get("peft_config"), vars(module).get(CONFIGS)):
            if isinstance(configs, Mapping):
                config = config or configs.get(chosen)
    if config is None:
        return ()  # layers without a config: their modules are looked at
    if config.bias != "none":
        raise ValueError(f"source: adapter {chosen!r} has bias={config.bias!r}: trained base biases are not served")
    for entry in _MORE:
        value = getattr(config, entry, None)
        if not is_neutral(value):
            raise ValueError(f"source: adapter {chosen!r} has {entry}={value!r}, which is not served")
    try:
        check_init(config.init_lora_weights)
    except ValueError as error:
        raise ValueError(f"source: adapter {chosen!r} may not fit the store's base weights: {error}") from None
    return tuple(getattr(config, "alora_invocation_tokens", None) or ())


def _check_nothing_else(source: nn.Module, chosen: str, layers: Mapping[str, Any]) -> set[str]:
    """Raise ValueError where a wrapper of PEFT's or ours keeps something else under the adapter's name.

    Returns:
        The paths of all that is kept under adapters' names.
    """
    kept = set()
    for path, module in source.named_modules():
        if not hasattr(module, "active_adapters"):
            continue
        plain = _target(path, module)
        for part, held in module._modules.items():
            if not isinstance(held, (nn.ModuleDict, nn.ParameterDict)) or part == "lora_dropout":
                continue
            kept.add(f"{path}.{part}")
            if chosen in held and (part not in _PLAIN or plain not in layers):
                raise ValueError(
                    f"source: adapter {chosen!r} has {part} at {plain!r}; adapters that are served beside others bring "
                    "A and B only"
                )
    return kept


def _check_parameters(source: nn.Module, base: nn.Module, kept: set[str]) -> None:
    """Raise ValueError for a parameter of another shape than in ``base`` (a resized vocabulary), or one that is trained
    beside what is ``kept`` under adapters' names and is not the base's own."""
    ours = dict(base.named_parameters())
    for full, parameter in source.named_parameters():
        if any(path in kept for path in above(full)):
            continue
        parts = bare_path(full).split(".")
        path = ".".join(part for part in parts if part not in ("base_layer", "original_module"))
        own = ours.get(path)
        if own is not None and parameter.is_floating_point() and own.shape != parameter.shape:  # quantised: packed
            wanted = f"in the store's model {list(own.shape)}"
            raise ValueError(f"source: {path!r} has shape {list(parameter.shape)}, {wanted}")
        if parameter.requires_grad and own is not parameter:
            raise ValueError(
                f"source: {path!r} is trained beside the adapter and would not be served; freeze it with "
                "requires_grad_(False) if it is as in the store's model"
            )
