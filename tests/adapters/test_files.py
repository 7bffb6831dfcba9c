"""Checkpoints: round trips with PEFT both ways to the bit, and saves that a kill at any moment cannot break."""

import copy
import errno
import json
import os
import shutil
import sys
import threading
import time
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fused_lora.adapters import AdapterError, checkpoint, load_adapter, read_adapter, save_adapter, staging, write
from fused_lora.modules.changes import CHANGING
from fused_lora.modules.config import LoraConfig
from fused_lora.modules.inject import AdapterNotFound, adapter_configs, inject, lora_layers, set_adapter
from fused_lora.modules.merging import merge, unmerge
from fused_lora.testing.numeric import assert_close
from helpers import interrupts
from helpers.alone import run_killed
from helpers.checkpoint_files import write_adapter
from helpers.seeds import shifted
from helpers.waiting import HANG, wait_for

FILES = ["adapter_config.json", "adapter_model.safetensors"]


class Mlp(nn.Module):
    def __init__(self, K=10, bias=True):
        super().__init__()
        self.fc1, self.act, self.norm = nn.Linear(K, 16, bias=bias), nn.Tanh(), nn.LayerNorm(16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16, bias=bias) for _ in range(2)])
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        x = self.norm(self.act(self.fc1(x)))
        for block in self.blocks:
            x = x + self.act(block(x))
        return self.out(x)


def llama():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    return LlamaForCausalLM(LlamaConfig(**sizes)), torch.arange(12).reshape(2, 6)


def gpt2():
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config), torch.arange(12).reshape(2, 6)


def mlp(dtype=torch.float32):
    return Mlp().to(dtype), torch.randn(5, 10).to(dtype)


