"""May a kernel stand in for a call of this part of a LoRA layer? None when it may, else the reason in a few words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from fused_lora.bases.base import why_not_own_call, why_not_plain_bias, why_not_plain_weight


def why_not_plain(module: nn.Module) -> str | None:
    """None when calling ``module``, lora_A or lora_B, is a product with its weight, plus its bias, and nothing more.

    Plain is nn.Linear over ordinary floating tensors.
    """
    reason = why_not_own_call(module, "a part of the layer")
    if reason:
        return reason
    kind = type(module)
    if kind is not nn.Linear:
        return f"a part of the layer is a {kind.__name__}"
    parameters = module._parameters
    weight = parameters.get("weight")
    return why_not_plain_weight(weight) or why_not_plain_bias(parameters, weight.shape[0])


def why_not_plain_dropout(module: nn.Module) -> str | None:
    """None when calling ``module`` drops elements, or nothing (nn.Dropout, nn.Identity); else what more it does."""
    reason = why_not_own_call(module, "a part of the layer")
    if reason:
        return reason
    kind = type(module)
    if kind is nn.Identity:
        return None
    if kind is not nn.Dropout:
        return f"a part of the layer is a {kind.__name__}"
    if not (isinstance(module.p, (int, float)) and 0 <= module.p <= 1):
        return "dropout's p is no probability"
    return "dropout works in place" if module.inplace else None


def why_not_here() -> str | None:
    """None unless something follows the calls of every module, or traces, exports or transforms what they compute."""
    if torch.compiler._is_exporting_flag:  # is_exporting() is true in all that Dynamo of torch 2.8 to 2.11 traces
        return "torch.export"
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return "torch.jit.trace"
    return why_transformed() or ("a hook on all modules" if _has_any_global_hook() else None)


def why_inference(x: Tensor, parts: Sequence[nn.Module], base: nn.Module) -> str | None:
    """None unless x or a parameter of these parts was made in inference mode, and one of them or of base trains.

    The operators keep them for a backward, which torch refuses; PEFT keeps their casts, dropped copies or products.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    made = x.is_inference()
    for part in parts:  # loops, for this runs in every call
        for tensor in part._parameters.values():
            made = made or (tensor is not None and tensor.is_inference())
    if not made:
        return None
    trains = x.requires_grad or any(t.requires_grad for module in (*parts, base) for t in module.parameters())
    return "inference tensors with gradients" if trains else None


def why_transformed() -> str | None:
    """None unless vmap, grad or another transform is at work, for which the operators have no rules."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else None
