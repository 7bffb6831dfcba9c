"""Methods of PEFT and torch that a script replaces for all layers, or for one: accelerated layers follow them, too."""

import types

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fused_lora.integrations import peft as integration
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import K, Net, SideBySide, layers, pair, wrap
from helpers.seeds import shifted

pytestmark = pytest.mark.numeric

Linear, Embedding = peft.tuners.lora.Linear, peft.tuners.lora.Embedding


def outputs(both, x):
    """Of PEFT's layer and ours: y and its gradients, under the same random numbers."""
    found = []
    for layer in layers(both)[:2]:
        data = x.clone().requires_grad_()
        y = layer(data)
        found.append([y, *torch.autograd.grad(y.sum(), [data, *(p for p in layer.parameters() if p.requires_grad)])])
    return found


def assert_same(both, x):
    for mine, other in zip(*outputs(both, x), strict=True):
        assert torch.equal(mine, other)


def twice(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


PATCHES = {
    "PEFT's class has its forward replaced": (Linear, "forward"),
    "nn.Linear.forward was replaced": (nn.Linear, "forward"),
    "nn.Dropout.forward was replaced": (nn.Dropout, "forward"),
    "nn.Module.__call__ was replaced": (nn.Module, "__call__"),
    "F.linear was replaced": (F, "linear"),
    "F.dropout was replaced": (F, "dropout"),
}


@pytest.mark.parametrize("reason", PATCHES)
def test_what_is_replaced_for_all_layers_is_called(reason, report, monkeypatch):
    both, x = pair(lora_dropout=0.5), torch.randn(5, K)
    [layer.eval() for layer in layers(both)]
    outputs(both, x)
    outputs(both, x)  # the second call knows of the first
    assert report()["fused"] == 2
    owner, name = PATCHES[reason]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, twice(getattr(owner, name)))
        assert_same(both, x)
        [row] = integration.layer_report(both.ours)
        assert row.why_not == reason
        assert report() == {"fused": 2, "around": {}, "fallback": {reason: 1}}
    outputs(both, x)
    assert report()["fused"] == 3


def test_a_forward_replaced_before_the_class_of_ours_is_made(report, monkeypatch):
    integration.accelerated.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(Linear, "forward", twice(Linear.forward))
        with pytest.warns(UserWarning, match="2 do not: PEFT's class|1 do not: PEFT's class"):
            both = pair()
        assert_same(both, torch.randn(5, K))
    outputs(both, torch.randn(5, K))
    assert report()["fused"] == 1


def test_a_forward_that_forgets_an_argument(monkeypatch):
    """Of diffusers' ``scale``, which a base layer does not take."""
    both, plain = pair(), Linear.forward
    with pytest.raises(TypeError, match="scale"):
        layers(both)[0](torch.randn(5, K), scale=0.5)
    monkeypatch.setattr(Linear, "forward", lambda self, x, scale=1.0: plain(self, x))
    x = torch.randn(5, K)
    assert torch.equal(*(layer(x, scale=0.5) for layer in layers(both)[:2]))


def test_a_forward_replaced_in_the_class_of_the_layers(report):
    """By ``type(layer).forward = ...``, which on an accelerated layer is our class."""
    both = pair()
    ours = type(layers(both)[0])
    plain, x = ours.forward, torch.randn(5, K)
    y = layers(both)[0](x)
    try:
        ours.forward = twice(plain)
        assert_close(layers(both)[0](x), 2 * y, terms=K)
        [row] = integration.layer_report(both.ours)
        assert row.why_not == "the class of the layer has its forward replaced"
    finally:
        del ours.forward
    assert integration.layer_report(both.ours)[0].fused


