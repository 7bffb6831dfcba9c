"""Layers whose weights are elsewhere until they run: kept by hooks of accelerate, or sharded by DeepSpeed ZeRO-3."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fused_lora.bases.foreign import stored_weight
from fused_lora.modules.tree import above


def execution_device(layer: Any) -> torch.device:
    """The device of the layer's weight (or of a parameter) while the layer runs; meta where nobody says."""
    weight = layer if isinstance(layer, torch.Tensor) else stored_weight(layer)
    devices = (getattr(hook, "execution_device", None) for hook in _hooks(layer)) if weight.is_meta else ()
    return next((torch.device(device) for device in devices if device is not None), weight.device)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a parameter of ``module``, or of a module inside, elsewhere."""
    hooks = (hook for part in module.modules() for hook in _hooks(part))
    return any(p.is_meta for p in module.parameters()) and any(getattr(hook, "offload", False) for hook in hooks)


def is_sharded(layer: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 keeps only a part of a parameter of ``layer`` here, or would drop a change of its base.

    Small parameters are whole between calls, too, but written back by a GatheredParameters alone.
    """
    if "deepspeed" not in sys.modules:  # a merge of many small layers would notice the walk
        return False
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    depth = getattr(zero, "DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR", None)  # older ones do not tell
    partitioned = [(name, p) for name, p in layer.named_parameters() if hasattr(p, "ds_shape")]
    dropped = (depth is not None and "lora_" not in name and not getattr(p, depth, 0) for name, p in partitioned)
    return any(p.shape != p.ds_shape for _, p in partitioned) or any(dropped)


def refuse_sharded(layer: nn.Module, done: str) -> None:
    """Raise RuntimeError if the layer :func:`is_sharded`, so that nothing can be ``done``: merged or unmerged."""
    if is_sharded(layer):
        raise RuntimeError(
            f"the layer is sharded by DeepSpeed ZeRO-3, so nothing was {done}. Make the call inside "
            "deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0), in all processes"
        )


def check_places(modules: Mapping[str, nn.Module], layers: Mapping[str, Any], filled: Iterable[str]) -> None:
    """Raise ValueError where a LoRA layer would not get its weights.

    Args:
        modules: all modules of the model by path.
        layers: the base layers or parameters that get LoRA, by path.
        filled: paths of those whose adapter has values, which must not be put on the meta device.
    """
    for path, layer in layers.items():
        for parent in ("", *above(path)):
            if any(
                getattr(h, "offload", False) and getattr(h, "place_submodules", False) for h in _hooks(modules[parent])
            ):
                raise ValueError(
                    f"layers: {path!r} is offloaded as a part of {parent or 'the whole model'!r}, whose hook knows the "
                    "names of its parameters; add the adapter before dispatch_model, or give the parts to device_map"
                )
        if path in filled and execution_device(layer).type == "meta":
            raise ValueError(f"layers: the weight of {path!r} has no data (meta device); load the weights first")


def _hooks(module: Any) -> list[Any]:
    """What accelerate runs around the module's forward."""
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
