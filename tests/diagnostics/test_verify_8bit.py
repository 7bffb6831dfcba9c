"""verify over int8 layers of bitsandbytes and tensors of torchao: bounds that hold, bugs by their names."""

import copy
import functools
import random

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoraConfig, verify
from fused_lora.bases.torchao import parts
from fused_lora.diagnostics.verification import report
from helpers.over_quantised import KINDS, assert_lost, assert_requantised, finds, lora_layers, same, with_adapters
from helpers.quantised import linear8bit, torchao_linear

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:TorchaoLoraLinear was instantiated"),
]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
K, H, N, M = 128, 96, 64, 7
LIBRARIES = {"int8": "bitsandbytes", "outliers": "bitsandbytes", "ao int8": "torchao", "ao groups": "torchao"}
LIBRARIES |= {"ao float8": "torchao", "ao e5m2": "torchao"}
NAMES = {"ao float8": "float8_e4m3fn", "ao e5m2": "float8_e5m2"}
TARGETS = ["up", "down", "head"]


def settings_of(base):
    import torchao.quantization as ao
    from torchao.quantization.granularity import PerGroup

    return {
        "ao int8": lambda: ao.Int8WeightOnlyConfig(),
        "ao groups": lambda: ao.Int8WeightOnlyConfig(granularity=PerGroup(32)),
        "ao float8": lambda: ao.Float8WeightOnlyConfig(),
        "ao e5m2": lambda: ao.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
        "ao tensor": lambda: ao.Float8WeightOnlyConfig(granularity=ao.PerTensor()),
        "ao dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
    }[base]()


@functools.cache
def int8_products_are_exact():
    """oneDNN saturates sums of 16 bits on processors without VNNI: the base layer is then another than x W^T."""
    x, W = (torch.full(shape, 127, dtype=torch.int8) for shape in ((M, K), (K, N)))
    return bool((torch._int_mm(x, W) == K * 127**2).all())


def quantised(base, N, K, **settings):
    if LIBRARIES.get(base) == "bitsandbytes":
        if not int8_products_are_exact():
            pytest.skip("int8 products are not exact on this processor")
        return linear8bit(N, K, threshold=2.5 if base == "outliers" else 0.0, **settings)
    return torchao_linear(N, K, settings_of(base), **settings)


class Configuration:
    """Where PEFT looks for torchao's: ``model.hf_quantizer.quantization_config.get_apply_tensor_subclass``."""

    def __init__(self, base):
        self.base, self.quantization_config = base, self

    def get_apply_tensor_subclass(self):
        return settings_of(self.base)


class Net(nn.Module):
    """Two quantised layers with adapters, one without, and a dense head with one."""

    def __init__(self, base="int8", dtype=F32):
        super().__init__()
        self.is_loaded_in_8bit = LIBRARIES.get(base) == "bitsandbytes"  # where PEFT looks for that of bitsandbytes
        self.hf_quantizer = Configuration(base)
        self.up, self.down = quantised(base, H, K, dtype=dtype), quantised(base, N, H, bias=False, dtype=dtype)
        self.rest, self.head = quantised(base, K, N, dtype=dtype), nn.Linear(K, 8).to(dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.rest(torch.tanh(self.down(torch.tanh(self.up(x)))))))


def make(kind="fused_lora", base="int8", names=("default",), dtype=F32):
    pytest.importorskip(LIBRARIES.get(base, "torchao"))
    return with_adapters(Net(base, dtype), kind, names, target_modules=TARGETS)


def contents(model):
    """Objects and numbers of all weights, and the scales of int8 layers, wherever they are."""
    found = []
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found += [(path, name, id(parameter)), *(part.clone() for part in parts(parameter.detach()).values())]
        state = getattr(module, "state", None)
        if state is not None:
            scales = [getattr(module.weight, "SCB", None), state.SCB, state.CB]
            found += [id(state), *(None if t is None else t.clone() for t in scales)]
        found.append(list(getattr(module, "merged_adapters", ())))
    return found


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", LIBRARIES)
def test_a_healthy_model_differs_by_requantisation(base, kind, merged):
    """And the check leaves everything as it was."""
    name = NAMES.get(base, "int8")
    assert_requantised(make(kind, base), kind, merged, contents, torch.randn(M, K), 8, name)


def test_no_false_alarm_over_random_layers():
    """Settings, dtypes and sizes of adapters at random: the bounds hold."""
    for _ in range(30):
        base, dtype = random.choice([*LIBRARIES]), random.choice([F32, BF16, F16])
        names = random.choice([("one",), ("one", "two")])
        model = make(random.choice(["fused_lora", "accelerated"]), base, names, dtype)
        for layer in lora_layers(model).values():
            for name in names:
                layer.lora_B[name].weight.data.mul_(10 ** random.uniform(-1, 1))
        if random.random() < 0.5:
            fused_lora.merge(model)
        x = torch.randn(M, K) * 10 ** random.uniform(-2, 1)
        result = verify(model, x.to(dtype))
        assert not result.findings or [f.cause for f in result.findings] == [report.LOST], (base, dtype, str(result))
        assert all(check.ok for check in result.layers) and not result.skipped, (base, dtype, str(result))


