"""Layers with a packed ``qweight``, as those of GPTQ and AWQ: around their own call; merges are refused by name.

Stand-ins have the attributes of its classes, and stand where PEFT looks for them. ``test_gptqmodel.py`` has those.
"""

import copy
import enum
import pickle
import sys
import types

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoraConfig
from fused_lora.integrations.peft import layer_report
from fused_lora.testing.numeric import DRAWS, assert_close
from helpers.over_quantised import (
    assert_chosen_alike,
    assert_merges_refused,
    assert_no_worse_than_peft,
    layers,
    results,
    three_models,
)

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore:Merge lora module")]

N, K, M = 24, 32, 9


class Method(enum.Enum):
    GPTQ = "gptq"
    AWQ = "awq"


class BaseQuantLinear(nn.Module):
    """4-bit integers, eight to an int32 along K, with a scale for each group of 16 and each output; zeros are 8."""

    SUPPORTS_METHODS = [Method.GPTQ]
    bits, group_size = 4, 16

    def __init__(self, in_features, out_features, bias=True, dtype=torch.float32):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        numbers = torch.randint(-(2**31), 2**31 - 1, (in_features // 8, out_features)).int()
        self.register_buffer("qweight", numbers)
        self.register_buffer("scales", torch.rand(in_features // 16, out_features).to(dtype) / 8)
        self.register_buffer("bias", torch.randn(out_features).to(dtype) if bias else None)

    def dense(self):
        shifts = torch.arange(0, 32, 4)
        codes = (self.qweight[:, None] >> shifts[:, None] & 15).view(self.in_features, self.out_features)
        return ((codes - 8) * self.scales.repeat_interleave(16, 0)).t()

    def forward(self, x):
        return nn.functional.linear(x, self.dense().to(x.dtype), self.bias)


class TorchQuantLinear(BaseQuantLinear):
    @property
    def weight(self):
        """No tensor but what gptqmodel's tells of one."""
        shape = self.out_features, self.in_features
        return types.SimpleNamespace(device=self.scales.device, dtype=torch.float16, shape=shape)


class AwqTorchQuantLinear(BaseQuantLinear):
    SUPPORTS_METHODS = [Method.AWQ]


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """PEFT finds the stand-ins' base class where it looks for gptqmodel's."""
    for name in ("gptqmodel", "gptqmodel.nn_modules", "gptqmodel.nn_modules.qlinear"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["gptqmodel.nn_modules.qlinear"].BaseQuantLinear = BaseQuantLinear
    for module in ("peft.tuners.lora.gptq", "peft.tuners.lora.awq", "peft.utils.other"):
        monkeypatch.setattr(sys.modules[module], "is_gptqmodel_available", lambda: True)


class Net(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        self.up, self.down = kind(K, N, **settings), nn.Linear(N, 8)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


KINDS = {TorchQuantLinear: "GPTQLoraLinear", AwqTorchQuantLinear: "AwqLoraLinear"}


def pair(kind, **settings):
    models = three_models(Net(kind, **settings), target_modules=["up"])
    assert type(layer_of(models[-1])).__name__ == KINDS[kind]
    return models


def layer_of(model):
    return layers(model)[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_its_own_call_and_the_terms(kind, dtype, training):
    draws = []
    for _ in range(DRAWS):
        models, x, g = pair(kind, dtype=dtype), torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        base = layer_of(models[-1]).base_layer
        for model in models:
            model.train(training)
        draws.append(results(models, x, g, ["default"], base(x).double(), base.dense().to(dtype)))
    assert_no_worse_than_peft(draws)


@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_how_is_said(kind):
    ours, injected, theirs = pair(kind)
    why = f"fused around the base: the base layer is a {kind.__name__}, its weight is packed"
    assert str(layer_report(ours)[0]) == str(layer_report(injected)[0]) == why
    assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs)
    layer = layer_of(ours)
    assert type(pickle.loads(pickle.dumps(layer))) is type(copy.deepcopy(layer)) is type(layer)
    fused_lora.restore(ours)
    assert type(layer_of(ours)) is type(layer_of(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_and_disabled_ones(kind):
    ours, _, theirs = pair(kind)
    x = torch.randn(M, K)
    for model in (ours, theirs):
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up"]))
    assert_chosen_alike(ours, theirs, x, terms=K + N)


@pytest.mark.parametrize("kind", KINDS)
def test_merges_are_refused_by_name_and_change_nothing(kind):
    ours, injected, theirs = pair(kind)
    x = torch.randn(M, K)
    with pytest.raises(NotImplementedError):
        theirs.merge_adapter()
    assert_merges_refused(ours, injected, x, f"up: a {kind.__name__} with a Tensor of torch.int32 cannot be dequant")


def test_files_and_the_store(tmp_path):
    """An adapter that was trained over a packed layer, loaded again and served."""
    _, model, _ = pair(TorchQuantLinear)
    x, base = torch.randn(3, M, K), copy.deepcopy(model)
    plain = fused_lora.unload(base).eval()
    fused_lora.save_adapter(model, tmp_path)
    again = copy.deepcopy(plain)
    fused_lora.load_adapter(again, tmp_path)
    with torch.no_grad():
        wanted = model.eval()(x)
        assert torch.equal(again(x), wanted)
        store = fused_lora.AdapterStore(plain, capacity_bytes=1 << 20)
        store.load("packed", tmp_path)
        with store.batch(["packed", None, "packed"]):
            served = plain(x)
        assert_close(served[0], wanted[0], terms=K + N)
        assert_close(served[1], plain(x[1:2])[0], terms=K + N)


def test_a_packed_layer_without_sizes_is_refused_by_name():
    model = Net(TorchQuantLinear)
    del model.up.in_features
    with pytest.raises(ValueError, match="'up', .*TorchQuantLinear.*it has no in_features or out_features"):
        fused_lora.inject(model, LoraConfig(target_modules=["up"]))
