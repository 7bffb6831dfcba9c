"""Models in the wrappers that torch puts around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def compiled(module: nn.Module) -> nn.Module:
    """torch.compile without a compiler's work."""
    return torch.compile(module, backend="eager")


def each_block(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """What wraps each of ``model.blocks`` in place and returns the model."""

    def wrapped(model):
        for i, block in enumerate(model.blocks):
            model.blocks[i] = wrap(block)
        return model

    return wrapped
