"""Merge and unmerge of a model, whose layers share calls of the C loops."""

import copy
import inspect
import io
import os
import pickle
import sys
import warnings
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoraConfig
from fused_lora.modules import linear
from fused_lora.ops import native
from fused_lora.ops.merge import blocks
from fused_lora.ops.merge import op as merging
from fused_lora.reference import bits
from helpers.interrupts import everywhere
from helpers.seeds import shifted

built = pytest.mark.skipif(not native.usable(), reason=native.describe())
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(shifted(11))


def layers_of(dtypes) -> Any:
    net = nn.Sequential(*[nn.Linear(48, 40, dtype=dtype) for dtype in dtypes])
    net[-1].weight = nn.Parameter(net[-1].weight.detach().t().contiguous().t())  # columns are contiguous
    return fused_lora.inject(net, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def weights(net):
    return [layer.weight.detach().clone() for layer in net]


def same_bits(found, expected):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


def counted(monkeypatch, run=native.run):
    calls = []
    monkeypatch.setattr(native, "run", lambda works, mode: calls.append(len(works)) or run(works, mode))
    return calls


@built
def test_one_call_for_many_layers(monkeypatch):
    assert blocks._agree()  # which calls C, too, once in a process
    net, calls = layers_of([torch.float32] * 20), counted(monkeypatch)
    fused_lora.merge(net)
    assert calls == [20]
    fused_lora.unmerge(net)
    assert calls == [20, 20]
    monkeypatch.setattr(blocks._InC, "at_once", 3 * net[0].weight.nbytes)
    fused_lora.merge(net)
    assert calls[2:] == [3] * 6 + [2]


@pytest.mark.parametrize("scale", [1.0, 1e9], ids=["corrections", "copy"])
def test_the_bits_are_those_of_the_layers_own_merges(scale, loops):
    """Also where C does not take a layer, or a delta is so large that a copy of the weight is kept."""
    net = layers_of(DTYPES)
    net[0].scaling["default"] *= scale
    alone, before = copy.deepcopy(net), weights(net)
    fused_lora.merge(net)
    for layer in alone:
        layer.merge()
    assert same_bits(weights(net), weights(alone))
    for whole, own in zip(net, alone, strict=True):
        assert whole.merge_state.record.nbytes == own.merge_state.record.nbytes
        assert whole.merged_adapters == ["default"]
    fused_lora.unmerge(net)
    assert same_bits(weights(net), before)


def test_a_layer_that_refuses_is_named_and_nothing_is_changed(loops):
    net = layers_of(DTYPES)
    before = weights(net)
    net[3].lora_A["default"].weight.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"^3: NaNs or infinities"):
        fused_lora.merge(net)
    assert same_bits(weights(net), before) and not any(layer.merged or layer.merge_state for layer in net)
    net[3].lora_A["default"].weight.data[1, 2] = 0.0
    fused_lora.merge(net)
    net[4].weight.data[5, 6] += 1.0
    merged, states = weights(net), [layer.merge_state for layer in net]
    with pytest.raises(RuntimeError, match=r"^4: weight: it is not what the merge left"):
        fused_lora.unmerge(net)
    assert same_bits(weights(net), merged) and [layer.merge_state for layer in net] == states
    net[4].weight.data = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"^4: weight: expected shape"):
        fused_lora.unmerge(net)
    assert same_bits(weights(net)[:4], merged[:4]) and all(layer.merged for layer in net)


