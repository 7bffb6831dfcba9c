"""bitsandbytes' Linear8bitLt: the layer's own call, and the adapters around it.

A fused product would be another one: the call rounds its input to 8 bits, too (on a CPU only in ``eval()``), sums
integers, and takes columns of outliers apart. A merge dequantises, adds, and quantises once, from fp16, as the library
does; the old parameter and its state are the record.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_lora.bases.base import Factors, Grid, register
from fused_lora.bases.requantised import BLOCK_VALUES, Requantised, why_no_numbers


class Linear8bit(Requantised):
    """An Int8Params of [N, K] with a scale for each row, and a bias [N] or None."""

    bits = 8
    state_name = "state"
    own_attributes = ("state", "index")

    def why_not_fused(self, module: Any) -> str:
        """Always a reason: the call is the library's own."""
        return "an int8 base layer has products of its own"

    def why_not_merged(self, module: Any) -> str | None:
        """None for a weight of int8 with a scale for each row."""
        weight, shape = module._parameters.get("weight"), (module.out_features, module.in_features)
        if type(weight).__name__ != "Int8Params":
            return f"a weight is a {type(weight).__name__}"
        if weight.dtype is not torch.int8:
            return (
                f"the weight is stored in {weight.dtype}, expected torch.int8 (has_fp16_weights=False, on its device)"
            )
        if tuple(weight.shape) != shape:
            return f"the weight has shape {tuple(weight.shape)}, expected {shape}"
        if weight.is_meta:
            return "the weight is on the meta device"
        if module.state is None:
            return "state is missing"
        scales = _scales(module)
        if scales is None:
            return "weight.SCB and state.SCB are missing"
        if reason := why_no_numbers(scales, "SCB", getattr(scales, "numel", int)(), (torch.float32,)):
            return reason
        return None if scales.shape == shape[:1] else f"SCB has shape {tuple(scales.shape)}, expected {shape[:1]}"

    def why_not_adapted(self, module: Any) -> str | None:
        """None for such a weight with finite scales."""
        if reason := self.why_not_merged(module):
            return reason
        return None if torch.isfinite(_scales(module)).all() else "SCB has scales that are NaN or infinite"

    def adapter_dtype(self, module: Any) -> None:
        """None: adapters stay as they were drawn."""
        return None

    def values(self, module: Any, weight: Any, state: Any) -> Tensor:
        """Code times scale over 127."""
        return values_of_rows(weight.data, state.SCB if weight.SCB is None else weight.SCB)

    def blocks(self, module: Any) -> Iterator[tuple[int, int, Tensor]]:
        """Rows of the whole."""
        data, scales = module._parameters["weight"].data, _scales(module)
        step = max(1, BLOCK_VALUES // module.in_features)
        for start in range(0, len(data), step):
            stop = min(start + step, len(data))
            yield start, stop, values_of_rows(data[start:stop], scales[start:stop])

    def requantised(self, module: Any, factors: Factors) -> tuple[Any, Any]:
        """As PEFT does it: the sum in fp32, rounded to fp16, which the library quantises."""
        from bitsandbytes.functional import int8_vectorwise_quant

        data, scales, _ = int8_vectorwise_quant(self.dense_weight(module, factors, torch.float16))
        state = copy.copy(module.state)  # a backward that is under way keeps the old one
        state.reset_grads()
        return _parameter(data, data, scales), state

    def become_linear(self, module: Any, weight: Tensor, bias: Tensor | None) -> None:
        """As :meth:`Base.become_linear`."""
        super().become_linear(module, weight, bias)
        hooks = module._load_state_dict_pre_hooks
        for key in [
            key for key, hook in hooks.items() if "maybe_rearrange_weight" in repr(getattr(hook, "hook", hook))
        ]:
            del hooks[key]

    def grid(self, module: Any) -> Grid:
        """A scale for each row; what is quantised was rounded to fp16."""
        data = module._parameters["weight"].data
        code = torch.arange(-127, 128, device=data.device) / 127
        return Grid("int8", code, module.in_features, torch.float16, None, False)

    def settings(self, module: Any) -> dict[str, str]:
        """As :meth:`Base.settings`."""
        return {"weight": "int8 by rows", "product": f"outliers from {module.state.threshold}"}

    def operand_dtype(self, module: Any, x: Tensor) -> torch.dtype:
        """fp16, before x is quantised; columns with outliers are multiplied in x's dtype."""
        return torch.bfloat16 if x.dtype is torch.bfloat16 else torch.float16

    def input_step(self, module: Any, x: Tensor) -> Tensor:
        """Half a step of 127 to the largest of each row that is no outlier."""
        threshold, size = module.state.threshold, x.abs().float()
        if threshold > 0.0:  # of x in fp16
            size = size.masked_fill(size >= threshold * (1 + 2.0**-10), 0.0)
        return size.amax(1, keepdim=True) / 254

    def copy_weight(self, module: Any) -> None:
        """A parameter over the same bytes and a state of its own: a call moves the scales from one to the other."""
        weight = module._parameters["weight"]
        module._parameters["weight"] = _parameter(weight.data, weight.CB, weight.SCB)
        module.__dict__["state"] = copy.copy(module.__dict__["state"])


def _parameter(data: Tensor, CB: Any, SCB: Any) -> Any:
    from bitsandbytes.nn.modules import Int8Params

    new: Any = Int8Params  # it declares no arguments that pyright can read
    return new(data, requires_grad=False, has_fp16_weights=False, CB=CB, SCB=SCB)


def _scales(module: Any) -> Any:
    """[N]: the largest magnitude of each row, in the parameter until the first call, then in the state."""
    own = getattr(module._parameters["weight"], "SCB", None)
    return module.state.SCB if own is None else own


def values_of_rows(data: Tensor, scales: Tensor) -> Tensor:
    """Rows in fp32, from their codes and scales, with the library's bits."""
    return torch.ops.bitsandbytes.int8_vectorwise_dequant.default(data, scales)


register(Linear8bit(), "bitsandbytes.nn.modules.Linear8bitLt")
