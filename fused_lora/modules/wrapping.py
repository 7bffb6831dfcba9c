"""One set of LoRA layers a model: what stops PEFT from wrapping ours, and us from wrapping PEFT's."""

from __future__ import annotations

from torch import nn

from fused_lora.modules.linear import LoraLinear


class NotForPeft(dict):
    """What PEFT finds as ``model.peft_config`` and adds its own config to: refuses, before PEFT has changed anything.

    PEFT does not know our layers. It would wrap the linears inside them, or stop with "Target module ... is not
    supported".
    """

    def _refuse(self, *args, **kwargs):
        raise RuntimeError(
            "this model carries fused_lora's own LoRA layers, PEFT cannot wrap it. "
            "fused_lora.load_adapter(model, path, adapter_name) loads a PEFT checkpoint into it, "
            "fused_lora.inject(model, config, adapter_name) adds an adapter, and fused_lora.unload(model, "
            "merge_adapters=True) gives the plain model back"
        )

    __setitem__ = update = setdefault = _refuse


def check_module(model: nn.Module) -> None:
    """Raise TypeError when ``model`` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def check_not_wrapped(model: nn.Module) -> None:
    """Raise ValueError when ``model`` has LoRA layers that are not ours, TypeError when it is no module."""
    check_module(model)
    for path, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A") and not isinstance(module, LoraLinear):
            raise ValueError(
                f"model: {path!r} is a LoRA layer of PEFT's ({type(module).__module__}). "
                "fused_lora.accelerate(model) makes a PEFT model fast as it is; peft_model.load_adapter and "
                "peft_model.add_adapter give it further adapters"
            )
