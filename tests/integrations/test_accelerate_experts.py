"""PEFT's target_parameters over transformers' stacked experts: unfolded, next to PEFT, on every architecture."""

import copy
import importlib

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import fused_lora
from fused_lora.bases import experts
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import ROWS, TOKENS, SideBySide, merge_and_back, wrap
from helpers.experts import ARCHITECTURES, BOTH, EXPERTS, HIDDEN, Block, routed, router_config
from helpers.thorough import sampled
from helpers.unchanged import assert_bits, parameter_bits
from helpers.versions import since

pytestmark = [since("transformers", "5"), since("peft", "0.19.1")]  # the first with stacked experts, in this layout


class InOrder(SideBySide):
    """PEFT's forward registers a parameter anew, behind the biases of its module. Ours leaves it where it is."""

    def assert_same_state(self):
        for name, module in self.ours.named_modules():
            for other in (self.theirs, self.exact):
                held = other.get_submodule(name)._parameters
                held |= {key: held.pop(key) for key in module._parameters}
        super().assert_same_state()


def rows(model):
    return fused_lora.integrations.peft.layer_report(model)


@pytest.mark.numeric
@pytest.mark.parametrize("name", sampled(ARCHITECTURES, 3))  # gpt-oss has biases and its weights transposed
def test_every_architecture(name):
    both = InOrder(wrap(Block(name), **BOTH))
    assert all(row.fused for row in rows(both.ours)) and len(rows(both.ours)) == 2
    both.assert_same_results(draws=17)
    both.do(lambda m: m.merge_adapter())
    both.assert_same_results(ulps=2, draws=17)
    both.do(lambda m: m.unmerge_adapter())
    both.do(lambda m: m.eval())
    both.assert_same_results(draws=17)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("name", ["qwen3_moe", "llama4"])
def test_16_bit(dtype, autocast_adapter_dtype, name):
    net = wrap(Block(name, dtype), **BOTH)
    if not autocast_adapter_dtype:
        net.to(dtype)
    SideBySide(net).assert_same_results(draws=17)


@pytest.mark.numeric
def test_several_adapters_scales_and_one_parameter():
    adapters = {"a": {}, "b": {"r": 3, "use_rslora": True}}
    both = InOrder(wrap(Block("gpt_oss"), adapters, **BOTH))
    for names in (["a", "b"], ["b"]):
        both.do(lambda m, names=names: m.base_model.set_adapter(names))
        both.assert_same_results(draws=17)
    for layer in (m for model in both.models for m in model.modules() if hasattr(m, "parameter_name")):
        layer.scale_layer(0.5)
    both.assert_same_results(draws=17)
    one = SideBySide(wrap(Block(implementation="batched_mm"), **{**BOTH, "target_parameters": ["experts.down_proj"]}))
    assert [row.fused for row in rows(one.ours)] == [True]
    one.assert_same_results(draws=17)


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_made_in_inference_mode(autocast):
    """Torch keeps none for a backward, but keeps what PEFT makes of them."""
    theirs, found = wrap(Block(), **BOTH), []
    theirs.base_model.model.emb.weight.requires_grad_()  # before the experts
    for model in (theirs, fused_lora.accelerate(copy.deepcopy(theirs))):
        for name, parameter in list(model.named_parameters()):
            if "lora_" in name:
                with torch.inference_mode():
                    model.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(parameter.clone())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(torch.arange(ROWS))
        leaves = [p for p in model.parameters() if p.requires_grad]
        found.append([y, *torch.autograd.grad(y.sum(), leaves, allow_unused=True)])
    for other, mine in zip(*found, strict=True):
        assert mine is other or torch.equal(mine, other)


