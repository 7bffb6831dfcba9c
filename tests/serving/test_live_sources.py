"""store.load(name, a live model): what the model computes is served, or refused by name."""

import copy

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.serving.store import AdapterStore
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted

peft = pytest.importorskip("peft")
IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.fixture
def base():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(shifted(0))
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_bias=True, **sizes)).double().eval()


def filled(model):
    """The model in eval mode, with random changes to all that it trains."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def wrapped(base, **fields):
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **fields})
    return filled(peft.get_peft_model(copy.deepcopy(base), config))


@torch.no_grad()
def assert_served(base, live, name="x"):
    store = AdapterStore(base, dtype=torch.float64)
    store.load(name, live)
    with store.batch([name] * len(IDS)):
        ours = base(IDS).logits
    store.detach()
    assert_close(ours, live(IDS).logits, terms=2000)
    assert (live(IDS).logits - base(IDS).logits).abs().max() > 1e-3  # it matters


MORE = {
    r"modules_to_save=\['lm_head'\]": dict(modules_to_save=["lm_head"]),
    "bias='lora_only'": dict(bias="lora_only"),
    "bias='all'": dict(bias="all"),
    r"trainable_token_indices=\[5, 6\]": dict(trainable_token_indices=[5, 6]),
    "lora_bias=True": dict(lora_bias=True),
    "use_dora=True": dict(use_dora=True),
    "base weights: init_lora_weights .*'pissa'": dict(init_lora_weights="pissa"),
    "base weights: init_lora_weights .*'olora'": dict(init_lora_weights="olora"),
    "base weights: init_lora_weights .*'mica'": dict(init_lora_weights="mica"),
}


@pytest.mark.parametrize("message", MORE)
def test_more_than_lora_on_linear_layers_is_refused_by_name(base, message):
    live = wrapped(base.float(), **MORE[message])
    store = AdapterStore(base)
    with pytest.raises(ValueError, match=f"source: adapter 'default' .*{message}"):
        store.load("x", live)
    with pytest.raises(ValueError, match=message):
        store.load_async("x", torch.nn.Sequential(live)).result()  # as it is inside of another wrapper
    assert store.names() == []


def test_what_a_config_does_not_say_is_found_in_the_modules(base):
    live = wrapped(base, modules_to_save=["lm_head"])
    live.peft_config["default"].modules_to_save = None
    with pytest.raises(ValueError, match="has modules_to_save at 'lm_head'"):
        AdapterStore(base).load("x", live)


@pytest.mark.parametrize(
    "fields",
    [
        dict(use_rslora=True),
        dict(init_lora_weights="orthogonal"),
        dict(rank_pattern={"1.*q_proj": 2}),
        dict(target_modules=["q_proj", "embed_tokens"]),
    ],
)
def test_plain_adapters_are_served_as_peft_computes_them(base, fields):
    assert_served(base, wrapped(base, **fields))


def test_what_compile_wraps_inside_the_model_goes_by_its_own_name(base):
    live = wrapped(base)
    blocks = live.base_model.model.model.layers
    blocks[0] = torch.compile(blocks[0], backend="eager")
    assert_served(base, live)


def test_an_eva_adapter_is_served(base):
    live = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig()),
    )
    assert_served(base, filled(live))


def test_layers_that_the_store_has_not_are_listed(base):
    live = wrapped(base)
    with pytest.raises(ValueError, match=r"2 of the adapter's 2 layers .*rename: 'model' -> ''.*the model has 14"):
        AdapterStore(base.model).load("x", live)


def test_a_head_trained_beside_the_adapter_is_refused(base):
    live = fused_lora.inject(copy.deepcopy(base), fused_lora.LoraConfig(r=4, target_modules=["q_proj"]))
    live.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'lm_head.weight' is trained beside the adapter"):
        AdapterStore(base).load("x", filled(live))


def test_a_resized_vocabulary_is_refused(base):
    live = wrapped(base)
    live.resize_token_embeddings(70)
    with pytest.raises(
        ValueError, match=r"'model.embed_tokens.weight' has shape \[70, 32\], in the store's .*\[64, 32\]"
    ):
        AdapterStore(base).load("x", live)


@pytest.mark.parametrize(
    "layer, tied, what", [("embed_tokens", 0, "resized"), ("lm_head", 1, "resized"), ("lm_head", 0, "replaced")]
)
def test_a_vocabulary_that_is_resized_under_a_store_is_named(base, layer, tied, what):
    base.config.tie_word_embeddings = bool(tied)
    base.tie_weights()
    store = AdapterStore(base)
    store.load("x", wrapped(base, target_modules=[layer]))
    base.resize_token_embeddings(70)
    error = RuntimeError if what == "resized" else ValueError
    with store.batch(["x", None]), pytest.raises(error, match=f"{layer}' .*was {what} since the store was made"):
        base(IDS + 50)  # tokens that the adapter does not have among them


def test_only_the_adapter_that_is_asked_for_counts(base):
    live = wrapped(base)
    live.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]))
    store = AdapterStore(base)
    store.load("default", live)
    with pytest.raises(ValueError, match=r"adapter 'other' has modules_to_save=\['lm_head'\]"):
        store.load("other", live)


def test_ours_with_trained_biases_is_refused(base):
    live = fused_lora.inject(copy.deepcopy(base), fused_lora.LoraConfig(target_modules=["q_proj"], bias="all"))
    with pytest.raises(ValueError, match="adapter 'default' has bias='all'"):
        AdapterStore(base).load("x", nn.Sequential(live))
