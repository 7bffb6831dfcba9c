"""Embeddings and convolutions of PEFT models: outputs, gradients, exact merges, files, what stays PEFT's."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import fused_lora
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import TOKENS, SideBySide, merge_and_back, quiet, wrap
from helpers.seeds import shifted
from helpers.versions import since

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Net(nn.Module):
    """An embedding, convolutions of one and two dimensions, and a linear layer."""

    def __init__(self, dtype=torch.float32, embedding=None):
        super().__init__()
        self.emb = nn.Embedding(TOKENS, 8, padding_idx=3) if embedding is None else embedding
        self.one, self.two = nn.Conv1d(8, 6, 3, padding=1), nn.Conv2d(1, 4, (3, 1), padding=(1, 0))
        self.head = nn.Linear(6, 5)
        self.to(dtype)

    def forward(self, ids):
        hidden = torch.tanh(self.one(self.emb(ids).transpose(1, 2)))
        return self.head(self.two(hidden[:, None]).mean(1).transpose(1, 2))


ALL = dict(target_modules=["emb", "one", "two", "head"], r=2)


def fill(model):
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def kinds(model):
    return {row.path.rpartition(".")[2]: row.why_not for row in fused_lora.integrations.peft.layer_report(model)}


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients(dtype):
    both = SideBySide(fill(wrap(Net(dtype), {"a": {}, "b": {"use_rslora": True}}, lora_dropout=0.0, **ALL)))
    conv = "a convolution runs PEFT's own forward"
    assert kinds(both.ours) == dict(emb=None, one=conv, two=conv, head=None)
    for names in (["a"], ["a", "b"]):
        both.do(lambda m, names=names: m.base_model.set_adapter(names))
        both.assert_same_results(draws=17)


def test_scaled_embeddings_and_tokens_beside():
    config = Gemma3TextConfig(vocab_size=TOKENS, hidden_size=8)
    scaled = Gemma3TextScaledWordEmbedding(TOKENS, 8, config.pad_token_id, embed_scale=2.5)
    SideBySide(fill(wrap(Net(embedding=scaled), target_modules=["emb"], r=2))).assert_same_results(draws=17)
    both = SideBySide(wrap(Net(), target_modules=["head"], r=2, trainable_token_indices={"emb": [1, 2]}))
    both.assert_same_results(draws=17)


@since("peft", "0.19")
@pytest.mark.experiment("A1", full=500, quick=5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embeddings_and_convolutions_come_back(dtype, count):
    """Merge and unmerge of embeddings and convolutions of an accelerated model: every bit is back."""
    both = SideBySide(fill(wrap(Net(dtype).eval(), {"a": {}, "b": {}}, **ALL)))

    def compare():
        if dtype is torch.float32:
            both.assert_same_results(ulps=2, draws=17)

    merge_and_back(both, count, compare)


LAST = torch.channels_last


@pytest.mark.parametrize("before, merged", [(None, LAST), (LAST, None), (LAST, LAST)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions_in_any_order_of_memory_come_back(dtype, before, merged):
    """``unet.to(memory_format=torch.channels_last)``, before a merge or while merged."""
    torch.manual_seed(shifted(0))
    convolutions = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 5, 1)).to(dtype).eval()
    both, x = SideBySide(wrap(convolutions, target_modules=["0", "1"])), torch.randn(2, 4, 5, 5, dtype=dtype)

    def weights():
        return [layer.base_layer.weight.detach().clone() for layer in both.ours.base_model.model]

    def order(kept):
        both.do(lambda m: m.to(memory_format=kept or torch.contiguous_format) and None)
        assert all(w.is_contiguous(memory_format=kept or torch.contiguous_format) for w in weights())

    order(before)
    old = weights()
    for _ in range(2):
        both.do(lambda m: m.merge_adapter())
        assert not any(torch.equal(w, held) for w, held in zip(weights(), old, strict=True))
        if dtype is torch.float32:
            assert_close(both.ours(x), both.theirs(x), terms=500)
        order(merged)
        both.do(lambda m: m.unmerge_adapter())
        assert all(torch.equal(w, held) for w, held in zip(weights(), old, strict=True))
        order(before)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_a_weight_whose_matrix_is_transposed_in_memory_comes_back(kind):
    """A view of it has the shape of the matrix."""
    torch.manual_seed(shifted(0))
    layer = kind(4, 6, 1)
    layer.weight.data = layer.weight.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert not layer.weight.is_contiguous()
    both = SideBySide(wrap(nn.Sequential(layer), target_modules=["0"]))
    weights = [m.base_model.model[0].base_layer.weight for m in (both.ours, both.theirs)]
    old = weights[0].detach().clone()
    both.do(lambda m: m.merge_adapter())
    assert not torch.equal(weights[0], old)
    assert_close(*weights, terms=100)
    both.do(lambda m: m.unmerge_adapter())
    assert torch.equal(weights[0], old)


def test_an_interrupt_behind_a_merge_in_channels_last_changes_nothing(monkeypatch):
    layer = fused_lora.accelerate(wrap(nn.Sequential(nn.Conv2d(4, 6, 3)), target_modules=["0"])).base_model.model[0]
    layer.to(memory_format=LAST)
    weight, old = layer.base_layer.weight, layer.base_layer.weight.detach().clone()
    copy_, left = torch.Tensor.copy_, [1]

    def interrupted(*args, **kwargs):
        copied = copy_(*args, **kwargs)
        if args[0].data_ptr() == weight.data_ptr() and left:
            raise KeyboardInterrupt(left.pop())
        return copied

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer.merge()
    assert not layer.merged and torch.equal(weight, old)
    layer.merge()
    held = weight.detach().clone()
    left.append(1)
    with pytest.raises(KeyboardInterrupt):
        layer.unmerge()
    assert layer.merged and torch.equal(weight, held)
    layer.unmerge()
    assert torch.equal(weight, old)


def test_a_tied_head_and_files(tmp_path):
    """The head reads the same memory, so a merge reaches it as PEFT's does, with PEFT's warning."""
    torch.manual_seed(shifted(0))
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    with quiet():
        both = SideBySide(fill(wrap(LlamaForCausalLM(config).eval(), target_modules=["embed_tokens", "q_proj"])))
    both.assert_same_results(draws=17)
    both.do(lambda m: m.merge_adapter())
    assert both.ours.lm_head.weight is both.ours.get_input_embeddings().weight
    ids = torch.arange(6)[None]
    assert_close(both.ours(ids).logits, both.theirs(ids).logits, terms=1000)
    both.do(lambda m: m.unmerge_adapter())
    both.ours.save_pretrained(tmp_path, save_embedding_layers=False)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(both.ours).unload(), tmp_path)
    assert torch.equal(fused_lora.accelerate(again)(ids).logits, both.ours(ids).logits)


def test_embeddings_may_be_detached_in_place_and_scalings_train():
    found = []
    both = SideBySide(fill(wrap(nn.Sequential(nn.Embedding(TOKENS, 8)), target_modules=["0"], r=2)))
    for model in both.models[:2]:
        assert not model(torch.arange(6)[None]).detach_().requires_grad
        scaling = model.base_model.model[0].scaling["default"] = nn.Parameter(torch.tensor(1.5))
        found.append(torch.autograd.grad(model(torch.arange(6)).sum(), scaling)[0])
    assert_close(*found, terms=64)


def test_what_stays_pefts():
    net = Net(embedding=nn.Embedding(TOKENS, 8, max_norm=1.0))
    model = fused_lora.accelerate(wrap(net, target_modules=["emb", "head"]))
    assert kinds(model)["emb"] == "max_norm changes rows"
    with quiet():
        dora = fused_lora.accelerate(wrap(Net(), target_modules=["emb", "head"], use_dora=True))
    assert kinds(dora)["emb"] == "DoraEmbeddingVariant"
    fused_lora.restore(dora)
    assert type(dora.base_model.model.emb) is peft.tuners.lora.Embedding
