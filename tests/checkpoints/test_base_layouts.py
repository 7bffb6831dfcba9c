"""Published bases whose files have other names than the loaded model: merged into, and adapters extracted of them."""

import subprocess
import sys

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from fused_lora.adapters import AdapterError
from fused_lora.checkpoints import extract_adapter, merge_checkpoint, unmerge_checkpoint
from fused_lora.checkpoints.loading import loaded_names
from fused_lora.testing.numeric import assert_close
from helpers.checkpoint_files import SINGLE, change, contents, read_all
from helpers.published import SIZES, TEXT, adapted, built

VIT = dict(SIZES, image_size=16, patch_size=8, num_labels=3)
MOE = dict(TEXT, num_local_experts=4)
EXPERTS = dict(target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=[])
ALL = dict(target_modules="all-linear")
BY_TRANSFORMERS = {  # class, sizes, LoRA, a name in the files that the model has not
    "encoder.layer and attention.query": (tf.ViTForImageClassification, VIT, ALL, "attention.attention.query.weight"),
    "experts' input_linear": (tf.GraniteMoeForCausalLM, MOE, EXPERTS, "block_sparse_moe.input_linear.weight"),
    "mlp.router": (tf.PhimoeForCausalLM, MOE, dict(target_modules=["router"]), "block_sparse_moe.gate.weight"),
    "Wqkv in one": (getattr(tf, "NomicBertForMaskedLM", None), dict(SIZES, vocab_size=90), ALL, "attn.Wqkv.weight"),
}


@pytest.mark.parametrize("name", BY_TRANSFORMERS)
def test_names_that_transformers_gives(tmp_path, name):
    """Its own rules say where the layers are. PEFT's merge of the loaded model, and the same files back."""
    kind, sizes, config, stored = BY_TRANSFORMERS[name]
    if kind is None:
        pytest.skip("transformers has no such model yet")
    model = built(kind, sizes, tmp_path / "base")
    assert any(key.endswith(stored) for key in read_all(tmp_path / "base"))
    assert not any(key.endswith(stored) for key in model.state_dict())
    wrapped = adapted(model, tmp_path / "adapter", **config)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", record=tmp_path / "record")
    theirs = wrapped.merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    assert read_all(tmp_path / "out").keys() == read_all(tmp_path / "theirs").keys()
    merged, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    for key, tensor in merged.state_dict().items():
        assert_close(tensor, theirs.state_dict()[key], terms=100)
    unmerge_checkpoint(tmp_path / "out", tmp_path / "record", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "base")


