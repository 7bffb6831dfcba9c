"""verify over 4-bit layers of bitsandbytes: requantisation has its own bound, bugs their names, and nothing changes."""

import copy
import random

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoraConfig, verify
from fused_lora.bases.bitsandbytes_4bit import is_repacked
from fused_lora.diagnostics.verification import report
from helpers.over_quantised import KINDS, assert_lost, assert_requantised, finds, lora_layers, same, with_adapters
from helpers.quantised import linear4bit, repack, values_of

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings("ignore:Merge lora module", "ignore:merge. 4-bit weights"),
]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
K, H, N, M = 128, 256, 192, 7
TARGETS = ["up", "down", "head"]


class Net(nn.Module):
    """Two 4-bit layers that take adapters, one that does not, and a dense head that does."""

    is_loaded_in_4bit = True

    def __init__(self, **settings):
        super().__init__()
        dtype = settings.get("compute_dtype") or F32
        self.up, self.down = linear4bit(H, K, **settings), linear4bit(N, H, bias=False, **settings)
        self.rest, self.head = linear4bit(K, N, **settings | {"blocksize": 64}), nn.Linear(K, 8).to(dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.rest(torch.tanh(self.down(torch.tanh(self.up(x)))))))


def make(kind, names=("default",), **settings):
    return with_adapters(Net(**settings), kind, names, target_modules=TARGETS)


def contents(model):
    """Objects and bytes of all weights, what the quantised ones know of themselves, and the modules' attributes."""
    found = []
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found += [path, name, id(parameter), parameter.dtype, parameter.data.clone()]
                state = getattr(parameter, "quant_state", None)
                found += [] if state is None else [path, state.dtype, state.nested, state.absmax.clone()]
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, str, torch.dtype, type(None)))}
        found += [path, plain, list(getattr(module, "merged_adapters", ()))]
    return found


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_model_differs_by_requantisation(kind, merged):
    """And the check leaves everything as it was, on CPUs that repack in a call, too."""
    assert_requantised(make(kind), kind, merged, contents, torch.randn(M, K), 4, "nf4")


def test_no_false_alarm_over_random_layers():
    """Settings, dtypes and sizes of adapters at random: the bound of requantisation holds."""
    for _ in range(40):
        dtype, compute = random.choice([(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)])
        settings = {
            "dtype": dtype,
            "compute_dtype": compute,
            "quant_type": random.choice(["nf4", "fp4"]),
            "nested": random.random() < 0.7,
            "blocksize": random.choice([64, 128]),
            "storage": random.choice([torch.uint8, BF16]),
        }
        names = random.choice([("one",), ("one", "two")])
        model = make(random.choice(["fused_lora", "accelerated"]), names, **settings)
        for layer in lora_layers(model).values():
            for name in names:
                layer.lora_B[name].weight.data.mul_(10 ** random.uniform(-1, 1))
        if random.random() < 0.5:
            fused_lora.merge(model)
        if random.random() < 0.5:  # no layer repacks, as on CPUs without bf16
            for module in model.modules():
                if type(module) is bnb.nn.Linear4bit:
                    module.support_avx512bf16_for_cpu = False
        result = verify(model, torch.randn(M, K).to(compute))
        assert not result.findings or [f.cause for f in result.findings] == [report.LOST], (settings, str(result))
        assert all(check.ok for check in result.layers) and not result.skipped, (settings, str(result))


def test_a_layer_that_was_repacked_before():
    model = make("fused_lora")
    repack(model.up.base_layer)
    before = contents(model)
    result = verify(model, torch.randn(M, K))
    assert result.ok and same(contents(model), before) and is_repacked(model.up.base_layer), str(result)


def test_an_adapter_that_four_bits_lose():
    assert_lost(make("fused_lora"), torch.randn(M, K), "nf4")


def test_an_adapter_trained_while_merged_is_stale():
    """Also where the change is far smaller than the distance between two codes."""
    model = make("fused_lora")
    fused_lora.merge(model)
    model.up.lora_B["default"].weight.data.mul_(1.02)
    finds(report.STALE, ("up",), model, torch.randn(M, K))


@pytest.mark.parametrize("kind", ["fused_lora", "accelerated"])
def test_a_merged_weight_that_was_replaced(kind):
    model = make(kind)
    fused_lora.merge(model)
    path, layer = next(iter(lora_layers(model).items()))
    layer.base_layer.weight = linear4bit(H, K).weight
    before = contents(model)
    finds(report.BASE, (path,), model, torch.randn(M, K))
    assert same(contents(model), before)


