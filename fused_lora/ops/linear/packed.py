"""The LoRA linear over a packed weight: quantised values that are dequantised for each product, and never kept.

Saved for the backward are x, S and the seeds, as over a dense weight, and the packed weight itself. A CPU dequantises
it in blocks of rows, in the forward and again in the backward; a GPU whole, into memory that the next layer reuses, but
for a forward of few rows over 4 bits, which its kernel reads by tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fused_lora.ops import guard
from fused_lora.ops.checks import check_linear
from fused_lora.ops.dequant import FourBit
from fused_lora.ops.linear.op import _autocast_dtype, _direct, _of_autocast, without_autocast


class Packed:
    """A weight [N, K] that is dequantised where it is used; ``dtype`` is what its values are rounded to.

    four_bit: what a kernel reads in its place, where there is one. kind: all that a launch depends on besides tensors.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    four_bit: FourBit | None = None
    kind: tuple = ()
    requires_grad = False

    def data_ptr(self) -> int:
        """Where the packed values begin, of whose alignment a kernel's launch depends; 0 where no kernel reads them."""
        return 0

    def blocks(self, step: int) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows start to stop as a dense tensor of ``dtype``), about ``step`` rows at a time."""
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> Tensor:
        """The whole weight, rounded to ``self.dtype`` and given in ``dtype``."""
        [(_, _, whole)] = self.blocks(self.shape[0])
        return whole.to(dtype)

    def dim(self) -> int:
        """As of a tensor."""
        return 2


def lora_linear(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
) -> Tensor:
    """x W^T + b + the terms, as :func:`fused_lora.ops.linear.op.lora_linear`, for at least one adapter.

    Args:
        x: [..., K], fp64, fp32, bf16 or fp16. On a CPU it may have another dtype than the weight: it is not rounded.
            On a GPU it takes the autocast dtype, or the weight's.

    Returns:
        [..., N] in x's dtype, under autocast too, as bitsandbytes returns it.

    Raises:
        ValueError, TypeError: the arguments do not fit.
    """
    check_linear(x, weight, bias, lora_A, lora_B, scaling, dropout, None, weight.dtype)
    inside, rounded = x, None
    if x.device.type == guard.DEVICE:
        autocast = _autocast_dtype(x)
        # kernels read memory, which does not tell the sign of a lazily negated view
        lora_A, lora_B = ([t.resolve_neg() for t in part] for part in (lora_A, lora_B))
        inside = x.resolve_neg().to(autocast or weight.dtype)
        if autocast:
            lora_A, lora_B, rounded = _of_autocast(lora_A, lora_B, autocast)
    with without_autocast(x):
        return _direct(inside, weight, bias, lora_A, lora_B, scaling, dropout, None, rounded).to(x.dtype)


def operand_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype, else that of x."""
    return _autocast_dtype(x) or x.dtype