CASES = {
    "mlp": (mlp, {"target_modules": ["fc1", "blocks.1"]}),
    "regex": (mlp, {"target_modules": r"fc1|blocks\.\d"}),
    "llama": (llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.1}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "rslora": (mlp, {"target_modules": ["fc1", "out"], "use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        mlp,
        {
            "target_modules": ["fc1", "0", "1", "out"],
            "rank_pattern": {"^fc1": 2, r"blocks\.\d": 5},
            "alpha_pattern": {"blocks.0": 3, "out|fc1": 7.5},
        },
    ),
    "lora_bias": (mlp, {"target_modules": ["fc1", "out"], "lora_bias": True}),
    "lora_only": (mlp, {"target_modules": ["fc1", "0"], "bias": "lora_only"}),
    "bias all": (mlp, {"target_modules": ["fc1", "0"], "bias": "all", "lora_bias": True}),
    "layers": (llama, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "r": 1}),
    "bf16 base": (lambda: mlp(torch.bfloat16), {"target_modules": ["fc1", "out"]}),
    "exclude": (mlp, {"target_modules": "all-linear", "exclude_modules": ["out"]}),
    "orthogonal": (mlp, {"target_modules": ["fc1", "out"], "init_lora_weights": "orthogonal"}),
    "eva": (
        mlp,
        {"target_modules": ["fc1", "out"], "init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.5)},
    ),
    "eva's config alone": (mlp, {"target_modules": ["fc1", "out"], "eva_config": peft.EvaConfig()}),
}


def output(model, x):
    model.eval()
    with torch.no_grad():
        result = model(x)
    return getattr(result, "logits", result)


def shake(tensors):
    """Give every tensor values of its own, in place."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn(tensor.shape) * 0.2)


def peft_tensors(model, adapter_name="default"):
    return {k: v.clone() for k, v in peft.get_peft_model_state_dict(model, adapter_name=adapter_name).items()}


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_round_trip_with_peft(tmp_path, case):
    make, kwargs = CASES[case]
    torch.manual_seed(shifted(0))
    base, x = make()
    kwargs = {"r": 4, "lora_alpha": 6, **kwargs}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**kwargs))
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "peft")

    ours = copy.deepcopy(base)
    config = load_adapter(ours, tmp_path / "peft")
    assert set(lora_layers(ours)) == set(theirs.base_model.targeted_module_names)
    for path, layer in lora_layers(ours).items():
        their_layer = theirs.base_model.model.get_submodule(path)
        assert layer.scaling["default"] == their_layer.scaling["default"]
        assert layer.r["default"] == their_layer.r["default"]
    assert_close(output(ours, x), output(theirs, x), terms=300)
    assert config.inference_mode and not any(p.requires_grad for p in adapter_parameters(ours))

    save_adapter(ours, tmp_path / "same")
    assert_same_tensors(*(load_file(tmp_path / name / FILES[1]) for name in ("same", "peft")))
    ours_json, peft_json = (json.loads((tmp_path / name / FILES[0]).read_text()) for name in ("same", "peft"))
    for entries in (ours_json, peft_json):
        entries["target_modules"] = sorted(entries["target_modules"])
    assert ours_json == peft_json

    shake(adapter_parameters(ours))
    save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert_same_tensors(load_file(tmp_path / "ours" / FILES[1]), peft_tensors(back))
    assert_close(output(back, x), output(ours, x), terms=300)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga"])
def test_an_adapter_that_changed_its_base_loads_once_it_is_converted(tmp_path, init):
    torch.manual_seed(shifted(0))
    base, x = mlp()
    config = peft.LoraConfig(r=2, target_modules=["fc1", "1"], init_lora_weights=init)
    rewritten = copy.deepcopy(base)
    if init == "corda":  # preprocess_corda needs a package that PEFT does not ask for
        for layer in (rewritten.fc1, rewritten.blocks[1]):
            U, S, V = torch.svd_lowrank(layer.weight.detach(), q=2)
            layer.eigens = SimpleNamespace(U_WC=U, S_WC=S, V_WC=V)
    if init == "lora_ga":
        loraga = pytest.importorskip("peft.tuners.lora.loraga")
        config.lora_ga_config = peft.LoraGAConfig()
        loraga.preprocess_loraga(rewritten, config, train_step=lambda: rewritten(x).square().sum().backward())
    theirs = peft.get_peft_model(rewritten, config)
    theirs.save_pretrained(tmp_path / "start")
    json_file = tmp_path / "start" / FILES[0]
    json_file.write_text(json_file.read_text().replace(f'"{init}"', "true"))  # what the conversion asks for
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "as it is")
    with pytest.raises(
        AdapterError, match=f"init_lora_weights: .*path_initial_model_for_weight_conversion.*found {init}"
    ):
        load_adapter(copy.deepcopy(base), tmp_path / "as it is")
    theirs.peft_config["default"].init_lora_weights = init
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    ours = copy.deepcopy(base)
    loaded = load_adapter(ours, tmp_path / "plain")
    assert loaded.r == 4
    # the adapter's own start is still in the file
    assert init in ("pissa", "olora") or loaded.extra[f"{init}_config"]
    # PEFT's base was rewritten in fp32: its own rounding, not ours
    assert_close(output(ours.double(), x.double()).float(), output(theirs.double(), x.double()).float(), terms=300)


def adapter_parameters(model, name="default"):
    return [
        p
        for layer in lora_layers(model).values()
        for half in (layer.lora_A, layer.lora_B)
        if name in half
        for p in half[name].parameters()
    ]


@pytest.fixture
def adapted(tmp_path):
    """A small model with adapter "default" of rank 4, its input, and the checkpoint it came from."""
    torch.manual_seed(shifted(0))
    return adapted_model(tmp_path / "source", 4)


def adapted_model(folder, r, **kwargs):
    model, x = mlp()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=r, target_modules=["fc1", "0"], **kwargs))
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(folder)
    load_adapter(model, folder)
    return model, x, folder


def test_a_config_that_could_not_be_read_back_is_not_written(adapted, tmp_path):
    with pytest.raises(TypeError, match="base_model_name_or_path: expected a str or None, got 5"):
        save_adapter(adapted[0], tmp_path / "a", base_model_name_or_path=5)
    assert not (tmp_path / "a").exists()


def test_our_files(adapted, tmp_path):
    model, _, _ = adapted
    save_adapter(model, tmp_path / "a" / "b", base_model_name_or_path="somewhere/base")
    assert sorted(os.listdir(tmp_path / "a" / "b")) == FILES and os.listdir(tmp_path / "a") == ["b"]
    entries = json.loads((tmp_path / "a" / "b" / FILES[0]).read_text())
    assert entries["peft_type"] == "LORA" and entries["inference_mode"] is True
    assert entries["base_model_name_or_path"] == "somewhere/base"
    assert entries["target_modules"] == ["0", "fc1"]
    tensors = load_file(tmp_path / "a" / "b" / FILES[1])
    assert sorted(tensors) == [
        f"base_model.model.{path}.lora_{x}.weight" for path in ("blocks.0", "fc1") for x in ("A", "B")
    ]
    adapter = read_adapter(tmp_path / "a" / "b")
    assert adapter.config.r == 4 and list(adapter.biases) == []
    for path, layer in lora_layers(model).items():
        assert torch.equal(adapter.layers[path].lora_A, layer.lora_A["default"].weight)
        assert torch.equal(adapter.layers[path].lora_B, layer.lora_B["default"].weight)


def test_several_adapters_by_name(adapted, tmp_path):
    model, x, source = adapted
    expected = [t.clone() for t in adapter_parameters(model)]
    load_adapter(model, source, "other-1", is_trainable=True)
    assert all(p.requires_grad for p in adapter_parameters(model, "other-1"))
    assert not adapter_configs(model)["other-1"].inference_mode
    shake(adapter_parameters(model, "other-1"))
    assert all(torch.equal(a, b) for a, b in zip(expected, adapter_parameters(model), strict=True))
    save_adapter(model, tmp_path / "x", "other-1")
    assert torch.equal(read_adapter(tmp_path / "x").layers["fc1"].lora_A, model.fc1.lora_A["other-1"].weight)
    with pytest.raises(ValueError, match="'other-1' is taken"):
        load_adapter(model, source, "other-1")
    with pytest.raises(AdapterNotFound, match=r"'nope' not found; adapters of the model: 'default', 'other-1'"):
        save_adapter(model, tmp_path / "y", "nope")
    with pytest.raises(ValueError, match="adapter_name must be"):
        save_adapter(model, tmp_path / "y", "../up")
    assert not (tmp_path / "y").exists()


INJECTED = {
    "mlp": (mlp, {"target_modules": "all-linear"}),
    "ambiguous names": (mlp, {"target_modules": "all-linear", "exclude_modules": ["blocks.1", "out"]}),
    # the first pattern that matches decides, not the first in the alphabet
    "order of patterns": (
        mlp,
        {
            "target_modules": ["fc1", "blocks.0", "blocks.1"],
            "rank_pattern": {"blocks.1": 2, "1": 7},
            "alpha_pattern": {"blocks.0": 16, "0": 2},
        },
    ),
    "regex": (mlp, {"target_modules": r"blocks\.\d|out", "rank_pattern": {r"blocks\.[01]": 2}, "bias": "lora_only"}),
    "llama": (llama, {"target_modules": "all-linear", "init_lora_weights": "gaussian"}),
    "gpt2": (gpt2, {"target_modules": "all-linear", "use_rslora": True}),
    "bias all": (mlp, {"target_modules": ["fc1"], "bias": "all", "lora_bias": True}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", INJECTED)
def test_injected_adapters_load_in_peft(tmp_path, case):
    make, kwargs = INJECTED[case]
    torch.manual_seed(shifted(0))
    base, x = make()
    ours = inject(copy.deepcopy(base), LoraConfig(r=3, lora_alpha=5, lora_dropout=0.2, **kwargs))
    shake(p for p in ours.parameters() if p.requires_grad)
    save_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a")
    assert set(theirs.base_model.targeted_module_names) == set(lora_layers(ours))
    assert_same_tensors(load_file(tmp_path / "a" / FILES[1]), peft_tensors(theirs))
    assert_close(output(theirs, x), output(ours, x), terms=300)

    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "a", is_trainable=True)
    assert torch.equal(output(again, x), output(ours, x))
    trainable = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (ours, again)]
    assert trainable[0] == trainable[1] and trainable[0]


def test_the_second_adapter_may_have_other_layers(adapted, tmp_path):
    model, x, source = adapted
    first = output(model, x)
    other = peft.get_peft_model(mlp()[0], peft.LoraConfig(r=2, target_modules=["fc1", "out"], init_lora_weights=False))
    other.save_pretrained(tmp_path / "other")
    load_adapter(model, tmp_path / "other", "other")
    assert torch.equal(output(model, x), first)  # loaded, not chosen
    set_adapter(model, "other")
    assert set(load_file(tmp_path / "other" / FILES[1])) == saved_keys(model, tmp_path / "x", "other")
    assert set(load_file(source / FILES[1])) == saved_keys(model, tmp_path / "y", "default")
    alone = mlp()[0]
    alone.load_state_dict(base_state(model))
    load_adapter(alone, tmp_path / "other")
    assert torch.equal(output(model, x), output(alone, x))


def saved_keys(model, folder, adapter_name):
    save_adapter(model, folder, adapter_name)
    return set(load_file(folder / FILES[1]))


def base_state(model):
    return {k.replace("base_layer.", ""): v for k, v in model.state_dict().items() if ".lora_" not in k}


def test_merged_models(tmp_path):
    """A merge changes nothing in what is saved; where base biases are part of it, saving and loading wait."""
    model, _, source = adapted_model(tmp_path / "source", 4)
    before = load_file(source / FILES[1])
    merge(model)
    save_adapter(model, tmp_path / "merged")
    assert_same_tensors(load_file(tmp_path / "merged" / FILES[1]), before)
    adapted_model(tmp_path / "biased", 4, bias="lora_only", lora_bias=True)
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="unmerge before loading"):
        load_adapter(model, tmp_path / "biased", "second")
    assert model.state_dict().keys() == bits.keys() and all(
        torch.equal(v, bits[k]) for k, v in model.state_dict().items()
    )
    unmerge(model)
    load_adapter(model, tmp_path / "biased", "second")
    merge(model, ["second"])
    with pytest.raises(RuntimeError, match="unmerge before saving"):
        save_adapter(model, tmp_path / "x", "second")
    with pytest.raises(ValueError, match="only one adapter may train biases"):
        unmerge(model)
        load_adapter(model, tmp_path / "biased", "third")


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_train_or_eval_is_pefts(tmp_path, training, is_trainable):
    """A loaded adapter predicts without dropout, unless it is to be trained."""
    torch.manual_seed(shifted(6))
    base, x = mlp()
    config = LoraConfig(r=2, target_modules=["fc1"], lora_dropout=0.5, init_lora_weights=False)
    save_adapter(inject(copy.deepcopy(base), config), tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base).train(training), tmp_path, is_trainable=is_trainable)
    load_adapter(base.train(training), tmp_path, is_trainable=is_trainable)
    assert all(module.training is theirs.base_model.model.training for module in base.modules())
    assert torch.equal(base(x), base(x)) is not base.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [True, False])
def test_dtype_of_the_adapter_is_pefts(tmp_path, dtype, autocast):
    model, _ = mlp(dtype)
    config = peft.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=autocast)
    theirs.save_pretrained(tmp_path / "a")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a", autocast_adapter_dtype=autocast)
    load_adapter(model, tmp_path / "a", autocast_adapter_dtype=autocast)
    expected = back.base_model.model.fc1.lora_A["default"].weight
    assert model.fc1.lora_A["default"].weight.dtype == expected.dtype
    assert torch.equal(model.fc1.lora_A["default"].weight, expected)


# every key that PEFT 0.10.0 wrote
PEFT_0_10 = """{"alpha_pattern": {}, "auto_mapping": null, "base_model_name_or_path": "x/y", "bias": "none",
"fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, "layer_replication": null,
"layers_pattern": null, "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 16, "lora_dropout": 0.05,
"megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null, "peft_type": "LORA", "r": 4,
"rank_pattern": {}, "revision": null, "target_modules": ["fc1", "0"], "task_type": "CAUSAL_LM", "use_dora": false,
"use_rslora": false}"""


def test_old_config_without_metadata(adapted, tmp_path):
    source = adapted[2]
    save_file(load_file(source / FILES[1]), tmp_path / "plain")
    os.replace(tmp_path / "plain", source / FILES[1])
    (source / FILES[0]).write_text(PEFT_0_10)
    model = mlp()[0]
    config = load_adapter(model, source)
    assert model.fc1.scaling["default"] == 4.0 and config.lora_dropout == 0.05
    save_adapter(model, source)
    again = json.loads((source / FILES[0]).read_text())
    assert {k: v for k, v in again.items() if k in json.loads(PEFT_0_10)} == {
        **json.loads(PEFT_0_10),
        "target_modules": ["0", "fc1"],
    }


def leftovers(parent):
    return [name for name in os.listdir(parent) if "fused_lora_" in name]


def write_pair(number):
    """A writer whose two files carry the same number."""

    def write(stage):
        for name in ("a.json", "b.bin"):
            with open(os.path.join(stage, name), "x") as file:
                file.write(str(number))
        return "a.json", "b.bin"

    return write


def pair(folder):
    return (folder / "a.json").read_text(), (folder / "b.bin").read_text()


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(staging, "exchange", lambda a, b: False)
    return request.param


def test_other_entries_stay(tmp_path, way):
    target = tmp_path / "t"
    (target / "sub" / "deep").mkdir(parents=True)
    (target / "README.md").write_text("read me")
    (target / "sub" / "deep" / "x").write_text("x")
    (target / "link").symlink_to("README.md")
    os.mkfifo(target / "fifo")
    os.chmod(target, 0o750)
    (target / "sub" / "deep").chmod(0o711)
    inode = (target / "README.md").stat().st_ino
    for number in range(3):
        staging.replace_directory(target, write_pair(number))
        assert pair(target) == (str(number), str(number))
    assert sorted(os.listdir(target)) == ["README.md", "a.json", "b.bin", "fifo", "link", "sub"]
    assert (target / "sub" / "deep" / "x").read_text() == "x" and (target / "link").read_text() == "read me"
    assert os.readlink(target / "link") == "README.md" and (target / "README.md").stat().st_ino == inode
    assert target.stat().st_mode & 0o777 == 0o750 and (target / "sub" / "deep").stat().st_mode & 0o777 == 0o711
    assert leftovers(tmp_path) == []


def test_an_interrupt_of_a_save_leaves_all_old_files_or_all_new_ones(tmp_path, way):
    target = tmp_path / "parent" / "t"

    def begin():
        shutil.rmtree(tmp_path / "parent", ignore_errors=True)
        staging.replace_directory(target, write_pair(0))
        (target / "other").write_text("other")

    for place in interrupts.everywhere(begin, lambda: staging.replace_directory(target, write_pair(1))):
        assert target.is_dir() and pair(target) in (("0", "0"), ("1", "1")), place
        assert (target / "other").read_text() == "other", place
        staging.replace_directory(target, write_pair(2))
        assert pair(target) == ("2", "2") and leftovers(target.parent) == [], place


def test_a_file_that_is_written_over_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """A file of PEFT's has no digest that would tell."""
    weights = write_adapter(tmp_path / "a", {"0": (8, 8)}) / "adapter_model.safetensors"
    real = checkpoint.read_tensors
    os.utime(weights, (0, 0))  # clocks of some file systems are coarse

    def read(path, file, header):
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
        return real(path, file, header)

    wanted = read_adapter(tmp_path / "a").layers["0"].lora_B
    with monkeypatch.context() as patch, pytest.raises(AdapterError, match="expected a file that stays as it is"):
        patch.setattr(checkpoint, "read_tensors", read)
        read_adapter(tmp_path / "a")
    assert not torch.equal(read_adapter(tmp_path / "a").layers["0"].lora_B, wanted)


def test_a_folder_that_cannot_be_emptied_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """Its old entries could not be removed when the new folder is in its place."""
    target = tmp_path / "t"
    staging.replace_directory(target, write_pair(0))
    monkeypatch.setattr(os, "access", lambda path, _: path != str(target))
    with pytest.raises(PermissionError, match="no permission to write in '.*/t'"):
        staging.replace_directory(target, write_pair(1))
    assert pair(target) == ("0", "0") and leftovers(tmp_path) == []


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    def no_link(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    staging.replace_directory(tmp_path / "t", write_pair(0))
    (tmp_path / "t" / "c").write_text("c")
    monkeypatch.setattr(os, "link", no_link)
    staging.replace_directory(tmp_path / "t", write_pair(1))
    assert pair(tmp_path / "t") == ("1", "1") and (tmp_path / "t" / "c").read_text() == "c"


def test_what_appears_during_a_save_is_kept(tmp_path, monkeypatch, way):
    target = tmp_path / "t"
    (target / "sub").mkdir(parents=True)
    put_in_place = staging.put_in_place

    def late(stage, target_path, exists):
        (target / "late").write_text("late")
        (target / "sub" / "late").write_text("late")
        put_in_place(stage, target_path, exists)

    monkeypatch.setattr(staging, "put_in_place", late)
    staging.replace_directory(target, write_pair(1))
    assert (target / "late").exists() and (target / "sub" / "late").exists() and pair(target) == ("1", "1")


def test_targets_that_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="must be a directory, got the file"):
        staging.replace_directory(tmp_path / "file", write_pair(0))
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for path in (".", "..", "/", tmp_path):
        with pytest.raises(ValueError, match="must not be the root, the current directory or above"):
            staging.replace_directory(path, write_pair(0))
    assert sorted(os.listdir(tmp_path)) == ["file", "here"]
    staging.replace_directory("beside", write_pair(0))
    assert pair(tmp_path / "here" / "below" / "beside") == ("0", "0")


def test_a_link_to_the_folder_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    staging.replace_directory(tmp_path / "link", write_pair(5))
    assert (tmp_path / "link").is_symlink() and pair(tmp_path / "real") == ("5", "5")


def test_a_failure_anywhere_leaves_the_old_pair(tmp_path, monkeypatch, way):
    """Each system call of a save fails once: the old pair stays, or the failure comes after the new one is there."""
    target = tmp_path / "t"
    staging.replace_directory(target, write_pair(0))
    (target / "other").write_text("other")
    calls = ["mkdir", "fsync", "open", "rename", "link", "chmod"]
    failures = 0
    for name in calls:
        real = getattr(os, name)
        for nth in range(8):
            count = 0

            def failing(*args, real=real, nth=nth, **kwargs):
                nonlocal count
                count += 1
                if count == nth + 1:
                    raise OSError(errno.ENOSPC, "no space left")
                return real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, failing)
                try:
                    staging.replace_directory(target, write_pair(nth + 1))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    failures += 1
            assert len(set(pair(target))) == 1, (name, nth)
            assert (target / "other").read_text() == "other"
    staging.replace_directory(target, write_pair(99))
    assert pair(target) == ("99", "99") and leftovers(tmp_path) == [] and failures >= 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names the files by /proc")
