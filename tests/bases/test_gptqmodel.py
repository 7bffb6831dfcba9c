"""GPTQ and AWQ layers of gptqmodel itself, where it imports: PEFT's classes, accelerated ones and ours over them.

The package takes pip's ``--no-deps`` beside this torch: ``make test-gptq``. ``test_packed_weights.py`` has stand-ins.
"""

import copy

import pytest
import torch
from torch import nn

import fused_lora
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
pytest.importorskip("gptqmodel", reason="gptqmodel is not installed: make test-gptq")
from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # noqa: E402
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear  # noqa: E402

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore:Merge lora module")]

N, K, M, GROUP = 48, 64, 9, 32
KINDS = {TorchLinear: "GPTQLoraLinear", AwqTorchLinear: "AwqLoraLinear"}
DTYPES = [torch.float16, torch.bfloat16]


def quantised(kind, dtype):
    """A layer [N, K] of 4-bit integers around 8, and its bias."""
    linear = nn.Linear(K, N).half().requires_grad_(False)
    sizes = dict(bits=4, group_size=GROUP, sym=True, desc_act=False, in_features=K, out_features=N, bias=True)
    layer = kind(**sizes, register_buffers=True)
    scales = linear.weight.detach().float().view(N, -1, GROUP).abs().amax(-1) / 7
    scales, zeros = scales.half(), torch.full_like(scales, 8).half()
    if kind is TorchLinear:
        layer.pack_original(linear, scales, zeros, (torch.arange(K) // GROUP).int())
        layer.optimized = True  # post_init would compile the dequantisation, which takes longer than the test
    else:
        layer.pack(linear, scales, zeros)
    layer.post_init()
    return layer.to(dtype)


class Net(nn.Module):
    def __init__(self, kind, dtype):
        super().__init__()
        self.up, self.down = quantised(kind, dtype), nn.Linear(N, 8).to(dtype)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def three(kind, dtype, names=("default",)):
    models = three_models(Net(kind, dtype), names, target_modules=["up"])
    assert type(layers(models[-1])[0]).__name__ == KINDS[kind]
    return models


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("names", [["default"], ["default", "second"]], ids=len)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_with_one_and_two_adapters(kind, dtype, names, training):
    draws = []
    for _ in range(DRAWS):
        models, x, g = three(kind, dtype, names), torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        base = layers(models[-1])[0].base_layer
        for model in models:
            model.train(training)
        y = base(x.clone().requires_grad_()).detach().double()
        draws.append(results(models, x, g, names, y, dense(base, dtype)))
    assert_no_worse_than_peft(draws)


def dense(base, dtype):
    """[N, K], by which the layer's own backward multiplies."""
    x = torch.zeros(N, K, dtype=dtype, requires_grad=True)
    return torch.autograd.grad(base(x), [x], torch.eye(N, dtype=dtype))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_how_is_said(kind):
    ours, injected, theirs = three(kind, torch.float16)
    why = f"fused around the base: the base layer is a {kind.__name__}, its weight is packed"
    assert str(layer_report(ours)[0]) == str(layer_report(injected)[0]) == why
    assert list(ours.state_dict()) == list(theirs.state_dict())
    fused_lora.restore(ours)
    assert type(layers(ours)[0]) is type(layers(theirs)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_chosen_and_disabled_as_in_peft(kind):
    ours, _, theirs = three(kind, torch.float16, ["default", "second"])
    x = torch.randn(M, K).half()
    assert_chosen_alike(ours, theirs, x, terms=K + N)


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_adapter_alone(kind):
    """Three steps: the losses are PEFT's, and the packed tensors keep their bytes."""
    models = three(kind, torch.float16)
    x, wanted, losses = torch.randn(M, K).half(), torch.randn(M, 8), []
    for model in models:
        before = {name: buffer.clone() for name, buffer in layers(model)[0].base_layer.named_buffers()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            loss = (model(x).float() - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        after = dict(layers(model)[0].base_layer.named_buffers())
        assert all(torch.equal(after[name], buffer) for name, buffer in before.items())
    ours, injected, theirs = torch.stack(losses).view(3, 3)
    assert theirs[-1] < theirs[0]
    assert_close(ours.half(), theirs.half(), terms=K + N)
    assert_close(injected.half(), theirs.half(), terms=K + N)


@pytest.mark.parametrize("kind", KINDS)
def test_merges_are_refused_by_name_and_change_nothing(kind):
    ours, injected, _ = three(kind, torch.float16)
    x = torch.randn(M, K).half()
    assert_merges_refused(ours, injected, x, f"up: a {kind.__name__} with a .* cannot be dequant")


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_the_store(kind, tmp_path):
    """An adapter that was trained over such a layer: loaded here and in PEFT, and served."""
    _, model, theirs = three(kind, torch.float16)
    x, plain = torch.randn(3, M, K).half(), fused_lora.unload(copy.deepcopy(model)).eval()
    fused_lora.save_adapter(model, tmp_path)
    again, peft_again = copy.deepcopy(plain), copy.deepcopy(plain)
    fused_lora.load_adapter(again, tmp_path)
    peft_again = peft.PeftModel.from_pretrained(peft_again, tmp_path)
    with torch.no_grad():
        wanted = model.eval()(x)
        assert torch.equal(again(x), wanted)
        assert_close(peft_again(x), wanted, terms=K + N)
        store = fused_lora.AdapterStore(plain, capacity_bytes=1 << 20)
        store.load("packed", tmp_path)
        with store.batch(["packed", None, "packed"]):
            served = plain(x)
        assert_close(served[0], wanted[0], terms=K + N)
        assert_close(served[1], plain(x[1:2])[0], terms=K + N)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_its_own(kind):
    """LoraLinear, adapters in fp32 as PEFT holds them."""
    layer = fused_lora.LoraLinear(quantised(kind, torch.float16), r=4, lora_dropout=0.5)
    assert layer.lora_A["default"].weight.dtype is torch.float32 and (layer.in_features, layer.out_features) == (K, N)
    x = torch.randn(M, K).half().requires_grad_()
    y = layer.train()(x)
    y.float().square().sum().backward()
    assert y.dtype is torch.float16 and x.grad.abs().max() > 0 and layer.lora_B["default"].weight.grad.abs().max() > 0