def test_a_merge_that_quantises_wrongly(monkeypatch):
    """One code off in one element of a thousand; or scales that are 1 % too large."""
    from bitsandbytes import functional

    real = functional.quantize_4bit
    for spoil in ("codes", "scales"):

        def quantise(*args, spoil=spoil, **kwargs):
            data, state = real(*args, **kwargs)
            if spoil == "codes":
                data.view(-1)[::500] ^= 16
            else:
                state.absmax = state.absmax * 1.01
            return data, state

        model = make("fused_lora", nested=False)
        monkeypatch.setattr(functional, "quantize_4bit", quantise)
        finds(report.MERGE, ("up", "down"), model, torch.randn(M, K))
        monkeypatch.undo()


def test_an_adapter_on_top_of_its_own_merge():
    """W of the layer is W + D of before, quantised."""
    model = make("fused_lora")
    merged = copy.deepcopy(model)
    fused_lora.merge(merged)
    for path, layer in lora_layers(model).items():
        layer.base_layer.weight = lora_layers(merged)[path].base_layer.weight
    result = verify(model, torch.randn(M, K))
    assert report.DOUBLE in [f.cause for f in result.findings], str(result)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("merged", [False, True])
def test_a_dense_reference(merged, nested):
    """The weights of 16 bits that were quantised: with the adapter in them, too, as some serve it."""
    model = Net(nested=nested)
    original = {}
    for name in ("up", "down"):
        layer = getattr(model, name)
        original[f"{name}.weight"] = (torch.randn(*layer.weight.quant_state.shape) * 0.1).bfloat16()
        settings = {"compress_statistics": nested, "quant_type": "nf4"}
        layer.weight = bnb.nn.Params4bit(original[f"{name}.weight"].clone(), **settings).to("cpu")
    fused_lora.inject(model, LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False))
    if merged:
        for name in ("up", "down"):
            delta = getattr(model, name).get_delta_weight("default")
            original[f"{name}.weight"] = original[f"{name}.weight"].float() + delta
    x = torch.randn(M, K)
    result = finds(report.QUANTISED, ("up", "down"), model.eval(), x, reference=original)
    assert "nf4 in blocks of 64" in result.findings[0].message and result.reference_merged == merged
    exact = {f"{name}.weight": values_of(getattr(model, name).base_layer) for name in ("up", "down")}
    result = verify(model, x, reference=exact)
    assert result.ok and not result.findings, str(result)
    for name in ("up", "down"):  # a call on a CPU rounds the scales to bf16
        repack(getattr(model, name).base_layer)
    finds(report.QUANTISED, ("up", "down"), model, x, reference=original)
    finds(report.BASE, ("up",), model, x, reference={"up.weight": torch.randn(H, K)})


def test_a_quantised_reference():
    """The same one, one with other settings, and one of other weights."""
    model = make("fused_lora")
    repack(model.down.base_layer)
    reference, x = copy.deepcopy(model), torch.randn(M, K)
    before = contents(reference)
    result = verify(model, x, reference=reference)
    assert result.ok and not result.findings and result.reference is not None, str(result)
    assert same(contents(reference), before)
    for quant_type, cause in (("fp4", report.QUANTISED), ("nf4", report.BASE)):
        reference.up.base_layer.weight = linear4bit(H, K, quant_type=quant_type).weight
        finds(cause, ("up",), model, x, reference=reference)
    assert "nf4 in blocks of 64, double quantised here, fp4 in" in str(
        verify(model, x, reference=_with_weight(reference, quant_type="fp4"))
    )


def _with_weight(model, **settings):
    model.up.base_layer.weight = linear4bit(H, K, **settings).weight
    return model


REASONS = {
    "weight.quant_state is missing": lambda base: setattr(base.weight, "quant_state", None),
    "weight.quant_state.absmax has scales that are NaN": lambda base: base.weight.quant_state.state2.absmax.fill_(
        float("nan")
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_weights_of_an_unknown_kind_are_listed(reason):
    model = make("fused_lora")
    model.forward = lambda x: model.head(x)  # a call of the layer would raise
    REASONS[reason](model.up.base_layer)
    result = verify(model, torch.randn(M, K))
    assert result.skipped["up"].startswith(reason) and not result.ok


def test_several_adapters_of_pefts_own_class():
    """Which quantises again after each."""
    result = verify(make("peft", ("one", "two")), torch.randn(M, K))
    assert len(result.skipped) == 2 and all("PEFT quantises again" in why for why in result.skipped.values())
