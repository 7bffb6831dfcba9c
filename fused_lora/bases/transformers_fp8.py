"""transformers' FP8Linear: block-scaled fp8 weights. The layer's own call, and the adapters around it.

A fused product would be another one: the call rounds its input to fp8, too. A merge dequantises, adds, and quantises
each block once, as transformers quantises a model; PEFT has no merge for it. The old weight and scales are the record.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases.base import Factors, register
from fused_lora.bases.requantised import BLOCK_VALUES, Requantised, values_of_codes

_FP8 = torch.float8_e4m3fn


class Fp8Linear(Requantised):
    """A weight [N, K] in fp8 with ``weight_scale_inv`` for each block, or one for all, and a bias [N] or None."""

    bits = 8
    state_name = "weight_scale_inv"
    own_attributes = ("has_bias", "block_size", "activation_scheme", "_deepgemm_disabled")

    def held(self, module: Any) -> dict[str, Any]:
        """The scales are a parameter."""
        return module._parameters

    def why_not_fused(self, module: Any) -> str:
        """Always a reason: the call is transformers' own."""
        return "an fp8 base layer rounds its input, too"

    def why_not_merged(self, module: Any) -> str | None:
        """None for a weight of fp8 with a scale for each block."""
        weight, shape = module._parameters.get("weight"), (module.out_features, module.in_features)
        if weight is None or weight.dtype is not _FP8 or tuple(weight.shape) != shape:
            found = None if weight is None else (weight.dtype, tuple(weight.shape))
            return f"the weight is {found}, expected {_FP8} {shape}"
        scales, block = module._parameters.get("weight_scale_inv"), getattr(module, "block_size", ())
        sizes = block is None or (isinstance(block, (tuple, list)) and [type(n) for n in block] == [int, int])
        if not sizes or min(block or (1,)) < 1:
            return f"block_size is {block!r:.100}, expected two positive integers or None"
        rows, columns = block_size(module)
        wanted = (-(-shape[0] // rows), -(-shape[1] // columns))
        if scales is None or scales.numel() != wanted[0] * wanted[1]:
            found = None if scales is None else tuple(scales.shape)
            return f"weight_scale_inv has shape {found}, expected {wanted}"
        if not scales.is_floating_point():
            return f"weight_scale_inv is {scales.dtype}, expected floating numbers"
        if scales.is_meta and not weight.is_meta:
            return "weight_scale_inv is on the meta device"
        return "the weight is on the meta device" if weight.is_meta else None

    def why_not_adapted(self, module: Any) -> str | None:
        """None for such a weight with finite scales."""
        if reason := self.why_not_merged(module):
            return reason
        finite = torch.isfinite(module._parameters["weight_scale_inv"].float()).all()
        return None if finite else "weight_scale_inv has scales that are NaN or infinite"

    def values(self, module: Any, weight: Any, state: Any) -> Tensor:
        """Code times the scale of its block."""
        return values_of_rows(weight.data, state.data, block_size(module))

    def blocks(self, module: Any) -> Iterator[tuple[int, int, Tensor]]:
        """Rows of the whole."""
        weight, scales = (module._parameters[name].data for name in ("weight", "weight_scale_inv"))
        step = max(1, BLOCK_VALUES // module.in_features)
        for start in range(0, module.out_features, step):
            stop = min(start + step, module.out_features)
            yield start, stop, values_of_rows(weight[start:stop], scales, block_size(module), start)

    def requantised(self, module: Any, factors: Factors) -> tuple[Any, Any]:
        """With the largest magnitude of each block at fp8's largest number, as transformers quantises."""
        merged = self.dense_weight(module, factors, torch.float32)
        (rows, columns), (N, K) = block_size(module), merged.shape
        old = module._parameters["weight_scale_inv"]
        padded = nn.functional.pad(merged, (0, -K % columns, 0, -N % rows))
        tiles = padded.view(-(-N // rows), rows, -(-K // columns), columns)
        largest, most = tiles.abs().amax(dim=(1, 3)), torch.finfo(_FP8).max
        factor = torch.where(largest > 0, most / largest, 1.0)
        inverse = 1.0 / factor
        if old.dtype is not torch.float32:  # e8m0 holds powers of two
            inverse = torch.exp2(inverse.clamp(min=torch.finfo(torch.float32).tiny).log2().ceil())
            factor = 1.0 / inverse
        codes = (tiles * factor[:, None, :, None]).clamp(-most, most).to(_FP8)
        weight = codes.view(padded.shape)[:N, :K].contiguous()
        scales = inverse.to(old.dtype).view(old.shape)
        return nn.Parameter(weight, requires_grad=False), nn.Parameter(scales, requires_grad=False)

    def settings(self, module: Any) -> dict[str, str]:
        """As :meth:`Base.settings`."""
        rows, columns = block_size(module)
        scales = str(module._parameters["weight_scale_inv"].dtype).removeprefix("torch.")
        return {"weight": f"fp8 in blocks of ({rows}, {columns})", "scales": f"scales of {scales}"}

    def become_linear(self, module: Any, weight: Tensor, bias: Tensor | None) -> None:
        """As :meth:`Base.become_linear`."""
        super().become_linear(module, weight, bias)
        for name in ("weight_scale_inv", "activation_scale"):
            module._parameters.pop(name, None)


def block_size(module: Any) -> tuple[int, int]:
    """Rows and columns that share a scale; the whole weight's where it has one."""
    rows, columns = module.block_size or (module.out_features, module.in_features)
    return rows, columns


def values_of_rows(codes: Tensor, scales: Tensor, block: tuple[int, int], first: int = 0) -> Tensor:
    """Rows ``first`` on of a weight in fp32, from their codes and the scales of the whole."""
    rows, columns = block
    K = codes.shape[1]
    of_row = torch.arange(first, first + len(codes), device=codes.device) // rows
    own = scales.float().view(-1, -(-K // columns))[of_row]
    return values_of_codes(codes) * own.repeat_interleave(columns, 1)[:, :K]


register(Fp8Linear(), "transformers.integrations.finegrained_fp8.FP8Linear")
