"""The layers that the benchmarks compare: one base layer and adapter as PEFT's lora.Linear and as LoraLinear."""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fused_lora
from fused_lora.testing.numeric import errors, ulp

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
    base: str = ""  # "nf4": the base layer is bitsandbytes' Linear4bit, with double quantisation

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
    quantised: nn.Module | None = None  # the layer whose 4-bit values ``weight`` holds

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
            from bitsandbytes.functional import dequantize_4bit

            quantised = _linear_4bit(weight, bias, point.base)
            weight = dequantize_4bit(quantised.weight.data, quantised.weight.quant_state)
        return cls(weight.to(dtype), bias, A.to(adapter_dtype), B.to(adapter_dtype), quantised)

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
        holder.layer, holder.is_loaded_in_4bit = base, self.quantised is not None
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


def _linear_4bit(weight: torch.Tensor, bias: torch.Tensor, quant_type: str) -> nn.Module:
    """A frozen Linear4bit that computes in the bias's dtype, its weight quantised twice."""
    from bitsandbytes.nn import Linear4bit

    N, K = weight.shape
    layer = Linear4bit(K, N, compute_dtype=bias.dtype, quant_type=quant_type, compress_statistics=True)
    layer.load_state_dict({"weight": weight.to(bias.dtype), "bias": bias})
    return layer.to(bias.dtype).to(weight.device).requires_grad_(False)


def no_worse(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, name: str) -> str | None:
    """None, or what is wrong: the RMS error against float64 may be 1.1 times PEFT's plus one ulp.

    Rounding errors of two equally good sums differ by chance, so the RMS over n elements may differ by 4 / sqrt(n)
    more, and the largest error may be twice PEFT's plus one ulp; an element that is really wrong exceeds both.
    """
    (worst, rms), (their_worst, their_rms) = errors(ours, exact), errors(theirs, exact)
    size, typical = exact.abs().max().item(), exact.square().mean().sqrt().item()
    factor = 1.1 + 4 / exact.numel() ** 0.5
    if rms <= factor * their_rms + ulp(typical, ours.dtype) and worst <= max(2, factor) * their_worst + ulp(
        size, ours.dtype
    ):
        return None
    return f"{name}: error RMS {rms:.3e}, largest {worst:.3e}; PEFT RMS {their_rms:.3e}, largest {their_worst:.3e}"


def plausible(result: torch.Tensor, exact: torch.Tensor, terms: int, name: str) -> str | None:
    """None, or what is wrong with PEFT's result itself: an RMS error above what ``terms`` roundings explain."""
    rms = errors(result, exact)[1]
    limit = 4 * torch.finfo(result.dtype).eps * terms**0.5 * exact.square().mean().sqrt().item()
    return None if rms <= limit else f"{name}: RMS error {rms:.3e}, expected at most {limit:.3e}"
