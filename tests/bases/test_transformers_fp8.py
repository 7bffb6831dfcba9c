"""FP8Linear of transformers as a base: around its own call, merges, dense merges, refusals.

Its kernels need a GPU. Here its product is computed as they do: the input rounded to fp8 with a scale for each row.
"""

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoraConfig
from fused_lora.bases import base_of
from fused_lora.integrations.peft import layer_report
from fused_lora.testing.numeric import DRAWS, assert_close, ulp
from helpers.over_quantised import assert_no_worse_than_peft, layers, results, three_models
from helpers.seeds import shifted

peft = pytest.importorskip("peft")
fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
pytestmark = pytest.mark.numeric

F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
N, K, M = 96, 80, 9
BLOCKS = [(32, 16), (64, 32), None]  # the second ends in parts of blocks
REASON = "an fp8 base layer rounds its input, too"


class Quantizer:
    """What transformers' quantisation of a weight asks."""

    def __init__(self, block_size, scale_fmt):
        self.weight_block_size, self.scale_fmt, self.quantization_config = block_size, scale_fmt, self


def quantise(weight, block_size, scale_fmt="float"):
    """transformers' own quantisation, of whole blocks."""
    found = fp8.Fp8Quantize(Quantizer(block_size, scale_fmt))._quantize_one("weight", weight)
    return found["weight"], found["weight_scale_inv"]


