"""What quantised bases share: a merge makes a new parameter, and keeps the old one as the record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases.base import Base, Factors
from fused_lora.ops.dora import op as dora

BLOCK_VALUES = 1 << 21  # of a weight that are in fp32 at a time
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS_OF_8_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class Merged:
    """A merge in force: the parameters before and after it, copies of the adapters, and the module's state before."""

    before: Any
    after: Any
    factors: Factors
    state: Any


def rounded_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A copy in another dtype. ValueError: a number would not be finite."""
    found = None if bias is None else bias.detach().to(dtype, copy=True)
    if found is not None and not torch.isfinite(found).all():
        raise ValueError(f"the bias would not be finite in {dtype}")
    return found


def why_no_numbers(part: Any, name: str, count: int, dtypes: Sequence[torch.dtype] = FLOATS) -> str | None:
    """None for a tensor of ``count`` numbers of one of these dtypes, else what the field ``name`` is instead.

    Libraries read these fields by address: too short ones, or of another dtype, would be other numbers.
    """
    if not isinstance(part, Tensor):
        return f"{name} is a {type(part).__name__}, expected a tensor"
    if part.is_meta:
        return f"{name} is on the meta device"
    if part.dtype not in dtypes:
        return f"{name} is {part.dtype}, expected one of {tuple(dtypes)}"
    return None if part.numel() == count else f"{name} has shape {tuple(part.shape)}, expected {count} numbers"


def values_of_codes(codes: Tensor) -> Tensor:
    """Numbers of 8 bits in fp32. On a CPU fp8 by a table: a quarter of the time of torch's conversion."""
    if not codes.is_cpu or codes.dtype not in FLOATS_OF_8_BITS:
        return codes.float()
    numbers = codes.reshape(-1).view(torch.uint8).int()
    return _every_number(codes.dtype).index_select(0, numbers).view(codes.shape)


@cache
def _every_number(dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float()


def summed_delta(factors: Factors) -> Tensor:
    """sum_i (B_i A_i) s_i in fp32, under autocast too, each product as PEFT forms it."""
    with torch.autocast(factors.lora_A[0].device.type, enabled=False):
        return reduce(torch.add, [(B.float() @ A.float()) * s for A, B, s in zip(*factors[:3], strict=True)])


class Requantised(Base):
    """A packed [N, K] of ``bits`` bits and a bias [N] or None.

    state_name: of what goes with the parameter in ``held(module)``, if anything does. own_attributes: those that an
    nn.Linear has not.
    """

    state_name: str | None
    own_attributes: tuple[str, ...]

    def held(self, module: Any) -> dict[str, Any]:
        """Where the state is: the module's attributes."""
        return module.__dict__

    def values(self, module: Any, weight: Any, state: Any) -> Tensor:
        """[N, K] in fp32 of one parameter, as the library dequantises it."""
        raise NotImplementedError

    def blocks(self, module: Any) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows start to stop in fp32) of the weight as it is now, about ``BLOCK_VALUES`` at a time."""
        raise NotImplementedError

    def requantised(self, module: Any, factors: Factors) -> tuple[Any, Any]:
        """W + D as a new parameter, and the module's state that goes with it. Raises ValueError: not finite."""
        raise NotImplementedError

    def features(self, module: Any) -> tuple[int, int]:
        """As the module has them: a packed weight may have another shape."""
        return module.in_features, module.out_features

    in_one_pass = False  # the old packed weight is put back as it is

    def merge_(self, module: Any, factors: Factors, fan_in_fan_out: bool) -> Merged:
        """dequant(W) + D, quantised again as W was, as a new parameter; the old one is kept as it is."""
        lora_A, lora_B, scaling = factors[:3]
        frozen = Factors([t.detach().clone() for t in lora_A], [t.detach().clone() for t in lora_B], list(scaling))
        after, state = self.requantised(module, frozen)
        held: dict[Any, Any] = self.held(module)
        record = Merged(module._parameters["weight"], after, frozen, held.get(self.state_name))
        # no call from here on: in one an interrupt would lose the record
        module._parameters["weight"] = after
        if self.state_name is not None:
            held[self.state_name] = state
        return record

    def unmerge_(self, module: Any, record: Merged) -> None:
        """Put the old parameter back, whatever has become of the merged one."""
        weight = module._parameters.get("weight")
        if weight is not record.after or weight.device != record.before.device:
            raise RuntimeError("weight: it was replaced or moved while merged; nothing was unmerged")
        held = self.held(module)
        module._parameters["weight"] = record.before
        if self.state_name is not None:
            held[self.state_name] = record.state

    def factors(self, record: Merged, fan_in_fan_out: bool) -> Factors:
        """The adapters that were merged, frozen."""
        return record.factors

    def delta_fidelity(self, module: Any, record: Merged) -> float:
        """Share of the delta that requantisation lost; 0 for a delta of zeros."""
        held: dict[Any, Any] = self.held(module)
        before = self.values(module, record.before, record.state)
        after = self.values(module, module._parameters["weight"], held.get(self.state_name))
        delta = summed_delta(record.factors)
        wanted = delta.norm().item()
        return (after - before - delta).norm().item() / wanted if wanted else 0.0

    def dense_weight(self, module: Any, factors: Factors, dtype: torch.dtype) -> Tensor:
        """As :meth:`Base.dense_weight`."""
        lora_A, lora_B, scaling = factors[:3]
        K, N = self.features(module)
        dense = torch.empty((N, K), dtype=dtype, device=module._parameters["weight"].device)
        for start, stop, block in self.blocks(module):
            rows = Factors(lora_A, [B[start:stop] for B in lora_B], scaling)
            dense[start:stop] = block + summed_delta(rows) if scaling else block
        if not torch.isfinite(dense).all():
            raise ValueError(f"the weight would hold NaN or infinity in {dtype}")
        return dense

    def row_norms(self, module: Any, lora_A: Tensor, lora_B: Tensor, scaling: float, fan_in_fan_out: bool) -> Tensor:
        """As :meth:`Base.row_norms`, of the dequantised weight."""
        return dora.norms_of_blocks(self.blocks(module), lora_A, lora_B, scaling)

    def product(self, module: Any, x: Tensor, fan_in_fan_out: bool) -> Tensor:
        """As :meth:`Base.product`."""
        return dora.product(x, lambda: self.blocks(module), self.features(module)[1])

    def become_linear(self, module: Any, weight: Tensor, bias: Tensor | None) -> None:
        """As :meth:`Base.become_linear`."""
        old = module._parameters["bias"]
        for name in (*self.own_attributes, "forward"):  # its own forward, as accelerate's hooks leave it behind
            module.__dict__.pop(name, None)
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        module._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=old.requires_grad)
        module.__class__ = nn.Linear
