"""Linear8bitLt of bitsandbytes as a base: its own call with the adapters around it, merges, dense merges, refusals."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoraConfig
from fused_lora.bases import base_of
from fused_lora.integrations.peft import layer_report
from fused_lora.testing.numeric import DRAWS, assert_close, ulp
from helpers.over_quantised import assert_no_worse_than_peft, layers, results, same, three_models
from helpers.quantised import linear8bit, values_of_8bit
from helpers.thorough import pairwise

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:Unmerge lora module")]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
N, K, M = 96, 128, 9
REASON = "an int8 base layer has products of its own"


class Net(nn.Module):
    """Two 8-bit layers; transformers sets the flag that PEFT looks for."""

    is_loaded_in_8bit = True

    def __init__(self, **settings):
        super().__init__()
        self.up, self.down = linear8bit(N, K, **settings), linear8bit(K, N, bias=False, **settings)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def pair(names=("first",), **settings):
    return three_models(Net(**settings), names, target_modules=["up", "down"])


def contents(layer):
    """Codes and scales, and what else a call reads."""
    weight, state = layer.weight, layer.state
    held = [weight.data, weight.CB, weight.SCB, state.CB, state.SCB]
    return [None if t is None else t.clone() for t in held]


@pairwise(dtype=[F32, BF16, F16], threshold=[0.0, 6.0], training=[True, False])
def test_a_layer_is_its_own_call_and_the_terms(dtype, threshold, training):
    """Against float64 of the terms on the layer's own output, no worse than PEFT; with outliers in the input, too."""
    names, draws = ("first", "second"), []
    for _ in range(DRAWS):
        models = pair(names, dtype=dtype, threshold=threshold)
        x, g = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        x[2, 5] = 10.0
        for model in models:
            model.train(training)
        layer = layers(models[-1])[0]
        with torch.no_grad():
            y = layer.base_layer(x).double()
        draws.append(results(models, x, g, names, y, values_of_8bit(layer.base_layer)))
    assert_no_worse_than_peft(draws)


def test_what_runs_how_is_said():
    ours, injected, theirs = pair()
    for model in (ours, injected):
        assert all(REASON in str(row) for row in layer_report(model))
    restored = fused_lora.restore(copy.deepcopy(ours))
    assert [type(layer) for layer in layers(restored)] == [type(layer) for layer in layers(theirs)]
    for layer in layers(ours):
        assert type(pickle.loads(pickle.dumps(layer))) is type(layer)


@pytest.mark.parametrize("called", [False, True])
def test_a_merge_has_the_bytes_of_peft_and_an_unmerge_those_of_before(called):
    """Before a first call the scales are the parameter's, then the state's. Many cycles change nothing."""
    ours, injected, theirs = pair()
    x = torch.randn(M, K)
    for model in (ours, injected, theirs):
        if called:
            model(x)
    before = [contents(layer.base_layer) for layer in layers(ours)]
    theirs.merge_adapter()
    for model in (ours, injected):
        for _ in range(20):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", "Merge lora module to 8-bit")  # PEFT's own
                fused_lora.merge(model)
            for mine, other in zip(layers(model), layers(theirs), strict=True):
                assert torch.equal(mine.base_layer.weight.data, other.base_layer.weight.data)
                assert torch.equal(values_of_8bit(mine.base_layer), values_of_8bit(other.base_layer))
            assert_close(model(x), theirs(x), terms=1)
            fused_lora.unmerge(model)
            for layer, held in zip(layers(model), before, strict=True):
                assert same(contents(layer.base_layer), held)


def test_what_a_merge_loses_is_said():
    _, model, _ = pair()
    values = [values_of_8bit(layer.base_layer) for layer in layers(model)]
    for layer in layers(model):
        layer.lora_B["first"].weight.data.mul_(1e-3)
    with pytest.warns(UserWarning, match=r"merge: 8-bit weights keep only .* unload\(model, merge_adapters=True"):
        fused_lora.merge(model)
    lost = fused_lora.delta_fidelity(model)
    for (path, layer), W in zip(fused_lora.lora_layers(model).items(), values, strict=True):
        delta = layer.get_delta_weight("first").double()
        expected = (values_of_8bit(layer.base_layer) - W - delta).norm() / delta.norm()
        assert lost[path] == pytest.approx(expected.item(), rel=1e-3)