def fp8_linear(N, K, block_size=(32, 16), scale_fmt="float", bias=True):
    layer = fp8.FP8Linear(K, N, block_size, scale_fmt=scale_fmt, has_bias=bias)
    rows, columns = block_size or (N, K)
    padded = torch.zeros(-(-N // rows) * rows, -(-K // columns) * columns)
    padded[:N, :K] = torch.randn(N, K) * K**-0.5
    weight, scales = quantise(padded, block_size, scale_fmt)
    layer.weight.data = weight[:N, :K].contiguous()
    layer.weight_scale_inv.data = scales if block_size else scales.reshape(())
    if bias:
        layer.bias.data = torch.randn(N)
    return layer.requires_grad_(False)


def values_of(layer):
    """[N, K] in fp64 by the definition: code times the scale of its block."""
    return values_of_codes(layer.weight, layer.weight_scale_inv, layer.block_size)


def values_of_codes(weight, scales, block_size):
    rows, columns = block_size or weight.shape
    scales = scales.double().view(-1, -(-weight.shape[1] // columns))
    i, j = (torch.arange(size) // step for size, step in zip(weight.shape, (rows, columns), strict=True))
    return weight.double() * scales[i[:, None], j[None]]


@pytest.fixture(autouse=True)
def product(monkeypatch):
    def on_a_cpu(x, weight, scales, block_size=None, bias=None, activation_scale=None, allow_deepgemm=True):
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / torch.finfo(FP8).max
        rounded = (x.float() / scale).to(FP8).float() * scale
        W = values_of_codes(weight, scales, block_size).float()
        return nn.functional.linear(rounded, W, None if bias is None else bias.float()).to(x.dtype)

    monkeypatch.setattr(fp8, "fp8_linear", on_a_cpu)


class Net(nn.Module):
    def __init__(self, block_size=(32, 16), **settings):
        super().__init__()
        self.up = fp8_linear(N, K, block_size, **settings)
        self.down = fp8_linear(K, N, block_size, bias=False, **settings)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def pair(**settings):
    return three_models(Net(**settings), target_modules=["up", "down"])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_layer_is_its_own_call_and_the_terms(dtype):
    """Against float64 of the terms on the layer's own output, no worse than PEFT."""
    draws = []
    for _ in range(DRAWS):
        models, x, g = pair(), torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        base = layers(models[-1])[0].base_layer
        draws.append(results(models, x, g, ["default"], base(x).double(), values_of(base)))
    assert_no_worse_than_peft(draws)


def test_what_runs_how_is_said_and_new_adapters_are_drawn_as_peft_draws_them():
    """PEFT casts them to the base's dtype and back: to fp8."""
    torch.manual_seed(shifted(5))
    theirs = layers(peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["up"])))[0]
    torch.manual_seed(shifted(5))
    model = Net()
    fused_lora.inject(model, LoraConfig(target_modules=["up"]))
    for part in ("lora_A", "lora_B"):
        mine, other = (getattr(layer, part)["default"].weight for layer in (model.up, theirs))
        assert mine.dtype is other.dtype is F32 and torch.equal(mine, other)
    for built in pair()[:2]:
        assert [str(row) for row in layer_report(built)] == [f"fused around the base: {REASON}"] * 2


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("block_size", BLOCKS)
def test_a_merge_is_quantised_as_transformers_does_and_an_unmerge_gives_back_the_bits(block_size, scale_fmt):
    """PEFT has no merge for it."""
    if block_size is None and scale_fmt == "ue8m0":
        return  # transformers has no such layer
    ours, injected, theirs = pair(block_size=block_size, scale_fmt=scale_fmt)
    with pytest.raises(RuntimeError):
        theirs.merge_adapter()
    for model in (ours, injected):
        before = [(m.base_layer.weight.data.clone(), m.base_layer.weight_scale_inv.data.clone()) for m in layers(model)]
        right = [values_of(m.base_layer) + m.get_delta_weight("default").detach().double() for m in layers(model)]
        for _ in range(5):
            fused_lora.merge(model)
            for layer, wanted in zip(layers(model), right, strict=True):
                base = layer.base_layer
                rows, columns = block_size or wanted.shape
                whole = wanted.shape[0] % rows == wanted.shape[1] % columns == 0
                if whole:
                    codes, scales = quantise(wanted.float(), block_size, scale_fmt)
                    moved = (base.weight.float() - codes.float()).abs() > 0
                    assert moved.float().mean() < 0.01  # fp32 sums in another order
                    assert_close(base.weight_scale_inv.float().view(-1), scales.float().view(-1), terms=K)
                assert base.weight.dtype is FP8 and base.weight.is_contiguous()
                step = wanted.abs().max() / 16  # half of the largest gap of e4m3
                assert (values_of(base) - wanted).abs().max() <= step * (1 + (scale_fmt == "ue8m0"))
            fused_lora.unmerge(model)
            for layer, (weight, scales) in zip(layers(model), before, strict=True):
                assert torch.equal(layer.base_layer.weight.view(torch.uint8), weight.view(torch.uint8))
                assert torch.equal(layer.base_layer.weight_scale_inv.float(), scales.float())


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("block_size", BLOCKS)
def test_a_dense_merge_is_rounded_once(block_size, dtype):
    for model in pair(block_size=block_size)[:2]:
        exact = []
        for layer in layers(model):
            A, B = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
            exact.append(values_of(layer.base_layer) + 1.5 * B @ A)
        plain = fused_lora.unload(model, merge_adapters=True, dtype=dtype)
        for layer, right in zip((plain.up, plain.down), exact, strict=True):
            assert type(layer) is nn.Linear and layer.weight.dtype is dtype
            size = right.abs().max().item()
            assert (layer.weight.double() - right).abs().max().item() <= ulp(size, dtype) / 2 + 16 * ulp(size, F32)
            assert not vars(layer).keys() - vars(nn.Linear(1, 1)).keys()
        assert plain.state_dict().keys() == {"up.weight", "up.bias", "down.weight"}


REFUSED = {
    "the weight is .*bfloat16": lambda layer: setattr(layer.weight, "data", layer.weight.data.to(BF16)),
    "weight_scale_inv has shape": lambda layer: setattr(
        layer.weight_scale_inv, "data", layer.weight_scale_inv.data[1:]
    ),
    "weight_scale_inv has scales that are NaN": lambda layer: layer.weight_scale_inv.data.fill_(float("nan")),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_inject_names_layer_and_field_and_changes_nothing(reason):
    model = Net()
    REFUSED[reason](model.up)
    with pytest.raises(ValueError, match=rf"'up', a transformers.*FP8Linear.*{reason}"):
        fused_lora.inject(model, LoraConfig(target_modules=["up", "down"]))
    assert type(model.up) is type(model.down) is fp8.FP8Linear


def test_a_merge_that_would_not_be_finite_changes_nothing():
    _, model, _ = pair()
    model.down.lora_B["default"].weight.data.fill_(float("inf"))
    before = [layer.base_layer.weight for layer in layers(model)]
    with pytest.raises(ValueError, match="down: the weight would hold NaN or infinity"):
        fused_lora.merge(model)
    assert all(layer.base_layer.weight is held for layer, held in zip(layers(model), before, strict=True))
    assert base_of(model.up.base_layer).bits == 8