@pytest.mark.parametrize("action", ["merge", "unmerge"])
def test_an_interrupt_at_any_line(action, monkeypatch, loops):
    """All layers are merged or none, and each weight has the bits that its record says."""
    net = layers_of([torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float16])
    states = {False: weights(net)}
    monkeypatch.setattr(blocks._InC, "at_once", 2 * net[0].weight.nbytes)  # two calls
    fused_lora.merge(net)
    states[True] = weights(net)
    if action == "unmerge":
        fused_lora.unmerge(net)
    lines = {"seen": 0, "stop": 0}
    names = "together", "_run", "run_together", "kept", "unmerge_all", "merge"

    def trace(frame, event, argument):
        code = frame.f_code
        files = linear.__file__, blocks.__file__, fused_lora.modules.merging.__file__
        if code.co_filename not in files or code.co_name not in names:
            return None
        if event == "line":
            lines["seen"] += 1
            if lines["seen"] == lines["stop"]:
                raise KeyboardInterrupt
        return trace

    while lines["seen"] >= lines["stop"]:
        (fused_lora.unmerge if action == "merge" else fused_lora.merge)(net)
        lines["seen"], lines["stop"] = 0, lines["stop"] + 1
        outer = sys.gettrace()
        sys.settrace(trace)
        try:
            (fused_lora.merge if action == "merge" else fused_lora.unmerge)(net)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(outer)
        merged = net[0].merged
        assert all(layer.merged is merged for layer in net) and same_bits(weights(net), states[merged]), lines
        (fused_lora.merge if action == "merge" else fused_lora.unmerge)(net) if merged is (action != "merge") else None
    assert lines["stop"] > 30


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("action", ["merge", "unmerge", "switch"])
@pytest.mark.parametrize("base", [nn.Linear(24, 16, dtype=torch.bfloat16), nn.Embedding(24, 16)], ids=str)
def test_an_interrupt_wherever_python_handles_signals(base, action, forked, loops, monkeypatch, request):
    """Of a layer's own merge, where no other code takes it back; torch is set to one thread around it in a child."""
    if action == "switch" and loops == "torch":
        pytest.skip("it is an unmerge and a merge")
    monkeypatch.setattr(native, "_PROCESS", None if forked else os.getpid())
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(2)
    net = nn.Sequential(copy.deepcopy(base))
    for name in "ab":
        fused_lora.inject(net, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), name)
    layer: Any = net[0]
    states = {"": weights(net)}
    for name in "ab":
        fused_lora.switch(net, [name])
        states[name] = weights(net)

    def begin():
        if action == "merge":
            layer.unmerge() if layer.merged else None
        else:
            fused_lora.switch(net, ["a"])

    acts = {"merge": lambda: layer.merge(adapter_names=["a"]), "unmerge": layer.unmerge}
    places = 0
    for place in everywhere(begin, acts.get(action, lambda: fused_lora.switch(net, ["b"]))):
        assert same_bits(weights(net), states["".join(layer.merged_adapters)]), place
        assert torch.get_num_threads() == 2, place
        places += 1
    assert places > 20


