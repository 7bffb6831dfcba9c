"""bitsandbytes' Linear4bit (NF4 and FP4): base and adapters in one operator, which dequantises for each product.

The weight has the values that the library's own forward multiplies with: code times scale in fp32, rounded to the
compute dtype. A forward of few rows on a GPU reads the 4 bits themselves. Otherwise, in ``eval()`` without gradients,
the layer itself is called. On CPUs with AVX512-BF16 that call repacks the weight in place, and its scales to bf16. The
library's own training then has no gradient, and its own merge reads other weights; the fused forward and backward read
the new layout too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_lora.bases.base import (
    Adapters,
    Factors,
    Grid,
    register,
    why_not_fits,
    why_not_own_call,
    why_not_plain_bias,
)
from fused_lora.bases.requantised import BLOCK_VALUES, FLOATS, Requantised, summed_delta, why_no_numbers
from fused_lora.ops.dequant import FourBit, dequantise_4bit
from fused_lora.ops.linear import packed, plan

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STORAGE = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_LARGEST = 1024  # values to a scale that bitsandbytes' fast loops for CPUs take
_REPACKED_ROWS = 32  # whose values share memory in the layout for CPUs


class Weight(packed.Packed):
    """The tensors of a Params4bit as they are now: a later call of the layer may put others in their place."""

    def __init__(self, module: Any, dtype: torch.dtype, weight: Any = None):
        weight = module._parameters["weight"] if weight is None else weight
        state, data = weight.quant_state, weight.data
        self.shape, self.dtype, self.device = tuple(state.shape), dtype, data.device
        self.quant_type, self.blocksize = state.quant_type, state.blocksize
        self.repacked = _is_repacked(state)
        self.bytes = data.contiguous().view(torch.uint8).view(-1)
        self.absmax, self.code, self.nested = state.absmax, state.code, None
        if state.nested:
            inner = state.state2
            self.nested = inner.code, inner.absmax, inner.blocksize, state.offset

    def data_ptr(self) -> int:
        """As :meth:`Packed.data_ptr`."""
        return self.bytes.data_ptr()

    @property
    def four_bit(self) -> FourBit | None:
        """As :class:`Packed`; made when a kernel asks."""
        own = self.bytes, self.code, self.absmax, self.nested, self.blocksize, self.shape, self.dtype
        return None if self.repacked else FourBit(*own)

    @property
    def kind(self) -> tuple:
        """As :class:`Packed`."""
        nested = self.nested is not None and self.nested[2]
        return self.dtype, self.quant_type, self.blocksize, nested, self.shape, self.repacked

    def scales(self) -> Tensor:
        """fp32, one to each ``blocksize`` values in the order of the rows."""
        if self.nested is not None:
            return nested_scales(self.absmax, *self.nested)
        return (self.absmax.t() if self.repacked else self.absmax).float().reshape(-1)

    def to(self, dtype: torch.dtype) -> Tensor:
        """As :meth:`Packed.to`; on a GPU by one launch."""
        four_bit = self.four_bit
        if four_bit is None:
            return super().to(dtype)
        return dequantise_4bit(four_bit, lambda: super(Weight, self).to(self.dtype)).to(dtype)

    def blocks(self, step: int) -> Iterator[tuple[int, int, Tensor]]:
        """As :meth:`Packed.blocks`. Fewer rows than all only where each row begins with a scale of its own."""
        (N, K), size, scales = self.shape, self.blocksize, self.scales()
        if self.repacked:
            step = max(_REPACKED_ROWS, step - step % _REPACKED_ROWS)
        for start in range(0, N, step):
            stop, values, own = min(start + step, N), self.bytes, scales
            if stop - start < N:
                values = values[start * K // 2 : stop * K // 2]
                own = scales[start * K // size : stop * K // size]
            if self.repacked:
                values = _rows_of(values, K)
            yield start, stop, values_of_rows(values, own, size, self.quant_type, (stop - start, K), self.dtype)


def is_installed() -> bool:
    """Whether bitsandbytes can be imported. Its operators are there from then on."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return False
    return True


