"""What must have the same bits afterwards, or be wholly as before a change or wholly as after it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.reference import bits
from helpers.interrupts import PACKAGE, everywhere


def parameter_bits(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the bits of every parameter, by name."""
    return {name: bits(parameter.detach().clone()) for name, parameter in module.named_parameters()}


def assert_bits(module: nn.Module, before: dict[str, Tensor]) -> None:
    """The parameters have these bits, and there are no others."""
    now = dict(module.named_parameters())
    assert now.keys() == before.keys()
    for name, parameter in now.items():
        assert torch.equal(bits(parameter), before[name]), name


def state(model: nn.Module) -> dict[str, Any]:
    """By path: class, names and kinds of all attributes, plain values, bits and ``requires_grad`` of parameters."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        attributes = {name: _plain(value) for name, value in vars(module).items()}
        parameters = {n: (p.requires_grad, bits(p.detach()).tolist()) for n, p in module.named_parameters("", False)}
        found[path] = type(module).__name__, attributes, parameters
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):  # keys of hooks count on
        return [_plain(held) if isinstance(key, int) else (key, _plain(held)) for key, held in value.items()]
    if isinstance(value, set):  # of two equal ones each may have its own order
        return sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__


def check_interrupts(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], Any], package: str = PACKAGE, step: int = 1
) -> None:
    """Wherever Python handles signals in the package, an interrupt leaves the model as before ``change`` or as after.

    ``step``: of the places it tries each such one, for time.
    """
    first = make()
    changed = copy.deepcopy(first)
    change(changed)
    before, after, places = state(first), state(changed), 0
    assert before != after
    models = [first]

    def begin() -> None:
        models[0] = copy.deepcopy(first)

    for place in everywhere(begin, lambda: change(models[0]), package, step):
        assert state(models[0]) in (before, after), place
        places += 1
    assert places > 20
