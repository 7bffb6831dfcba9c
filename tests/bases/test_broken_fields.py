"""Quantised layers whose fields are missing, on the meta device or of another kind: a refusal by name, nothing done."""

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoraConfig
from helpers.quantised import linear4bit, linear8bit, torchao_linear

N, K = 32, 64


def int8_of_torchao():
    return torchao_linear(N, K, pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


def fp8_of_transformers():
    kinds = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = kinds.FP8Linear(K, N, (16, 16))
    layer.weight.data = torch.randn(N, K).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand(layer.weight_scale_inv.shape)
    return layer.requires_grad_(False)


def nf4():
    pytest.importorskip("bitsandbytes")
    return linear4bit(N, K, nested=False)


def nested_nf4():
    pytest.importorskip("bitsandbytes")
    return linear4bit(N, K)


def int8():
    pytest.importorskip("bitsandbytes")
    return linear8bit(N, K)


def other(value):
    """Some other things that may stand where a tensor is expected."""
    return {
        "missing": None,
        "text": "x",
        "on meta": value.to("meta"),
        "short": value.reshape(-1)[:1],
        "of another dtype": value.to(torch.bool),
    }


KINDS = {  # what is read by address, and where it is
    "weight.scale": (int8_of_torchao, lambda layer: (layer.weight, "scale")),
    "weight.zero_point": (int8_of_torchao, lambda layer: (layer.weight, "zero_point")),
    "weight.quant_state.absmax": (nf4, lambda layer: (layer.weight.quant_state, "absmax")),
    "weight.quant_state.code": (nf4, lambda layer: (layer.weight.quant_state, "code")),
    "weight.quant_state.state2.absmax": (nested_nf4, lambda layer: (layer.weight.quant_state.state2, "absmax")),
    "weight.quant_state.offset": (nested_nf4, lambda layer: (layer.weight.quant_state, "offset")),
    "SCB": (int8, lambda layer: (layer.weight, "SCB")),
    "weight_scale_inv": (fp8_of_transformers, lambda layer: (layer._parameters, "weight_scale_inv")),
}
CASES = [(name, how) for name in KINDS for how in other(torch.ones(2))]
CASES.remove(("weight.zero_point", "missing"))  # None stands for zeros
CASES.remove(("weight.quant_state.offset", "short"))  # they are one number
CASES.remove(("weight.quant_state.state2.absmax", "short"))
CASES.remove(("weight_scale_inv", "text"))  # torch takes no such parameter


def put(owner, name, how):
    if isinstance(owner, dict):
        broken = other(owner[name].data)[how]
        owner[name] = None if broken is None else nn.Parameter(broken, requires_grad=False)
    else:
        setattr(owner, name, other(getattr(owner, name))[how])


@pytest.mark.parametrize(("field", "how"), CASES)
def test_a_broken_field_is_refused_by_name(field, how):
    """Before adapters and after; short fields would be read beyond their ends."""
    make, place = KINDS[field]
    base = make()
    put(*place(base), how)
    if base.__class__.__name__ == "Linear8bitLt":
        base.state.SCB = None
    model, config = nn.Sequential(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    with pytest.raises(ValueError, match=rf"'?0'?.*{field}"):
        fused_lora.inject(model, config)
    assert model[0] is base and not hasattr(model, "peft_config")
    model = nn.Sequential(make())
    fused_lora.inject(model, config)
    layer = model[0]
    put(*place(layer.base_layer), how)
    weight = layer.base_layer._parameters["weight"]
    for call in (fused_lora.merge, lambda m: fused_lora.unload(m, merge_adapters=True, dtype=torch.float32)):
        with pytest.raises((RuntimeError, ValueError), match=field):
            call(model)
        assert model[0] is layer and not layer.merged_adapters and layer.base_layer._parameters["weight"] is weight


@pytest.mark.parametrize("block", ["16", 16, (0, 0), (16, 16, 16), (16.0, 16.0), (-16, 16)], ids=str)
def test_a_block_size_that_is_none(block):
    base = fp8_of_transformers()
    base.block_size = block
    with pytest.raises(ValueError, match="block_size is"):
        fused_lora.inject(nn.Sequential(base), LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("name", ["qdata", "scale", "zero_point", "block_size", "act_quant_kwargs"])
def test_a_tensor_of_torchao_that_lacks_a_field(name):
    base = int8_of_torchao()
    delattr(base.weight, name)
    with pytest.raises(ValueError, match=f"weight.{name} is missing"):
        fused_lora.inject(nn.Sequential(base), LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("block", ["x", (1, "a"), (1, -64), (1, 7), (1, 0), (3, 64)], ids=str)
def test_blocks_of_torchao_that_are_none(block):
    base = int8_of_torchao()
    base.weight.block_size = block
    with pytest.raises(ValueError, match="weight.block_size is"):
        fused_lora.inject(nn.Sequential(base), LoraConfig(r=2, target_modules=["0"]))