@pytest.mark.experiment("A1", full=500, quick=5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_experts_come_back(name, dtype, count):
    """Merge and unmerge of adapters of stacked experts, two at once and one after another: every bit is back."""
    both = InOrder(wrap(Block(name, dtype).eval(), {"a": {}, "b": {"r": 2}}, **BOTH))
    ids = torch.arange(ROWS)

    def compare():
        if dtype is torch.float32:
            assert_close(both.ours(ids), both.theirs(ids), terms=1000)

    merge_and_back(both, count, compare)


def test_a_broken_adapter_changes_no_expert():
    model = fused_lora.accelerate(wrap(Block(), **BOTH))
    outer = model.base_model.model.experts
    before = parameter_bits(outer.get_base_layer())
    outer.lora_B["default"].weight.data[0, -1] = float("inf")  # of the last expert
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        outer.merge(safe_merge=True)
    assert_bits(outer.get_base_layer(), before)
    outer.lora_B["default"].weight.data.zero_()
    outer.merge()
    outer.get_param().data[-1, 0, 0] += 1
    with pytest.warns(UserWarning, match="PEFT's unmerge subtracts the adapters instead"):
        outer.unmerge()


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4"])
def test_merge_and_unload_and_files(tmp_path, name):
    """PEFT's packing: its own delta weights, expert by expert, and its files read back."""
    model = fused_lora.accelerate(wrap(Block(name), **BOTH))
    for wrapper in (m for m in model.modules() if hasattr(m, "parameter_name")):
        A, B = (part["default"].weight.detach() for part in (wrapper.lora_A, wrapper.lora_B))
        A, B = experts.unpacked(A, B, EXPERTS)
        assert_close(B @ A * wrapper.scaling["default"], wrapper.get_delta_weight("default").detach(), terms=1000)
    ids = torch.arange(ROWS)
    expected = model(ids)
    assert model(ids[:0]).shape == (0, HIDDEN)  # no token for any expert
    model.save_pretrained(tmp_path)
    plain = copy.deepcopy(model).unload()
    again = fused_lora.accelerate(peft.PeftModel.from_pretrained(plain, tmp_path))
    assert torch.equal(again(ids), expected)
    assert_close(model.merge_and_unload()(ids), expected, terms=1000)


@torch.no_grad()
@pytest.mark.parametrize("name, dtype", [("qwen3_moe", torch.bfloat16), ("llama4_text", torch.float32)])
def test_routers_have_pefts_bits_and_come_back(name, dtype):
    """Called without a parametrisation; several adapters; merged once, and back to the bit."""
    theirs = wrap(routed(name, dtype), {"a": {}, "b": {"r": 2}}, **router_config(name)).eval()
    theirs.base_model.set_adapter(["a", "b"])
    ours, ids = fused_lora.accelerate(copy.deepcopy(theirs)), torch.arange(10).reshape(2, 5)
    assert [row.why_not for row in rows(ours)] == [None, None]
    before, expected = parameter_bits(ours), theirs(ids).logits
    assert torch.equal(ours(ids).logits, expected)
    ours.merge_adapter()
    assert_close(ours(ids).logits, expected, terms=2000)
    ours.unmerge_adapter()
    assert_bits(ours, before)
    hidden = torch.randn(3, HIDDEN, dtype=dtype)
    place = next(path for path, m in ours.named_modules() if hasattr(m, "parameter_name"))
    with pytest.raises(TypeError, match="unexpected keyword"):  # PEFT's own forward, which says so
        ours.get_submodule(place)(hidden, further=1)


def test_what_runs_in_pefts_own_way():
    def reasons(model):
        return {row.why_not for row in rows(model)}

    model = fused_lora.accelerate(wrap(Block(implementation="sonicmoe"), **BOTH))
    assert reasons(model) == {"the experts implementation is 'sonicmoe'"}
    model.base_model.model.experts.get_base_layer().config._experts_implementation = "grouped_mm"
    assert reasons(model) == {None}
    handle = model.base_model.model.experts.get_base_layer().register_forward_hook(lambda *_: None)
    assert reasons(model) == {"a hook on the experts"}
    ids = torch.arange(ROWS)
    unhooked = model(ids)
    handle.remove()
    assert_close(model(ids), unhooked, terms=1000)
    with model.disable_adapter():
        assert reasons(model) == {"adapters are disabled"}
        assert_close(model(ids), copy.deepcopy(model).unload()(ids), terms=1000)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.experts = nn.Embedding(TOKENS, 8), nn.Module()
            self.experts.w = nn.Parameter(torch.randn(3, 8, 8))
            self.experts.forward = lambda x: x @ self.experts.w.sum(0)

        def forward(self, ids):
            return self.experts(self.emb(ids))

    own = wrap(Own(), target_modules=[], target_parameters=["experts.w"])
    with pytest.warns(UserWarning, match="1 do not: Module is not in transformers' registry of experts"):
        fused_lora.accelerate(own)


def test_a_subclass_of_llama_4s_experts_runs_in_pefts_own_way():
    """It may compute anything: PEFT's forward runs, and inject refuses it by name."""

    class Own(Llama4TextExperts):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    net = Block("llama4")
    net.experts.__class__ = Own
    theirs = wrap(net, **BOTH)
    ours = copy.deepcopy(theirs)
    with pytest.warns(UserWarning, match="2 do not: Own is not in transformers' registry of experts"):
        fused_lora.accelerate(ours)
    assert "Own is not in transformers' registry of experts" in str(fused_lora.explain(ours))
    ids = torch.randint(0, TOKENS, (ROWS, 5))
    found = []
    for model in (ours, theirs):
        y = model(ids)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == 5 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    net = Block("llama4")
    net.experts.__class__ = Own
    with pytest.raises(ValueError, match="not supported: Own is not in transformers' registry"):
        fused_lora.inject(net, fused_lora.LoraConfig(**BOTH))
    assert type(net.experts) is Own


# torch 2.8 has no grouped product for a CPU, and that of transformers makes a gradient of all experts
@pytest.mark.parametrize("name", [pytest.param("qwen3_moe", marks=since("torch", "2.9")), "llama4"])
def test_no_tensor_of_the_size_of_all_experts(name):
    if name == "llama4":
        module = Llama4TextExperts(transformers.Llama4TextConfig(hidden_size=64, intermediate_size=64))
        call = (torch.randn(16 * 2, 64, requires_grad=True),)
    else:
        config = transformers.Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=64, num_experts=32)
        config._experts_implementation = "grouped_mm"
        module = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe").Qwen3MoeExperts(config)
        call = torch.randn(16, 64, requires_grad=True), torch.randint(0, 32, (16, 2)), torch.rand(16, 2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    holder = nn.ModuleDict({"experts": module})
    model = fused_lora.accelerate(wrap(holder, r=2, **{k: v for k, v in BOTH.items() if k != "lora_alpha"}))
    stack = module.gate_up_proj.nbytes
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model.base_model.model["experts"](*call).sum().backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak < stack
