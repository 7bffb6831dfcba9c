"""Goal A: base weights come back to the bit, whatever happens between the first merge and the last unmerge."""

import copy
import os
import random
import sys

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoraConfig
from fused_lora.reference import bits
from helpers.seeds import shifted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PACKAGE = os.path.dirname(fused_lora.__file__)


def same_bits(a, b):
    return torch.equal(bits(a), bits(b))


def eight_layers():
    net = nn.Sequential(*[nn.Linear(48, 48) for _ in range(8)]).to(torch.bfloat16)
    for name in ("one", "two"):
        fused_lora.inject(net, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), name)
    return net


ACTIONS = {
    "merge": ([], lambda net: fused_lora.merge(net, ["one"])),
    "merge another": (["one"], lambda net: fused_lora.merge(net, ["two"])),
    "unmerge": (["one"], fused_lora.unmerge),
    "switch": (["one"], lambda net: fused_lora.switch(net, ["two"])),
}


class Fault(OSError):
    """What an injected failure raises."""


class Injector:
    """Raises in the n-th call of a function of this package, and counts the calls."""

    def __init__(self, stop, error):
        self.stop, self.error, self.seen, self.at = stop, error, 0, None

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        self.seen += 1
        if self.seen == self.stop:
            self.at = f"{code.co_filename[len(PACKAGE) :]}:{frame.f_lineno} {code.co_name}"
            raise self.error


def run(action, net, stop=0, error=Fault("injected")):  # noqa: B008 - one constant
    injector, outer = Injector(stop, error), sys.gettrace()
    sys.settrace(injector)
    try:
        action(net)
    except type(error):
        assert injector.at
    finally:
        sys.settrace(outer)
    return injector


def weights(net):
    return [layer.weight.detach().clone() for layer in fused_lora.lora_layers(net).values()]


@pytest.mark.experiment("A5", full=500, quick=25)
@pytest.mark.parametrize("name", ACTIONS)
def test_faults(name, count):
    """A failure inside merge, unmerge or switch of 8 layers, at calls spread over all: all layers old, or all new."""
    merged, action = ACTIONS[name]
    net = eight_layers()
    states = {(): weights(net)}
    for names in (["one"], ["two"], ["one", "two"]):
        fused_lora.merge(net, names)
        states[tuple(names)] = weights(net)
        fused_lora.unmerge(net)
    start = copy.deepcopy(net)
    if merged:
        fused_lora.merge(start, merged)
    calls = run(action, copy.deepcopy(start)).seen
    assert calls > 100
    drawn = random.Random(shifted(0)).sample(range(1, calls + 1), min(count, calls))
    for stop in drawn:
        net = copy.deepcopy(start)
        at = run(action, net, stop).at
        assert at
        check(net, states, f"call {stop}, {at}")
        if name != "merge another":  # which is no action that can be tried again once it succeeded
            action(net) if any(layer.merged for layer in net) == bool(merged) else None
        if any(layer.merged for layer in net):
            fused_lora.unmerge(net)
        assert all(map(same_bits, weights(net), states[()])), at


def check(net, states, where):
    """All layers agree on what is merged, and hold the bits of that."""
    names = {tuple(layer.merged_adapters) for layer in net}
    assert len(names) == 1, f"{where}: {names}"
    wanted = states[tuple(sorted(names.pop()))]
    for i, (found, right) in enumerate(zip(weights(net), wanted, strict=True)):
        assert same_bits(found, right), f"{where}: layer {i}"