def nested_scales(codes: Tensor, code: Tensor, absmax: Tensor, blocksize: int, offset: Any) -> Tensor:
    """fp32, of scales that are quantised themselves."""
    return torch.ops.bitsandbytes.dequantize_blockwise.default(codes, absmax, code, blocksize, torch.float32) + offset


def values_of_rows(
    packed: Tensor, scales: Tensor, blocksize: int, quant_type: str, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """``shape`` in ``dtype``: whole rows of a weight, from their bytes and the scale of each block, in fp32."""
    if blocksize > _LARGEST and packed.is_cpu:
        scales, blocksize = scales.repeat_interleave(blocksize // _LARGEST), _LARGEST
    # a CPU gives no float64: what was in memory
    own = torch.float32 if dtype is torch.float64 else dtype
    return torch.ops.bitsandbytes.dequantize_4bit.default(packed, scales, blocksize, quant_type, shape, own).to(dtype)


def _rows_of(repacked: Tensor, K: int) -> Tensor:
    """The bytes of whole groups of 32 rows in the order of the rows, two values each.

    In the layout for CPUs 32 bytes hold 64 values, the first 32 in their low halves: two neighbours of each row.
    """
    groups = repacked.view(-1, 32)
    values = torch.cat((groups & 15, groups >> 4), 1).view(-1, K // 2, _REPACKED_ROWS, 2).transpose(1, 2)
    return (values[..., 0] << 4 | values[..., 1]).reshape(-1)


def is_repacked(module: Any) -> bool:
    """Whether a call in ``eval()`` without gradients has put the weight into the layout for CPUs."""
    return _is_repacked(getattr(getattr(module, "weight", None), "quant_state", None))


def _is_repacked(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def compute_dtype(module: Any, x: Tensor) -> torch.dtype:
    """What the layer's own call would multiply in; a layer without one takes that of its first input."""
    own = module.compute_dtype
    if own is None or not module.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
        return x.dtype
    return own


def _reads_4_bits(module: Any, x: Tensor) -> bool:
    """Whether the fused product of x would read the weight as it is."""
    K, weight = module.in_features, module._parameters["weight"]
    dtype = packed.operand_dtype(x)
    if dtype is not compute_dtype(module, x) or _is_repacked(weight.quant_state):
        return False
    return plan.reads_4_bits(x.numel() // K, K, weight.quant_state.blocksize, dtype, x.device)


class Linear4bit(Requantised):
    """A Params4bit of [N, K] values and a bias [N] or None."""

    bits = 4
    state_name = "quant_state"
    own_attributes = (
        "compute_dtype",
        "compute_type_is_set",
        "quant_state",
        "quant_storage",
        "support_avx512bf16_for_cpu",
    )

    def why_not_fused(self, module: Any) -> str | None:
        """None for a quantised weight of a known kind, and a call that nobody has changed."""
        parameters = module._parameters
        reason = why_not_own_call(module, "the base layer") or _why_not_known(module, parameters.get("weight"))
        return reason or why_not_plain_bias(parameters, module.out_features)

    def why_not_call(self, module: Any, x: Tensor, outputs: int) -> str | None:
        """None where x fits and a gradient may be wanted, in training, or for few rows on a GPU."""
        if reason := why_not_fits(module._parameters, x, module.in_features, module.out_features, outputs):
            return reason
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return "torch.compile or a dispatch mode over a 4-bit base"
        if reason := self._why_not_now(module, x):
            return reason
        if x.is_cpu:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return "float64 under autocast" if x.dtype is torch.float64 else None
        fits = x.dtype is compute_dtype(module, x)
        return None if fits else "the input has another dtype than the base layer computes in"

    def _why_not_now(self, module: Any, x: Tensor) -> str | None:
        if not (module.training or torch.is_grad_enabled() or _reads_4_bits(module, x)):
            return "inference over a 4-bit base"
        # the operator computes in fp32; after the layer's call of a repacked weight there is no backward
        native = x.is_cpu and getattr(module, "support_avx512bf16_for_cpu", False) and not is_repacked(module)
        return "this CPU multiplies bf16 itself" if native and compute_dtype(module, x) is torch.bfloat16 else None

    def forward(self, module: Any, x: Tensor, adapters: Adapters) -> Tensor:
        """x W^T + b and the terms, one rounding, in x's dtype."""
        dtype = compute_dtype(module, x)
        if not module.compute_type_is_set:
            module.set_compute_type(x)  # as the layer's own first call does
            module.compute_type_is_set = True
        lora_A, lora_B, scaling, dropout, *_ = adapters
        bias = adapters.bias_with(module._parameters["bias"])
        return packed.lora_linear(x, Weight(module, dtype), bias, lora_A, lora_B, scaling, dropout)

    def operand(self, module: Any, x: Tensor) -> Weight | None:
        """As :meth:`Base.operand`. The fields of a state are compared with those of an earlier call, not looked into.

        Every attribute of a Params4bit takes microseconds, for it is a subclass of a tensor.
        """
        own, state = module.__dict__, getattr(module._parameters.get("weight"), "quant_state", None)
        shape = getattr(state, "shape", None)
        if type(shape) is not torch.Size or shape != (own["out_features"], own["in_features"]):
            return None
        if not own["compute_type_is_set"] or self._why_not_now(module, x):
            return None
        dtype = compute_dtype(module, x)
        fits = x.is_cpu or x.dtype is dtype or torch.is_autocast_enabled(x.device.type)
        return Weight(module, dtype) if fits else None

    def why_not_merged(self, module: Any) -> str | None:
        """None for a weight of a known kind."""
        return _why_not_read(module, module._parameters.get("weight"))

    def values(self, module: Any, weight: Any, state: Any) -> Tensor:
        """Code times scale."""
        return Weight(module, torch.float32, weight).to(torch.float32)

    def blocks(self, module: Any) -> Iterator[tuple[int, int, Tensor]]:
        """On a CPU; a GPU dequantises all rows by one launch."""
        weight = Weight(module, torch.float32)
        if weight.device.type == "cpu":
            return weight.blocks(max(1, BLOCK_VALUES // module.in_features))
        return iter([(0, module.out_features, weight.to(torch.float32))])

    def requantised(self, module: Any, factors: Factors) -> tuple[Any, Any]:
        """As PEFT does it: values in the dtype that was quantised, the sum in fp32."""
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn.modules import Params4bit

        before, state = module._parameters["weight"], module._parameters["weight"].quant_state
        dtype = getattr(state, "original_dtype", state.dtype)  # a repacked one has bf16 instead
        merged = Weight(module, dtype).to(torch.float32) + summed_delta(factors)
        if not torch.isfinite(merged).all():
            raise ValueError("NaNs or infinities detected in the merged weights: the adapter seems to be broken")
        settings = dict(blocksize=state.blocksize, quant_type=state.quant_type)
        nested = state.nested or getattr(state, "original_nested", False)
        storage = before.quant_storage
        data, new = quantize_4bit(merged, compress_statistics=nested, quant_storage=storage, **settings)
        new.dtype = dtype
        settings |= dict(compress_statistics=nested, quant_storage=storage, module=before.module, bnb_quantized=True)
        new_parameter: Any = Params4bit  # it declares no arguments that pyright can read
        return new_parameter(data, **settings, requires_grad=False, quant_state=new), new

    def copy_weight(self, module: Any) -> None:
        """A parameter over the same bytes with a state of its own: a call that repacks puts others in their place."""
        weight = module._parameters["weight"]
        own = copy.copy(weight)
        own.quant_state = copy.copy(weight.quant_state)
        module._parameters["weight"] = own

    def grid(self, module: Any) -> Grid:
        """As :meth:`Base.grid`."""
        state = module._parameters["weight"].quant_state
        nested = (state.state2.code, state.state2.blocksize) if state.nested else None
        dtype = getattr(state, "original_dtype", state.dtype)
        return Grid(state.quant_type, state.code, state.blocksize, dtype, nested, _is_repacked(state))

    def operand_dtype(self, module: Any, x: Tensor) -> torch.dtype | None:
        """The compute dtype; bf16 for a weight that was repacked."""
        return torch.bfloat16 if is_repacked(module) else compute_dtype(module, x)

    def adapter_dtype(self, module: Any) -> torch.dtype | None:
        """The compute dtype, where it is set."""
        return module.compute_dtype

    def why_not_adapted(self, module: Any) -> str | None:
        """None for a weight of a known kind whose scales are finite."""
        reason = _why_not_read(module, module._parameters.get("weight"))
        if reason is None and not torch.isfinite(Weight(module, torch.float32).scales()).all():
            return "weight.quant_state.absmax has scales that are NaN or infinite"
        return reason


def _why_not_known(module, weight) -> str | None:
    """None for a weight that :class:`Weight` reads, else which field is another one."""
    if type(weight).__name__ != "Params4bit":  # a pickled one is a Parameter until the layer's own first call
        return f"a weight is a {type(weight).__name__}"
    state, (N, K) = weight.quant_state, (module.out_features, module.in_features)
    if state is None:
        return "weight.quant_state is missing: the weight is quantised when the layer is moved to its device"
    if state.quant_type not in ("nf4", "fp4"):
        return f"weight.quant_state.quant_type is {state.quant_type!r}, expected 'nf4' or 'fp4'"
    if state.blocksize not in BLOCK_SIZES:
        return f"weight.quant_state.blocksize is {state.blocksize}"
    if state.shape is None or tuple(state.shape) != (N, K):
        return f"weight.quant_state.shape is {state.shape}, expected {(N, K)}"
    data = weight.data
    if data.dtype not in STORAGE:
        return f"the weight is stored in {data.dtype}, expected one of {STORAGE}"
    if data.nbytes != -(-N * K // 2):
        return f"the weight has {data.nbytes} bytes, expected {-(-N * K // 2)} for {(N, K)}"
    # bitsandbytes' loops for CPUs take rows of other lengths for rows that begin with a scale
    return "in_features is no multiple of the blocksize" if data.is_cpu and K % state.blocksize else None


def _why_not_read(module, weight) -> str | None:
    """As :func:`_why_not_known`, of every field: somebody may have made or changed the state by hand."""
    name, state = "weight.quant_state", getattr(weight, "quant_state", None)
    if state is not None:
        for field in ("quant_type", "blocksize", "shape", "dtype", "nested", "absmax", "code"):
            if getattr(state, field, None) is None:
                return f"{name}.{field} is missing"
        if not isinstance(state.shape, (tuple, list)):
            return f"{name}.shape is {state.shape!r:.100}, expected out_features and in_features"
    if reason := _why_not_known(module, weight):
        return reason
    inner = state.state2 if state.nested else None
    count = -(-module.out_features * module.in_features // state.blocksize)
    reason = why_no_numbers(state.absmax, f"{name}.absmax", count, FLOATS if inner is None else (torch.uint8,))
    reason = reason or why_no_numbers(state.code, f"{name}.code", 16)
    if reason or not state.nested:
        return reason
    size = getattr(inner, "blocksize", None)
    if type(size) is not int or size < 1:
        return f"{name}.state2.blocksize is {size!r:.100}, expected a positive integer"
    reason = why_no_numbers(getattr(inner, "absmax", None), f"{name}.state2.absmax", -(-count // size))
    reason = reason or why_no_numbers(getattr(inner, "code", None), f"{name}.state2.code", 256)
    return reason or why_no_numbers(state.offset, f"{name}.offset", 1)


_CLASSES = "Linear4bit", "LinearNF4", "LinearFP4"  # the two others only fill in an argument
register(Linear4bit(), *(f"bitsandbytes.nn.modules.{name}" for name in _CLASSES))
