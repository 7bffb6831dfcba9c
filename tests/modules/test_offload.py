"""Adapters on models whose weights are elsewhere between calls: made where the layer runs, or refused."""

import copy
import sys
import types

import peft
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

accelerate = pytest.importorskip("accelerate")
Conv1D = pytest.importorskip("transformers").pytorch_utils.Conv1D

import fused_lora  # noqa: E402
from fused_lora import LoraConfig  # noqa: E402
from fused_lora.bases.experts import experts_forward  # noqa: E402
from fused_lora.modules.offload import execution_device  # noqa: E402
from fused_lora.testing.numeric import assert_close  # noqa: E402
from helpers import training  # noqa: E402
from helpers.experts import routed, router_config  # noqa: E402
from helpers.seeds import shifted  # noqa: E402

IDS = torch.arange(3, 27).reshape(2, 12)
WHERE = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
WHERE |= {"model.layers.1": "disk", "lm_head": "disk"}
AWAY = "model.layers.1.self_attn.q_proj"


def offloaded(folder, **more):
    model = training.tiny_llama().eval()
    return accelerate.dispatch_model(model, WHERE, main_device="cpu", offload_dir=folder, **more)


def adapted(**fields):
    fields = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False, **fields}
    return fused_lora.inject(training.tiny_llama().eval(), LoraConfig(**fields))


def output(model):
    return model(IDS).logits


def state(model):
    return {name: (tensor.device, tensor._version, tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("how", ["inject", "load_adapter"])
def test_outputs_and_gradients_are_those_of_the_whole_model(how, tmp_path):
    whole = adapted()
    fused_lora.save_adapter(whole, tmp_path / "adapter")
    model = offloaded(tmp_path / "weights")
    assert model.get_submodule(AWAY).weight.is_meta
    if how == "inject":
        fused_lora.inject(model, LoraConfig(r=3, target_modules="all-linear"))
        assert torch.equal(output(model), output(training.tiny_llama().eval()))  # lora_B is zero
        parameters = dict(model.named_parameters())
        for name, parameter in whole.named_parameters():
            if "lora_" in name:
                parameters[name].data.copy_(parameter.data)
    else:
        fused_lora.load_adapter(model, tmp_path / "adapter", is_trainable=True)
    assert {p.device.type for n, p in model.named_parameters() if "lora_" in n} == {"cpu"}
    for _ in range(2):
        assert_close(output(model), output(whole), terms=1000)
    assert model.get_submodule(AWAY).base_layer.weight.is_meta  # gone again after the call
    for m in (model, whole):
        output(m).square().sum().backward()
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert_close(parameter.grad, expected[name].grad, terms=5000, name=name)
    fused_lora.save_adapter(model, tmp_path / "again")
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "again"))
    assert second.read_bytes() == first.read_bytes()
    assert torch.equal(output(fused_lora.unload(model)), output(training.tiny_llama().eval()))


def test_a_merge_is_refused_before_anything_is_left_changed(tmp_path):
    model = offloaded(tmp_path)
    fused_lora.inject(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    before = output(model)
    with pytest.raises(RuntimeError, match=f"{AWAY}: base_layer.weight is offloaded"):
        fused_lora.merge(model)
    assert not any(layer.merged for layer in fused_lora.lora_layers(model).values())
    assert torch.equal(output(model), before)


def with_biases():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    accelerate.cpu_offload(model, execution_device="cpu")
    return model


@torch.no_grad()
def test_a_store_is_where_an_offloaded_model_runs():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 2, 4)
    adapter = torch.randn(2, 4), torch.randn(4, 2), 1.0
    want = model[1](model[0](x) + x @ adapter[0].T @ adapter[1].T)
    accelerate.cpu_offload(model, execution_device="cpu")
    store = fused_lora.AdapterStore(model)
    store.load("a", {"0": adapter})
    with store.batch(["a"]):
        assert_close(model(x), want, terms=100)


