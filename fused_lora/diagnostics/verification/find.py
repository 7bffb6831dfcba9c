"""Which LoRA layers of a model can be verified, and why the others cannot."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_lora.bases import base_of
from fused_lora.bases.base import why_not_device
from fused_lora.bases.expert_forms import find_form
from fused_lora.diagnostics.verification.experts import ExpertsLayer, Stack, stack_of
from fused_lora.diagnostics.verification.layers import Layer
from fused_lora.modules.names import some
from fused_lora.modules.tree import held_parts


def find_layers(model: nn.Module) -> tuple[list[Layer], dict[str, str], list[Layer]]:
    """LoRA layers that can be verified; those that cannot, path -> why; and of those the ones whose weights can be
    compared with a reference's, routers."""
    layers, skipped, folded = [], {}, []
    stacks: dict[str, list[Stack]] = {}
    module: Any
    for path, module in model.named_modules():
        if not all(hasattr(module, name) for name in ("base_layer", "merged_adapters", "active_adapters", "scaling")):
            continue
        merged, held = bool(module.merged_adapters), held_parts(module)[0]
        names = [n for n in (module.merged_adapters if merged else module.active_adapters) if n in held]
        if (stack := stack_of(path, module, names)) is not None:
            stacks.setdefault(stack.place, []).append(stack)
            continue
        why = _unfit(module, names)
        if why:
            skipped[path] = why
        elif names:
            layers.append(Layer(path, module, names, merged))
    for place, held in stacks.items():
        layer = ExpertsLayer.of(place, model.get_submodule(place), [stack for stack in held if stack.names])
        if layer.stacks and (why := layer.why_not()):
            skipped |= {stack.path: why for stack in layer.stacks}
            if (form := find_form(layer.base)) is not None and form.calls_module:
                folded.append(layer)
        elif layer.stacks:
            layers.append(layer)
    return layers, skipped, folded


def check_state(model: nn.Module) -> None:
    """Raise RuntimeError where merged and unmerged cannot be compared at all."""
    for path, module in model.named_modules():
        if getattr(module, "merged_adapters", None) is None or not hasattr(module, "base_layer"):
            continue
        if getattr(module, "disable_adapters", False) is True:
            raise RuntimeError(f"model: its adapters are disabled ({path}), so there is nothing to verify")
        if getattr(module, "mixed_batch", None) is not None:
            raise RuntimeError("model: verify inside adapter_batch cannot compare with a merged model")


def _unfit(module: Any, names: list[str]) -> str:
    base = module.base_layer
    if not len(held_parts(module)[0]):
        return f"{type(module).__name__} over {type(base).__name__} is no linear layer"
    weight = getattr(base, "_parameters", {}).get("weight")
    embeds = isinstance(base, nn.Embedding)
    if why := _unfit_variants(module, names, embeds):
        return why
    if weight is None or weight.dim() != 2 or not (embeds or hasattr(base, "bias")):
        return f"{type(base).__name__} has no plain 2-D weight"
    if base_of(base).bits:
        return _unfit_quantised(module, names)
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {weight.dtype}: quantised or distributed"
    if weight.device.type == "meta":
        return "its weight is on the meta device"
    if reason := why_not_device(weight.device):
        return f"{reason}, which may have no float64: verify it on a CPU"
    if embeds:
        return "max_norm changes its rows" if base.max_norm is not None else ""
    if base.bias is None and any(module.lora_B[name].bias is not None for name in names):
        return "its lora_bias has no base bias to be merged into"
    return ""


def _unfit_variants(module: Any, names: list[str], embeds: bool) -> str:
    """LoRA and DoRA of a linear layer are compared; DoRA where a merge is exact, and scales no lora_bias."""
    variants = {**getattr(module, "lora_variant", {}), **getattr(module, "activated", {})}  # PEFT's, and our aLoRA
    dora = [n for n in names if n in module.lora_magnitude_vector]
    kinds = {name: type(variants[name]).__name__ for name in names if name in variants}
    if other := [name for name in names if kinds.get(name, "DoraLinearVariant") != "DoraLinearVariant"]:
        return f"adapters {some(other)} are another variant: verify compares LoRA and DoRA"
    if not dora:
        return ""
    if embeds or base_of(module.base_layer).bits:
        return f"adapters {some(dora)} are DoRA over {'an embedding' if embeds else 'a quantised layer'}"
    if module.merged_adapters and len(names) > 1 and not getattr(module, "merge_state", None):
        return f"PEFT merged {some(names)}, DoRA among them: rounding changed the norms of the weight of before"
    if any(getattr(module.lora_B[name], "bias", None) is not None for name in names):
        return f"adapters {some(dora)} are DoRA beside a lora_bias, which a merge does not scale"
    return ""


def _unfit_quantised(module: Any, names: list[str]) -> str:
    base = module.base_layer
    kind = base_of(base)
    if why := kind.why_not_adapted(base) or kind.why_not_merged(base):
        return why
    grid = kind.grid(base)
    if grid is None:
        return "no bound is known for its arithmetic"
    if base.in_features % grid.blocksize:
        return "in_features is no multiple of the blocksize"
    exactly = hasattr(module, "merge_state")  # what PEFT's own class merges keeps nothing of the weight before
    if module.merged_adapters and not (exactly and module.merge_state):
        return f"PEFT merged it into {kind.bits} bits, the weight of before is gone"
    return "" if exactly or len(names) == 1 else "PEFT quantises again for each adapter; accelerate the model first"