def test_a_backbone_alone_under_the_names_of_a_model_with_a_head(tmp_path):
    model = built(tf.ViTModel, VIT, tmp_path / "base")
    wrapped = adapted(model, tmp_path / "adapter", **ALL)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    inside = {key.replace("model.model.", "model.model.vit."): tensor for key, tensor in keys.items()}
    save_file(inside, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    theirs = wrapped.merge_and_unload().state_dict()
    for key, tensor in tf.ViTModel.from_pretrained(tmp_path / "out").state_dict().items():
        assert_close(tensor, theirs[key], terms=100)


@pytest.mark.parametrize("config", [{}, {"architectures": ["NoSuchModel"]}, {"hidden_size": "many"}])
def test_names_are_unknown_without_a_config_that_transformers_takes(tmp_path, config):
    adapted(built(tf.ViTForImageClassification, VIT, tmp_path / "base"), tmp_path / "adapter", **ALL)
    if config:
        change(tmp_path / "base" / "config.json", **config)
    else:
        (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(AdapterError, match="layers are not in the checkpoint"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_names_where_a_config_asks_for_a_kernel_of_the_hub(tmp_path):
    """Nothing is computed: no kernel is downloaded, nor missed."""
    adapted(built(tf.ViTForImageClassification, VIT, tmp_path / "base"), tmp_path / "adapter", **ALL)
    change(tmp_path / "base" / "config.json", attn_implementation="kernels-community/flash-attn")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("count", [3000, 10**7])
def test_a_config_of_many_more_layers_than_the_files_have(tmp_path, monkeypatch, count):
    """A model of them would fill the memory, and for lists of some more the config's own class does."""
    base = tmp_path / "base"
    built(tf.ViTForImageClassification, VIT, base)
    names = list(read_all(base))
    assert loaded_names(str(base), names)
    change(base / "config.json", num_hidden_layers=count)
    if count > 10**6:
        monkeypatch.setattr(tf.ViTConfig, "from_dict", lambda about: pytest.fail("a config was made"))
    assert not loaded_names(str(base), names)


def test_names_in_another_order(tmp_path):
    """Some of the rules wait for a first name, and transformers sorts what it loads."""
    kind = getattr(tf, "Kimi_K25ForConditionalGeneration", None)
    if kind is None:
        pytest.skip("transformers has no such model yet")
    experts = dict(moe_intermediate_size=16, n_routed_experts=4)
    text = dict(TEXT, num_key_value_heads=4, first_k_dense_replace=2, **experts)
    config = kind.config_class(text_config=text, vision_config=SIZES, architectures=[kind.__name__])
    config.save_pretrained(tmp_path)
    blocks = [f"vision_tower.encoder.blocks.{i}.mlp.fc{j}.weight" for i in range(2) for j in range(2)]
    found = loaded_names(str(tmp_path), blocks[::-1])
    assert found["model.vision_tower.layers.1.mlp.fc1.weight"].stored == blocks[2]
    assert found["model.vision_tower.layers.1.mlp.fc2.weight"].stored == blocks[3]


def test_an_error_says_that_transformers_was_not_asked(tmp_path):
    adapted(built(tf.ViTForImageClassification, VIT, tmp_path / "base"), tmp_path / "adapter", **ALL)
    script = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "from fused_lora.checkpoints import merge_checkpoint\n"
        "merge_checkpoint(*sys.argv[1:])\n"
    )
    paths = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    run = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True)
    assert run.returncode == 1 and "transformers 5 was not asked, for it is not installed" in run.stderr, run.stderr


LLAVA = dict(text_config=dict(model_type="llama", **TEXT), vision_config=dict(SIZES, image_size=28, patch_size=14))
EXTRACTED = {
    "vit": (tf.ViTForImageClassification, VIT, ["q_proj"]),
    "llava": (tf.LlavaForConditionalGeneration, LLAVA, ["q_proj"]),
    "gpt2": (tf.GPT2LMHeadModel, dict(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=32), ["c_attn"]),
}


@pytest.mark.parametrize("name", EXTRACTED)
def test_peft_reads_what_was_extracted_of_files_with_other_names(tmp_path, name):
    kind, sizes, targets = EXTRACTED[name]
    model = built(kind, sizes, tmp_path / "base")
    wrapped = adapted(model, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=name == "gpt2")
    theirs = wrapped.merge_and_unload()
    theirs.save_pretrained(tmp_path / "tuned")
    extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "found", rank=4)
    again = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "found")
    merge_checkpoint(tmp_path / "base", tmp_path / "found", tmp_path / "out")
    for merged in (again.merge_and_unload(), kind.from_pretrained(tmp_path / "out")):
        for key, tensor in merged.state_dict().items():
            assert_close(tensor, theirs.state_dict()[key], terms=1000)


def test_extract_names_heads_and_embeddings_of_a_resized_vocabulary(tmp_path):
    sizes = dict(TEXT, tie_word_embeddings=False)
    model = built(tf.LlamaForCausalLM, sizes, tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    model.resize_token_embeddings(96)
    model.save_pretrained(tmp_path / "tuned")
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "found", rank=1)
    assert sorted(report.left_out) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert [layer["path"] for layer in report.layers] == ["model.layers.0.mlp.up_proj"]
    change(tmp_path / "tuned" / SINGLE, **{"model.layers.0.mlp.up_proj.weight": torch.ones(9, 32)})
    with pytest.raises(AdapterError, match=r"up_proj.weight: expected a shape \[48, 32\], found \[9, 32\]"):
        extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1)


@pytest.mark.parametrize("where", ["base", "tuned"])
@pytest.mark.parametrize("tied", [True, False])
def test_extract_where_one_of_two_stores_its_head(tmp_path, where, tied):
    """A second copy of the embedding is no change. Another head is named."""
    model = built(tf.LlamaForCausalLM, dict(TEXT, tie_word_embeddings=True), tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    weight = model.model.embed_tokens.weight.detach().clone()
    change(tmp_path / where / SINGLE, **{"lm_head.weight": weight if tied else weight + 1})
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "found", rank=1)
    assert report.left_out == ([] if tied else ["lm_head.weight"])
    change(tmp_path / where / SINGLE, **{"more.weight": weight})
    with pytest.raises(AdapterError, match="others: 'more.weight'"):
        extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1)
