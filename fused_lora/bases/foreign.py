"""Any other base layer: the module is called as it is, and the LoRA terms are added to what it returns.

So hooks run once and in PEFT's order, offloaded weights are fetched, sharded and quantised layers keep their own
arithmetic, and the adapters still take two launches instead of five to seven a piece. Layers of GPTQ and AWQ are such.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases.base import Adapters, Base, register, why_not_plain_tensor
from fused_lora.bases.dense import is_conv1d
from fused_lora.ops.term.op import lora_term


class Foreign(Base):
    """A module of a class that no other file of this folder knows."""

    def why_not_fused(self, module: nn.Module) -> str:
        """Always a reason: nobody knows what a call of this module does."""
        return f"the base layer is a {type(module).__name__}" + ", its weight is packed" * has_packed_weight(module)

    def features(self, module: nn.Module) -> tuple[int, int]:
        """``in_features`` and ``out_features``, or the shape of a weight.

        Raises:
            TypeError: the module has neither.
        """
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
            first, second = weight.shape
            return (first, second) if is_conv1d(module) else (second, first)
        K, N = self._sizes(module)
        if not isinstance(K, int) or not isinstance(N, int):
            raise TypeError(f"base_layer: a {type(module).__name__} has no in_features, out_features or weight matrix")
        return K, N

    def why_not_merged(self, module: nn.Module) -> str | None:
        """None for an ordinary matrix, as a subclass of nn.Linear may have."""
        return "the weight is packed in qweight" if has_packed_weight(module) else super().why_not_merged(module)

    def why_not_adapted(self, module: nn.Module) -> str | None:
        """As :meth:`Base.why_not_adapted`; a packed weight need not be known."""
        if not has_packed_weight(module):
            return super().why_not_adapted(module)
        known = all(type(n) is int and n > 0 for n in self._sizes(module))
        return None if known else "it has no in_features or out_features"

    def adapter_dtype(self, module: nn.Module) -> torch.dtype | None:
        """As :meth:`Base.adapter_dtype`; over a packed weight None."""
        return None if has_packed_weight(module) else super().adapter_dtype(module)

    def settings(self, module: nn.Module) -> dict[str, str]:
        """As :meth:`Base.settings`; of a packed weight the numbers that its class keeps."""
        if not has_packed_weight(module):
            return {}
        numbers = {name: getattr(module, name, None) for name in ("bits", "group_size")}
        return {"weight": "packed, " + ", ".join(f"{name} {n}" for name, n in numbers.items() if isinstance(n, int))}

    def _sizes(self, module: nn.Module) -> tuple[Any, Any]:
        return getattr(module, "in_features", None), getattr(module, "out_features", None)


def has_packed_weight(module: nn.Module) -> bool:
    """Whether ``module`` keeps integers in ``qweight``, as layers of GPTQ and AWQ do."""
    return isinstance(getattr(module, "qweight", None), Tensor)


def stored_weight(module: Any) -> Tensor:
    """``weight``, or the packed ``qweight``: it tells the device."""
    return module.qweight if has_packed_weight(module) else module.weight


def forward_around(
    module: nn.Module, x: Tensor, adapters: Adapters, *args: Any, **kwargs: Any
) -> tuple[Tensor, str | None]:
    """(module(x, ...) + the terms, None), or the module's output as it is and why nothing was added to it."""
    y = module(x, *args, **kwargs)
    reason = why_not_added(y, x, adapters)
    if reason:
        return y, reason
    lora_A, lora_B, scaling, dropout, bias, _ = adapters
    return lora_term(y, x, lora_A, lora_B, scaling, dropout, bias=bias), None


def why_not_added(y: object, x: Tensor, adapters: Adapters) -> str | None:
    """None where ``lora_term`` takes these, else why the sum needs the adapters' own modules."""
    # torch's tensor of a running collective (row-parallel layers) is waited for where an operator takes it
    running = type(y).__module__ == "torch.distributed._functional_collectives"
    reason = (None if running else why_not_plain_tensor(y, "the base layer's output")) or why_not_plain_tensor(x)
    if reason:
        return reason
    if y.device != x.device:
        return "devices differ"
    return None if y.shape == (*x.shape[:-1], adapters.lora_B[0].shape[0]) else "shapes differ"


register(Foreign())
