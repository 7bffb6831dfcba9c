"""Paths of a model under the wrappers that torch puts around it and inside it."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fused_lora
from fused_lora import LoraConfig, LoraLinear
from fused_lora.modules.targets import match_targets
from fused_lora.modules.tree import above, bare_path, named_modules, own_path, parent_of, unwrapped
from helpers.wrapped import compiled, each_block


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.Linear(6, 6)  # a name that DDP uses, too
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.fc(torch.tanh(self.module(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks.append(self.blocks[0])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class DeepSpeedEngine(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


WRAPS = {
    "none": lambda model: model,
    "compile": compiled,
    "compiled blocks": each_block(compiled),
    "checkpoint": checkpoint_wrapper,
    "checkpointed blocks": each_block(checkpoint_wrapper),
    "data parallel": nn.DataParallel,
    "deepspeed": DeepSpeedEngine,
    "all": lambda model: compiled(nn.DataParallel(each_block(lambda b: compiled(checkpoint_wrapper(b)))(model))),
}
each_wrap = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


@each_wrap
def test_paths_are_those_of_the_bare_model(wrap):
    bare, model = Net(), Net()
    wrapped = wrap(model)
    assert unwrapped(wrapped) is model
    assert [name for name, _ in named_modules(wrapped)] == [name for name, _ in bare.named_modules()]
    config = LoraConfig(target_modules="all-linear")
    assert match_targets(wrapped, config) == match_targets(bare, config)


@each_wrap
@pytest.mark.parametrize("order", ["inject first", "wrap first"])
def test_everything_works_on_a_wrapped_model(wrap, order, tmp_path):
    config, x = LoraConfig(r=2, target_modules=["fc", "module"], init_lora_weights=False), torch.randn(3, 6)
    model = Net().eval()
    if order == "inject first":
        wrapped = wrap(fused_lora.inject(model, config))
    else:
        wrapped = wrap(model)
        assert fused_lora.inject(wrapped, config) is wrapped
    y = model(x)
    paths = [f"blocks.{i}.{name}" for i in range(2) for name in ("module", "fc")]
    assert list(fused_lora.lora_layers(wrapped)) == paths and list(fused_lora.adapter_configs(wrapped)) == ["default"]
    fused_lora.save_adapter(wrapped, tmp_path / "adapter")
    fused_lora.load_adapter(wrapped, tmp_path / "adapter", "copy")
    fused_lora.set_adapter(wrapped, "copy")
    assert torch.equal(model(x), y)
    fused_lora.delete_adapter(wrapped, "default")
    fused_lora.merge(wrapped)
    assert all(layer.merged for layer in fused_lora.lora_layers(model).values())
    fused_lora.unmerge(wrapped)
    fused_lora.unload(wrapped)
    assert not any(isinstance(m, LoraLinear) for m in model.modules()) and not hasattr(model, "peft_config")


def test_a_layer_that_is_wrapped_by_itself():
    model, config = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0", "1"])
    model[1] = compiled(model[1])
    with pytest.raises(RuntimeError, match="'1' is wrapped by a OptimizedModule of its own"):
        fused_lora.inject(model, config)
    assert not fused_lora.lora_layers(model) and all(p.requires_grad for p in model.parameters())
    model[1] = model[1]._orig_mod
    fused_lora.inject(model, config)
    layer = model[1]
    model[1] = checkpoint_wrapper(layer)
    with pytest.raises(RuntimeError, match="'1' is wrapped by a CheckpointWrapper of its own"):
        fused_lora.unload(model, merge_adapters=True)
    assert len(fused_lora.lora_layers(model)) == 2 and not layer.merged
    with pytest.raises(RuntimeError, match="wrapped by"):
        parent_of(dict(named_modules(model)), "1")


def test_own_path():
    assert own_path("a._orig_mod.b._checkpoint_wrapped_module.c") == own_path("_fsdp_wrapped_module.a.b.c") == "a.b.c"
    assert own_path("module.a_orig_mod._x") == "module.a_orig_mod._x"


def test_names_that_others_put_before_or_into_a_path():
    assert bare_path("module.base_model.model._orig_mod.layers.0._checkpoint_wrapped_module.q") == "layers.0.q"
    assert bare_path("layers.module.q") == "layers.module.q"
    assert above("a.b.c") == ["a", "a.b"] and above("a") == []