@built
@pytest.mark.parametrize("mode", [native.MERGE, native.UNMERGE])
def test_a_weight_that_changes_meanwhile_is_named(mode, monkeypatch):
    net, run = layers_of([torch.float32] * 4), native.run
    before = weights(net)
    if mode == native.UNMERGE:
        fused_lora.merge(net)
        before = weights(net)

    def changed_meanwhile(works, what):
        outcome = run(works, what)
        if len(works) > 1:
            net[1].weight.data[0, 0] = float("inf") if what == native.UNMERGE else 7.0
            net[1].weight.data[0, 1] = 3.4e38
            return native.TORN
        return native.TORN if outcome == native.DONE and works[0].weight == net[1].weight.data_ptr() else outcome

    monkeypatch.setattr(native, "run", changed_meanwhile)
    with pytest.raises(RuntimeError, match=r"^1: weight.*partly merged"):
        (fused_lora.merge if mode == native.MERGE else fused_lora.unmerge)(net)
    others = [0, 2, 3]
    assert same_bits([weights(net)[i] for i in others], [before[i] for i in others])
    assert all(net[i].merged is (mode == native.UNMERGE) for i in others)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_a_layer_without_weights_merges(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about numbers to initialise that are none
        model = nn.ModuleDict({"empty": nn.Linear(*shape), "other": nn.Linear(4, 4)})
        config = fused_lora.LoraConfig(r=2, target_modules=["empty", "other"], init_lora_weights=False)
        fused_lora.inject(model, config)
    before = model["other"].base_layer.weight.detach().clone()
    fused_lora.merge(model)
    assert model["empty"].merged and not torch.equal(model["other"].base_layer.weight, before)
    fused_lora.unmerge(model)
    assert torch.equal(model["other"].base_layer.weight, before) and not model["empty"].merged


def two_adapters(dtypes=(torch.bfloat16, torch.float32)):
    """A model with the adapters "a" and "b", and another whose scalings are set to 0.5 and -2 times them."""
    net = layers_of(list(dtypes))
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    net = fused_lora.unload(net)
    for name in "ab":
        fused_lora.inject(net, config, name)
    scaled = copy.deepcopy(net)
    for layer in scaled:
        layer.set_scale("a", 0.5)
        layer.set_scale("b", -2.0)
    return net, scaled


def test_weights_of_a_merge(loops):
    """As if the scalings were others; the adapters themselves are not changed, and the unmerge knows."""
    net, scaled = two_adapters()
    before, scalings = weights(net), [dict(layer.scaling) for layer in net]
    fused_lora.merge(net, ["a", "b"], weights=[0.5, -2.0])
    fused_lora.merge(scaled, ["a", "b"])
    assert same_bits(weights(net), weights(scaled)) and not same_bits(weights(net), before)
    assert [dict(layer.scaling) for layer in net] == scalings
    fused_lora.unmerge(net)
    assert same_bits(weights(net), before)
    for bad, kind in (
        ([1.0], ValueError),
        ([1.0, float("inf")], ValueError),
        ([1.0, 10**400], ValueError),
        ("12", TypeError),
        ([1, True], TypeError),
    ):
        with pytest.raises(kind, match="weights"):
            fused_lora.merge(net, ["a", "b"], weights=bad)
    with pytest.raises(ValueError, match="weights"):
        fused_lora.merge(net, ["a", "a"], weights=[1.0, 1.0])
    assert same_bits(weights(net), before)


def test_switch_is_one_or_the_other(loops):
    net, scaled = two_adapters()
    before = weights(net)
    fused_lora.merge(net, ["a"])
    merged = weights(net)
    fused_lora.switch(net, ["b"], weights=[-2.0])
    fused_lora.merge(scaled, ["b"])
    assert same_bits(weights(net), weights(scaled)) and all(layer.merged_adapters == ["b"] for layer in net)
    fused_lora.switch(net, ["a"])
    assert same_bits(weights(net), merged)
    with torch.no_grad():
        net[-1].lora_B["b"].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="infinit"):
        fused_lora.switch(net, ["b"])
    assert same_bits(weights(net), merged) and all(layer.merged_adapters == ["a"] for layer in net)
    with pytest.raises(fused_lora.AdapterNotFound):
        fused_lora.switch(net, ["c"])
    fused_lora.unmerge(net)
    assert same_bits(weights(net), before)


class Kinds(nn.Module):
    """A linear layer of each dtype, one stored by columns, and what a switch leaves to an unmerge and a merge."""

    def __init__(self):
        super().__init__()
        dtypes = [*DTYPES, torch.bfloat16]
        self.linear = nn.ModuleList([nn.Linear(24, 40, dtype=dtype) for dtype in dtypes])
        self.linear[-1].weight = nn.Parameter(self.linear[-1].weight.detach().t().contiguous().t())
        self.dora, self.biased, self.embedding = nn.Linear(24, 40), nn.Linear(24, 40), nn.Embedding(50, 24)
        plain = LoraConfig(r=4, init_lora_weights=False)
        more = {"dora": dict(use_dora=True), "biased": dict(lora_bias=True)}
        fused_lora.inject(self, replace(plain, target_modules=r"linear\.\d|embedding"), "a")
        fused_lora.inject(self, replace(plain, target_modules=r"linear\.[1-5]|embedding", r=2), "b")
        for name, options in more.items():
            own = LoraConfig(r=3, target_modules=[name], init_lora_weights=False, **options)
            fused_lora.inject(self, own, name)

    def weights(self):
        return [layer.weight.detach().clone() for layer in fused_lora.lora_layers(self).values()]


