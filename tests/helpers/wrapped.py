"""Models in the wrappers that torch puts around them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable

import torch
from torch import nn

from stub_driver import HAS_HEADERS

# torch.compile's own backend writes C++ for a CPU, with Python's headers; where nobody compiles that, the same graphs
# run operator by operator
_CXX = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
INDUCTOR = "inductor" if shutil.which(_CXX) and HAS_HEADERS else "aot_eager"


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
