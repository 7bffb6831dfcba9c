"""nn.Linear over a weight-only quantised tensor of torchao: base and adapters in one operator, as over 4 bits.

The weight has the values of ``weight.dequantize()``: code times scale, rounded once to the tensor's dtype. torchao's
own call of an int8 weight rounds the scale and the product instead, and keeps a dense weight for the backward. A merge
quantises W + D from the tensor's dtype, as PEFT does; the old tensor is the record.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases.base import (
    Adapters,
    Factors,
    Grid,
    register,
    why_not_fits,
    why_not_own_call,
    why_not_plain_bias,
)
from fused_lora.bases.requantised import (
    BLOCK_VALUES,
    FLOATS,
    FLOATS_OF_8_BITS,
    Requantised,
    values_of_codes,
    why_no_numbers,
)
from fused_lora.ops.linear import packed

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
_INPUT = ("act_quant_kwargs", "act_pre_scale", "activation_quantization")  # what changes the input in a call


class Weight(packed.Packed):
    """A tensor [N, K] of torchao, in its own dtype."""

    def __init__(self, tensor: Any):
        self.tensor, self.shape, self.dtype, self.device = tensor, tuple(tensor.shape), tensor.dtype, tensor.device

    def blocks(self, step: int) -> Iterator[tuple[int, int, Tensor]]:
        """As :meth:`Packed.blocks`."""
        N = self.shape[0]
        for start in range(0, N, step):
            stop = min(start + step, N)
            part = self.tensor if stop - start == N else self.tensor[start:stop]
            yield start, stop, _dequantised(part)


def _dequantised(tensor: Any) -> Tensor:
    """``tensor.dequantize()``, to the bit; on a CPU with half of its passes and copies."""
    zeros = getattr(tensor, "zero_point", None)
    if not tensor.is_cpu or tensor.block_size[0] != 1 or (zeros is not None and zeros.any()):
        return tensor.dequantize()
    values = values_of_codes(tensor.qdata).view(tensor.shape[0], -1, tensor.block_size[1])
    return values.mul_(tensor.scale.float().unsqueeze(-1)).view(tensor.shape).to(tensor.dtype)


class Torchao(Requantised):
    """An Int8Tensor, Float8Tensor or IntxUnpackedToInt8Tensor of [N, K] and a bias [N] or None."""

    bits = 8
    state_name = None
    own_attributes = ("extra_repr",)

    def why_not_fused(self, module: Any) -> str | None:
        """None for a weight that is quantised alone, and a call that nobody has changed."""
        parameters = module._parameters
        reason = why_not_own_call(module, "the base layer") or _why_not_known(parameters["weight"])
        if reason is None and _changes_input(parameters["weight"]):
            return "its call quantises or scales the input, too"
        return reason or why_not_plain_bias(parameters, module.out_features)

    def why_not_call(self, module: Any, x: Tensor, outputs: int) -> str | None:
        """None where x has the weight's dtype, and a gradient may be wanted."""
        if reason := why_not_fits(module._parameters, x, module.in_features, module.out_features, outputs):
            return reason
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return "torch.compile or a dispatch mode over a quantised base"
        if reason := self._why_not_now(module, x):
            return reason
        kind, dtype = x.device.type, module._parameters["weight"].dtype
        if x.dtype is not dtype or torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is not dtype:
            return "the input has another dtype than the base layer computes in"
        return None

    def _why_not_now(self, module: Any, x: Tensor) -> str | None:
        if not (module.training or torch.is_grad_enabled()):
            return "inference over a quantised base"
        # the operator computes in fp32, which takes several times as long there
        native = x.is_cpu and x.dtype is torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
        return "this CPU multiplies bf16 itself" if native else None

    def forward(self, module: Any, x: Tensor, adapters: Adapters) -> Tensor:
        """x W^T + b and the terms, one rounding, in x's dtype."""
        lora_A, lora_B, scaling, dropout, *_ = adapters
        bias = adapters.bias_with(module._parameters["bias"])
        return packed.lora_linear(x, Weight(module._parameters["weight"]), bias, lora_A, lora_B, scaling, dropout)

    def operand(self, module: Any, x: Tensor) -> Weight | None:
        """As :meth:`Base.operand`."""
        weight = module._parameters["weight"]
        if _why_not_known(weight) or _changes_input(weight) or self._why_not_now(module, x):
            return None
        return Weight(weight)

    def why_not_dense(self, module: Any) -> str | None:
        """None for a weight that this file can read."""
        return _why_not_read(module._parameters["weight"])

    def why_not_merged(self, module: Any) -> str | None:
        """None for a weight that says all about how it was quantised."""
        weight = module._parameters["weight"]
        if reason := _why_not_read(weight):
            return reason
        if hasattr(weight, "target_dtype"):
            return f"a {type(weight).__name__} does not say how its scales were chosen"
        if getattr(weight, "act_pre_scale", None) is not None:
            return "weight.act_pre_scale changes the input of the base layer alone"
        zeros = getattr(weight, "zero_point", None)
        return None if zeros is None or not zeros.any() else "weight.zero_point is not zero"

    def why_not_adapted(self, module: Any) -> str | None:
        """None for such a weight with finite scales."""
        weight = module._parameters["weight"]
        reason = _why_not_read(weight)
        if reason is None and not torch.isfinite(weight.scale).all():
            return "weight.scale has values that are NaN or infinite"
        return reason

    def adapter_dtype(self, module: Any) -> torch.dtype:
        """The tensor's."""
        return module._parameters["weight"].dtype

    def values(self, module: Any, weight: Any, state: Any) -> Tensor:
        """Code times scale, rounded to the tensor's dtype."""
        return weight.dequantize().float()

    def blocks(self, module: Any) -> Iterator[tuple[int, int, Tensor]]:
        """Rows of the whole."""
        found = Weight(module._parameters["weight"]).blocks(max(1, BLOCK_VALUES // module.in_features))
        return ((start, stop, block.float()) for start, stop, block in found)

    def requantised(self, module: Any, factors: Factors) -> tuple[Any, None]:
        """As PEFT does it: the sum in fp32, rounded to the tensor's dtype, which torchao quantises."""
        old: Any = module._parameters["weight"]
        merged = self.dense_weight(module, factors, old.dtype)
        settings: dict[str, Any] = {"granularity": _granularity(old), "act_quant_kwargs": old.act_quant_kwargs}
        if hasattr(old, "mm_config"):
            settings |= {"float8_dtype": old.qdata.dtype, "mm_config": old.mm_config}
            settings["kernel_preference"] = old.kernel_preference
        else:
            settings["reduce_range"] = old.reduce_range
        return nn.Parameter(type(old).from_hp(merged, **settings), requires_grad=False), None

    def copy_weight(self, module: Any) -> None:
        """A parameter over the same numbers: nothing writes to them."""
        weight = module._parameters["weight"]
        module._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)

    def settings(self, module: Any) -> dict[str, str]:
        """As :meth:`Base.settings`."""
        weight = module._parameters["weight"]
        kind = getattr(weight, "target_dtype", weight.qdata.dtype)
        found = {"weight": f"{kind} in blocks of {tuple(weight.block_size)}", "product": f"computed in {weight.dtype}"}
        if _changes_input(weight):
            found["product"] += ", of a quantised input"
        return {topic: text.replace("torch.", "") for topic, text in found.items()}

    def operand_dtype(self, module: Any, x: Tensor) -> torch.dtype:
        """The tensor's: a call may round the scales to it, too."""
        return module._parameters["weight"].dtype

    def grid(self, module: Any) -> Grid | None:
        """Where each row, or part of a row, has a scale of its own, and the weight can be merged."""
        weight = module._parameters["weight"]
        if self.why_not_merged(module) or weight.block_size[0] != 1 or _changes_input(weight):
            return None
        kind, dtype, most = weight.qdata.dtype, weight.dtype, 127.5
        if kind is torch.int8:
            code = torch.arange(-128, 128, device=weight.device)
        else:
            code = torch.arange(256, dtype=torch.uint8, device=weight.device).view(kind).float()
            code, most = code[torch.isfinite(code)], torch.finfo(kind).max
        # a scale is formed in the tensor's dtype, of which fp16 has large subnormals
        rounding = most * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
        return Grid(str(kind).removeprefix("torch."), code / most, weight.block_size[1], dtype, None, False, rounding)


def _changes_input(weight: Any) -> bool:
    return any(getattr(weight, name, None) is not None for name in _INPUT)


def _granularity(weight: Any) -> Any:
    """What a tensor of this block size was quantised by."""
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor

    rows, columns = weight.block_size
    if rows > 1 or weight.shape[0] == 1:
        return PerTensor()
    return PerRow() if columns == weight.shape[1] else PerGroup(columns)


def is_of_torchao(tensor: object) -> bool:
    """Whether it is a tensor of any kind of torchao's."""
    return type(tensor).__module__.partition(".")[0] == "torchao"


def parts(tensor: Any) -> dict[str, Tensor]:
    """What a tensor of torchao's consists of, by name: codes, scales, zero points. Any other one is its own part."""
    names = tensor.__tensor_flatten__()[0] if is_of_torchao(tensor) else ()
    return {name: getattr(tensor, name) for name in names} or {"": tensor}


def _why_not_known(weight: Any) -> str | None:
    """None for a weight that :class:`Weight` reads, else which field is another one."""
    if weight.dim() != 2 or weight.dtype not in FLOATS:
        return f"the weight is a {weight.dtype} of {weight.dim()} dimensions"
    if weight.is_meta:
        return "the weight is on the meta device"
    data, block = weight.qdata, weight.block_size
    if tuple(data.shape) != tuple(weight.shape) or data.dtype not in (torch.int8, *FLOATS_OF_8_BITS):
        return f"weight.qdata is {data.dtype} {tuple(data.shape)}, expected a number for each of {tuple(weight.shape)}"
    if len(block) != 2 or block[0] not in (1, weight.shape[0]) or (block[0] > 1 and block[1] != weight.shape[1]):
        return f"weight.block_size is {block}"
    return None


def _why_not_read(weight: Any) -> str | None:
    """As :func:`_why_not_known`, of every field: somebody may have made or changed the tensor by hand."""
    kinds = [f"{optional}tensor_{kind}_names" for optional in ("", "optional_") for kind in ("data", "attribute")]
    missing = [name for kind in kinds for name in getattr(weight, kind, ()) if not hasattr(weight, name)]
    if missing:
        return f"weight.{missing[0]} is missing"
    if not isinstance(weight.qdata, Tensor):
        return f"weight.qdata is a {type(weight.qdata).__name__}, expected a tensor"
    block = weight.block_size
    if not isinstance(block, (tuple, list)) or not all(type(size) is int and size > 0 for size in block):
        return f"weight.block_size is {block!r:.100}, expected two positive integers"
    if reason := _why_not_known(weight):
        return reason
    if weight.qdata.is_meta:
        return "weight.qdata is on the meta device"
    (N, K), (rows, columns), zeros = weight.shape, block, getattr(weight, "zero_point", None)
    if K % columns:
        return f"weight.block_size is {block}, expected parts of a row of {K}"
    count = N // rows * (K // columns)
    reason = why_no_numbers(weight.scale, "weight.scale", count, (*FLOATS, torch.float64))
    if reason is None and rows == 1 and tuple(weight.scale.shape) != (N, K // columns):
        return f"weight.scale has shape {tuple(weight.scale.shape)}, expected {(N, K // columns)}"
    if reason or zeros is None:
        return reason
    return why_no_numbers(zeros, "weight.zero_point", count, (*FLOATS, torch.float64, *_INTEGERS))


_CLASSES = "Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"
register(Torchao(), *(f"torchao.quantization.{name}" for name in _CLASSES))
