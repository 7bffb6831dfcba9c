"""fused_lora's calls on models that PEFT has wrapped: PEFT's own calls do them, or an error names them."""

import logging

import peft
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.integrations.peft_linear import AcceleratedLinear
from helpers.seeds import shifted
from helpers.versions import since


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


CONFIG = {"r": 4, "target_modules": ["one", "two"], "init_lora_weights": False}


@pytest.fixture(params=["plain", "accelerated"])
def models(request):
    """A model for our calls, and one for PEFT's own, with the same numbers; and an input."""
    torch.manual_seed(shifted(0))
    found = []
    state = None
    for _ in range(2):
        model = peft.get_peft_model(Net(), peft.LoraConfig(**CONFIG), "first").eval()
        model.add_adapter("second", peft.LoraConfig(**CONFIG))
        state = model.state_dict() if state is None else state
        model.load_state_dict(state)
        found.append(fused_lora.accelerate(model) if request.param == "accelerated" else model)
    return *found, torch.randn(3, 16)


@torch.no_grad()
def same(ours, theirs, x):
    return torch.equal(ours(x), theirs(x))


def test_every_call_does_what_pefts_does(models):
    ours, theirs, x = models
    with fused_lora.disable_adapters(ours), theirs.disable_adapter():
        assert same(ours, theirs, x)
    assert fused_lora.active_adapters(ours) == theirs.active_adapters == ["first"]
    fused_lora.set_adapter(ours, "second")
    theirs.set_adapter("second")
    assert same(ours, theirs, x) and fused_lora.active_adapters(ours) == ["second"]
    fused_lora.set_adapter(ours, ["first", "second"])
    theirs.base_model.set_adapter(["first", "second"])
    assert same(ours, theirs, x) and fused_lora.active_adapters(ours) == ["first", "second"]
    fused_lora.merge(ours, ["first"])
    theirs.merge_adapter(["first"])
    assert same(ours, theirs, x) and all(m.merged_adapters == ["first"] for m in peft_layers(ours))
    fused_lora.unmerge(ours)
    theirs.unmerge_adapter()
    assert same(ours, theirs, x) and not any(m.merged for m in peft_layers(ours))
    fused_lora.delete_adapter(ours, "second")
    assert list(ours.peft_config) == ["first"]
    theirs.delete_adapter("second")
    assert same(fused_lora.unload(ours, merge_adapters=True), theirs.merge_and_unload(), x)


def peft_layers(model):
    return [m for m in model.modules() if hasattr(m, "merged_adapters")]


def test_disabled_adapters_are_the_base_model(models):
    ours, _, x = models
    base = Net()
    base.load_state_dict(
        {k.replace(".base_layer", "").removeprefix("base_model.model."): v for k, v in ours.state_dict().items()},
        strict=False,
    )
    with fused_lora.disable_adapters(ours), torch.no_grad():
        assert torch.equal(ours(x), base(x))
    with torch.no_grad():
        assert not torch.equal(ours(x), base(x))


def test_the_share_that_rounding_lost_is_known_of_exact_merges_only(models):
    ours, *_ = models
    accelerated = isinstance(ours.base_model.model.one, AcceleratedLinear)
    fused_lora.merge(ours)
    if accelerated:
        assert all(0 <= lost < 0.01 for lost in fused_lora.delta_fidelity(ours).values())
    else:
        with pytest.raises(RuntimeError, match="no layer has an exact merge"):
            fused_lora.delta_fidelity(ours)


@pytest.mark.parametrize(
    "call, instead",
    [
        (lambda m, p: fused_lora.lora_layers(m), "layer_report"),
        (lambda m, p: fused_lora.adapter_configs(m), "peft_config"),
        (lambda m, p: fused_lora.adapter_batch(m, ["first"]).__enter__(), "adapter_names="),
        (lambda m, p: fused_lora.save_adapter(m, p, "first"), "save_pretrained"),
        (lambda m, p: fused_lora.load_adapter(m, p, "third"), "peft_model.load_adapter"),
        (
            lambda m, p: fused_lora.inject(m, fused_lora.LoraConfig(target_modules=["one"]), "x"),
            "peft_model.add_adapter",
        ),
    ],
)
def test_what_cannot_be_done_names_pefts_call(models, call, instead, tmp_path):
    with pytest.raises((RuntimeError, ValueError), match=instead):
        call(models[0], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_of_an_unknown_adapter_is_no_silent_no_op(models):
    with pytest.raises(ValueError, match="Adapter third not found"):
        fused_lora.merge(models[0], ["first", "third"])
    assert not any(m.merged for m in peft_layers(models[0]))


def test_layers_without_a_peft_model_are_no_silent_no_op():
    model = peft.inject_adapter_in_model(peft.LoraConfig(**CONFIG), Net())
    for call in (fused_lora.merge, fused_lora.unmerge, fused_lora.active_adapters, fused_lora.unload):
        with pytest.raises(RuntimeError, match=r"peft\.functional"):
            call(model)


@since("peft", "0.20")
def test_accelerate_says_how_many_layers_run_fused_and_why_the_others_do_not(caplog):
    with caplog.at_level(logging.INFO, logger="fused_lora"):
        fused_lora.accelerate(peft.get_peft_model(Net(), peft.LoraConfig(**CONFIG)))
        assert [r.getMessage() for r in caplog.records] == ["accelerate: 2 of 2 layers run fused"]
    mica = peft.get_peft_model(Net(), peft.LoraConfig(**{**CONFIG, "init_lora_weights": "mica"}))
    with pytest.warns(UserWarning, match="accelerate: 0 of 2 layers run fused; 2 do not: MiCALinearVariant"):
        fused_lora.accelerate(mica)
