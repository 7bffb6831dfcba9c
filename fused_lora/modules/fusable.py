"""May a kernel stand in for a call of this module? None when it may, else the reason in a few words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from fused_lora.ops.checks import FLOAT_DTYPES

_TENSORS = (nn.Parameter, Tensor)  # exact types: subclasses (quantised, sharded, fake) bring their own arithmetic


def why_not_plain(module: nn.Module) -> str | None:
    """None when calling ``module`` is a product with its weight, plus its bias, and nothing more; else what it is.

    Plain are nn.Linear and transformers' Conv1D over ordinary floating tensors.
    """
    # written out: this runs for every part of a layer in every call
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "a hook on a part of the layer"
    if "forward" in vars(module):
        return "a part of the layer has its forward replaced"
    kind = type(module)
    turned = kind is not nn.Linear
    if turned and not is_exactly_conv1d(module):
        return f"a part of the layer is a {kind.__name__}"
    parameters = module._parameters
    weight = parameters.get("weight")
    return why_not_plain_weight(weight) or _why_not_plain_bias(parameters, weight.shape[1 if turned else 0])


def why_not_plain_dropout(module: nn.Module) -> str | None:
    """None when calling ``module`` drops elements, or nothing (nn.Dropout, nn.Identity); else what more it does."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "a hook on a part of the layer"
    if "forward" in vars(module):
        return "a part of the layer has its forward replaced"
    kind = type(module)
    if kind is nn.Identity:
        return None
    if kind is not nn.Dropout:
        return f"a part of the layer is a {kind.__name__}"
    return "dropout works in place" if module.inplace else None


def why_not_plain_weight(weight: object) -> str | None:
    """None for an ordinary dense two-dimensional floating tensor, else what it is instead."""
    if (
        type(weight) in _TENSORS
        and weight.dim() == 2
        and weight.dtype in FLOAT_DTYPES
        and weight.layout is torch.strided
    ):
        return None
    if weight is None:
        return "a weight is not a parameter of its own"
    if type(weight) not in _TENSORS:
        return f"a weight is a {type(weight).__name__}"
    if weight.dim() != 2:
        return "a weight is not a matrix (sharded?)"
    return f"a weight is {weight.dtype if weight.layout is torch.strided else weight.layout}"


def _why_not_plain_bias(parameters: dict[str, object], N: int) -> str | None:
    if "bias" not in parameters:
        return "a bias is not a parameter of its own"
    bias = parameters["bias"]
    if bias is None:
        return None
    if type(bias) not in _TENSORS:
        return f"a bias is a {type(bias).__name__}"
    if bias.dim() != 1 or bias.shape[0] != N:
        return "a bias is not a vector of out_features"
    return None if bias.dtype in FLOAT_DTYPES else f"a bias is {bias.dtype}"


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
