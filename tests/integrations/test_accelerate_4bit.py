"""Accelerated PEFT layers over 4-bit layers of bitsandbytes: PEFT's results, states, files and merges."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora.bases.bitsandbytes_4bit import Weight
from fused_lora.integrations import peft as integration
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import quiet, wrap
from helpers.quantised import linear4bit, repack, values_of
from helpers.seeds import shifted

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
STOCK = pytest.importorskip("peft.tuners.lora.bnb").Linear4bit

K, H, N, M = 64, 128, 96, 7
TERMS = 3 * (K + H + N)


class Net(nn.Module):
    """Two 4-bit layers and a dense one."""

    is_loaded_in_4bit = True

    def __init__(self, **settings):
        super().__init__()
        self.up, self.down = linear4bit(H, K, **settings), linear4bit(N, H, bias=False, **settings)
        self.head = nn.Linear(N, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def pair(adapters=None, **fields):
    theirs = wrap(Net(), adapters, **{"target_modules": ["up", "down", "head"], **fields}).train()
    ours = fused_lora.accelerate(copy.deepcopy(theirs))
    return ours, theirs


def layers(model):
    return model.base_model.model.up, model.base_model.model.down


def results(model, x, **kwargs):
    """The output and all gradients."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x, **kwargs)
    y.backward(torch.ones_like(y))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(ours, theirs, x, **kwargs):
    found = [results(model, x, **kwargs) for model in (ours, theirs)]
    assert len(found[0]) == len(found[1])
    for mine, other in zip(*found, strict=True):
        assert mine.dtype == other.dtype
        assert_close(mine, other, terms=TERMS)


@pytest.fixture
def report():
    calls = integration.install()
    integration.uninstall()
    return calls


def test_there_and_back(report):
    ours, theirs = pair()
    assert [type(layer) for layer in layers(theirs)] == [STOCK, STOCK]
    for layer in layers(ours):
        assert isinstance(layer, STOCK) and type(layer) is not STOCK
        assert type(copy.deepcopy(layer)) is type(pickle.loads(pickle.dumps(layer))) is type(layer)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs)
    assert [str(row) for row in integration.layer_report(ours)] == ["fused"] * 3
    assert_same(ours, theirs, torch.randn(M, K))
    assert report() == {"fused": 3, "around": {}, "fallback": {}}
    fused_lora.restore(ours)
    assert [type(layer) for layer in layers(ours)] == [STOCK, STOCK]
    assert [set(vars(a)) for a in layers(ours)] == [set(vars(b)) for b in layers(theirs)]
    assert "not accelerated" in str(fused_lora.explain(ours))


def test_layers_that_peft_builds_later():
    integration.install()
    try:
        model = wrap(Net(), target_modules=["up"])
    finally:
        integration.uninstall()
    assert isinstance(layers(model)[0], STOCK) and type(layers(model)[0]) is not STOCK
    with quiet():
        model.add_adapter("second", peft.LoraConfig(target_modules=["up", "down"]))
    fused_lora.accelerate(model)
    assert all(type(layer) is not STOCK for layer in layers(model))


def test_several_adapters_scaled_switched_and_disabled():
    ours, theirs = pair({"a": {}, "b": {"r": 2, "lora_alpha": 3}})
    x = torch.randn(M, K)
    for step in (
        lambda m: m.set_adapter("b"),
        lambda m: m.base_model.set_adapter(["a", "b"]),
        lambda m: layers(m)[0].set_scale("a", 0.5),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.delete_adapter("a"),
    ):
        for model in (ours, theirs):
            with quiet():
                step(model)
        assert_same(ours, theirs, x)
    names = ["b", "__base__", "b", "b", "__base__", "b", "b"]
    assert_close(ours.eval()(x, adapter_names=names), theirs.eval()(x, adapter_names=names), terms=TERMS)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_prepared_for_training_with_checkpoints(use_reentrant):
    """fp32 activations over a bf16 compute dtype; the same bits with and without checkpoints."""
    net = Net(dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    for layer in (net.up, net.down):
        layer.support_avx512bf16_for_cpu = False
    model = fused_lora.accelerate(wrap(net, target_modules=["up", "down"], lora_dropout=0.3).train())
    x, found = torch.randn(M, K), []
    for checkpointed in (False, True):
        torch.manual_seed(shifted(2))
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = checkpoint(model, leaf, use_reentrant=use_reentrant) if checkpointed else model(leaf)
        y.sum().backward()
        found.append([leaf.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == 5 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_train_evaluate_train():
    """The evaluation may repack the weights for the CPU. The gradients of the next step are of what it computes."""
    ours, _ = pair()
    x = torch.randn(M, K)
    before = results(ours, x)
    ours.eval()
    with torch.no_grad():
        ours(x)
    for layer in layers(ours):
        if not layer.base_layer.weight.quant_state.__dict__.get("packing_format_for_cpu"):
            repack(layer.base_layer)
    now = results(ours.train(), x)
    for one, other in zip(now, before, strict=True):
        distance = (one - other).norm() / other.norm()
        assert 0 < distance < 2**-7  # the scales were rounded to bf16 in between


def test_merges_are_those_of_peft_and_unmerges_are_exact():
    ours, theirs = pair()
    before = [layer.base_layer.weight.data.clone() for layer in layers(ours)]
    x = torch.randn(M, K)
    said = []
    for model in (ours, theirs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.merge_adapter()
        said.append([str(w.message) for w in caught])
    assert said[0] == said[1] and "4-bit" in said[0][0]
    for mine, other in zip(layers(ours), layers(theirs), strict=True):
        assert torch.equal(mine.base_layer.weight.data, other.base_layer.weight.data)
    assert_close(ours(x), theirs(x), terms=TERMS)
    assert set(fused_lora.delta_fidelity(ours)) >= {"base_model.model.up", "base_model.model.down"}
    ours.unmerge_adapter()
    for layer, weight in zip(layers(ours), before, strict=True):
        assert torch.equal(layer.base_layer.weight.data, weight)


def test_merges_of_repacked_weights():
    """Ours reads the layout for CPUs; PEFT's own merge would not, and is refused."""
    ours, theirs = pair()
    base = layers(ours)[0].base_layer
    repack(base)
    before = base.weight.data.clone()
    W = Weight(base, torch.float32).to(torch.float32)
    delta = layers(ours)[0].get_delta_weight("default")
    with quiet():
        layers(ours)[0].merge()
    error = values_of(base) - W - delta
    assert error.norm() < 0.15 * (W + delta).norm()  # of 4 bits
    layers(ours)[0].unmerge()
    assert torch.equal(base.weight.data, before)

    with quiet():
        theirs.merge_adapter()
    fused_lora.accelerate(theirs)
    repack(layers(theirs)[0].base_layer)
    with pytest.raises(RuntimeError, match="base_layer: a call in eval.* so nothing was unmerged"), quiet():
        theirs.unmerge_adapter()
    assert layers(theirs)[0].merged_adapters == ["default"]


def test_files_of_peft(tmp_path):
    ours, theirs = pair()
    ours.save_pretrained(tmp_path)
    net = Net()
    for name in ("up", "down", "head"):
        setattr(net, name, copy.deepcopy(getattr(theirs.base_model.model, name).base_layer))
    loaded = fused_lora.accelerate(peft.PeftModel.from_pretrained(net, tmp_path, is_trainable=True)).train()
    x = torch.randn(M, K)
    assert all(torch.equal(a, b) for a, b in zip(results(ours, x), results(loaded, x), strict=True))
    assert torch.equal(values_of(layers(ours)[0].base_layer), values_of(layers(loaded)[0].base_layer))
