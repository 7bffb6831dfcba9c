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
from fused_lora.ops.merge import op as merging
from fused_lora.reference import bits
from helpers.seeds import shifted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PACKAGE = os.path.dirname(fused_lora.__file__)


def case(N, K, r, dtype, relative=0.01):
    """A weight with awkward values in it, and an adapter whose delta is ``relative`` times as large."""
    W = torch.randn(N, K) * 0.02
    A, B = torch.randn(r, K) * 0.05, torch.randn(N, r)
    B *= relative * W.norm() / (B @ A).norm()
    W.view(-1)[:7] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 6e-8, 3e4, -3e4])
    return W.to(dtype), A, B


def same_bits(a, b):
    return torch.equal(bits(a), bits(b))


@pytest.mark.experiment("A1", full=10_000, quick=500)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cycles(dtype, count):
    """Merge and unmerge of 100 adapters in turn, delta of 0.01 to 100 % of a 128x128 weight: every bit is back."""
    W, *_ = case(128, 128, 1, dtype)
    before = W.clone()
    pairs = [case(128, 128, 1 + i % 16, dtype, 10.0 ** (i % 5 - 4))[1:] for i in range(100)]
    for cycle in range(count):
        A, B = pairs[cycle % len(pairs)]
        record = merging.merge_(W, [A], [B], [1.0])
        if cycle < len(pairs):
            assert not same_bits(W, before)
        merging.unmerge_(W, record)
        assert same_bits(W, before), f"cycle {cycle}"


def eight_layers():
    net = nn.Sequential(*[nn.Linear(48, 48) for _ in range(8)]).to(torch.bfloat16)
    for name in ("one", "two"):
        fused_lora.inject(net, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), name)
    return net


def switch(net):
    fused_lora.unmerge(net)
    fused_lora.merge(net, ["two"])


ACTIONS = {
    "merge": ([], lambda net: fused_lora.merge(net, ["one"])),
    "merge another": (["one"], lambda net: fused_lora.merge(net, ["two"])),
    "unmerge": (["one"], fused_lora.unmerge),
    "switch": (["one"], switch),
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


@pytest.mark.experiment("A7", full=2_000, quick=200)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_flips(dtype, count):
    """A bit of a merged weight is flipped: unmerge refuses and writes nothing, or the old bits come back all the same."""
    tampered(dtype, count, flip=True)


@pytest.mark.experiment("A7", full=1_000, quick=100)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swaps(dtype, count):
    """Two elements of a merged weight change places: unmerge refuses and writes nothing, or the old bits come back."""
    tampered(dtype, count, flip=False)


def tampered(dtype, count, flip):
    W, A, B = case(64, 96, 4, dtype)
    before = W.clone()
    record = merging.merge_(W, [A], [B], [1.0])
    merged, flat = W.clone(), bits(W).view(-1)
    draw, width = torch.Generator().manual_seed(shifted(1)), W.element_size() * 8
    refused = tried = 0
    while tried < count:
        i, j = torch.randint(W.numel(), (2,), generator=draw).tolist()
        if flip:
            bit = int(torch.randint(width, (1,), generator=draw))
            flat[i] ^= 1 << bit if bit < width - 1 else -(1 << bit)
        else:
            flat[[i, j]] = flat[[j, i]]
        if same_bits(W, merged):
            continue  # two equal elements
        tried += 1
        held = W.clone()
        try:
            merging.unmerge_(W, record)
        except RuntimeError:
            refused += 1
            assert same_bits(W, held)
        else:
            assert same_bits(W, before)  # the change was below what the merge had rounded away
        W.copy_(merged)
    assert refused > 0.7 * count
    merging.unmerge_(W, record)
    assert same_bits(W, before)