STEPS = [["b"], ["a", "dora"], ["a", "b", "biased"], ["dora", "biased"], ["b"]]


def test_a_switch_of_every_kind_of_layer(loops):
    """Bit for bit an unmerge and a merge, also of layers that lose or get their only adapter, and of adapters that have
    been trained meanwhile."""
    net = Kinds()
    before = net.weights()
    two = copy.deepcopy(net)
    for model in (net, two):
        fused_lora.merge(model, ["a"])
    for names in STEPS:
        for model in (net, two):
            for name, parameter in model.named_parameters():
                if name.endswith(("lora_B.a.weight", "lora_B.b.weight")):
                    parameter.data.mul_(1.25)
        fused_lora.switch(net, names)
        fused_lora.unmerge(two)
        fused_lora.merge(two, names)
        assert same_bits(net.weights(), two.weights())
        pairs = zip(fused_lora.lora_layers(net).values(), fused_lora.lora_layers(two).values(), strict=True)
        assert all(ours.merged_adapters == theirs.merged_adapters for ours, theirs in pairs)
    fused_lora.unmerge(net)
    assert same_bits(net.weights(), before)


@pytest.fixture
def group_launches(kernels_on, monkeypatch):
    """How many weights each launch for several layers has; the trials of the first use are over."""
    from fused_lora.kernels import merge as kernel
    from fused_lora.ops.merge import launch

    monkeypatch.setattr(launch.guard, "passes", lambda *_: True)
    found, run = [], kernel.launch_group
    monkeypatch.setattr(kernel, "launch_group", lambda members, *a: found.append(len(members)) or run(members, *a))
    return found


@pytest.mark.parametrize("where", ["launch_group", "new_records", "delta_factors"])
def test_a_group_without_memory_goes_layer_by_layer(where, device, group_launches, monkeypatch):
    """Where even a layer finds none it says so, and nothing is changed."""
    from fused_lora.kernels import merge as kernel

    net: Any = nn.Sequential(*[nn.Linear(32, 48, dtype=torch.bfloat16, device=device) for _ in range(3)])
    for name in ("a", "b"):
        fused_lora.inject(net, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), name)
    alone, before, owner = copy.deepcopy(net), weights(net), merging if where == "delta_factors" else kernel
    run, full, asked = getattr(owner, where), [False], []

    def no_memory(first, *args, **options):
        many = where == "delta_factors" and len(asked) == 1 or where != "delta_factors" and len(first) > 1
        asked.append(many)
        if many or full[0]:
            raise torch.OutOfMemoryError("out of memory")
        return run(first, *args, **options)

    monkeypatch.setattr(owner, where, no_memory)
    fused_lora.merge(net, ["a"])
    for layer in alone:
        layer.merge(adapter_names=["a"])
    assert any(asked) and same_bits(weights(net), weights(alone)) and all(layer.merged for layer in net)
    fused_lora.unmerge(net)
    assert same_bits(weights(net), before)
    if where != "launch_group":
        full[0] = True
        with pytest.raises(torch.OutOfMemoryError):
            fused_lora.merge(net, ["a"])
        assert same_bits(weights(net), before) and not any(layer.merged for layer in net)


