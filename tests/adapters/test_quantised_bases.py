"""A file of ours says how the base was quantised; loading it over another base warns of what differs."""

import copy
import json
import struct
import warnings

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import AdapterError, LoraConfig
from helpers.quantised import linear4bit, linear8bit, torchao_linear

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
N, K = 32, 64


def int8_of_torchao(dtype=torch.float32):
    ao = pytest.importorskip("torchao.quantization")
    return torchao_linear(N, K, ao.Int8WeightOnlyConfig(), dtype=dtype)


def fp8(block_size):
    kinds = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = kinds.FP8Linear(K, N, block_size)
    layer.weight.data = torch.randn(N, K).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand(layer.weight_scale_inv.shape)
    return layer.requires_grad_(False)


def packed(bits):
    layer = nn.Module()
    layer.in_features, layer.out_features, layer.bits, layer.group_size = K, N, bits, 16
    layer.qweight, layer.bias = torch.zeros(K // 8, N, dtype=torch.int32), None
    return layer


def saved(base, folder):
    model = nn.Sequential(base)
    fused_lora.inject(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    fused_lora.save_adapter(model, folder)
    return model


NF4 = {"compute_dtype": torch.bfloat16}
OTHERS = {
    "nf4 in blocks of 64; here it is fp4 in blocks of 64": (
        lambda: linear4bit(N, K, **NF4),
        lambda: linear4bit(N, K, quant_type="fp4", **NF4),
    ),
    "double quantised, computed in bfloat16; here it is single quantised, computed in float16": (
        lambda: linear4bit(N, K, **NF4),
        lambda: linear4bit(N, K, nested=False, compute_dtype=torch.float16),
    ),
    "nf4 in blocks of 32; here it is nf4 in blocks of 64": (
        lambda: linear4bit(N, K, blocksize=32, **NF4),
        lambda: linear4bit(N, K, **NF4),
    ),
    "nf4 in blocks of 64, double quantised, computed in bfloat16; here it is not quantised": (
        lambda: linear4bit(N, K, **NF4),
        lambda: nn.Linear(K, N),
    ),
    "outliers from 0.0; here it is outliers from 6.0": (
        lambda: linear8bit(N, K),
        lambda: linear8bit(N, K, threshold=6.0),
    ),
    "int8 by rows; here it is nf4 in blocks of 64": (lambda: linear8bit(N, K), lambda: linear4bit(N, K)),
    "computed in bfloat16; here it is computed in float32": (
        lambda: int8_of_torchao(torch.bfloat16),
        lambda: int8_of_torchao(),
    ),
    r"fp8 in blocks of \(16, 16\); here it is fp8 in blocks of \(32, 32\)": (
        lambda: fp8((16, 16)),
        lambda: fp8((32, 32)),
    ),
    "packed, bits 4, group_size 16; here it is packed, bits 8": (lambda: packed(4), lambda: packed(8)),
}


@pytest.mark.parametrize("text", OTHERS)
def test_another_base_is_named(text, tmp_path):
    """By load_adapter and by the store; PEFT takes no notice of it."""
    first, other = OTHERS[text]
    model = saved(first(), tmp_path)
    with pytest.warns(UserWarning, match=f"the adapter was saved over another base, {text}.*in 1 layers: '0'"):
        fused_lora.load_adapter(nn.Sequential(other()), tmp_path)
    store = fused_lora.AdapterStore(nn.Sequential(other()).eval(), capacity_bytes=1 << 20)
    with pytest.warns(UserWarning, match=f"the adapter was saved over another base, {text}"):
        store.load("one", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(K, N)), tmp_path)
    assert torch.equal(again.base_model.model[0].lora_B["default"].weight.cpu(), model[0].lora_B["default"].weight)


@pytest.mark.parametrize("base", [linear4bit, linear8bit, None])
def test_the_same_base_is_none(base, tmp_path):
    """Also where a call has set the compute dtype or moved the scales, and for files that say nothing."""
    layer = int8_of_torchao() if base is None else base(N, K)
    fresh = copy.deepcopy(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            nn.Sequential(layer).eval()(torch.randn(3, K))
        saved(layer, tmp_path / "ours")
        fused_lora.load_adapter(nn.Sequential(fresh), tmp_path / "ours")
        saved(nn.Linear(K, N), tmp_path / "dense")
        fused_lora.load_adapter(nn.Sequential(copy.deepcopy(layer)), tmp_path / "dense")


def test_adapters_over_fp8_keep_their_numbers(tmp_path):
    model = saved(fp8((16, 16)), tmp_path)
    fresh = nn.Sequential(copy.deepcopy(model[0].base_layer))
    fused_lora.load_adapter(fresh, tmp_path)
    for part in ("lora_A", "lora_B"):
        mine, other = (getattr(m[0], part)["default"].weight for m in (fresh, model))
        assert mine.dtype is torch.float32 and torch.equal(mine, other)


def described(folder, text):
    """A file of ours over a dense layer whose description of the base is ``text``."""
    saved(nn.Linear(K, N), folder)
    file = folder / "adapter_model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = {"format": "pt", "fused_lora.quantised_base": text}
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


@pytest.mark.parametrize("text", ["[]", "{", '{"0": 1}', '{"0": {"weight": 2}}', '{"0": {}, "0": {}}', "\ud800"])
def test_what_is_no_description_is_refused(text, tmp_path):
    described(tmp_path, text)
    with pytest.raises(AdapterError) as caught:
        fused_lora.load_adapter(nn.Sequential(nn.Linear(K, N)), tmp_path)
    # half a surrogate pair is no text of the file either
    assert caught.value.key == (None if text == "\ud800" else "fused_lora.quantised_base")


def test_a_description_cannot_write_on_a_terminal(tmp_path):
    described(tmp_path, json.dumps({"0": {"weight": "\x1b[31m\r\n" + "x" * 5000}}))
    with pytest.warns(UserWarning, match="saved over another base") as caught:
        fused_lora.load_adapter(nn.Sequential(nn.Linear(K, N)), tmp_path)
    text = str(caught[0].message)
    assert text.isprintable() and "x1b" in text and len(text) < 1000


@pytest.mark.parametrize("kind", [linear4bit, linear8bit, fp8, int8_of_torchao])
def test_an_adapter_over_a_broken_base_is_saved_without_a_description(kind, tmp_path):
    layer = {linear4bit: lambda: linear4bit(N, K), linear8bit: lambda: linear8bit(N, K), fp8: lambda: fp8((16, 16))}
    model = nn.Sequential(layer.get(kind, kind)())
    fused_lora.inject(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    base = model[0].base_layer
    if kind is linear4bit:
        base.weight.quant_state = None
    elif kind is linear8bit:
        base.state = None
    elif kind is fp8:
        base.weight_scale_inv = None
    else:
        del base.weight.scale
    fused_lora.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_lora.load_adapter(nn.Sequential(nn.Linear(K, N)), tmp_path)
