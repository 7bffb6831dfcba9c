"""Dequantisation of 4-bit weights on a GPU: the kernel, which has passed its first use, or who did it before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.ops import guard


class FourBit(NamedTuple):
    """A 4-bit weight [N, K], and the dtype that it is wanted in: the arguments of ``kernels.dequant_4bit``."""

    packed: Tensor
    code: Tensor
    absmax: Tensor
    nested: Any
    blocksize: int
    shape: tuple[int, int]
    dtype: torch.dtype


def dequantise_4bit(weight: FourBit, otherwise: Callable[[], Tensor]) -> Tensor:
    """The weight [N, K] as a dense one. ``otherwise`` does it where no kernel runs."""
    device, dtype, nested = weight.packed.device, weight.dtype, weight.nested is not None
    if not guard.usable(device) or dtype not in guard.DTYPES:
        return otherwise()
    from fused_lora.kernels.dequant_4bit import dequant_4bit

    def check() -> str | None:
        small = small_case((21, 407), nested, dtype, device)
        return None if torch.equal(dequant_4bit(*small), by_torch(small)) else "a small weight has other bits"

    return guard.guarded(("dequant_4bit", dtype, nested, device), dequant_4bit, lambda *_: otherwise(), check)(*weight)


def by_torch(weight: FourBit) -> Tensor:
    """The definition: code times scale in fp32, rounded to the dtype."""
    packed, code, absmax, nested, blocksize, shape, dtype = weight
    scales, numel = absmax, shape[0] * shape[1]
    if nested is not None:
        code8, absmax8, blocksize8, offset = nested
        own = absmax8.repeat_interleave(blocksize8)[: absmax.numel()]
        scales = code8[absmax.long()] * own + offset
    values = code[torch.stack([packed >> 4, packed & 15], 1).view(-1)[:numel].long()]
    return (values * scales.repeat_interleave(blocksize)[:numel]).to(dtype).view(shape)


def small_case(shape: tuple[int, int], nested: bool, dtype: torch.dtype, device: torch.device) -> FourBit:
    """A weight to try kernels on; (21, 407) has rows that share a scale. No generator is touched."""
    blocksize, inner, numel = 64, 128, shape[0] * shape[1]
    line = torch.arange((numel + 1) // 2, device=device)
    scales, packed = torch.sin(line[: -(-numel // blocksize)].float()), (line * 37 % 256).to(torch.uint8)
    code = torch.cos(torch.arange(16, device=device).float())
    if not nested:
        return FourBit(packed, code, scales, None, blocksize, shape, dtype)
    absmax = (line[: len(scales)] * 11 % 256).to(torch.uint8)
    absmax8 = torch.sin(line[: -(-len(scales) // inner)] + 1.0)
    code8 = torch.cos(torch.arange(256, device=device).float())
    offset = torch.tensor(0.3, dtype=torch.float32, device=device)
    return FourBit(packed, code, absmax, (code8, absmax8, inner, offset), blocksize, shape, dtype)