class Twice(TorchFunctionMode):
    """Doubles every product."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is F.linear else result


def test_modes_that_follow_functions(report):
    both, x = pair(), torch.randn(5, K)
    with torch.device("cpu"):  # torch's own modes change no product
        outputs(both, x)
    assert report()["fused"] == 1
    with Twice():
        assert_same(both, x)
    assert report()["fallback"] == {"a Twice follows the calls": 1}


@pytest.mark.parametrize("name", ["forward", "get_weight_norm"])
@pytest.mark.parametrize("target", ["lin0", "conv1d"])
def test_dora_whose_class_was_patched(name, target, report, monkeypatch):
    both = SideBySide(wrap(Net(), target_modules=[target], use_dora=True))
    ours, theirs = (model.get_submodule(f"base_model.model.{target}") for model in (both.ours, both.theirs))
    kind = type(ours.lora_magnitude_vector["default"])
    monkeypatch.setattr(kind, name, twice(getattr(kind, name)))
    x = torch.randn(3, 24)
    assert torch.equal(ours(x), theirs(x))
    assert report()["fallback"] == {"PEFT's DoRA has a method replaced": 1}
    both.ours.merge_adapter()
    both.theirs.merge_adapter()
    assert_close(ours(x), theirs(x), terms=24)


def test_an_embedding_whose_class_was_patched(monkeypatch):
    both = SideBySide(wrap(Net(), target_modules=["emb"]))
    monkeypatch.setattr(Embedding, "forward", twice(Embedding.forward))
    ids = torch.arange(6)
    assert torch.equal(*(model.base_model.model.emb(ids) for model in (both.ours, both.theirs)))


class Switched(nn.ModuleDict):
    """Gives the modules of "b" for those of "a"."""

    def __getitem__(self, name):
        return super().__getitem__("b" if name == "a" else name)


def test_dicts_that_give_other_modules(report):
    both = pair(adapters={"a": {}, "b": {}})
    for layer in layers(both)[:2]:
        layer(torch.randn(5, K))
        layer.lora_A, layer.lora_B = Switched(layer.lora_A), Switched(layer.lora_B)
    x = torch.randn(5, K)
    assert torch.equal(*(layer(x) for layer in layers(both)[:2]))
    assert report()["fallback"] == {"lora_A is a Switched": 1}
    for layer in layers(both)[:2]:
        layer.merge()
    assert torch.equal(*(layer.base_layer.weight for layer in layers(both)[:2]))


def test_attributes_of_a_script_are_its_own():
    both, x = pair(), torch.randn(5, K)
    layer = layers(both)[0]
    layer.stock, layer.gate = 3, nn.Linear(2, 2)
    assert_close(layer(x), layers(both)[1](x), terms=2 * K)


# ---- merges


def by_half(self, name):
    """What a layer with more than A and B would add."""
    return (self.lora_B[name].weight @ self.lora_A[name].weight) * 0.5


def merged_and_back(model):
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    merged = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.unmerge_adapter()
    for n, p in model.named_parameters():
        assert_close(p, before[n], terms=8)
    return merged


def assert_merged_alike(both):
    ours, theirs = merged_and_back(both.ours), merged_and_back(both.theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("target", ["lin0", "conv1d", "emb"])
def test_a_delta_that_is_replaced_for_one_layer(target):
    both = SideBySide(wrap(Net(), target_modules=[target]))
    if target == "conv1d":
        delta = lambda self, name: by_half(self, name).T  # noqa: E731
    elif target == "emb":
        delta = lambda self, name: (self.lora_embedding_B[name] @ self.lora_embedding_A[name]).T * 0.5  # noqa: E731
    else:
        delta = by_half
    for model in both.models:
        torch.manual_seed(shifted(1))
        for name, parameter in model.named_parameters():
            if "lora_embedding" in name:
                nn.init.normal_(parameter)  # which wrap() leaves at zero
        layer = model.get_submodule(f"base_model.model.{target}")
        layer.get_delta_weight = types.MethodType(delta, layer)
    assert_merged_alike(both)


def test_a_delta_that_is_put_back_is_merged_exactly():
    both = SideBySide(wrap(Net()))
    for model in both.models:
        for layer in (m for m in model.modules() if isinstance(m, Linear)):
            plain = layer.get_delta_weight
            layer.get_delta_weight = types.MethodType(by_half, layer)
            layer.get_delta_weight = plain
    both.ours.merge_adapter()
    layer = both.ours.base_model.model.lin0
    assert layer.merge_state is not None
    both.ours.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, both.theirs.base_model.model.lin0.base_layer.weight)


def test_a_delta_that_is_replaced_for_all_layers(monkeypatch):
    both = SideBySide(wrap(Net(), target_modules=["lin0", "lin1"]))
    monkeypatch.setattr(Linear, "get_delta_weight", by_half)
    assert_merged_alike(both)


def test_merges_that_are_replaced_for_all_layers(monkeypatch):
    both, calls = SideBySide(wrap(Net(), target_modules=["lin0", "lin1"])), []
    for name in ("merge", "unmerge"):
        plain = getattr(Linear, name)
        monkeypatch.setattr(Linear, name, lambda s, *a, n=name, f=plain, **k: (calls.append(n), f(s, *a, **k))[1])
    merged_and_back(both.ours)
    assert calls == ["merge"] * 2 + ["unmerge"] * 2


def test_an_unmerge_that_is_replaced_while_merged(monkeypatch):
    both, calls = SideBySide(wrap(Net(), target_modules=["lin0"])), []
    both.ours.merge_adapter()
    plain = Linear.unmerge
    monkeypatch.setattr(Linear, "unmerge", lambda self: (calls.append(self), plain(self))[1])
    both.ours.unmerge_adapter()
    layer = both.ours.base_model.model.lin0
    assert calls == [layer] and not layer.merged
    assert_close(layer.base_layer.weight, both.theirs.base_model.model.lin0.base_layer.weight, terms=8)


def test_layers_compile_whole_where_deepspeed_has_replaced_a_function(monkeypatch):
    (layer, theirs, *_), x = layers(pair()), torch.randn(5, K)
    expected = theirs(x)

    def linear(*args):
        return own(*args)

    own, linear.__module__ = F.linear, "deepspeed.runtime.zero.linear"
    monkeypatch.setattr(F, "linear", linear)
    assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), expected, terms=100)
