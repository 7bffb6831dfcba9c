"""Every kind of quantised base that merges or trains: orders of calls, and merges taken back two hundred times."""

import copy

import pytest
import torch

import fused_lora
from fused_lora.bases import base_of
from fused_lora.bases.base import Factors
from fused_lora.bases.torchao import parts
from helpers.over_quantised import same
from helpers.quantised import linear4bit, linear8bit, torchao_linear
from helpers.thorough import sampled

pytest.importorskip("bitsandbytes")
ao = pytest.importorskip("torchao.quantization")
granularity = pytest.importorskip("torchao.quantization.granularity")

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")]

F32, BF16 = torch.float32, torch.bfloat16
N, K = 64, 64


def fp8_linear():
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = fp8.FP8Linear(K, N, (32, 16), has_bias=True)
    layer.weight.data = torch.randn(N, K).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data, layer.bias.data = torch.rand(N // 32, K // 16) / 8, torch.randn(N)
    return layer


def of_torchao(config, **settings):
    return lambda: torchao_linear(N, K, getattr(ao, config)(**settings))


GROUPS = granularity.PerGroup(32)
MERGED = {
    "nf4, nested": lambda: linear4bit(N, K),
    "fp4": lambda: linear4bit(N, K, quant_type="fp4", nested=False),
    "nf4, stored in bf16": lambda: linear4bit(N, K, storage=BF16),
    "int8": lambda: linear8bit(N, K),
    "torchao int8": of_torchao("Int8WeightOnlyConfig"),
    "torchao int8, groups": of_torchao("Int8WeightOnlyConfig", granularity=GROUPS),
    "torchao float8": of_torchao("Float8WeightOnlyConfig"),
    "torchao e5m2": of_torchao("Float8WeightOnlyConfig", weight_dtype=torch.float8_e5m2, granularity=GROUPS),
}
INT4 = {"torchao int4": of_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=GROUPS)}


def lora_layer(make):
    """Adapters and bias that bf16 holds exactly."""
    layer = fused_lora.LoraLinear(make(), r=4, lora_alpha=8, init_lora_weights=False)
    for number in (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.bias):
        number.data.copy_(number.bfloat16().float())
    return layer


def everything(base):
    """All numbers that a base layer computes with, as bytes."""
    state = getattr(base.weight, "quant_state", None)
    found = [*parts(base.weight.data).values(), getattr(base.weight, "SCB", None)]
    found += [getattr(base, "weight_scale_inv", None), base.bias, getattr(getattr(base, "state", None), "SCB", None)]
    if state is not None:
        found += [state.absmax, state.code, *([state.state2.absmax, state.offset] if state.nested else [])]
    return [t.detach().contiguous().view(-1).view(torch.uint8).clone() for t in found if t is not None]


@pytest.mark.parametrize("kind", [*MERGED, "fp8 blocks"])
def test_two_hundred_merges_and_unmerges_change_no_byte(kind):
    layer = lora_layer({**MERGED, "fp8 blocks": fp8_linear}[kind])
    before, merged = everything(layer.base_layer), None
    for _ in range(200):
        layer.merge()
        after = everything(layer.base_layer)
        assert not same(after, before) and (merged is None or same(after, merged))
        merged = after
        layer.unmerge()
        assert same(everything(layer.base_layer), before)


def reload(layer):
    """The adapters into a copy: bitsandbytes' own modules do not take back what their state_dict gives."""
    other = copy.deepcopy(layer)
    other.load_state_dict({k: t for k, t in layer.state_dict().items() if "base_layer" not in k}, strict=False)
    return other


STEPS = {
    "evaluate": lambda layer, x: layer.eval()(x),
    "train": lambda layer, x: layer.merged or layer.train()(x.clone().requires_grad_()).sum().backward(),
    "merge": lambda layer, x: layer.merged or layer.merge(),
    "unmerge": lambda layer, x: layer.unmerge() if layer.merged else None,
    "cast": lambda layer, x: layer.to(BF16).to(F32),
    "copy": lambda layer, x: copy.deepcopy(layer),
    "save": lambda layer, x: layer.state_dict(),
    "reload": lambda layer, x: reload(layer),
}

# torch casts packed bf16 as numbers, after which the library's own call raises
WITHOUT = {"torchao int4": ("merge", "unmerge"), "nf4, stored in bf16": ("cast",)}
ORDERS = [(kind, step) for kind in [*MERGED, *INT4] for step in STEPS if step not in WITHOUT.get(kind, ())]


@pytest.mark.slow
@pytest.mark.parametrize("kind, first", sampled(ORDERS, 15))
def test_any_order_of_four_calls(kind, first):
    """After each call of each order the layer computes W x + D x, or what its merge gives."""
    start, x = lora_layer({**MERGED, **INT4}[kind]), torch.randn(5, K)
    steps = [step for step in STEPS if step not in WITHOUT.get(kind, ())]
    D, merged = start.get_delta_weight("default").detach(), copy.deepcopy(start)
    if "merge" in steps:
        merged.merge()
    right = {False: values(start) + D, True: values(merged)}
    right = {state: x @ W.t() + start.base_layer.bias for state, W in right.items()}

    def walk(layer, path):
        found = copy.deepcopy(layer)
        with torch.set_grad_enabled(path[-1] == "train"):
            other = STEPS[path[-1]](found, x)
        found = other if path[-1] in ("copy", "reload") else found
        y, wanted = copy.deepcopy(found).train()(x).detach(), right[found.merged]
        # scales and x in bf16 once a 4-bit weight is repacked or cast, and a second quantisation of such scales
        assert (y - wanted).norm() < (0.05 if found.merged else 0.02) * wanted.norm(), path
        for step in steps if len(path) < 4 else ():
            walk(found, (*path, step))

    walk(start, (first,))


def values(layer):
    return base_of(layer.base_layer).dense_weight(layer.base_layer, Factors([], [], []), F32)
