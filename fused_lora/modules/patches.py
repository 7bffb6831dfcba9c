"""Who has replaced functions that PEFT's forward calls, for all layers at once: an operator would pass over that."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# what an accelerated layer compares in each call; of torch, as they were when they were last looked at
OF_TORCH: tuple[Any, ...] = ()
MODES = torch._C._len_torch_function_stack  # how many function modes are on
_NAMES = "nn.Linear.forward", "nn.Dropout.forward", "nn.Module.__call__", "F.linear", "F.dropout"


def of_torch(linear: Any = nn.Linear, dropout: Any = nn.Dropout, functional: Any = F) -> tuple[Any, ...]:
    """What PEFT's forward of a linear layer calls of torch, as it is now. The defaults are there for speed."""
    return linear.forward, dropout.forward, linear.__call__, functional.linear, functional.dropout


def is_own(function: Any, package: str) -> bool:
    """Whether the code of a function is the package's, and not that of a wrapper that has taken its names."""
    code = getattr(function, "__code__", None)
    if code is None:
        return function is torch._C._nn.linear
    return code.co_filename.startswith(_folder(package))


@functools.cache
def _folder(package: str) -> str:
    """Of a package, as its code says it: in a frozen program modules say otherwise."""
    beside = torch.typename if package == "torch" else sys.modules["peft.config"].PeftConfigMixin.to_dict
    return os.path.dirname(beside.__code__.co_filename) + os.sep


def why_replaced_in_torch() -> str | None:
    """None unless something of torch that PEFT's forward calls is another's, or a mode follows the calls."""
    global OF_TORCH
    if (found := of_torch()) != OF_TORCH:
        seen = OF_TORCH or (None,) * len(found)
        for name, function, known in zip(_NAMES, found, seen, strict=True):
            # DeepSpeed's has the same numbers, and stays after ZeRO-3 has been set up
            alike = getattr(function, "__module__", "") == "deepspeed.runtime.zero.linear"
            # Dynamo cannot read the code of torch's own
            if not (function is known or alike or is_own(function, "torch")):
                return f"{name} was replaced"
        OF_TORCH = found
    return why_followed() if MODES() else None


def why_followed() -> str | None:
    """None unless a ``TorchFunctionMode`` of another than torch is on: it may change what ``F.linear`` returns."""
    modes = map(torch._C._get_function_stack_at, range(MODES()))
    kind = next((type(mode) for mode in modes if not type(mode).__module__.startswith("torch.")), None)
    return f"a {kind.__name__} follows the calls" if kind is not None else None


why_replaced_in_torch()
