"""nn.Linear and transformers' Conv1D over ordinary floating tensors: base and adapters in one operator."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases.base import (
    Adapters,
    Base,
    register,
    why_not_fits,
    why_not_own_call,
    why_not_plain_bias,
    why_not_plain_weight,
)
from fused_lora.ops.linear.op import lora_linear


class Dense(Base):
    """A weight [N, K], or [K, N] where ``transposed``, and a bias [N] or None."""

    def __init__(self, transposed: bool):
        self.transposed = transposed

    def why_not_fused(self, module: nn.Module) -> str | None:
        """None for an ordinary weight and a call that nobody has changed."""
        parameters = module._parameters
        weight = parameters.get("weight")
        reason = why_not_own_call(module, "the base layer") or why_not_plain_weight(weight)
        return reason or why_not_plain_bias(parameters, weight.shape[1 if self.transposed else 0])

    def why_not_call(self, module: nn.Module, x: Tensor, outputs: int) -> str | None:
        """None where x, weight and bias fit as in the module's own forward, and the adapters the weight."""
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        N, K = reversed(weight.shape) if self.transposed else weight.shape
        if reason := why_not_fits(module._parameters, x, K, N, outputs):
            return reason
        if torch.is_autocast_enabled(x.device.type):
            return "float64 under autocast" if torch.float64 in (x.dtype, weight.dtype) else None
        fits = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
        return None if fits else "the input has another dtype than the base layer"

    def forward(self, module: nn.Module, x: Tensor, adapters: Adapters) -> Tensor:
        """x W^T + b and the terms, one rounding."""
        parameters: Any = module._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        lora_A, lora_B, scaling, dropout, *_ = adapters
        bias = adapters.bias_with(bias)
        return lora_linear(x, weight.t() if self.transposed else weight, bias, lora_A, lora_B, scaling, dropout)

    def features(self, module: nn.Module) -> tuple[int, int]:
        """The weight's shape."""
        weight: Any = module.weight
        N, K = weight.shape
        return (N, K) if self.transposed else (K, N)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D (weight [K, N]) or a subclass, without importing transformers."""
    # no module can be a Conv1D before something imported the file that defines it
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


register(Dense(transposed=False), "torch.nn.modules.linear.Linear")
register(Dense(transposed=True), "transformers.pytorch_utils.Conv1D")
