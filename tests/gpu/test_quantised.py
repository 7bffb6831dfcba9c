"""On a GPU: 4-bit layers of bitsandbytes to the bit, against PEFT and float64, and merged."""

import itertools
import warnings

import pytest
import torch

import fused_lora
from fused_lora import reference
from fused_lora.bases import base_of
from fused_lora.bases.bitsandbytes_4bit import Weight
from fused_lora.ops import guard
from fused_lora.ops.linear import packed, plan
from fused_lora.ops.linear.op import draw_seeds, lora_linear
from fused_lora.testing.graphs import capture
from fused_lora.testing.numeric import DRAWS, assert_no_worse
from helpers.quantised import linear4bit, values_of
from helpers.seeds import shifted
from helpers.twins import ExportedDropout

bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
PeftLinear4bit = pytest.importorskip("peft.tuners.lora.bnb").Linear4bit
pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = [*itertools.product(["nf4", "fp4"], [True, False], [64, 256, 4096])]


@pytest.fixture(autouse=True)
def nothing_is_dropped():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is dropped.*")
        yield


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("quant_type, nested, blocksize", KINDS)
def test_the_kernel_has_the_bits_of_bitsandbytes(quant_type, nested, blocksize, dtype):
    for N, K in ((4096, 4096), (1000, 776)):
        kind = dict(quant_type=quant_type, nested=nested, blocksize=blocksize)
        layer = linear4bit(N, K, dtype=dtype, device="cuda", **kind)
        ours = Weight(layer, dtype).to(dtype)
        assert torch.equal(ours, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))


@pytest.mark.parametrize("adapters", [[16], [64], [8, 16]], ids=str)
@pytest.mark.parametrize("dtype, adapter_dtype", [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)])
@pytest.mark.parametrize("M", [1, 16, 64])
def test_few_rows_are_as_exact_over_4_bits_as_over_the_dequantised_weight(M, dtype, adapter_dtype, adapters):
    """In eval() without gradients, by launches that have passed their first use."""
    M = min(M, 16) if dtype is FP32 else M
    for (N, K), kind in zip(((4096, 4096), (1000, 704), (14336, 4096)), (KINDS[0], KINDS[4], KINDS[11]), strict=True):
        quant_type, nested, blocksize = kind
        layer = linear4bit(
            N, K, dtype=dtype, compute_dtype=dtype, quant_type=quant_type, nested=nested, blocksize=blocksize,
            device="cuda",
        )  # fmt: skip
        found = [], [], []
        for _ in range(DRAWS):
            x = torch.randn(M, K, device="cuda").to(dtype)
            A = [(torch.randn(r, K, device="cuda") * K**-0.5).to(adapter_dtype) for r in adapters]
            B = [torch.randn(N, r, device="cuda").to(adapter_dtype) for r in adapters]
            scaling, none, weight = [0.5] * len(A), [0.0] * len(A), Weight(layer, dtype)
            assert plan.reads_4_bits(M, K, blocksize, dtype, x.device)
            with torch.no_grad():
                found[0].append(packed.lora_linear(x, weight, layer.bias, A, B, scaling, none))
            dense = weight.to(dtype)
            found[1].append(lora_linear(x, dense, layer.bias, A, B, scaling))
            found[2].append(reference.lora_linear(x, dense, layer.bias, A, B, scaling, none, None)[0])
        assert_no_worse(*(torch.stack(part) for part in found), draws=True)
    assert any(key[0] == "linear_4bit" for key in guard.verdicts())


def test_decoding_runs_fused_and_in_a_graph():
    base = linear4bit(512, 1024, dtype=BF16, compute_dtype=BF16, device="cuda")
    layer = fused_lora.LoraLinear(base, r=16, lora_alpha=6, autocast_adapter_dtype=False).eval()
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(4, 1, 1024, device="cuda").to(BF16)
    with torch.no_grad():
        assert base_of(base).why_not_call(base, x, 512) is None
        expected = layer(x)
        graph, result = capture(lambda: layer(x))
        result.zero_()
        graph.replay()
    assert torch.equal(result, expected)


