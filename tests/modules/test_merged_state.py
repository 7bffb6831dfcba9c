"""State dicts around a merge: no base over a merged weight, no merged weight as a base, and nothing else refused."""

import io

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoraConfig
from helpers.seeds import shifted


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.body, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.body(self.embed_tokens(ids)))


IDS = torch.tensor([[0, 3, 4], [8, 2, 3]])
TOKENS = {"trainable_token_indices": [3, 4]}


def adapted(seed, **fields):
    torch.manual_seed(shifted(seed))
    config = LoraConfig(r=2, target_modules=["body"], init_lora_weights=False, **fields)
    model = fused_lora.inject(Net(), config).eval()
    if fields:
        nn.init.normal_(model.embed_tokens.trainable_tokens_delta["default"])
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, tensors):
    return all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def saved(model, **how):
    """A state dict after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, **how)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("fields, path", [({}, "body"), (TOKENS, "embed_tokens")], ids=["linear", "tokens"])
def test_a_base_is_not_loaded_over_a_merge(fields, path, assign):
    model, other = adapted(0, **fields), state(adapted(1, **fields))
    before = state(model)
    fused_lora.merge(model)
    merged = state(model)
    kept = {name: tensor for name, tensor in other.items() if name.startswith(path)}
    with pytest.raises(RuntimeError, match=rf"{path}.base_layer.weight: \['default'\] are merged .* unmerge before"):
        model.load_state_dict(kept, strict=False, assign=assign)
    assert same(model, merged)
    model.load_state_dict(merged, assign=assign)
    fused_lora.unmerge(model)
    assert same(model, before)
    model.load_state_dict(other, assign=assign)
    assert same(model, other)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("fields, path", [({}, "body"), (TOKENS, "embed_tokens")], ids=["linear", "tokens"])
def test_merged_weights_are_no_base(fields, path, weights_only):
    model, other = adapted(0, **fields), adapted(1, **fields)
    expected, before = model(IDS), state(other)
    fused_lora.merge(model)
    said = rf"{path}.base_layer.weight: the state was taken while \['default'\] were merged.* unmerge before"
    with pytest.raises(RuntimeError, match=said):
        other.load_state_dict(saved(model, weights_only=weights_only))
    assert torch.equal(other.body.base_layer.weight, before["body.base_layer.weight"])
    fused_lora.unmerge(model)
    other.load_state_dict(saved(model, weights_only=weights_only))
    assert torch.equal(other(IDS), expected)


def test_merged_models_exchange_their_states():
    model, other = adapted(0), adapted(0)
    before = state(model)
    for each in (model, other):
        fused_lora.merge(each)
    other.load_state_dict(model.state_dict())
    fused_lora.unmerge(other)
    assert same(other, before)


def test_adapters_alone_are_loaded_over_a_merge():
    model, other = adapted(0), adapted(1)
    base = model.body.base_layer.weight.clone()
    fused_lora.merge(model)
    adapters = {name: tensor for name, tensor in other.state_dict().items() if "lora_" in name}
    model.load_state_dict(adapters, strict=False)
    fused_lora.unmerge(model)
    assert torch.equal(model.body.base_layer.weight, base)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in adapters.items())
