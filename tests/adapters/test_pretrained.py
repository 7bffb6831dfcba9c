"""save_pretrained of injected models: the adapter, the merged model, or an error that says what to call."""

import copy
import gc
import json
import pickle
import weakref

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import fused_lora
from fused_lora import LoraConfig
from fused_lora.adapters.pretrained import SavesAdapters, plain_state_dict
from fused_lora.testing.numeric import assert_close
from helpers import training

SIZES = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48, vocab_size=61)


def llama():
    return training.tiny_llama().eval()


def tied_llama():
    return training.llama(tie_word_embeddings=True).eval()


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def bert():
    return BertModel(BertConfig(**SIZES)).eval()


MODELS = {"llama": llama, "tied llama": tied_llama, "gpt2": gpt2, "bert": bert}
IDS = torch.arange(3, 27).reshape(2, 12)


def output(model):
    with torch.no_grad():
        result = model.eval()(IDS)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def auto(model):
    return AutoModel if isinstance(model, BertModel) else AutoModelForCausalLM


def saved_base(make, folder):
    """A model that was loaded from ``folder``, so that its adapters name it as their base."""
    make().save_pretrained(folder)
    return auto(make()).from_pretrained(folder)


def injected(model, **fields):
    fields = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False, **fields}
    return fused_lora.inject(model, LoraConfig(**fields))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_an_adapter_comes_back_through_transformers_and_peft(make, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = injected(saved_base(make, base))
    expected = output(model)
    model.save_pretrained(adapter)
    assert files(adapter).keys() == {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"}
    assert_close(output(auto(model).from_pretrained(adapter)), expected, terms=1000)
    plain = auto(model).from_pretrained(base)
    assert_close(output(peft.PeftModel.from_pretrained(copy.deepcopy(plain), adapter)), expected, terms=1000)
    fused_lora.load_adapter(plain, adapter)
    assert torch.equal(output(plain), expected)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_merged_model_comes_back_as_a_plain_one(make, tmp_path):
    model = injected(make())
    keys = set(make().state_dict())
    fused_lora.merge(model)
    expected = output(model)
    assert set(plain_state_dict(model)) == keys
    model.save_pretrained(tmp_path)
    loaded, found = auto(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(output(loaded), expected)
    fused_lora.unmerge(model)
    fused_lora.unload(model, merge_adapters=True)
    model.save_pretrained(tmp_path / "unloaded")
    assert torch.equal(output(auto(model).from_pretrained(tmp_path / "unloaded")), expected)


def test_tensors_that_were_gathered_elsewhere(tmp_path):
    """The state dict that a trainer passes stands for the model's own tensors, under the names of a wrapped model."""
    model = injected(llama())
    gathered = {f"_orig_mod.{name}": t.clone() for name, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "whole")
    fused_lora.merge(model)
    merged = {f"_orig_mod.{name}": t.clone() for name, t in model.state_dict().items()}
    expected = output(model)
    fused_lora.unmerge(model)
    for layer in fused_lora.lora_layers(model).values():
        layer.lora_A["default"].weight.data = torch.empty(0)
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    assert files(tmp_path / "gathered") == files(tmp_path / "whole")
    del gathered[next(name for name in gathered if "lora_A" in name)]
    with pytest.raises(ValueError, match="state_dict: expected a tensor .*lora_A.default.weight', found none"):
        model.save_pretrained(tmp_path / "part", state_dict=gathered)
    assert not (tmp_path / "part").exists()
    other = injected(llama())
    fused_lora.merge(other)
    other.save_pretrained(tmp_path / "merged", state_dict=merged)
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_what_trains_goes_with_the_adapter(tmp_path):
    model = injected(llama())
    fused_lora.inject(model, LoraConfig(r=2, target_modules=["q_proj"]), "other")
    model.lm_head.requires_grad_(True)
    model.save_pretrained(tmp_path)
    named = dict(model.named_parameters())
    held = load_file(tmp_path / "model.safetensors")
    assert held.keys() == {name for name in named if "lora_" in name or name == "lm_head.weight"}
    assert all(torch.equal(tensor, named[name]) for name, tensor in held.items())


def test_another_process_than_the_main_one_writes_nothing(tmp_path):
    injected(llama()).save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = llama()

    def forward(self, x):
        return self.inner(x)


def test_what_is_neither_an_adapter_nor_a_plain_model_is_refused(tmp_path):
    model = injected(llama(), target_modules=["q_proj"])
    fused_lora.inject(model, LoraConfig(r=2, target_modules=["v_proj"]), "other")
    fused_lora.set_adapter(model, ["default", "other"])
    with pytest.raises(ValueError, match="one active adapter, got .'default', 'other'.*save_adapter.*merge"):
        model.save_pretrained(tmp_path / "no")
    fused_lora.merge(model, ["other"])
    with pytest.raises(RuntimeError, match="q_proj' has no merged adapter but .'default'. active.*merge.*unmerge"):
        model.save_pretrained(tmp_path / "no")
    fused_lora.merge(model)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="holds an adapter.*choose another folder"):
        model.save_pretrained(tmp_path / "adapter")
    fused_lora.unmerge(model)
    fused_lora.set_adapter(model, "other")
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "no", push_to_hub=True)
    assert not (tmp_path / "no").exists() and len(list((tmp_path / "adapter").iterdir())) == 1


def test_a_part_of_the_model_is_saved_merged_only(tmp_path):
    outer = Wrapper()
    injected(outer)
    for part in (outer.inner, outer.inner.model):
        with pytest.raises(RuntimeError, match="is a part of the model that has the adapters.*save_adapter"):
            part.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()
    fused_lora.merge(outer)
    outer.inner.save_pretrained(tmp_path / "part")
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "part")), output(outer.inner))


def test_beside_a_whole_model_the_adapter_is_all_that_is_written(tmp_path):
    llama().save_pretrained(tmp_path)
    before = files(tmp_path)
    with pytest.warns(UserWarning, match="holds a whole model .config.json.*without the model.safetensors"):
        injected(llama()).save_pretrained(tmp_path)
    after = files(tmp_path)
    assert after.items() >= before.items() and len(after) == len(before) + 2


COPIES = {"copy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_saves_itself(how, tmp_path):
    model = injected(llama())
    copied = COPIES[how](model)
    for layer in fused_lora.lora_layers(model).values():
        layer.lora_B["default"].weight.data.zero_()
    assert type(copied) is type(model) and type(copied.model) is type(model.model)
    copied.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())


def test_the_class_is_changed_only_while_there_are_adapters():
    model, plain = llama(), llama()
    injected(model)
    for ours, theirs in ((model, plain), (model.model, plain.model)):
        assert (
            isinstance(ours, SavesAdapters) and isinstance(ours, type(theirs)) and str(type(ours)) == str(type(theirs))
        )
    assert type(model.model.layers[0]) is type(plain.model.layers[0])
    fused_lora.unload(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_the_model_is_freed_with_its_last_reference():
    model = injected(llama())
    weight = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_the_base_is_recorded(tmp_path):
    injected(saved_base(llama, tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