def test_everything_is_durable_before_it_is_visible(tmp_path, monkeypatch):
    log = []
    fsync, exchange = os.fsync, staging.exchange
    staging.replace_directory(tmp_path / "t", write_pair(0))
    monkeypatch.setattr(
        os, "fsync", lambda fd: (log.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(staging, "exchange", lambda a, b: (log.append("exchange"), exchange(a, b))[1])
    staging.replace_directory(tmp_path / "t", write_pair(1))
    stage = next(name for name in log if "fused_lora_tmp" in name)
    assert sorted(log[:2]) == ["a.json", "b.bin"] and log[2:] == [stage, "exchange", tmp_path.name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_between_two_renames_the_old_pair_comes_back(tmp_path, monkeypatch):
    target = tmp_path / "t"
    staging.replace_directory(target, write_pair(7))
    monkeypatch.setattr(staging, "exchange", lambda a, b: False)
    real = os.rename

    def stop(source, destination):
        real(source, destination)
        if destination.endswith("_old"):
            time.sleep(HANG)

    def work():
        os.rename = stop
        staging.replace_directory(target, write_pair(8))

    def gone():
        wait_for(lambda: not target.exists())

    run_killed(work, gone)
    assert not target.exists()
    with pytest.raises(RuntimeError, match="stop here"):
        staging.replace_directory(target, fail)
    assert pair(target) == ("7", "7") and leftovers(tmp_path) == []


def fail(stage):
    raise RuntimeError("stop here")


def test_a_reader_beside_a_saver_sees_whole_checkpoints(tmp_path):
    torch.manual_seed(shifted(0))
    models = [adapted_model(tmp_path / f"r{r}", r, lora_alpha=r + 1)[0] for r in (4, 8)]
    target, stop = tmp_path / "t", threading.Event()
    save_adapter(models[0], target)

    def loop():
        while not stop.is_set():
            for model in models:
                save_adapter(model, target)

    saver, seen = threading.Thread(target=loop), set()
    saver.start()
    try:
        for count in range(30_000):  # on a busy machine a save may take as long as hundreds of reads
            a = read_adapter(target)
            seen.add((a.config.r, a.config.lora_alpha, a.layers["fc1"].lora_A.shape[0]))
            if count >= 300 and len(seen) > 1:
                break
    finally:
        stop.set()
        saver.join()
    assert seen == {(4, 5, 4), (8, 9, 8)}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_a_save_has_replaced_is_read_again(name, tmp_path, monkeypatch):
    """Also where the old one has gone, and the new one is not there, by the time that it is listed for a message."""
    adapted_model(tmp_path / "t", 4, lora_alpha=5)
    adapted_model(tmp_path / "new", 8, lora_alpha=9)
    found, replaced, asked = checkpoint._exists, checkpoint._replaced, []

    def exists(path, dir_fd):
        if os.path.basename(path) == name and not asked:
            asked.append(path)
            shutil.rmtree(tmp_path / "t")
        return found(path, dir_fd)

    def put_in_place(folder, dir_fd):
        (tmp_path / "new").rename(tmp_path / "t")
        return replaced(folder, dir_fd)

    monkeypatch.setattr(checkpoint, "_exists", exists)
    monkeypatch.setattr(checkpoint, "_replaced", put_in_place)
    assert read_adapter(tmp_path / "t").config.r == 8 and asked


def test_savers_wait_for_each_other(tmp_path):
    threads = [
        threading.Thread(target=staging.replace_directory, args=(tmp_path / "t", write_pair(i))) for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = pair(tmp_path / "t")
    assert first == second and leftovers(tmp_path) == []


@pytest.mark.filterwarnings("ignore")
def test_undecided_expressions_for_alpha_are_written_as_paths(tmp_path):
    torch.manual_seed(shifted(0))
    base, x = mlp()
    pattern = {r"blocks\.(?=.)\d": 3, "fc1|fc2": 6}
    config = dict(target_modules=["fc1", "0", "1", "out"], r=4, lora_alpha=6, init_lora_weights=False)
    ours = inject(copy.deepcopy(base), LoraConfig(**config, alpha_pattern=pattern))
    shake(adapter_parameters(ours))
    save_adapter(ours, tmp_path)
    written = json.loads((tmp_path / FILES[0]).read_text())["alpha_pattern"]
    assert written == {r"^blocks\.0": 3, r"^blocks\.1": 3}
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert torch.equal(output(again, x), output(ours, x))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(output(theirs, x), output(ours, x), terms=300)


@pytest.mark.parametrize("path", [None, 5, ["a"]], ids=repr)
def test_a_directory_is_a_path(adapted, path):
    for call in (lambda: save_adapter(adapted[0], path), lambda: read_adapter(path)):
        with pytest.raises(TypeError, match="directory: expected a path, got"):
            call()


def test_a_name_that_is_no_utf8_is_not_written(adapted, tmp_path):
    model = adapted[0]
    model.name_or_path = os.fsdecode(b"/data/mod\xe8le")
    with pytest.raises(ValueError, match="base_model_name_or_path must be text that UTF-8 can hold, got '/data"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    save_adapter(model, tmp_path / "a", base_model_name_or_path="model")
    assert read_adapter(tmp_path / "a").config.base_model_name_or_path == "model"


def test_a_model_that_cannot_be_saved_leaves_the_folder_alone(adapted, tmp_path):
    model = adapted[0]
    save_adapter(model, tmp_path / "a")
    before = [(tmp_path / "a" / name).read_bytes() for name in FILES]
    weight = model.fc1.lora_B["default"].weight
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"fc1\.lora_B\.weight must hold finite values, got NaN or Inf"):
        save_adapter(model, tmp_path / "a")
    with torch.no_grad():
        weight[0, 0] = 0
    model.double()
    with pytest.raises(ValueError, match="must have a dtype of F32, F16, BF16, got torch.float64"):
        save_adapter(model, tmp_path / "a")
    model.float()
    adapter_configs(model)["default"].lora_alpha = 3
    with pytest.raises(RuntimeError, match=r"has \(r, lora_alpha\) = \(4, 8\), which the config does not give"):
        save_adapter(model, tmp_path / "a")
    assert [(tmp_path / "a" / name).read_bytes() for name in FILES] == before


def test_a_save_walks_the_model_alone(tmp_path, monkeypatch):
    """Another thread may add or delete an adapter at any moment."""
    model, walked = inject(mlp()[0], LoraConfig(r=2, target_modules=["fc1"]), "a"), []
    for name in ("named_modules", "lora_layers", "adapter_configs", "unwrapped", "base_settings"):
        inner = getattr(write, name)
        monkeypatch.setattr(write, name, lambda *a, _inner=inner: [walked.append(id(model) in CHANGING), _inner(*a)][1])
    save_adapter(model, tmp_path / "a", "a")
    assert len(walked) >= 5 and all(walked)
