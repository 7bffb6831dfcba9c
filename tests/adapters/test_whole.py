"""Saves of models that are wrapped, emptied or sharded: the bare model's keys and whole tensors, or nothing at all."""

import copy
from collections import OrderedDict

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fused_lora
from fused_lora import AdapterError, LoraConfig
from fused_lora.testing.numeric import assert_close
from helpers import processes, whole
from helpers.wrapped import compiled, each_block

WEIGHTS = "adapter_model.safetensors"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Sequential(OrderedDict(fc=nn.Linear(6, 6), norm=nn.LayerNorm(6))) for _ in range(2)]
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def injected(**fields):
    fields = {"r": 3, "target_modules": ["fc"], "init_lora_weights": False, **fields}
    return fused_lora.inject(Net().eval(), LoraConfig(**fields))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


WRAPS = {
    "compile": compiled,
    "compiled blocks": each_block(compiled),
    "checkpointed blocks": each_block(checkpoint_wrapper),
    "both": lambda model: compiled(each_block(checkpoint_wrapper)(model)),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_wrapped_model_is_saved_under_its_own_keys(tmp_path, wrap, bias):
    x = torch.randn(5, 6)
    model = injected(bias=bias)
    base = fused_lora.unload(copy.deepcopy(model))
    y = model(x)
    fused_lora.save_adapter(model, tmp_path / "bare")
    fused_lora.save_adapter(wrap(model), tmp_path / "wrapped")
    assert files(tmp_path / "wrapped") == files(tmp_path / "bare")
    assert_close(peft.PeftModel.from_pretrained(base, tmp_path / "wrapped")(x), y, terms=300)


@pytest.mark.parametrize(
    "old, new",
    [
        ("base_model.", "_orig_mod.base_model."),
        ("model.blocks", "model._orig_mod.blocks"),
        (".fc", "._checkpoint_wrapped_module.fc"),
        ("model.blocks", "model._fsdp_wrapped_module.blocks"),
    ],
)
def test_files_with_the_names_of_wrappers_load(tmp_path, old, new):
    """Keys as PEFT, and earlier savers here, wrote them for wrapped models."""
    model, loaded, x = injected(), Net().eval(), torch.randn(5, 6)
    loaded.load_state_dict(fused_lora.unload(copy.deepcopy(model)).state_dict())
    fused_lora.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    renamed = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, tmp_path / WEIGHTS)
    fused_lora.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), model(x))
    twice = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file({**renamed, **twice}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=r"one tensor for \S+\d.fc.lora_[AB].weight, found a second"):
        fused_lora.load_adapter(Net(), tmp_path)


def emptied(parameter):
    parameter.data = torch.empty(0)


def zero3(parameter):
    parameter.ds_shape = parameter.shape
    parameter.data = torch.empty(0)


def part(parameter):
    parameter.data = parameter.data.flatten()[:2].clone()


SHARDED = {"emptied": emptied, "zero3": zero3, "part": part}


@pytest.mark.parametrize("how", SHARDED)
@pytest.mark.parametrize(
    "which",
    ["blocks.0.fc.lora_A.default.weight", "blocks.1.fc.lora_B.default.weight", "blocks.0.fc.lora_B.default.bias"]
    + ["blocks.1.fc.base_layer.bias", "blocks.1.norm.bias"],
)
def test_a_parameter_that_is_not_whole_leaves_the_folder_alone(tmp_path, how, which):
    model = injected(bias="all", lora_bias=True)
    folder = tmp_path / "adapter"
    fused_lora.save_adapter(model, folder)
    before = files(folder)
    SHARDED[how](model.get_parameter(which))
    said = "DeepSpeed ZeRO-3.*GatheredParameters" if how == "zero3" else "of the whole layer|not empty"
    with pytest.raises(RuntimeError, match=which + f".*({said})"):
        fused_lora.save_adapter(model, folder)
    assert files(folder) == before and list(tmp_path.iterdir()) == [folder]


def test_a_gathered_zero3_model_is_saved(tmp_path):
    model = injected()
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
    fused_lora.save_adapter(model, tmp_path / "gathered")
    assert files(tmp_path / "gathered").keys() == {WEIGHTS, "adapter_config.json"}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, processes.run_in_processes({"all": {"folder": str(folder)}}, folder, whole.run_case)["all"]


needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch has no gloo"
)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2 linears", "ddp", "fsdp1"])
def test_sharded_models_are_saved_whole(sharded, kind):
    folder, found = sharded
    assert found[kind] == ["saved", "saved"]
    assert files(folder / kind) == files(folder / "bare")


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "embedding"])
def test_sharded_models_are_described_as_a_call_finds_them(sharded, kind):
    assert sharded[1][f"{kind}, reported"] == [["fused"] * 2] * 2


@needs_gloo
@pytest.mark.slow
def test_what_cannot_be_gathered_is_refused_in_every_process(sharded):
    folder, found = sharded
    for said in found["fsdp1, not summoned"]:
        assert "expected the shape [3, 6] of the whole layer" in said and "summon_full_params" in said
    assert not (folder / "fsdp1, not summoned").exists()


@needs_gloo
@pytest.mark.slow
def test_a_failed_write_is_an_error_in_every_process(sharded):
    first, second = sharded[1]["fsdp2, not a folder"]
    assert "directory must be a directory" in first and "process 0 could not write the files" in second
