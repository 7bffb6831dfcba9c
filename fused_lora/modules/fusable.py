"""May a kernel stand in for a call of this part of a LoRA layer? None when it may, else the reason in a few words."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from fused_lora.bases.base import why_not_own_call, why_not_plain_weight


def why_not_plain(module: nn.Module) -> str | None:
    """None when calling ``module``, a part of an adapter, does nothing but its class's own arithmetic.

    Plain are nn.Identity, nn.Dropout, and nn.Linear over an ordinary floating tensor.
    """
    reason = why_not_own_call(module, "a part of the layer")
    if reason:
        return reason
    kind = type(module)
    if kind is nn.Identity:
        return None
    if kind is nn.Dropout:
        return "dropout works in place" if module.inplace else None
    if kind is not nn.Linear:
        return f"a part of the layer is a {kind.__name__}"
    return why_not_plain_weight(module._parameters.get("weight"))


def why_not_here() -> str | None:
    """None unless something follows the calls of every module, or traces, exports or transforms what they compute."""
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return "a hook on all modules" if _has_any_global_hook() else None