def layers(N, K, r, p, dtype, adapter_dtype):
    """PEFT's layer and ours over one base, with the same adapter."""
    base = linear4bit(N, K, dtype=dtype, compute_dtype=dtype, device="cuda")
    config = peft.LoraConfig(r=r, lora_alpha=6, lora_dropout=p)
    theirs = PeftLinear4bit(base, "default", config=config, r=r, lora_alpha=6).to("cuda").train()
    theirs.lora_A.to(adapter_dtype)["default"].weight.data.normal_(std=K**-0.5)
    theirs.lora_B.to(adapter_dtype)["default"].weight.data.normal_()
    ours = fused_lora.LoraLinear(base, r=r, lora_alpha=6, lora_dropout=p, autocast_adapter_dtype=adapter_dtype is FP32)
    for part in ("lora_A", "lora_B"):
        own = getattr(ours, part)["default"].weight
        assert own.dtype is adapter_dtype and own.is_cuda
        own.data.copy_(getattr(theirs, part)["default"].weight.data)
    return theirs, ours.train()


def results(layer, x, g):
    x = x.detach().requires_grad_()
    y = layer(x)
    wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [y.detach(), *torch.autograd.grad(y, wanted, g)]


@pytest.mark.parametrize("adapters", [BF16, FP32])
@pytest.mark.parametrize("M, N, K", [(200, 264, 512), (8, 512, 1024)])
def test_a_layer_is_as_exact_as_peft(M, N, K, adapters):
    found, p = ([], [], []), 0.1
    for i in range(DRAWS):
        theirs, ours = layers(N, K, 16, p, BF16, adapters)
        weight = values_of(theirs.base_layer).to(BF16).double()
        x, g = (torch.randn(M, n, device="cuda").to(BF16) for n in (K, N))
        torch.manual_seed(shifted(i))
        seeds = draw_seeds(1, x.device)
        theirs.lora_dropout["default"] = ExportedDropout(seeds, p).train()
        found[1].append(results(theirs, x, g))
        torch.manual_seed(shifted(i))
        found[0].append(results(ours, x, g))
        A, B = ([getattr(theirs, part)["default"].weight.detach()] for part in ("lora_A", "lora_B"))
        bias, rest = theirs.base_layer.bias, (A, B, [theirs.scaling["default"]], [p], seeds)
        y, _ = reference.lora_linear(x, weight, bias, *rest)
        dx, dA, dB, *_ = reference.lora_linear_backward(g, x, weight, *rest)
        found[2].append([y, dx, *dA, *dB])
    for k, name in enumerate(("y", "dx", "dA", "dB")):
        ours, theirs, exact = (torch.stack([draw[k] for draw in part]) for part in found)
        assert ours.dtype == theirs.dtype, name
        assert_no_worse(ours, theirs, exact, name=name, draws=True)


@pytest.mark.filterwarnings("ignore:Merge lora module")
def test_a_merge_is_that_of_peft_and_an_unmerge_gives_the_bytes_back():
    theirs, ours = layers(1024, 2048, 16, 0.0, BF16, FP32)
    for layer in (theirs, ours):
        layer.lora_B["default"].weight.data.mul_(0.1)
    weight, before = ours.base_layer.weight, ours.base_layer.weight.data.clone()
    ours.merge()
    merged = values_of(ours.base_layer)
    ours.unmerge()
    assert ours.base_layer.weight is weight and torch.equal(weight.data, before)
    theirs.merge()
    assert not torch.equal(theirs.base_layer.weight.data, before)
    same = (values_of(theirs.base_layer) == merged).double().mean().item()
    assert same > 0.999  # sums of another order may fall on the other side of a border between two codes