def test_two_adapters_are_quantised_once():
    _, model, _ = pair(("first", "second"))
    layer = model.up
    wanted = values_of_8bit(layer.base_layer).float()
    wanted += layer.get_delta_weight("first") + layer.get_delta_weight("second")
    layer.merge(adapter_names=["first"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        layer.merge(adapter_names=["second"])
    other = bnb.nn.Int8Params(wanted, requires_grad=False, has_fp16_weights=False).to("cpu")
    moved = (layer.base_layer.weight.data.int() - other.data.int()).abs()
    assert moved.max() <= 1 and moved.float().mean() < 0.01  # fp32 sums in another order
    assert_close(layer.base_layer.weight.SCB, other.SCB, terms=8)


STEPS = {
    "evaluate": lambda layer, x: layer.eval()(x),
    "train": lambda layer, x: layer.merged or layer.train()(x.clone().requires_grad_()).sum().backward(),
    "merge": lambda layer, x: layer.merged or layer.merge(),
    "unmerge": lambda layer, x: layer.unmerge() if layer.merged else None,
    "copy": lambda layer, x: copy.deepcopy(layer),
    "save": lambda layer, x: layer.state_dict(),
}


@pytest.mark.parametrize("first", STEPS)
def test_any_order_of_calls(first):
    """Two more calls after each: the layer computes what it computed merged, or unmerged.

    On a CPU the library rounds the input in eval() only.
    """
    start, x = pair()[1].up, torch.randn(5, K)
    merged = copy.deepcopy(start)
    merged.merge()
    right = {
        (layer.merged, training): layer.train(training)(x).detach()
        for layer in (start, merged)
        for training in (True, False)
    }
    start.train()
    for rest in itertools.product(STEPS, repeat=2):
        layer = copy.deepcopy(start)
        for step in (first, *rest):
            with torch.set_grad_enabled(step == "train"):
                found = STEPS[step](layer, x)
            layer = found if step == "copy" else layer
            assert_close(layer(x).detach(), right[layer.merged, layer.training], terms=K)
        STEPS["unmerge"](layer, x)
        assert_close(layer(x).detach(), right[False, layer.training], terms=K)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_dense_merge_is_rounded_once(dtype, called):
    for model in pair()[:2]:
        if called:
            model(torch.randn(M, K))
        exact = []
        for layer in layers(model):
            A, B = (part["first"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
            exact.append(values_of_8bit(layer.base_layer) + 1.5 * B @ A)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain = fused_lora.unload(model, merge_adapters=True, dtype=dtype)
        for layer, right in zip((plain.up, plain.down), exact, strict=True):
            assert type(layer) is nn.Linear and layer.weight.dtype is dtype
            size = right.abs().max().item()
            assert (layer.weight.double() - right).abs().max().item() <= ulp(size, dtype) / 2 + 16 * ulp(size, F32)
            assert not vars(layer).keys() - vars(nn.Linear(1, 1)).keys() and not layer._load_state_dict_pre_hooks
        assert plain.state_dict().keys() == {"up.weight", "up.bias", "down.weight"}
        assert plain(torch.randn(M, K).to(dtype)).dtype is dtype


def test_files(tmp_path):
    _, model, _ = pair()
    fused_lora.save_adapter(model, tmp_path, "first")
    fresh = Net()
    for layer, other in zip((fresh.up, fresh.down), layers(model), strict=True):
        layer.weight, layer.bias = copy.deepcopy(other.base_layer.weight), other.base_layer.bias
    fused_lora.load_adapter(fresh, tmp_path, "first")
    x = torch.randn(M, K)
    with torch.no_grad():
        assert torch.equal(fresh(x), model.eval()(x))


def no_scales(layer):
    layer.weight.SCB = None


def nan_scales(layer):
    layer.weight.SCB[0] = float("nan")


REFUSED = {
    "the weight is stored in torch.float32, expected torch.int8": lambda layer: setattr(
        layer, "weight", bnb.nn.Int8Params(torch.randn(N, K), has_fp16_weights=True)
    ),
    "a weight is a Parameter": lambda layer: layer._parameters.update(weight=nn.Parameter(torch.randn(N, K))),
    "the weight has shape": lambda layer: setattr(layer.weight, "data", layer.weight.data[:-1]),
    "weight.SCB and state.SCB are missing": no_scales,
    "SCB has scales that are NaN or infinite": nan_scales,
    "SCB has shape": lambda layer: setattr(layer.weight, "SCB", layer.weight.SCB[:-1]),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_inject_names_layer_and_field_and_changes_nothing(reason):
    model = Net()
    REFUSED[reason](model.up)
    with pytest.raises(ValueError, match=rf"'up', a bitsandbytes.*Linear8bitLt.*{reason}"):
        fused_lora.inject(model, LoraConfig(target_modules=["up", "down"]))
    assert type(model.up) is type(model.down) is bnb.nn.Linear8bitLt


def test_a_merge_that_would_not_be_finite_changes_nothing():
    """fp16 is what the library quantises: more than it holds is no merge."""
    _, model, _ = pair()
    for value in (float("inf"), 1e7):
        model.down.lora_B["first"].weight.data.fill_(value)
        before = [contents(layer.base_layer) for layer in layers(model)]
        with pytest.raises(ValueError, match="down: the weight would hold NaN or infinity in torch.float16"):
            fused_lora.merge(model)
        assert all(same(contents(m.base_layer), held) for m, held in zip(layers(model), before, strict=True))
        assert not any(layer.merged for layer in layers(model))


def test_a_weight_that_was_replaced_while_merged():
    _, model, _ = pair()
    fused_lora.merge(model)
    model.up.base_layer.weight = linear8bit(N, K).weight
    with pytest.raises(RuntimeError, match="up: weight: it was replaced or moved while merged"):
        fused_lora.unmerge(model)
    assert base_of(model.up.base_layer).bits == 8 and model.up.merged
