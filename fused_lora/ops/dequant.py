"""Dequantisation of 4-bit weights on a GPU: the kernel, which has passed its first use, or who did it before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_lora.ops import guard


def dequantise_4bit(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    nested: Any,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    otherwise: Callable[[], Tensor],
) -> Tensor:
    """[N, K] in ``dtype``: arguments as ``kernels.dequant_4bit``. ``otherwise`` does it where no kernel runs."""
    if not guard.usable(packed.device) or dtype not in guard.DTYPES:
        return otherwise()
    from fused_lora.kernels.dequant_4bit import dequant_4bit

    def check() -> str | None:
        small = _small_case(packed.device, code, nested is not None)
        same = torch.equal(dequant_4bit(*small, dtype), by_torch(*small, dtype))
        return None if same else "a small weight has other bits"

    run = guard.guarded(("dequant_4bit", dtype, nested is not None), dequant_4bit, lambda *_: otherwise(), check)
    return run(packed, code, absmax, nested, blocksize, shape, dtype)


def by_torch(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    nested: Any,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The definition: code times scale in fp32, rounded to ``dtype``. Arguments as above."""
    scales, numel = absmax, shape[0] * shape[1]
    if nested is not None:
        code8, absmax8, blocksize8, offset = nested
        own = absmax8.repeat_interleave(blocksize8)[: absmax.numel()]
        scales = code8[absmax.long()] * own + offset
    values = code[torch.stack([packed >> 4, packed & 15], 1).view(-1)[:numel].long()]
    return (values * scales.repeat_interleave(blocksize)[:numel]).to(dtype).view(shape)


def _small_case(device: torch.device, code: Tensor, nested: bool) -> tuple:
    """Three programs, the last in part, with rows that share a scale; no generator is touched."""
    N, K, blocksize = 21, 407, 64
    line = torch.arange((N * K + 1) // 2, device=device)
    scales = torch.sin(line[: -(-N * K // blocksize)].float())
    packed = (line * 37 % 256).to(torch.uint8)
    if not nested:
        return packed, code, scales, None, blocksize, (N, K)
    code8 = torch.cos(torch.arange(256, device=device).float())
    quantised, inner = (line[: scales.numel()] * 11 % 256).to(torch.uint8), torch.sin(line[:2].float() + 1)
    return packed, code, quantised, (code8, inner, 128, torch.tensor(0.3, device=device)), blocksize, (N, K)
