"""May a kernel stand in for a call of this module? None when it may, else the reason in a few words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from fused_lora.ops.checks import FLOAT_DTYPES

_TENSORS = (nn.Parameter, Tensor)  # exact types: subclasses (quantised, sharded, fake) bring their own arithmetic


def why_not_plain(module: nn.Module) -> str | None:
    """None when calling ``module`` does nothing but its class's own arithmetic, else what more it does.

    Plain are nn.Identity, nn.Dropout, and nn.Linear and transformers' Conv1D over ordinary floating tensors.
    """
    # written out, and past nn.Module's __getattr__: this runs for every part of a layer in every call
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "a hook on a part of the layer"
    if "forward" in own:
        return "a part of the layer has its forward replaced"
    kind = type(module)
    if kind is nn.Identity:
        return None
    if kind is nn.Dropout:
        return "dropout works in place" if module.inplace else None
    if kind is not nn.Linear and not is_exactly_conv1d(module):
        return f"a part of the layer is a {kind.__name__}"
    return why_not_plain_weight(own["_parameters"].get("weight"))


def why_not_plain_weight(weight: object) -> str | None:
    """None for an ordinary two-dimensional floating tensor, else what it is instead."""
    if type(weight) in _TENSORS and weight.dim() == 2 and weight.dtype in FLOAT_DTYPES:
        return None
    if weight is None:
        return "a weight is not a parameter of its own"
    if type(weight) not in _TENSORS:
        return f"a weight is a {type(weight).__name__}"
    return "a weight is not a matrix (sharded?)" if weight.dim() != 2 else f"a weight is {weight.dtype}"


def why_not_plain_input(x: object) -> str | None:
    """None for an ordinary dense floating tensor on a CPU or CUDA device, else what it is instead."""
    if type(x) not in _TENSORS:
        return f"the input is a {type(x).__name__}"
    if x.is_nested or x.layout is not torch.strided:
        return "the input is not dense"
    if x.device.type not in ("cpu", "cuda"):
        return f"device {x.device.type}"
    return None if x.dtype in FLOAT_DTYPES else f"the input is {x.dtype}"


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


def is_exactly_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D itself, not a subclass, without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers")
