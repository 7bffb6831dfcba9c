"""The layers that the benchmarks compare: one base layer and adapter as PEFT's lora.Linear and as LoraLinear."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fused_lora
from fused_lora.bases import base_of
from fused_lora.bases.base import Factors
from fused_lora.bases.torchao import parts
from fused_lora.testing.numeric import errors, largest_and_rms, ulp

ADAPTER = "default"
SCALING = 2.0


@dataclass(frozen=True)
class Point:
    """One measurement: a layer with ``inputs`` features in and ``outputs`` out; ``M`` rows where rows matter."""

    inputs: int
    outputs: int
    r: int = 16
    dtype: str = "float32"
    adapter_dtype: str = "float32"
    dropout: float = 0.0
    M: int = 0
    relative: float = 0.01
    base: str = ""  # a name in QUANTISED; else dense

    @property
    def shape(self) -> str:
        return f"{self.inputs}x{self.outputs}"

    @property
    def label(self) -> str:
        """What a table calls this point; the adapters' dtype where it is not the layer's."""
        return str(self) if self.adapter_dtype == self.dtype else f"{self} +{self.adapter_dtype}"

    def __str__(self) -> str:
        rows = f" M={self.M} p={self.dropout:g}" if self.M else ""
        return f"{self.shape} r={self.r} {self.base + ' ' if self.base else ''}{self.dtype}{rows}"


@dataclass
class Weights:
    """A base layer's weight and bias and an adapter whose delta has ``relative`` times the weight's norm."""

    weight: torch.Tensor
    bias: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    quantised: nn.Module | None = None  # the layer whose values ``weight`` holds
    base: str = ""

    @classmethod
    def draw(cls, point: Point, device: torch.device) -> Weights:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float) -> torch.Tensor:
            return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)

        weight = normal(point.outputs, point.inputs, std=point.inputs**-0.5)
        A, B = normal(point.r, point.inputs, std=point.inputs**-0.5), normal(point.outputs, point.r, std=1.0)
        # ||B A||^2 = trace(B^T B A A^T), without the product
        norm = torch.einsum("ij,ij->", (B.double().T @ B.double()), (A.double() @ A.double().T)).sqrt()
        B *= point.relative * weight.norm() / (SCALING * norm)
        dtype, adapter_dtype = getattr(torch, point.dtype), getattr(torch, point.adapter_dtype)
        bias, quantised = normal(point.outputs, std=1.0).to(dtype), None
        if point.base:
            quantised = QUANTISED[point.base](weight.to(dtype), bias)
            weight = base_of(quantised).dense_weight(quantised, Factors([], [], []), dtype)
        return cls(weight.to(dtype), bias, A.to(adapter_dtype), B.to(adapter_dtype), quantised, point.base)

    def dense(self) -> nn.Linear:
        """A frozen nn.Linear over the same values."""
        return replace(self, quantised=None).base_layer(copy=False)

    def base_layer(self, copy: bool) -> nn.Linear:
        """A frozen layer over this weight, or over a copy of it."""
        if self.quantised is not None:
            return deepcopy(self.quantised) if copy else self.quantised
        base = nn.Linear(*reversed(self.weight.shape), device="meta")
        base.weight = nn.Parameter(self.weight.clone() if copy else self.weight, requires_grad=False)
        base.bias = nn.Parameter(self.bias.clone() if copy else self.bias, requires_grad=False)
        return base

    def _fill(self, layer: nn.Module) -> nn.Module:
        for part, values in ((layer.lora_A, self.lora_A), (layer.lora_B, self.lora_B)):
            with torch.no_grad():
                part[ADAPTER].weight.copy_(values)
            if part[ADAPTER].weight.dtype != values.dtype:
                raise RuntimeError(f"adapter dtype is {part[ADAPTER].weight.dtype}, expected {values.dtype}")
        return layer.train()

    def peft(self, base: nn.Linear, dropout: float) -> nn.Module:
        """peft.tuners.lora.Linear with this adapter, as get_peft_model makes it."""
        r, holder = len(self.lora_A), nn.Module()
        holder.layer = base
        holder.is_loaded_in_4bit, holder.is_loaded_in_8bit = self.base in ("nf4", "fp4"), self.base == "int8"
        if self.base in _TORCHAO:  # where transformers leaves what PEFT's merge quantises by
            config = SimpleNamespace(get_apply_tensor_subclass=_TORCHAO[self.base])
            holder.hf_quantizer = SimpleNamespace(quantization_config=config)
        config = LoraConfig(r=r, lora_alpha=SCALING * r, lora_dropout=dropout, target_modules=["layer"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a model without a config: it has none
            model = get_peft_model(holder, config, autocast_adapter_dtype=self.lora_A.dtype == torch.float32)
        return self._fill(model.base_model.model.layer)

    def ours(self, base: nn.Linear, dropout: float) -> nn.Module:
        """LoraLinear with this adapter."""
        r, fp32 = len(self.lora_A), self.lora_A.dtype == torch.float32
        options = dict(r=r, lora_alpha=SCALING * r, lora_dropout=dropout, autocast_adapter_dtype=fp32)
        return self._fill(fused_lora.LoraLinear(base, **options))


def _linear_4bit(quant_type: str) -> Callable[[torch.Tensor, torch.Tensor], nn.Module]:
    """A Linear4bit that computes in the bias's dtype, its weight quantised twice."""

    def make(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
        from bitsandbytes.nn import Linear4bit

        N, K = weight.shape
        layer = Linear4bit(K, N, compute_dtype=bias.dtype, quant_type=quant_type, compress_statistics=True)
        return _loaded(layer, weight, bias).to(bias.dtype).to(weight.device)

    return make


def _linear_8bit(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    N, K = weight.shape
    return _loaded(Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0), weight, bias).to(weight.device)


def _loaded(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer.requires_grad_(False)


def _of_torchao(config: Callable[[], object]) -> Callable[[torch.Tensor, torch.Tensor], nn.Module]:
    def make(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
        from torchao.quantization import quantize_

        layer = nn.Linear(*reversed(weight.shape), device="meta")
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        holder = nn.Sequential(layer)
        quantize_(holder, config())
        return holder[0].requires_grad_(False)

    return make


def _int8() -> object:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int4() -> object:
    """In a byte each: torchao packs two in one for kernels of GPUs alone, whose tensors nobody can dequantise."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def _fp8() -> object:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def _fp8_blocks(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    """transformers' FP8Linear with a scale for each 128 x 128 values. Its call needs a GPU."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    (N, K), size = weight.shape, 128
    layer = FP8Linear(K, N, (size, size), has_bias=True).to(weight.device)
    padded = nn.functional.pad(weight.float(), (0, -K % size, 0, -N % size))
    tiles = padded.view(-(-N // size), size, -(-K // size), size)
    scales = tiles.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    codes = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(padded.shape)[:N, :K].contiguous()
    layer.weight.data, layer.weight_scale_inv.data, layer.bias.data = codes, scales, bias.clone()
    return layer.requires_grad_(False)


_TORCHAO = {"torchao int8": _int8, "torchao int4": _int4, "torchao fp8": _fp8}
# what makes a frozen layer of weight [N, K] and bias, which has the dtype that is computed in
QUANTISED = {"nf4": _linear_4bit("nf4"), "fp4": _linear_4bit("fp4"), "int8": _linear_8bit}
QUANTISED |= {name: _of_torchao(config) for name, config in _TORCHAO.items()} | {"fp8 blocks": _fp8_blocks}


def no_worse(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, name: str) -> str | None:
    """None, or what is wrong: the RMS error against float64 may be 1.1 times PEFT's plus one ulp.

    Rounding errors of two equally good sums differ by chance, so the RMS over n elements may differ by 4 / sqrt(n)
    more, and the largest error may be twice PEFT's plus one ulp; an element that is really wrong exceeds both.
    """
    (worst, rms), (their_worst, their_rms) = errors(ours, exact), errors(theirs, exact)
    size, typical = largest_and_rms(exact)
    factor = 1.1 + 4 / exact.numel() ** 0.5
    if rms <= factor * their_rms + ulp(typical, ours.dtype) and worst <= max(2, factor) * their_worst + ulp(
        size, ours.dtype
    ):
        return None
    return f"{name}: error RMS {rms:.3e}, largest {worst:.3e}; PEFT RMS {their_rms:.3e}, largest {their_worst:.3e}"


def plausible(result: torch.Tensor, exact: torch.Tensor, terms: int, name: str) -> str | None:
    """None, or what is wrong with PEFT's result itself: an RMS error above what ``terms`` roundings explain."""
    rms = errors(result, exact)[1]
    limit = 4 * torch.finfo(result.dtype).eps * terms**0.5 * largest_and_rms(exact)[1]
    return None if rms <= limit else f"{name}: RMS error {rms:.3e}, expected at most {limit:.3e}"


def kept_by(call: Callable[[], object], parameters: Iterable[torch.Tensor]) -> dict[int, int]:
    """{storage: bytes} of what autograd keeps of ``call``, ``parameters`` excepted; with or without memory."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for part in parts(tensor).values():
            storage = part.untyped_storage()
            kept[storage._cdata] = storage  # held, so that no later one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    for part in (part for parameter in parameters for part in parts(parameter.data).values()):
        kept.pop(part.untyped_storage()._cdata, None)
    del result
    return {address: storage.nbytes() for address, storage in kept.items()}
