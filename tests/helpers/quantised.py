"""4-bit layers of bitsandbytes for tests, and what they stand for in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def linear4bit(
    N: int,
    K: int,
    *,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    quant_type: str = "nf4",
    nested: bool = True,
    blocksize: int = 64,
    storage: torch.dtype = torch.uint8,
    bias: bool = True,
    device: str = "cpu",
) -> nn.Module:
    """A Linear4bit over random values of ``dtype``, quantised on ``device``, in ``train()``."""
    import bitsandbytes as bnb

    settings = {"compress_statistics": nested, "quant_type": quant_type, "quant_storage": storage}
    layer = bnb.nn.Linear4bit(K, N, bias=bias, compute_dtype=compute_dtype, **settings)
    values = (torch.randn(N, K) * K**-0.5).to(dtype)
    layer.weight = bnb.nn.Params4bit(values, requires_grad=False, blocksize=blocksize, module=layer, **settings)
    if bias:
        layer.bias = nn.Parameter(torch.randn(N).to(dtype), requires_grad=False)
    return layer.to(device)


def repack(layer: nn.Module) -> None:
    """What a call in ``eval()`` without gradients does to the weight on CPUs with AVX512-BF16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)


def values_of(layer: nn.Module) -> Tensor:
    """[N, K] in fp32 by the definition: code times scale. Of a weight that is not repacked."""
    from bitsandbytes.functional import dequantize_blockwise, get_4bit_type

    state = layer.weight.quant_state
    N, K = state.shape
    scales = state.absmax.float()
    if state.nested:
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = layer.weight.data.view(torch.uint8).view(-1)
    code = get_4bit_type(state.quant_type, device=packed.device)
    numbers = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: N * K].long()
    return (code[numbers] * scales.repeat_interleave(state.blocksize)[: N * K]).view(N, K)


def dequant_case(N: int, K: int, blocksize: int, nested: bool, device="cpu") -> tuple:
    """Random arguments of ``kernels.dequant_4bit`` but for the dtype; NF4 needs no more than 16 numbers."""
    packed = torch.randint(0, 256, (-(-N * K // 2),), dtype=torch.uint8, device=device)
    code, scales = torch.randn(16, device=device), -(-N * K // blocksize)
    if not nested:
        return packed, code, torch.rand(scales, device=device), None, blocksize, (N, K)
    absmax = torch.randint(0, 256, (scales,), dtype=torch.uint8, device=device)
    inner = torch.randn(256, device=device), torch.rand(-(-scales // 16), device=device), 16
    return packed, code, absmax, (*inner, torch.rand((), device=device)), blocksize, (N, K)


def linear8bit(
    N: int,
    K: int,
    *,
    dtype: torch.dtype = torch.float32,
    threshold: float = 0.0,
    bias: bool = True,
    device: str = "cpu",
) -> nn.Module:
    """A Linear8bitLt over random values of ``dtype``, quantised on ``device``, in ``train()``."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(K, N, bias=bias, has_fp16_weights=False, threshold=threshold)
    values = (torch.randn(N, K) * K**-0.5).to(dtype)
    layer.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)
    if bias:
        layer.bias = nn.Parameter(torch.randn(N).to(dtype), requires_grad=False)
    return layer.to(device)


def values_of_8bit(layer: nn.Module) -> Tensor:
    """[N, K] in fp64 by the definition: code times the row's largest magnitude over 127."""
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return layer.weight.data.double() * scales.double()[:, None] / 127


def torchao_linear(N: int, K: int, settings, *, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    """An nn.Linear over random values, quantised by a configuration of torchao, in ``train()``."""
    from torchao.quantization import quantize_

    layer = nn.Linear(K, N, bias=bias, dtype=dtype).requires_grad_(False)
    quantize_(layer, settings)
    return layer