def test_one_launch_for_many_layers(device, group_launches):
    """Of each dtype; layers of odd sizes or in fp64 go by themselves. Bits, records and names are the layers' own."""
    shapes = [(16, 33), (48, 64), (80, 5), (30, 40), (32, 32), (16, 33)]
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16, torch.float64, torch.float32]
    net: Any = nn.Sequential(*[nn.Linear(*s, dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=True)])
    net[2].weight = nn.Parameter(torch.randn(80, 16, dtype=torch.bfloat16, device=device).t())
    for name in ("a", "b"):
        fused_lora.inject(net, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), name)
    alone, before = copy.deepcopy(net), weights(net)
    fused_lora.merge(net, ["a"])
    assert sorted(group_launches) == [2, 2]
    for layer in alone:
        layer.merge(adapter_names=["a"])
    assert same_bits(weights(net), weights(alone)) and all(layer.merged_adapters == ["a"] for layer in net)
    fused_lora.switch(net, ["b"])
    assert sorted(group_launches) == [2] * 4
    net[0].weight.data[3, 4] += 1
    merged = weights(net)
    with pytest.raises(RuntimeError, match="^0: weight: it is not what the merge left"):
        fused_lora.unmerge(net)
    assert same_bits(weights(net), merged) and all(layer.merged_adapters == ["b"] for layer in net)
    for layer in alone:
        layer.unmerge()
        layer.merge(adapter_names=["b"])
    net[0].weight.data.copy_(alone[0].weight)
    assert same_bits(weights(net), weights(alone))
    group_launches.clear()
    fused_lora.unmerge(net)
    assert sorted(group_launches) == [2, 2] and same_bits(weights(net), before)


def test_a_switch_of_a_changed_model_is_refused(loops):
    """All layers go back, also those that another call of the C loops has switched before."""
    net, _ = two_adapters()
    fused_lora.merge(net, ["a"])
    merged, path = weights(net), list(fused_lora.lora_layers(net))[-1]
    with torch.no_grad():
        net[-1].base_layer.weight[3, 4] += 1
    changed = weights(net)
    with pytest.raises(RuntimeError, match=f"^{path}: weight: it is not what the merge left"):
        fused_lora.switch(net, ["b"])
    assert same_bits(weights(net), changed) and all(layer.merged_adapters == ["a"] for layer in net)
    with torch.no_grad():
        net[-1].base_layer.weight.copy_(merged[-1])
    fused_lora.switch(net, ["b"])


