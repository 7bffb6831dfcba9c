"""Five hundred merges and unmerges of embeddings, DoRA layers and stacked experts, ours and PEFT's: no bit is lost."""

import warnings
from itertools import product

import pytest
import torch
from torch import nn

import fused_lora
from helpers.accelerated import TOKENS, wrap
from helpers.experts import HIDDEN, Block
from helpers.thorough import sampled
from helpers.unchanged import assert_bits, parameter_bits

CYCLES = 500
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
ADAPTERS = {  # PEFT has no adapter of all three: experts refuse DoRA
    "embeddings": {"target_modules": ["emb"], "r": 3},
    "DoRA": {"target_modules": ["lin"], "r": 2, "use_dora": True},
    "experts": {"target_modules": [], "target_parameters": STACKS, "r": 2},
}


class Net(nn.Module):
    """Embedding, linear layer and experts."""

    def __init__(self, dtype):
        super().__init__()
        self.emb, self.lin = nn.Embedding(TOKENS, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.experts = Block().experts
        self.to(dtype)


def build(kind, dtype, name):
    adapters = {"a": {}, "b": {"r": 4, "use_rslora": True}}
    if kind == "inject":
        model = Net(dtype).eval()
        for adapter, own in adapters.items():
            fused_lora.inject(model, fused_lora.LoraConfig(**{"lora_alpha": 6, **ADAPTERS[name], **own}), adapter)
    else:
        model = fused_lora.accelerate(wrap(Net(dtype).eval(), adapters, **ADAPTERS[name]))
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name and "magnitude" not in parameter_name:
            parameter.data.normal_(std=0.2)
    return model


@pytest.mark.parametrize("name, kind, dtype", sampled(list(product(ADAPTERS, ["inject", "accelerate"], DTYPES)), 2))
def test_five_hundred_cycles_lose_no_bit(name, kind, dtype):
    """One adapter, the other, both; each time the same merged bits, and all bits of the base afterwards."""
    model = build(kind, dtype, name)
    before, merged = parameter_bits(model), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 16 bits keep little of a small adapter
        for cycle in range(CYCLES):
            names = [["a"], ["b"], ["a", "b"]][cycle % 3]
            fused_lora.merge(model, names)
            if cycle < 3:
                merged[cycle] = parameter_bits(model)
                with pytest.raises(AssertionError):
                    assert_bits(model, before)
            elif cycle % 50 == 0:
                assert_bits(model, merged[cycle % 3])
            fused_lora.unmerge(model)
            if cycle % 50 == 0:
                assert_bits(model, before)
    assert_bits(model, before)
