"""Adapters of an output layer as PEFT writes them, with the base's own weight: it must be the model's to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fused_lora
from fused_lora.adapters import AdapterError, load_adapter, read_adapter
from fused_lora.testing.numeric import assert_close
from helpers import serving

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

KEY = "base_model.model.lm_head.base_layer.weight"
PLAIN = "base_model.model.lm_head.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of a tiny Llama, folder that PEFT saved, logits of PEFT's model for the ids 1 to 9)."""
    root = tmp_path_factory.mktemp("copies")
    tiny = serving.write_tiny_llama(root / "tiny")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(serving.load_model(tiny), config).eval()
    model.save_pretrained(root / "saved")
    with torch.no_grad():
        return tiny, root / "saved", model(torch.arange(1, 10)[None]).logits


def changed(folder, into, **tensors):
    """A copy of the adapter with other tensors; None takes one out."""
    into.mkdir()
    held = {**load_file(folder / "adapter_model.safetensors"), **tensors}
    kept = {key: tensor for key, tensor in held.items() if tensor is not None}
    save_file(kept, into / "adapter_model.safetensors", metadata={"format": "pt"})
    (into / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return into


@torch.no_grad()
def in_store(model, folder):
    store = fused_lora.AdapterStore(model)
    store.load("a", str(folder))
    with store.batch(["a"]):
        return model(torch.arange(1, 10)[None]).logits


@torch.no_grad()
def in_model(model, folder):
    load_adapter(model, folder)
    return model(torch.arange(1, 10)[None]).logits


BOTH = pytest.mark.parametrize("use", [in_store, in_model])


@BOTH
@pytest.mark.parametrize("key", [KEY, PLAIN])
@pytest.mark.numeric
def test_what_peft_saved_has_pefts_outputs(world, tmp_path, use, key):
    tiny, saved, logits = world
    weight = load_file(saved / "adapter_model.safetensors")[KEY]  # PEFT put it there
    folder = changed(saved, tmp_path / "a", **{KEY: None, key: weight})
    assert_close(use(serving.load_model(tiny), folder), logits, 1000)


@BOTH
def test_a_bit_that_differs_is_refused_by_name(world, tmp_path, use):
    tiny, saved, _ = world
    weight = load_file(saved / "adapter_model.safetensors")[KEY].clone()
    weight.view(torch.int32)[7, 5] ^= 1
    folder = changed(saved, tmp_path / "a", **{KEY: weight})
    model = serving.load_model(tiny)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError, match=f"1 of {weight.numel()} elements differ") as caught:
        use(model, folder)
    assert caught.value.key == KEY
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


@BOTH
@pytest.mark.parametrize(
    "key, change, said",
    [
        (KEY, lambda w: w[:-1].contiguous(), "a resized vocabulary"),
        (KEY, lambda w: w.to(torch.bfloat16), "elements differ"),  # narrower than the model, and rounded
        ("base_model.model.model.embed_tokens.weight", lambda w: w, "saved whole"),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", lambda w: w, "a parameter of the base"),
    ],
)
def test_other_weights_are_refused(world, tmp_path, use, key, change, said):
    tiny, saved, _ = world
    weight = load_file(saved / "adapter_model.safetensors")[KEY]
    folder = changed(saved, tmp_path / "a", **{key: change(weight)})
    with pytest.raises(AdapterError, match=said):
        use(serving.load_model(tiny), folder)


def test_a_narrow_copy_of_what_the_model_widened_is_the_same(world, tmp_path):
    """A server on a CPU holds a bf16 model in fp32."""
    tiny, saved, _ = world
    model = serving.load_model(tiny)
    model.lm_head.weight.data = model.lm_head.weight.data.to(torch.bfloat16).float()
    folder = changed(saved, tmp_path / "a", **{KEY: model.lm_head.weight.data.to(torch.bfloat16)})
    assert in_store(model, folder).isfinite().all()


def test_without_a_model_to_compare_with_it_is_refused(world):
    with pytest.raises(AdapterError, match="a parameter of the base model"):
        read_adapter(world[1])


def test_the_store_knows_from_the_header_what_cannot_fit(world, tmp_path):
    tiny, saved, _ = world
    weight = load_file(saved / "adapter_model.safetensors")[KEY]
    store = fused_lora.AdapterStore(serving.load_model(tiny))
    store.register("good", str(saved))
    store.register("bad", str(changed(saved, tmp_path / "a", **{KEY: weight[:-1].contiguous()})))
    assert store.probe("good") is None and "resized vocabulary" in str(store.probe("bad"))


def test_a_layer_that_is_left_out_takes_its_copy_with_it(world, tmp_path):
    tiny, saved, _ = world
    config = json.loads((saved / "adapter_config.json").read_text())
    held = load_file(saved / "adapter_model.safetensors")
    other = {key.replace("lm_head", "other_head"): held[key] for key in held if "lm_head" in key}
    folder = changed(saved, tmp_path / "a", **{key: None for key in held if "lm_head" in key}, **other)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "other_head"]}))
    store = fused_lora.AdapterStore(serving.load_model(tiny))
    with pytest.warns(UserWarning, match=r"3 of \d+ tensors are left out: .*other_head"):
        store.load("a", str(folder), allow_partial=True)


def test_embeddings_of_a_resized_vocabulary_are_the_adapters_own_once_they_are_named(world, tmp_path):
    """PEFT writes them over the base's (save_embedding_layers). The error tells how to read them here."""
    tiny, size = world[0], 70
    model = serving.load_model(tiny)
    model.resize_token_embeddings(size, mean_resizing=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    base = serving.load_model(tiny)
    with pytest.raises(AdapterError, match="Add its module to modules_to_save"):
        load_adapter(base, tmp_path)
    entries = json.loads((tmp_path / "adapter_config.json").read_text())
    entries["modules_to_save"] = ["embed_tokens", "lm_head"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(entries))
    with pytest.raises(AdapterError, match=r"found \[70, \d+\] .another vocabulary"):
        load_adapter(base, tmp_path)
    base.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        ids = torch.arange(size - 9, size)[None]
        load_adapter(base, tmp_path)
        assert_close(base(ids).logits, theirs(ids).logits, 1000)
