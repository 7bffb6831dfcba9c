"""What must have the same bits afterwards."""

import torch
from torch import Tensor, nn

from fused_lora.reference import bits


def parameter_bits(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the bits of every parameter, by name."""
    return {name: bits(parameter.detach().clone()) for name, parameter in module.named_parameters()}


def assert_bits(module: nn.Module, before: dict[str, Tensor]) -> None:
    """The parameters have these bits, and there are no others."""
    now = dict(module.named_parameters())
    assert now.keys() == before.keys()
    for name, parameter in now.items():
        assert torch.equal(bits(parameter), before[name]), name
