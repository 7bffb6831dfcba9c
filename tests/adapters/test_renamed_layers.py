"""Adapters whose layers have names of other releases of transformers: read as the model calls them."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers import __version__ as TRANSFORMERS

import fused_lora
from fused_lora import AdapterError, AdapterStore
from fused_lora.modules.names import renamed
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
IDS = torch.tensor([[3, 7, 9, 60], [5, 6, 3, 2]])
PREFIX = "base_model.model."
# what transformers 5 calls the layers -> what transformers before 4.52 did
OLD = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model."}


def llava() -> nn.Module:
    torch.manual_seed(shifted(0))
    vision = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4, projection_dim=8)
    text = LlamaConfig(**SIZES, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63, image_seq_length=4)
    return LlavaForConditionalGeneration(config).eval()


def old_adapter(base, folder, **fields):
    """An adapter of ``base`` whose file has the old names; returns what it gives."""
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **fields)
    model = peft.get_peft_model(copy.deepcopy(base), settings).eval()
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(file).items()}
    for new, old in OLD.items():
        tensors = {old + k.removeprefix(new) if k.startswith(new) else k: t for k, t in tensors.items()}
    save_file({PREFIX + key: tensor for key, tensor in tensors.items()}, file)
    return model(IDS).logits.detach()


@pytest.mark.skipif(int(TRANSFORMERS.split(".")[0]) < 5, reason="the names of transformers 5")
def test_old_names_are_read_as_peft_reads_them(tmp_path):
    base = llava()
    expected = old_adapter(base, tmp_path / "old")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "old").eval()
    assert_close(theirs(IDS).logits, expected, terms=100)
    ours = copy.deepcopy(base)
    fused_lora.load_adapter(ours, tmp_path / "old")
    assert len(fused_lora.lora_layers(ours)) == 8  # those of the vision tower, too
    assert_close(ours(IDS).logits, expected, terms=500)
    store = AdapterStore(base)
    store.load("old", tmp_path / "old")
    with store.batch(["old", None]):
        assert_close(base(IDS).logits[0], expected[0], terms=500)
    fused_lora.save_adapter(ours, tmp_path / "new")  # under the names of today
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(llava()), tmp_path / "new").eval()
    assert_close(theirs(IDS).logits, expected, terms=100)


@pytest.mark.skipif(int(TRANSFORMERS.split(".")[0]) < 5, reason="the names of transformers 5")
@pytest.mark.parametrize("field, value", [("alpha_pattern", 4), ("rank_pattern", 2)])
def test_patterns_that_know_the_old_names_alone_are_refused(tmp_path, field, value):
    base = llava()
    old_adapter(base, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    pattern = {"language_model.model.layers.0.self_attn.q_proj": value, "v_proj": 2}
    entries = {**config, "r": 8 if field == "rank_pattern" else 2, field: pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(entries))
    with pytest.raises(AdapterError, match=f"{field}: expected keys that match 'model.language_model.layers.0"):
        fused_lora.load_adapter(base, tmp_path)


def test_all_layers_have_one_name_each_or_none_is_renamed():
    known = {"model.language_model.layers.0.q", "model.language_model.layers.1.q", "model.visual.a", "visual.b"}
    old = {"model.layers.0.q": "model.language_model.layers.0.q", "visual.a": "model.visual.a"}
    assert renamed(old, known) == old
    assert renamed([*old, "visual.b"], known) == old
    assert renamed([*old, "model.layers.2.q"], known) == {}  # one that is nowhere
    assert renamed([*old, "language_model.layers.0.q"], known) == {}  # two that mean the same
    assert renamed(["model.language_model.layers.0.q"], {"model.layers.0.q"}) == {}  # a part, for a text model
    assert renamed(["model.layers.0.q"], {"model.language_model.layers.0.q", "backbone.layers.0.q"}) == {}


def test_layers_of_a_text_model_are_none_of_a_vision_model():
    layer = "encoder.layers.0.self_attn.q_proj"
    text, vision = {layer, "embeddings.token_embedding"}, {layer, "embeddings.position_embedding"}
    assert renamed([f"text_model.{layer}"], text) == {f"text_model.{layer}": layer}
    assert renamed([f"vision_model.{layer}"], vision) == {f"vision_model.{layer}": layer}
    assert renamed([f"text_model.{layer}"], vision) == {}
    assert renamed([f"vision_model.{layer}"], text) == {}
