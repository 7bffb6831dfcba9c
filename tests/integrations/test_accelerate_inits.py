"""Initialisations, scalings and optimizers of PEFT: accelerated layers stay fused and do what PEFT's do, with files."""

import copy

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig
from torch import nn

import fused_lora
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import ROWS, TOKENS, Net, quiet
from helpers.seeds import shifted

TARGETS = ["lin0", "lin1"]
IDS = torch.arange(ROWS * 3).reshape(ROWS, 3) % TOKENS
INITS = {
    "pissa": {},
    "pissa_niter_4": {},
    "olora": {},
    "orthogonal": {},
    "corda": dict(corda_config=CordaConfig(corda_method="kpm")),
    "lora_ga": {},
    "loftq": dict(loftq_config=peft.LoftQConfig(loftq_bits=4)),
    "gaussian": dict(use_rslora=True),
}


def net():
    torch.manual_seed(shifted(0))
    return Net().eval()


def build(init, **fields):
    if init == "loftq" and not torch.cuda.is_available():
        pytest.skip("PEFT quantises with CUDA there")
    config = peft.LoraConfig(target_modules=TARGETS, r=4, init_lora_weights=init, **INITS[init], **fields)
    base = net()
    if init == "corda":
        pytest.importorskip("attr")  # which PEFT imports there and does not ask for
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(base, config, run_model=lambda: base(IDS[:1]))
    if init == "lora_ga":
        loraga = pytest.importorskip("peft.tuners.lora.loraga")
        config.lora_ga_config = peft.LoraGAConfig()
        loraga.preprocess_loraga(base, config, train_step=lambda: base(IDS).square().mean().backward())
    torch.manual_seed(shifted(1))
    with quiet():
        return peft.get_peft_model(base, config)


def step(model, optimizer):
    """One of training: the loss, and all parameters."""
    model.train()
    loss = model(IDS).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss, [p.detach() for p in model.parameters()]


def assert_same_steps(ours, theirs, optimizers):
    assert all(row.fused for row in fused_lora.integrations.peft.layer_report(ours))
    for _ in range(3):
        (mine, own), (other, parameters) = map(step, (ours, theirs), optimizers)
        assert_close(mine, other, terms=1000)
        for a, b in zip(own, parameters, strict=True):
            assert_close(a, b, terms=10_000)  # AdamW divides by the root of small numbers


@pytest.mark.parametrize("init", INITS)
def test_initialisations(init, tmp_path):
    theirs = build(init)
    ours = fused_lora.accelerate(copy.deepcopy(theirs))
    theirs.save_pretrained(tmp_path / "start")
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (ours, theirs)]
    assert_same_steps(ours, theirs, optimizers)
    expected = ours.eval()(IDS)
    mutates = init.startswith("pissa") or init in ("olora", "corda", "lora_ga")
    fields = dict(path_initial_model_for_weight_conversion=str(tmp_path / "start")) if mutates else {}
    ours.peft_config["default"].init_lora_weights = True if mutates else init  # PEFT asks for it
    ours.save_pretrained(tmp_path / "end", **fields)
    # a mutated base is converted to the original one; LoftQ leaves its own
    base = net() if mutates else copy.deepcopy(ours).unload()
    again = fused_lora.accelerate(peft.PeftModel.from_pretrained(base, tmp_path / "end"))
    assert all(row.fused for row in fused_lora.integrations.peft.layer_report(again))
    assert_close(again(IDS), expected, terms=1000)


@pytest.mark.parametrize("kind", ["LoRA+", "LoRA-FA"])
def test_optimizers(kind):
    theirs = build("gaussian")
    ours = fused_lora.accelerate(copy.deepcopy(theirs))

    def optimizer(model):
        if kind == "LoRA+":
            return create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-2, loraplus_lr_ratio=16.0)
        return create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)

    optimizers = [optimizer(m) for m in (ours, theirs)]
    assert_same_steps(ours, theirs, optimizers)
    moved = [n for n, p in ours.named_parameters() if "lora_A" in n and p.requires_grad]
    assert bool(moved) == (kind == "LoRA+")
    assert isinstance(ours.base_model.model.lin0.base_layer, nn.Linear)