STACKS = dict(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
MOVED = {"Qwen3MoeTopKRouter": router_config("qwen3_moe"), "Qwen3MoeExperts": STACKS}


@torch.no_grad()
@pytest.mark.parametrize("kind", MOVED)
@pytest.mark.parametrize("when", ["before", "after"])
def test_routers_and_experts_whose_inputs_are_moved(kind, when, tmp_path):
    """As in a model over several devices. Where the hook loads the weight, too, they are refused."""
    torch.manual_seed(shifted(1))
    plain, ids = routed("qwen3_moe"), IDS // 3
    ours, served = copy.deepcopy(plain), copy.deepcopy(plain)
    config = LoraConfig(**MOVED[kind], init_lora_weights=False)
    expected = fused_lora.inject(plain, config)
    fused_lora.save_adapter(plain, tmp_path / "a")

    def hook(model, **fields):
        for module in [m for m in model.modules() if type(m).__name__ == kind]:
            for _ in range(1 if fields else 2):  # accelerate makes one of two
                each = accelerate.hooks.AlignDevicesHook(execution_device="cpu", **fields)
                accelerate.hooks.add_hook_to_module(module, each, append=True)

    for when_now in ("before", "after"):
        if when_now == when:
            hook(ours), hook(served)
        if when_now == "before":
            fused_lora.load_adapter(ours, tmp_path / "a")
            store = fused_lora.AdapterStore(served)
            store.load("a", tmp_path / "a")
    assert_close(ours(ids).logits, expected(ids).logits, terms=1000)
    with store.batch(["a", None]), fused_lora.adapter_batch(ours, ["default", None]):
        assert_close(served(ids).logits, ours(ids).logits, terms=1000)
    accelerate.hooks.remove_hook_from_submodules(ours)
    hook(ours, offload=True)
    with pytest.raises(RuntimeError, match="is on the meta device: not loaded, or offloaded between calls"):
        ours(ids)


@torch.no_grad()
def test_accelerated_experts_whose_inputs_are_moved():
    torch.manual_seed(shifted(1))
    model = routed("qwen3_moe")
    accelerate.hooks.attach_execution_device_hook(model, "cpu")
    model = peft.get_peft_model(model, peft.LoraConfig(**STACKS, init_lora_weights=False))
    want = model(IDS // 3).logits
    fused_lora.accelerate(model)
    assert_close(model(IDS // 3).logits, want, terms=1000)
    assert str(fused_lora.explain(model)).endswith("4 of 4 layers run fused")
    layer = next(m for m in model.modules() if hasattr(m, "parameter_name"))
    call = torch.ones(2, 16), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    with pytest.raises(RuntimeError, match="the experts are on cpu, and their inputs on meta; expected one device"):
        experts_forward(layer.get_base_layer(), [t.to("meta") for t in call], {})


@torch.no_grad()
def test_hooks_on_what_stands_for_a_hooked_module():
    """The adapter ran no longer: accelerate took the forward of the module inside for that of the one around it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu")
    accelerate.hooks.add_hook_to_module(model[1], hook)
    fused_lora.inject(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    dict(model.named_parameters())["1.modules_to_save.default.bias"].add_(1)
    x = torch.randn(2, 4)
    expected = model(x)
    accelerate.hooks.add_hook_to_module(model[1], hook)
    assert torch.equal(model(x), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(x), expected)


REFUSED = {
    "biases": (
        LoraConfig(r=2, target_modules=["0"], bias="lora_only"),
        "bias: 'lora_only' trains biases, and '0.bias'",
    ),
    "a whole module": (LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]), "'1' is offloaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_train_values_that_are_elsewhere_is_refused(case):
    model = with_biases()
    before, (config, said) = state(model), REFUSED[case]
    with pytest.raises(ValueError, match=said):
        fused_lora.inject(model, config)
    assert state(model) == before


def test_layers_that_are_fetched_with_their_parent_are_refused():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["Sequential"])
    before = state(model)
    with pytest.raises(ValueError, match="'0.0' is offloaded as a part of 'the whole model'"):
        fused_lora.inject(model, LoraConfig(r=2, target_modules=["0.0"]))
    assert state(model) == before


def test_values_are_not_put_on_the_meta_device(tmp_path):
    fused_lora.save_adapter(adapted(), tmp_path)
    with torch.device("meta"):
        model = training.llama()
    with pytest.raises(ValueError, match="_proj' has no data .meta device.; load the weights first"):
        fused_lora.load_adapter(model, tmp_path)
    assert not fused_lora.lora_layers(model)
    fused_lora.inject(model, LoraConfig(r=2, target_modules=["q_proj"]))  # a plan of a model, without numbers


def test_what_was_offloaded_later_says_how_to_bring_it_back(tmp_path):
    """Neither a merged weight nor an adapter can be read then."""
    model = peft.get_peft_model(
        training.tiny_llama().eval(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    fused_lora.merge(fused_lora.accelerate(model))
    wanted = fused_lora.delta_fidelity(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(RuntimeError, match="offloaded after the merge.*remove_hook_from_submodules"):
        fused_lora.delta_fidelity(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert fused_lora.delta_fidelity(model) == wanted
    ours = adapted()
    accelerate.cpu_offload(ours, execution_device="cpu")
    with pytest.raises(ValueError, match="is offloaded, bring it back.*remove_hook_from_submodules"):
        fused_lora.save_adapter(ours, tmp_path)
    accelerate.hooks.remove_hook_from_submodules(ours)
    fused_lora.save_adapter(ours, tmp_path)


def test_the_execution_device():
    layer = nn.Linear(2, 2)
    assert execution_device(layer).type == "cpu"
    meta = copy.deepcopy(layer).to("meta")
    assert execution_device(meta).type == "meta"
    accelerate.cpu_offload(layer, execution_device="cpu")
    assert layer.weight.is_meta and execution_device(layer) == torch.device("cpu")


@pytest.fixture
def sharded(monkeypatch):
    """Takes and gives back a layer's data, as DeepSpeed ZeRO-3 does (tests/integrations/zero3.py has the real one)."""
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    kept = {}

    def take(module):
        for parameter in module.parameters():
            kept[parameter], parameter.ds_shape = parameter.data.clone(), parameter.shape
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    def give(module):
        for parameter in module.parameters():
            parameter.data = kept[parameter].clone()

    return take, give


@pytest.mark.parametrize("which", ["", "0.base_layer", "1.lora_A"])
@pytest.mark.parametrize("kind", ["inject", "accelerate"])
def test_what_zero3_keeps_elsewhere_is_not_merged_and_not_unmerged(sharded, kind, which):
    take, give = sharded
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    fields = dict(r=2, target_modules=["0", "1"], init_lora_weights=False)
    if kind == "inject":
        model, inner = fused_lora.inject(net, fused_lora.LoraConfig(**fields)).eval(), net
        merge, unmerge = fused_lora.merge, fused_lora.unmerge
    else:
        model = fused_lora.accelerate(peft.get_peft_model(net, peft.LoraConfig(**fields))).eval()
        inner, merge, unmerge = model.base_model.model, lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()
    part, x = inner.get_submodule(which), torch.randn(3, 6)
    before = {name: p.clone() for name, p in model.named_parameters()}
    y = model(x)
    for call, done in ((merge, "merged"), (unmerge, "unmerged")):
        take(part)
        with pytest.raises(
            RuntimeError, match=rf"ZeRO-3, so nothing was {done}\. .*GatheredParameters.*modifier_rank=0"
        ):
            call(model)
        give(part)
        assert_close(model(x), y, terms=1000)
        if kind == "accelerate":  # PEFT goes layer by layer, the first may be done
            {"merged": unmerge, "unmerged": merge}[done](model)
        call(model)
        assert all(layer.merged is (done == "merged") for layer in (inner[0], inner[1]))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def both_ways(net, **fields):
    """An injected model, and one that PEFT has wrapped and that is accelerated, with their LoRA layers."""
    fields = {"r": 2, "target_modules": ["0", "1"], "init_lora_weights": False, **fields}
    injected = fused_lora.inject(copy.deepcopy(net), LoraConfig(**fields))
    torch.manual_seed(shifted(0))
    wrapped = fused_lora.accelerate(peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**fields)))
    return (injected, list(injected)), (wrapped, list(wrapped.base_model.model))


def test_what_zero3_keeps_whole_is_merged_where_it_is_gathered(sharded, monkeypatch):
    """Small parameters are whole between calls, too, but a change of them is dropped at the next step."""
    take, give = sharded
    of_zero = types.ModuleType("deepspeed.runtime.zero.partition_parameters")
    of_zero.DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR = "depth"
    monkeypatch.setitem(sys.modules, of_zero.__name__, of_zero)
    for model, layers in both_ways(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))):
        take(model), give(model)
        with pytest.raises(RuntimeError, match="nothing was merged.*GatheredParameters"):
            layers[0].merge()
        assert not layers[0].merged
        for layer in layers:  # A and B are only read
            for parameter in layer.base_layer.parameters():
                parameter.depth = 1
        fused_lora.merge(model)
        assert all(layer.merged for layer in layers)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_no_gathered_weight_is_kept_for_the_backward(sharded, kind):
    """Of a module that gathers all of its parameters itself (``set_z3_leaf_modules``)."""
    take, give = sharded
    make = nn.Linear if kind == "linear" else Conv1D
    for model, layers in both_ways(nn.Sequential(make(6, 6), make(6, 6)), fan_in_fan_out=kind == "conv1d"):
        x = torch.randn(3, 6, requires_grad=True)
        model(x).sum().backward()
        expected = [x.grad.clone(), *(p.grad for p in model.parameters() if p.requires_grad)]
        x.grad = None
        model.zero_grad()
        for layer in layers:
            take(layer)
        assert {str(row) for row in fused_lora.explain(model).layers} == {"fused"}  # as a call finds them
        for layer in layers:
            give(layer)
        memory = [StorageWeakRef(layer.base_layer.weight.untyped_storage()) for layer in layers]
        y = model(x)
        for layer in layers:
            take(layer)
        assert all(kept.expired() for kept in memory)
        for layer in layers:
            give(layer)
        y.sum().backward()
        found = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class Gathering(dict):
    """DeepSpeed's dict of parameters: in a forward, ``[]`` gathers what it finds partitioned."""

    def __init__(self, plain, give):
        super().__init__(plain)
        self.give = give

    def __getitem__(self, name):
        parameter = super().__getitem__(name)
        if parameter is not None and not parameter.numel():
            self.give(parameter)
        return parameter


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_reads_a_base_weight_that_zero3_has_partitioned(sharded, dropout):
    take, give = sharded
    fields = dict(r=2, target_modules=["0"], use_dora=True, lora_dropout=dropout, init_lora_weights=False)
    model = fused_lora.inject(nn.Sequential(nn.Linear(6, 6)), LoraConfig(**fields))
    x, base = torch.randn(3, 6), model[0].base_layer
    base.register_forward_hook(lambda *_: None)
    torch.manual_seed(shifted(1))
    expected = model(x)
    take(base)
    base._parameters = Gathering(base._parameters, lambda _: give(base))
    base.register_forward_pre_hook(lambda *_: give(base))
    base.register_forward_hook(lambda *_: take(base))
    torch.manual_seed(shifted(1))
    assert torch.equal(model(x), expected)


def test_an_injection_names_zero3(sharded):
    net = nn.Sequential(nn.Linear(6, 6))
    sharded[0](net)
    with pytest.raises(ValueError, match="sharded by DeepSpeed ZeRO-3 .*PEFT and call fused_lora.accelerate"):
        fused_lora.inject(net, LoraConfig(r=2, target_modules=["0"]))