@pytest.mark.parametrize("first", [None, 3], ids=["nearest", "at random"])
def test_a_switch_warns_as_a_merge_does(first, loops):
    """Of what rounding takes from the new adapter, measured against the base and not against the old merge."""
    net = layers_of([torch.bfloat16] * 2)
    fused_lora.inject(net, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "small")
    for layer in net:
        layer.lora_B["small"].weight.data.mul_(1e-3)
    fused_lora.merge(net, ["default"], stochastic=first)
    with pytest.warns(UserWarning, match="16-bit weights keep only"):
        fused_lora.switch(net, ["small"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_lora.switch(net, ["default"])
    fused_lora.unmerge(net)
    net[0].merge(adapter_names=["default"])  # whose rows before nobody has kept
    with pytest.warns(UserWarning, match="16-bit weights keep only"):
        fused_lora.switch(net, ["small"])


@pytest.mark.parametrize("kind", ["ours", "accelerated"])
def test_merged_restores_the_bits(kind):
    """500 other adapters, each merged and left by an exception now and then: no bit changes."""
    linear = nn.Linear(24, 40, dtype=torch.bfloat16)
    if kind == "ours":
        net = fused_lora.inject(nn.Sequential(linear), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    else:
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        net = peft.get_peft_model(nn.Sequential(linear), config)
        with pytest.raises(RuntimeError, match="call fused_lora.accelerate"), fused_lora.merged(net):
            pass
        fused_lora.accelerate(net)
    B = next(p for n, p in net.named_parameters() if "lora_B" in n)
    before = linear.weight.detach().clone()
    for i in range(500):
        B.data.normal_(std=0.1)
        try:
            with fused_lora.merged(net) as inside:
                assert inside is net and not torch.equal(linear.weight, before)
                if i % 7 == 0:
                    raise KeyError(i)
        except KeyError:
            assert i % 7 == 0
        assert torch.equal(bits(linear.weight.detach()), bits(before))
    with pytest.raises(RuntimeError, match="merged already"), fused_lora.merged(net), fused_lora.merged(net):
        pass
    with fused_lora.merged(net):
        fused_lora.unmerge(net)
    assert torch.equal(bits(linear.weight.detach()), bits(before))


def test_rounding_at_random(loops):
    """Reproducible, another draw in each layer, further adapters on top, and all bits back."""
    net = layers_of([torch.bfloat16, torch.float16, torch.bfloat16])
    net[1].base_layer.weight.data.copy_(net[0].base_layer.weight)
    fused_lora.inject(net, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "other")
    before, found = weights(net), []
    for seed in (3, 3, 4, None):
        fused_lora.merge(net, stochastic=seed)
        found.append(weights(net))
        assert "rounding_seed" not in vars(net[0])
        fused_lora.merge(net, ["other"])  # keeps the seed of what is merged already
        found[-1] += weights(net)
        fused_lora.unmerge(net)
        assert same_bits(weights(net), before)
    assert same_bits(found[0], found[1])
    assert not any(same_bits([a], [b]) for other in found[2:] for a, b in zip(found[0], other, strict=True))


def test_rounding_at_random_is_no_loss_to_warn_of():
    net = layers_of([torch.bfloat16] * 2)
    for layer in net:
        layer.lora_B["default"].weight.data.mul_(1e-3)
    with pytest.warns(UserWarning, match="16-bit weights keep only"):
        fused_lora.merge(net)
    fused_lora.unmerge(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_lora.merge(net, stochastic=1)
    fused_lora.unmerge(net)


@pytest.mark.parametrize(
    "seed, kind, message", [(1, ValueError, "2 has a Parameter of torch.float32"), (True, TypeError, "an int")]
)
def test_rounding_at_random_that_is_refused(seed, kind, message):
    net = layers_of([torch.bfloat16, torch.bfloat16, torch.float32])
    before = weights(net)
    with pytest.raises(kind, match=f"stochastic: expected .*{message}"):
        fused_lora.merge(net, stochastic=seed)
    assert same_bits(weights(net), before)
    wrapped = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="stochastic: expected None for a PEFT model"):
        fused_lora.merge(wrapped, stochastic=1)


def torch_saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def state_there_and_back(net):
    net.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()})
    return net


CARRIED = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": torch_saved,
    "state_dict": state_there_and_back,
    "to": lambda net: net.to("cpu", torch.float32).to("cpu"),
}


@pytest.mark.parametrize("how", CARRIED)
@pytest.mark.parametrize("stochastic", [None, 9])
def test_the_record_of_a_merge_goes_with_the_model(loops, how, stochastic):
    """What was merged before comes back to the bit behind it, from frozen factors; the original is its own."""
    net = layers_of([torch.float32, torch.float32] if how == "to" else [torch.bfloat16, torch.float16])
    before = weights(net)
    fused_lora.merge(net, stochastic=None if how == "to" else stochastic)
    merged = weights(net)
    carried = CARRIED[how](net)
    assert same_bits(weights(carried), merged) and all(layer.merged for layer in carried)
    with torch.no_grad():
        for layer in carried:
            layer.lora_B["default"].weight.zero_()  # an adapter may change meanwhile
    fused_lora.unmerge(carried)
    assert same_bits(weights(carried), before)
    if carried is not net:
        assert same_bits(weights(net), merged)
        fused_lora.unmerge(net)
        assert same_bits(weights(net), before)


def views(*parts):
    """Linear layers whose weights [64, 48] are parts of one tensor."""
    memory = torch.randn(96, 144)
    net: Any = nn.Sequential(*[nn.Linear(48, 64, bias=False) for _ in parts])
    for layer, (row, column) in zip(net, parts, strict=True):
        layer.weight = nn.Parameter(memory[row : row + 64, column : column + 48])
    fused_lora.inject(net, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return net, memory


def test_weights_that_overlap_are_refused(loops):
    net, memory = views((0, 0), (32, 40))
    before = memory.clone()
    for act in (lambda: fused_lora.merge(net), lambda: fused_lora.switch(net, ["default"])):
        with pytest.raises(RuntimeError, match=r"^1: 0.base_layer.weight and 1.base_layer.weight overlap in memory"):
            act()
        assert torch.equal(memory, before) and not any(layer.merged for layer in net)


def test_a_parameter_without_an_address_shares_nothing(loops):
    net: Any = layers_of([torch.float32, torch.float32])
    net.register_parameter("sparse", nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False))
    before = weights(net)
    fused_lora.merge(net)
    assert all(layer.merged for layer in net)
    fused_lora.unmerge(net)
    assert same_bits(weights(net), before)