@pytest.mark.parametrize("base", LIBRARIES)
def test_an_adapter_that_eight_bits_lose(base):
    assert_lost(make(base=base), torch.randn(M, K), NAMES.get(base, "int8"))


@pytest.mark.parametrize("base", LIBRARIES)
def test_a_changed_adapter_and_a_replaced_weight(base):
    """Each in a merged layer."""
    model = make(base=base)
    fused_lora.merge(model)
    model.up.lora_B["default"].weight.data.mul_(1.2)
    model.down.base_layer.weight = quantised(base, N, H).weight
    result = verify(model, torch.randn(M, K))
    assert {(f.cause, f.layers) for f in result.findings} == {(report.STALE, ("up",)), (report.BASE, ("down",))}


def test_a_merge_with_one_wrong_code_in_a_thousand(monkeypatch):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional

    real = functional.int8_vectorwise_quant

    def quantise(*args, **kwargs):
        data, scales, outliers = real(*args, **kwargs)
        data.view(-1)[::1000] += 1 - 2 * (data.view(-1)[::1000] > 0).to(torch.int8)
        return data, scales, outliers

    model, x = make(), torch.randn(M, K)
    monkeypatch.setattr(functional, "int8_vectorwise_quant", quantise)
    merged = copy.deepcopy(model)
    fused_lora.merge(merged)
    monkeypatch.undo()
    finds(report.STALE, ("up", "down"), merged, x)


def test_an_int8_product_that_is_wrong():
    """By 4 % of its largest result, in one layer: twice what the rounding of the input explains."""
    model = make()
    model.up.base_layer.register_forward_hook(lambda module, args, y: y + 0.04 * y.abs().max())
    result = verify(model, torch.randn(M, K))
    assert report.FORWARD in [f.cause for f in result.findings], str(result)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("base", ["int8", "ao int8", "ao float8"])
def test_a_dense_reference(base, merged):
    """The weights that were quantised: with the adapter in them, too, as some serve it."""
    pytest.importorskip(LIBRARIES[base])
    original = {f"{name}.weight": torch.randn(*shape) * 0.1 for name, shape in (("up", (H, K)), ("down", (N, H)))}
    model = Net(base)
    for name in ("up", "down"):
        dense = nn.Linear(*reversed(original[f"{name}.weight"].shape))
        dense.weight.data = original[f"{name}.weight"].clone()
        setattr(model, name, requantised(base, dense))
    fused_lora.inject(model, LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False))
    if merged:
        for name in ("up", "down"):
            original[f"{name}.weight"] += getattr(model, name).get_delta_weight("default").detach()
    x = torch.randn(M, K)
    result = finds(report.QUANTISED, ("up", "down"), model.eval(), x, reference=original)
    assert f"{NAMES.get(base, 'int8')} in blocks of" in result.findings[0].message
    assert result.reference_merged == merged
    finds(report.BASE, ("up",), model, x, reference={"up.weight": torch.randn(H, K)})


def requantised(base, dense):
    if base == "int8":
        import bitsandbytes as bnb

        layer = bnb.nn.Linear8bitLt(dense.in_features, dense.out_features, has_fp16_weights=False)
        layer.load_state_dict(dense.state_dict())
        return layer.to("cpu")
    from torchao.quantization import quantize_

    quantize_(dense, settings_of(base))
    return dense


def test_a_quantised_reference():
    """The same one, and one of other weights."""
    model = make()
    reference, x = copy.deepcopy(model), torch.randn(M, K)
    before = contents(reference)
    result = verify(model, x, reference=reference)
    assert result.ok and not result.findings and result.reference is not None, str(result)
    assert same(contents(reference), before)
    reference.up.base_layer.weight = linear8bit(H, K).weight
    finds(report.BASE, ("up",), model, x, reference=reference)


@pytest.mark.parametrize("base", ["ao tensor", "ao dynamic"])
def test_layers_without_a_bound_are_listed(base):
    result = verify(make(base=base), torch.randn(M, K))
    assert result.skipped == dict.fromkeys(("up", "down"), "no bound is known for its arithmetic") and not result.ok


def test_several_adapters_of_pefts_own_class():
    """Which quantises again after each."""
    result = verify(make("peft", names=("one", "two")), torch.randn(M, K))
    assert len(result.skipped) == 2 and all("PEFT quantises again" in why for why in result.skipped.values())
