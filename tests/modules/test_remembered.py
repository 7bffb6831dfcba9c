"""What a layer remembers of its last calls: after any change the next call is that of a copy without memory."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.modules import mixin
from fused_lora.ops.linear.op import Memory
from helpers.over_quantised import layers, with_adapters
from helpers.quantised import linear4bit
from helpers.seeds import shifted
from helpers.thorough import sampled

N, K = 64, 128  # whole blocks of 4 bits
OFFSETS = [1, None, 1, 1, 0]  # of an aLoRA adapter: it changes some rows


def model(base: str, kind: str) -> nn.Module:
    torch.manual_seed(shifted(3))
    given = nn.ModuleDict({"up": nn.Linear(K, N) if base == "dense" else linear4bit(N, K, compute_dtype=torch.float32)})
    fields = {"target_modules": ["up"], "lora_dropout": 0.3}
    if kind == "aLoRA":
        kind, fields["alora_invocation_tokens"] = "accelerated", [1]
    return with_adapters(given, kind, ["default", "second"], **fields).train()


def outcome(layer, x: torch.Tensor) -> list[torch.Tensor | None]:
    torch.manual_seed(shifted(4))
    y = layer(x, alora_offsets=OFFSETS) if getattr(layer, "lora_variant", None) else layer(x)
    leaves = [p for p in (x, *layer.parameters()) if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.sum(), leaves, allow_unused=True)]


def doubled(_module, _arguments, output):
    return output * 2


def other_weight(layer) -> None:
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.detach() * 3)


def swapped_base(layer) -> None:
    base, another = layer.base_layer, layer.base_layer
    if hasattr(base.weight, "quant_state"):
        another = linear4bit(N, K, compute_dtype=torch.float32, quant_type="fp4", blocksize=128, nested=False)
        base.quant_state = another.weight.quant_state
    else:
        another = nn.Linear(K, N).requires_grad_(False)
    base.weight, base.bias = another.weight, another.bias


def disabled(layer) -> None:
    if isinstance(layer, fused_lora.LoraLinear):
        layer.disable_adapters = True
    else:
        layer.enable_adapters(False)


CHANGES = {
    "nothing": lambda layer: None,
    "one adapter": lambda layer: layer.set_adapter(["second"]),
    "an adapter twice": lambda layer: layer.set_adapter(["second", "second"]),
    "disabled": disabled,
    "scaling": lambda layer: layer.set_scale("default", 0.3),
    "eval": lambda layer: layer.eval(),
    "dropout off": lambda layer: layer.lora_dropout["default"].eval(),
    "other p": lambda layer: setattr(layer.lora_dropout["second"], "p", 0.6),
    "no dropout": lambda layer: layer.lora_dropout.update({"default": nn.Identity()}),
    "hook on lora_B": lambda layer: layer.lora_B["second"].register_forward_hook(doubled),
    "hook on the base": lambda layer: layer.base_layer.register_forward_hook(doubled),
    "own forward": lambda layer: setattr(layer.base_layer, "forward", lambda x: x[..., :N] * 2),
    "another lora_A": other_weight,
    "another base weight": swapped_base,
    "frozen": lambda layer: layer.lora_A["default"].requires_grad_(False),
    "deleted": lambda layer: layer.delete_adapter("default"),
    "float64 adapters": lambda layer: (layer.lora_A.double(), layer.lora_B.double()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["fused_lora", "accelerated", "aLoRA"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_call_after_a_change_is_that_of_a_copy(base, kind, change, monkeypatch):
    recalled, find = [], Memory.find
    monkeypatch.setattr(Memory, "find", lambda *given: recalled.append(find(*given)) or recalled[-1])
    changed = model(base, kind)
    layer = layers(changed)[0]
    x = torch.randn(5, K, requires_grad=True)
    first = outcome(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(first, outcome(layer, x), strict=True))
    assert recalled and recalled[-1] is not None
    fresh = layers(copy.deepcopy(changed))[0]
    assert fresh.__dict__["_memory"] is None
    for one in (layer, fresh):
        torch.manual_seed(shifted(5))
        CHANGES[change](one)
    for ours, expected in zip(outcome(layer, x), outcome(fresh, x), strict=True):
        assert (ours is None) == (expected is None)
        assert ours is None or torch.equal(ours, expected)


def autocast(dtype: torch.dtype | None, device: str = "cpu"):
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


@pytest.fixture
def recalled(monkeypatch):
    """Of each call of a layer with a memory, whether one like it was known."""
    results, find, recall = [], Memory.find, mixin.recalled
    monkeypatch.setattr(Memory, "find", lambda *given: results.append(find(*given)) or results[-1])
    monkeypatch.setattr(mixin, "recalled", lambda *given: results.append(recall(*given)) or results[-1])
    return results


BF16 = torch.bfloat16


@pytest.mark.parametrize("first, then", [(None, BF16), (BF16, None), (BF16, torch.float16), (BF16, BF16)])
@pytest.mark.parametrize("kind", ["fused_lora", "accelerated", "aLoRA"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_call_is_remembered_for_its_autocast_alone(base, kind, first, then, recalled, monkeypatch):
    changed = model(base, kind)
    layer = layers(changed)[0]
    x = torch.randn(5, K, requires_grad=True)
    with autocast(first):
        outcome(layer, x)
    fresh = layers(copy.deepcopy(changed))[0]
    with autocast(then):
        expected = outcome(fresh, x)
        for repeated in (False, True):
            if repeated:
                monkeypatch.setattr(Memory, "learn", lambda *_: pytest.fail("a known call is learnt again"))
            for ours, theirs in zip(outcome(layer, x), expected, strict=True):
                assert ours.dtype is theirs.dtype and torch.equal(ours, theirs)
    assert torch.is_autocast_enabled("cpu") is False
    assert kind == "aLoRA" or recalled[-1] is not None


def test_float64_under_autocast_is_not_remembered(recalled):
    layer = layers(model("dense", "fused_lora").double())[0]
    x = torch.randn(5, K, dtype=torch.float64)
    with autocast(BF16):
        assert torch.equal(outcome(layer, x)[0], outcome(layer, x)[0])
    assert not recalled or recalled[-1] is None


@pytest.mark.parametrize(
    "base, x_dtype", sampled([("dense", torch.float32), ("dense", BF16), ("nf4", torch.float32)], 3)
)
def test_on_a_gpu_remembered_adapters_take_the_autocast_dtype(base, x_dtype, device, kernels_on, recalled):
    layer = layers(model(base, "fused_lora"))[0].to(device)
    x = torch.randn(5, K, device=device).to(x_dtype).requires_grad_()
    with autocast(BF16, device.type):
        known = outcome(layer, x), outcome(layer, x)
        assert recalled[-1] is not None
    assert known[1][0].dtype is (BF16 if base == "dense" else x_dtype) and known[1][2].dtype is torch.float32
    for part in ("lora_A", "lora_B"):
        getattr(layer, part).bfloat16()
    if base == "dense":
        layer.base_layer.weight.data = layer.base_layer.weight.data.bfloat16()
    with autocast(BF16 if base == "nf4" else None, device.type):
        rounded = outcome(layer, x.detach().bfloat16().requires_grad_())
    for first, second, plain in zip(*known, rounded, strict=True):
        assert torch.equal(first, second) and torch.equal(first.bfloat16(), plain)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_training_under_autocast_after_calls_without_gradients_has_its_gradients(base, device, kernels_on, recalled):
    """What is rounded without gradients wants none: a step after an evaluation must not be taken for one like it."""
    layer = layers(model(base, "fused_lora"))[0].to(device)
    x = torch.randn(5, K, device=device, requires_grad=True)
    with autocast(BF16, device.type):
        expected = outcome(layers(copy.deepcopy(layer))[0], x)
        with torch.no_grad():
            layer(x)
            layer(x)
        assert recalled[-1] is not None
        for ours, theirs in zip(outcome(layer, x), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert recalled[-1] is not None


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_what_is_read_past_peft_s_properties_is_what_they_return(base):
    layer = layers(model(base, "accelerated"))[0]
    own = layer.__dict__
    for names, given in ((["second"], "second"), (["default", "second"], ["default", "second"])):
        layer.set_adapter(given)
        found = own["_active_adapter"]
        assert names == layer.active_adapters == ([found] if isinstance(found, str) else found)
    layer.enable_adapters(False)
    assert own["_disable_adapters"] is layer.disable_adapters is True
    assert own["lora_variant"] is layer.lora_variant and own["merged_adapters"] is layer.merged_adapters
    assert own["cast_input_dtype_enabled"] is layer.cast_input_dtype_enabled