@pytest.mark.parametrize("parts", [[(0, 0), (32, 48)], [(0, 0), (0, 48)]], ids=str)
def test_weights_between_each_others_numbers_are_merged(parts, loops):
    net, memory = views(*parts)
    before, alone = memory.clone(), copy.deepcopy(net)
    fused_lora.merge(net)
    for layer in alone:
        layer.merge()
    assert same_bits(weights(net), weights(alone))
    fused_lora.unmerge(net)
    assert torch.equal(memory, before)


@built
def test_no_call_has_two_weights_that_overlap(monkeypatch):
    """Threads would write both. Layers that were merged one by one meet in an unmerge, which goes by their order."""
    net, memory = views((0, 0), (32, 40), (0, 96))
    before = memory.clone()
    for layer in (net[1], net[0], net[2]):
        layer.merge()
    calls = counted(monkeypatch)
    fused_lora.unmerge(net)
    assert calls == [1] * 3 and torch.equal(memory, before)


@pytest.mark.parametrize("action", ["merge", "unmerge"])
@pytest.mark.parametrize("interrupts", [1, 2])
def test_an_interrupt_at_any_line_of_the_way_back(action, interrupts, loops):
    """Of a merge or an unmerge that the last layer refuses; all layers are as they were."""
    net: Any = layers_of([torch.float32, torch.float64, torch.float32])
    if action == "merge":
        net[2].lora_A["default"].weight.data[0, 0] = float("nan")
    else:
        fused_lora.merge(net)
        net[2].weight.data[3, 4] += 1
    before, lines = weights(net), {"seen": 0, "stop": 0}
    source, first = inspect.getsourcelines(linear.go_back)
    ends = [first + i for i, line in enumerate(source) if line.strip() in ("try:", "except Exception as error:")]

    def trace(frame, event, argument):
        if frame.f_code is not linear.go_back.__code__:
            return None
        if event == "line" and ends[0] < frame.f_lineno < ends[1]:
            lines["seen"] += 1
            if lines["stop"] <= lines["seen"] < lines["stop"] + interrupts:
                raise KeyboardInterrupt
        return trace

    while lines["seen"] >= lines["stop"]:
        lines["seen"], lines["stop"] = 0, lines["stop"] + 1
        outer = sys.gettrace()
        sys.settrace(trace)
        try:
            with pytest.raises((KeyboardInterrupt, ValueError, RuntimeError)):
                (fused_lora.merge if action == "merge" else fused_lora.unmerge)(net)
        finally:
            sys.settrace(outer)
        assert all(layer.merged is (action == "unmerge") for layer in net) and same_bits(weights(net), before), lines
    assert lines["stop"] > 8


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_a_second_interrupt_does_not_stop_the_way_back(kind, loops, monkeypatch):
    net = layers_of([torch.float64] * 4)
    before, unmerge, calls = weights(net), type(net[0]).unmerge, []
    net[3].lora_A["default"].weight.data[0, 0] = float("nan")

    def stopped(layer):
        calls.append(layer)
        if len(calls) == 2:
            raise kind
        unmerge(layer)

    monkeypatch.setattr(type(net[0]), "unmerge", stopped)
    with pytest.raises(kind):
        fused_lora.merge(net)
    stays = [calls[1]] if kind is OSError else []
    assert len(calls) == 4 - len(stays) and [layer for layer in net if layer.merged] == stays
    monkeypatch.undo()
    for layer in stays:
        layer.unmerge()
    assert same_bits(weights(net), before)
