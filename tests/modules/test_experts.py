"""target_parameters of inject over stacked experts, next to PEFT: draws, results, merges, files, refusals."""

import copy
import json
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations import moe as moe_of_transformers

import fused_lora
from fused_lora import bases
from fused_lora.adapters.errors import AdapterError
from fused_lora.ops import native
from fused_lora.ops.linear.op import draw_seeds
from fused_lora.reference import bits, dropout_mask, keep_scale
from fused_lora.testing.numeric import assert_close, assert_no_worse
from helpers.accelerated import ROWS, TOKENS, quiet, wrap
from helpers.experts import ARCHITECTURES, BOTH, EXPERTS, HIDDEN, TOP_K, Block, llama4, moe
from helpers.interrupts import everywhere
from helpers.seeds import shifted
from helpers.thorough import sampled
from helpers.unchanged import assert_bits, parameter_bits

PARTS = {"gate_up_proj": "base_layer.", "down_proj": ""}  # a parameter, and what PEFT's names have in its place
FILE = "adapter_model.safetensors"


def of_peft(name):
    """The name that PEFT has for a parameter of ours."""
    for part, inner in PARTS.items():
        name = name.replace(f"experts.{part}.lora_", f"experts.{inner}lora_")
    return "base_model.model." + name.replace("experts.base_layer.", "experts.base_layer.base_layer.").replace(
        "base_layer.base_layer.lora_", "base_layer.lora_"
    )


def twins(base=None, adapters=None, **fields):
    """Ours and PEFT's around the same weights, with the same random adapters."""
    base = (base or Block()).eval()
    ours, theirs = copy.deepcopy(base), wrap(base, adapters, **{**BOTH, "r": 4, **fields}).eval()
    for name, own in (adapters or {"default": {}}).items():
        fused_lora.inject(ours, fused_lora.LoraConfig(**{**BOTH, "r": 4, **fields, **own}), name)
    held = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(held[of_peft(name)].data)
    return ours, theirs


def run(model, ids, g, names):
    y = model(ids)
    model.zero_grad()
    y.backward(g.to(y.dtype))
    held = dict(model.named_parameters())
    return {"y": y.detach(), **{name: held[own].grad for name, own in names.items()}}


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_draws_are_pefts(init):
    base = Block(dtype=torch.bfloat16)
    theirs, config = copy.deepcopy(base), {**BOTH, "r": 3, "init_lora_weights": init}
    torch.manual_seed(shifted(1))
    fused_lora.inject(base, peft.LoraConfig(**config))
    torch.manual_seed(shifted(1))
    held = dict(peft.get_peft_model(theirs, peft.LoraConfig(**config)).named_parameters())
    for name, parameter in base.named_parameters():
        other = held[of_peft(name)]
        assert parameter.dtype == other.dtype and parameter.requires_grad == other.requires_grad, name
        assert torch.equal(bits(parameter.detach()), bits(other.detach())), name


@pytest.mark.numeric
@pytest.mark.parametrize("name", sampled(ARCHITECTURES, 3))
def test_outputs_and_gradients_are_no_worse_than_pefts(name):
    found = {"ours": {}, "theirs": {}, "exact": {}}
    for draw in range(17):
        torch.manual_seed(shifted(draw))
        ours, theirs = twins(Block(name), {"a": {}, "b": {"r": 3, "use_rslora": True}})
        fused_lora.set_adapter(ours, ["a", "b"])
        theirs.base_model.set_adapter(["a", "b"])
        names = {n: n for n, p in ours.named_parameters() if p.requires_grad}
        assert len(names) == 8
        ids, g = torch.randint(0, TOKENS, (ROWS, 5)), torch.randn(ROWS * 5, HIDDEN)
        found_ours = run(ours, ids, g, names)
        theirs_names = {n: of_peft(n) for n in names}
        results = (found_ours, *(run(m, ids, g, theirs_names) for m in (theirs, copy.deepcopy(theirs).double())))
        for kept, result in zip(found.values(), results, strict=True):
            for key, tensor in result.items():
                kept.setdefault(key, []).append(tensor)
    for key in found["ours"]:
        assert_no_worse(*(torch.stack(kept[key]) for kept in found.values()), name=key, draws=True)


def with_dropout(model, ids, seeds, p):
    """The block's output under its one adapter by a loop over tokens and places, with the masks of these seeds."""
    base, rows = model.experts.base_layer, len(ids)
    index = torch.stack([ids % EXPERTS, (ids // 3 + ids + 1) % (EXPERTS - 1)], 1)
    weights = torch.softmax(torch.stack([ids, ids * 0], 1).to(model.emb.weight.dtype) / TOKENS, 1)
    hidden, sums = model.emb(ids), []
    sizes = {"gate_up_proj": HIDDEN, "down_proj": base.down_proj.shape[-1]}
    masks = {
        name: dropout_mask(seed, (rows * TOP_K, sizes[name]), p) * keep_scale(p)
        for name, seed in zip(sizes, seeds, strict=True)
    }

    def project(x, name, e, row):
        layer, r = model.experts.get_submodule(name), model.experts.get_submodule(name).r["default"]
        A, B = layer.lora_A["default"].weight[e * r : (e + 1) * r], layer.lora_B["default"].weight[:, e::EXPERTS]
        return layer.weight[e] @ x + layer.scaling["default"] * (B @ (A @ (x * masks[name][row])))

    for token in range(rows):
        parts = []
        for place in range(TOP_K):
            e, row = int(index[token, place]), token * TOP_K + place
            gate, up = project(hidden[token], "gate_up_proj", e, row).chunk(2)
            parts.append(project(base.act_fn(gate) * up, "down_proj", e, row) * weights[token, place])
        sums.append(torch.stack(parts).sum(0))
    return torch.stack(sums)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_has_a_mask_by_token_and_place(p):
    """Output and gradients against a loop in float64 with the exported masks; none in eval(), and by the seed."""
    torch.manual_seed(shifted(2))
    config = fused_lora.LoraConfig(**BOTH, r=3, init_lora_weights=False, lora_dropout=p)
    ours = fused_lora.inject(Block(), config).train()
    ours.emb.requires_grad_(True)
    exact, ids = copy.deepcopy(ours).double(), torch.randint(0, TOKENS, (ROWS * 5,))
    ids[1] = ids[0]  # the same expert and input in other places: another mask
    g = torch.randn(len(ids), HIDDEN, dtype=torch.float64)
    torch.manual_seed(shifted(4))
    seeds = draw_seeds(1, torch.device("cpu")), draw_seeds(1, torch.device("cpu"))
    torch.manual_seed(shifted(4))
    y, other = ours(ids), with_dropout(exact, ids, seeds, p)
    y.backward(g.float())
    other.backward(g)
    assert_close(y, other.to(y), terms=1000)
    assert p == 1.0 or not torch.equal(y[0], y[1])
    theirs = dict(exact.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (theirs[name].grad is None), name
        if parameter.grad is not None:
            assert_close(parameter.grad, theirs[name].grad.to(parameter.grad), terms=4000)
    torch.manual_seed(shifted(4))
    assert torch.equal(ours(ids), y)
    ours.eval()
    plain = fused_lora.LoraConfig(**BOTH, r=3)
    without = fused_lora.inject(fused_lora.unload(copy.deepcopy(ours)), plain).eval()
    without.load_state_dict(ours.state_dict())
    assert torch.equal(ours(ids), without(ids)) and not torch.equal(ours(ids), y)


def test_dropout_of_several_adapters_and_of_files(tmp_path):
    """Each active adapter has its own; PEFT reads the file, whose experts have none there."""
    base = moe()
    ours = copy.deepcopy(base)
    fields = {**BOTH, "target_modules": ["q_proj"], "r": 2, "init_lora_weights": False}
    for name, p in (("a", 0.5), ("b", 0.0)):
        fused_lora.inject(ours, fused_lora.LoraConfig(**fields, lora_dropout=p), name)
    stack = ours.get_submodule("model.layers.0.mlp.experts.down_proj")
    assert [t.dropout for t in stack.train().terms(["a", "b"])] == [0.5, 0.0]
    assert [t.dropout for t in stack.eval().terms(["a", "b"])] == [0.0, 0.0]
    fused_lora.save_adapter(ours, tmp_path / "a", "a")
    entries = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert entries["lora_dropout"] == 0.0 and entries["lora_dropout_with_target_parameters"] == 0.5
    again = copy.deepcopy(base)
    fused_lora.load_adapter(again, tmp_path / "a")
    assert fused_lora.adapter_configs(again)["default"].lora_dropout == 0.5
    fused_lora.save_adapter(again, tmp_path / "again")
    assert json.loads((tmp_path / "again/adapter_config.json").read_text()) == entries
    with pytest.warns(UserWarning, match="lora_dropout_with_target_parameters"):
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    fused_lora.set_adapter(ours.eval(), "a")
    ids = torch.randint(0, TOKENS, (2, 6))
    assert_close(ours(ids).logits, theirs(ids).logits, terms=1000)
    stack.lora_dropout["a"] = nn.AlphaDropout(0.1)
    with pytest.raises(RuntimeError, match="experts with LoRA: .*nothing was computed"):
        ours(ids)


@pytest.mark.parametrize("init", [True, False])
def test_single_experts_may_have_smaller_ranks(tmp_path, init):
    """Zeros beyond a rank have no gradient and stay; PEFT reads, trains and saves the same."""
    ranks = {r"experts\.down_proj\.[0-2]": 2, "gate_up_proj.3": 1, "down_proj": 5}
    config = fused_lora.LoraConfig(**BOTH, r=4, rank_pattern=ranks, init_lora_weights=init)
    base = Block()
    ours = fused_lora.inject(copy.deepcopy(base), config)
    wanted = {"down_proj": [2, 2, 2, 5, 5, 5], "gate_up_proj": [4, 4, 4, 1, 4, 4]}
    fused_lora.save_adapter(ours, tmp_path / "before")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "before", is_trainable=True)
    ids = torch.randint(0, TOKENS, (ROWS * 5,))
    target = torch.randn(len(ids), HIDDEN)
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (model(ids) - target).square().mean().backward()
            optimizer.step()
    assert_close(ours(ids), theirs(ids), terms=100_000)
    for name, own in wanted.items():
        stack = ours.experts.get_submodule(name)
        for e, rank in enumerate(own):
            A, B = stack.of_expert(e, "default")
            assert A[:rank].any(1).all() and B[:, :rank].any(0).all() and not A[rank:].any() and not B[:, rank:].any()
    fused_lora.save_adapter(ours, tmp_path / "after")
    again = copy.deepcopy(base)
    fused_lora.load_adapter(again, tmp_path / "after")
    assert torch.equal(again(ids), ours(ids))
    with pytest.raises(ValueError, match="ranks: expected 6 ranks from 1 to 4"):
        ours.experts.down_proj.add_adapter("c", 4, ranks=[4, 4, 4, 4, 4, 5])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_files_both_ways(tmp_path, name):
    """PEFT's packing and names: equal files, PEFT's load of ours, our load of PEFT's; its delta weights."""
    fields = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"experts\.gate_up_proj": 3}}
    ours, theirs = twins(Block(name), **fields)
    base, ids = Block(name), torch.arange(ROWS * 5)
    base.load_state_dict(fused_lora.unload(copy.deepcopy(ours)).state_dict())
    for part, inner in PARTS.items():
        wrapper, layer = theirs.base_model.model.experts, ours.experts.get_submodule(part)
        wrapper = wrapper.base_layer if inner else wrapper
        assert layer.r == wrapper.r and layer.scaling == wrapper.scaling
        assert_close(layer.get_delta_weight("default"), wrapper.get_delta_weight("default").detach(), terms=10)
    fused_lora.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / folder / FILE) for folder in ("ours", "theirs"))
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    fresh = copy.deepcopy(base)
    fused_lora.load_adapter(fresh, tmp_path / "theirs")
    assert torch.equal(fresh(ids), ours(ids))
    assert_close(back(ids), ours(ids), terms=1000)
    fused_lora.save_adapter(fresh, tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "ours" / FILE).read_bytes()


@pytest.mark.parametrize("targets", [["experts.down_proj"], ["gate_up_proj"]])
def test_one_parameter_alone(tmp_path, targets):
    ours, theirs = twins(target_parameters=targets) if targets == ["experts.down_proj"] else (None, None)
    if ours is None:  # PEFT's wrapper stands where the outer one of two does
        ours = fused_lora.inject(Block().eval(), fused_lora.LoraConfig(**{**BOTH, "target_parameters": targets}))
        theirs = peft.get_peft_model(copy.deepcopy(fused_lora.unload(copy.deepcopy(ours))), peft.LoraConfig(
            **{**BOTH, "target_parameters": targets}
        ))  # fmt: skip
        for (_, a), (_, b) in zip(
            ((n, p) for n, p in ours.named_parameters() if "lora_" in n),
            ((n, p) for n, p in theirs.named_parameters() if "lora_" in n),
            strict=True,
        ):
            b.data.copy_(a.data.normal_(std=0.2))
    fused_lora.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / folder / FILE) for folder in ("ours", "theirs"))
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    ids = torch.arange(ROWS)
    assert_close(ours(ids), theirs.eval()(ids), terms=1000)


@pytest.mark.parametrize("make", [moe, llama4])
def test_a_whole_model_with_linear_layers_and_experts(tmp_path, make):
    """Beside each other in one adapter; saved by the model itself, merged, unloaded."""
    ours, theirs = twins(make(), target_modules=["q_proj", "v_proj"])
    kind = type(ours)
    ids = torch.randint(0, TOKENS, (2, 6))
    logits = ours(ids).logits
    assert_close(logits, theirs(ids).logits, terms=1000)
    assert len(fused_lora.lora_layers(ours)) == 8
    assert all(row.fused for row in fused_lora.integrations.peft.layer_report(ours))
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = fused_lora.unload(copy.deepcopy(ours))
    fused_lora.load_adapter(fresh, tmp_path / "theirs")
    assert torch.equal(fresh(ids).logits, logits)
    ours.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_parameters"]
    with fused_lora.merged(ours):
        ours.save_pretrained(tmp_path / "merged")
        assert_close(ours(ids).logits, logits, terms=1000)
    again = kind.from_pretrained(tmp_path / "merged").eval()
    assert_close(again(ids).logits, logits, terms=1000)
    assert torch.equal(ours(ids).logits, logits)
    assert_close(fused_lora.unload(ours, merge_adapters=True)(ids).logits, logits, terms=1000)
    assert not any("lora" in name or "base_layer" in name for name in ours.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_merges_come_back(name, dtype):
    ours, theirs = twins(Block(name, dtype), {"a": {}, "b": {"r": 2}})
    before = parameter_bits(ours)
    for _ in range(3):
        fused_lora.merge(ours, ["a"])
        fused_lora.unmerge(ours)
    fused_lora.merge(ours, ["a", "b"])
    if dtype is torch.float32:
        theirs.base_model.set_adapter(["a", "b"])
        theirs.merge_adapter()
        base = theirs.base_model.model.experts.get_base_layer()
        for part in PARTS:
            assert_close(ours.experts.get_submodule(part).weight, base.get_parameter(part), terms=100)
        with pytest.raises(RuntimeError, match=r"experts\.base_layer\.gate_up_proj: \['a', 'b'\] are merged"):
            key = "experts.base_layer.gate_up_proj"
            ours.load_state_dict({key: torch.zeros_like(ours.get_parameter(key))}, strict=False)
    fused_lora.unmerge(ours)
    assert_bits(ours, before)


def test_experts_made_in_inference_mode_are_merged(loops):
    """Plain torch writes to their tensors as to others."""
    with torch.inference_mode():
        block = Block("qwen3_moe", torch.float32)
    config = fused_lora.LoraConfig(target_modules=[], target_parameters=[*PARTS], init_lora_weights=False)
    ours = fused_lora.inject(block, config)
    before = parameter_bits(ours)
    for names in (["default"], ["default"]):
        fused_lora.merge(ours, names)
        assert not torch.equal(ours.experts.down_proj.weight, before["experts.base_layer.down_proj"])
        fused_lora.unmerge(ours)
    assert_bits(ours, before)


def test_a_switch_of_stacks(loops, monkeypatch):
    """The bits of an unmerge and a merge; in C two calls for the experts of a stack; refused, nothing is changed."""
    ours, _ = twins(Block(dtype=torch.bfloat16), {"a": {}, "b": {"r": 2}})
    before, two, run, calls = parameter_bits(ours), copy.deepcopy(ours), native.run, []
    fused_lora.merge(ours, ["a"])
    monkeypatch.setattr(native, "run", lambda works, mode: calls.append(mode) or run(works, mode))
    fused_lora.switch(ours, ["b"])
    assert calls == ([native.UNMERGE, native.MERGE] * len(PARTS) if loops == "C" else [])
    fused_lora.merge(two, ["b"])
    assert_bits(ours, parameter_bits(two))
    ours.experts.down_proj.lora_B["a"].weight.data[0, -1] = float("inf")
    broken = parameter_bits(ours)
    with pytest.raises(ValueError, match="experts.down_proj: .*nothing was merged"):
        fused_lora.switch(ours, ["a"])
    assert_bits(ours, broken)
    ours.experts.down_proj.lora_B["a"].weight.data.copy_(two.experts.down_proj.lora_B["a"].weight)
    fused_lora.unmerge(ours)
    assert_bits(ours, before)


def test_experts_without_memory_for_one_launch(device, kernels_on, monkeypatch):
    """They are merged, switched and unmerged one by one."""
    from fused_lora.kernels import merge as kernel
    from fused_lora.ops.merge import launch

    ours, _ = twins(Block(dtype=torch.bfloat16).to(device), {"a": {}, "b": {"r": 2}})
    before, alone, asked = parameter_bits(ours), copy.deepcopy(ours), []
    monkeypatch.setattr(launch.guard, "passes", lambda *_: True)  # the trials are over
    fused_lora.merge(alone, ["b"])

    def no_memory(members, *_):
        asked.append(len(members))
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(kernel, "launch_group", no_memory)
    fused_lora.merge(ours, ["a"])
    fused_lora.switch(ours, ["b"])
    assert len(asked) >= 2 and min(asked) > 1
    assert_bits(ours, parameter_bits(alone))
    fused_lora.unmerge(ours)
    assert_bits(ours, before)


def test_experts_in_one_launch(device, kernels_on, monkeypatch):
    """Of the parameter whose rows are whole 16 bytes; the other's experts are launched one by one."""
    from fused_lora.kernels import merge as kernel
    from fused_lora.ops.merge import launch

    ours, _ = twins(Block(dtype=torch.bfloat16).to(device), {"a": {}, "b": {"r": 2}})
    before, alone, launches, run = parameter_bits(ours), copy.deepcopy(ours), [], kernel.launch_group
    monkeypatch.setattr(launch.guard, "passes", lambda *_: True)  # the trials are over
    with monkeypatch.context() as patch:
        patch.setattr(launch.Sweep, "joins", lambda sweep: False)
        fused_lora.merge(alone, ["b"])
    monkeypatch.setattr(kernel, "launch_group", lambda members, *a: launches.append(len(members)) or run(members, *a))
    fused_lora.merge(ours, ["a"])
    fused_lora.switch(ours, ["b"])
    assert_bits(ours, parameter_bits(alone))
    broken = ours.experts.gate_up_proj.lora_B["a"].weight.data
    held, broken[0, -1] = broken[0, -1].item(), float("inf")
    with pytest.raises(ValueError, match="experts.gate_up_proj: .*nothing was merged"):
        fused_lora.switch(ours, ["a"])
    broken[0, -1] = held
    assert_bits(ours, parameter_bits(alone))
    fused_lora.unmerge(ours)
    assert_bits(ours, before)
    assert launches == [EXPERTS] * 7  # a merge, a switch, four until the refused switch was undone, an unmerge


def test_no_call_follows_a_merge_of_experts():
    """An interrupt in one would lose the records, and with them the weights."""
    ours, _ = twins(Block(dtype=torch.bfloat16))
    called, outer = [], sys.gettrace()

    def trace(frame, event, argument):
        if frame.f_back is not None and frame.f_back.f_code is bases.experts.Experts._together.__code__:
            called.append(frame.f_code.co_name)

    sys.settrace(trace)
    try:
        fused_lora.merge(ours)
    finally:
        sys.settrace(outer)
    assert called[-1] == "_all_at_once"


def test_an_interrupt_of_a_merge_of_experts():
    """Wherever Python handles signals: behind the C loops, too."""
    ours, _ = twins(Block(dtype=torch.bfloat16))
    layer = next(iter(fused_lora.lora_layers(ours).values()))
    states = {False: parameter_bits(ours)}
    layer.merge()
    states[True] = parameter_bits(ours)
    for act, back, merged in ((layer.merge, layer.unmerge, True), (layer.unmerge, layer.merge, False)):
        for _ in everywhere(lambda back=back, merged=merged: back() if layer.merged is merged else None, act):
            assert_bits(ours, states[layer.merged])


def test_a_broken_adapter_merges_nowhere():
    ours, _ = twins()
    ours.experts.down_proj.lora_B["default"].weight.data[0, -1] = float("inf")  # of the last expert
    before = parameter_bits(ours)
    with pytest.raises(ValueError, match="experts.down_proj: .*nothing was merged"):
        fused_lora.merge(ours)
    assert_bits(ours, before)


def test_a_16_bit_merge_that_loses_the_adapter_warns():
    ours, _ = twins(Block(dtype=torch.bfloat16))
    for layer in fused_lora.lora_layers(ours).values():
        layer.lora_B["default"].weight.data.mul_(1e-4)
    with pytest.warns(UserWarning, match="16-bit weights keep only"):
        fused_lora.merge(ours)


@pytest.mark.parametrize("make", [moe, llama4])
def test_a_batch_of_several_adapters(make):
    """Each token's rows are those of its adapter alone, and base rows have the base's bits."""
    ours, _ = twins(make(), {"a": {}, "b": {"r": 2}}, target_modules=["q_proj"])
    ids, names = torch.randint(0, TOKENS, (5, 6)), ["a", None, "b", "a", None]
    with torch.no_grad():
        with fused_lora.disable_adapters(ours):
            base = ours(ids).logits
        with fused_lora.adapter_batch(ours, names):
            mixed = ours(ids).logits
        for name, rows in (("a", [0, 3]), ("b", [2])):
            fused_lora.set_adapter(ours, name)
            assert_close(mixed[rows], ours(ids).logits[rows], terms=1000)
    assert torch.equal(bits(mixed[[1, 4]]), bits(base[[1, 4]]))


def test_adapters_of_other_parameters_come_and_go(tmp_path):
    """Unlike in PEFT two adapters may target different parameters; files are those of each alone."""
    base, ids = Block().eval(), torch.arange(ROWS)
    alone = {}
    model = copy.deepcopy(base)
    for name, targets in (("gate", ["gate_up_proj"]), ("down", ["down_proj"]), ("both", ["gate_up_proj", "down_proj"])):
        config = fused_lora.LoraConfig(target_parameters=targets, init_lora_weights=False)
        fused_lora.inject(model, config, name)
        fused_lora.save_adapter(model, tmp_path / name, name)
        fresh = copy.deepcopy(base)
        fused_lora.load_adapter(fresh, tmp_path / name)
        alone[name] = fresh(ids)
    for name, expected in alone.items():
        fused_lora.set_adapter(model, name)
        assert torch.equal(model(ids), expected)
    fused_lora.delete_adapter(model, "both")
    assert fused_lora.active_adapters(model) == ["down"] and torch.equal(model(ids), alone["down"])
    with fused_lora.disable_adapters(model):
        assert torch.equal(model(ids), base(ids))


@pytest.mark.parametrize(
    "change, kind, text",
    [
        (lambda h, i, w: (h, i[:3], w[:3]), ValueError, "top_k_index, top_k_weights: expected"),
        (lambda h, i, w: (h, i, w[:3]), ValueError, "top_k_weights: expected"),
        (lambda h, i, w: (h, i[:, 0], w[:, 0]), ValueError, "top_k_index"),
        (lambda h, i, w: (h, i.float(), w), TypeError, "top_k_index: expected int32 or int64"),
        (lambda h, i, w: (h.int(), i, w), TypeError, "hidden_states: expected a floating dtype"),
        (lambda h, i, w: (h.to(torch.complex64), i, w), TypeError, "hidden_states: expected a floating dtype"),
    ],
)
def test_calls_that_do_not_fit_are_refused_by_name(change, kind, text):
    ours, _ = twins()
    call = torch.randn(4, HIDDEN), torch.arange(8).reshape(4, 2) % EXPERTS, torch.rand(4, 2)
    assert ours.experts(*call).shape == (4, HIDDEN)
    with pytest.raises(kind, match=text):
        ours.experts(*change(*call))


def test_experts_that_are_not_there(monkeypatch):
    """Refused by name; on a GPU by the device, for which the host does not wait, also at each replay of a graph."""

    def product(x, weight, offs):  # transformers' reads the offsets on a CPU under torch 2.8
        experts = torch.searchsorted(offs, torch.arange(len(x), dtype=offs.dtype), right=True)
        return torch.bmm(x[:, None], weight[experts])[:, 0]

    monkeypatch.setattr(moe_of_transformers, "_grouped_mm", product)
    ours, _ = twins()
    call = torch.randn(4, HIDDEN), torch.arange(8).reshape(4, 2) % EXPERTS, torch.rand(4, 2)
    expected, text = ours.experts(*call), f"top_k_index: expected experts from 0 to {EXPERTS - 1}"
    if expected.is_cuda:
        pytest.skip("a failed assertion of the device ends the process's use of it")
    for shift in (EXPERTS, -1):
        with pytest.raises(ValueError, match=f"{text}, got"):
            ours.experts(call[0], call[1] + shift, call[2])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with monkeypatch.context() as patched:
        for read in ("tolist", "item", "__bool__", "__int__"):
            patched.setattr(torch.Tensor, read, lambda tensor: pytest.fail("the host waits for the device"))
        found = ours.experts(*call)
    assert torch.equal(bits(found), bits(expected))
    for shift in (EXPERTS, -1):
        with pytest.raises(RuntimeError, match=text):
            ours.experts(call[0], call[1] + shift, call[2])


LLAMA4 = pytest.mark.parametrize(
    "change, kind, text",
    [
        (lambda h: (h[:-1],), ValueError, rf"hidden_states: expected \[{EXPERTS} experts \* tokens, {HIDDEN}\], got"),
        (lambda h: (h[:, 1:],), ValueError, "hidden_states: expected"),
        (lambda h: (h[None],), ValueError, "hidden_states: expected"),
        (lambda h: (h.int(),), TypeError, "hidden_states: expected a floating dtype"),
        (lambda h: (h, h), ValueError, "Llama4TextExperts: expected hidden_states, got 2 tensors"),
    ],
)


@LLAMA4
def test_calls_of_llama_4_that_do_not_fit(change, kind, text):
    ours, _ = twins(Block("llama4"))
    hidden = torch.randn(4 * EXPERTS, HIDDEN)
    assert ours.experts(hidden).shape == hidden.shape and ours.experts(hidden[:0]).shape == (0, HIDDEN)
    with pytest.raises(kind, match=text):
        ours.experts(*change(hidden))


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_of_llama_4_has_a_mask_by_row(p):
    """Output and gradients against W + s B A's products with the exported masks, in float64."""
    torch.manual_seed(shifted(2))
    config = fused_lora.LoraConfig(**BOTH, r=3, init_lora_weights=False, lora_dropout=p)
    ours = fused_lora.inject(Block("llama4"), config).train()
    exact, hidden = copy.deepcopy(ours).double(), torch.randn(5 * EXPERTS, HIDDEN)
    torch.manual_seed(shifted(4))
    seeds = draw_seeds(1, torch.device("cpu")), draw_seeds(1, torch.device("cpu"))
    torch.manual_seed(shifted(4))
    y, base, results = ours.experts(hidden), exact.experts.base_layer, []
    masks = [dropout_mask(s, (len(hidden), n), p) * keep_scale(p) for s, n in zip(seeds, (HIDDEN, 24), strict=True)]
    for e in range(EXPERTS):
        rows = slice(5 * e, 5 * e + 5)
        x = hidden[rows].double()
        for name, mask in zip(("gate_up_proj", "down_proj"), masks, strict=True):
            layer = exact.experts.get_submodule(name)
            A, B = layer.of_expert(e, "default")
            x = x @ layer.weight[e] + layer.scaling["default"] * ((x * mask[rows]) @ B @ A)
            if name == "gate_up_proj":
                gate, up = x.chunk(2, 1)
                x = up * base.act_fn(gate)
        results.append(x)
    g, other = torch.randn_like(y), torch.cat(results)
    y.backward(g)
    other.backward(g.double())
    assert_close(y, other.to(y), terms=1000)
    theirs, count = dict(exact.named_parameters()), 0
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad, theirs[name].grad.to(parameter.grad), terms=4000)
            count += 1
    assert count == 4


def test_float64_experts_of_llama_4():
    """Their products are batched, of any dtype."""
    ours, theirs = twins(Block("llama4", torch.float64))
    ids = torch.arange(ROWS * 5)
    assert ours(ids).dtype is torch.float64
    assert_close(ours(ids), theirs(ids), terms=1000)
    wrapper = theirs.base_model.model.experts
    while wrapper.parameter_name != "down_proj":
        wrapper = wrapper.base_layer
    delta = ours.experts.down_proj.get_delta_weight("default")
    assert_close(delta, wrapper.get_delta_weight("default").detach(), terms=10)


@pytest.mark.filterwarnings("ignore")
def test_llama_4s_experts_alone_in_a_batch_are_refused():
    """Called by themselves, nobody says which of their rows are whose."""
    ours, _ = twins(llama4(), {"a": {}, "b": {"r": 2}})
    experts = ours.model.layers[0].feed_forward.experts
    hidden = torch.randn(8, HIDDEN)
    with torch.no_grad():
        with fused_lora.adapter_batch(ours, ["a", "b"]), pytest.raises(ValueError, match="a call of the model"):
            experts(hidden)
        with fused_lora.adapter_batch(ours, ["b"]):
            found = experts(hidden)
        fused_lora.set_adapter(ours, "b")
        assert torch.equal(found, experts(hidden))


@pytest.mark.parametrize("mark", ["_is_expert_parallel", "_is_hooked"])
def test_experts_that_are_spread_over_processes_are_refused(mark):
    """By the marks of transformers 5.18 and newer, and of 5.17."""
    net = Block()
    vars(net.experts).pop("_is_expert_parallel", None)
    setattr(net.experts, mark, True)
    with pytest.raises(ValueError, match="experts are spread over processes"):
        fused_lora.inject(net, fused_lora.LoraConfig(**BOTH))


def test_what_is_refused(tmp_path):
    for fields, text in (
        (
            {"rank_pattern": {"down_proj.2": 9}},
            r"rank_pattern.*at most 8, the rank of 'experts.down_proj', for its exp",
        ),
        ({"use_dora": True}, "use_dora must be False with target_parameters"),
        ({"bias": "all"}, "bias must be 'none' with target_parameters"),
        ({"target_parameters": ["gate_up"]}, "target_parameters: no parameter of the model is named 'gate_up'"),
        ({"target_parameters": ["emb.weight"]}, "matches 'emb.weight', which is not supported: Embedding is an emb"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights: expected one of .* for experts, got 'orthogonal'"),
    ):
        net = Block()
        with pytest.raises(ValueError, match=text):
            fused_lora.inject(net, fused_lora.LoraConfig(**{**BOTH, **fields}))
        assert type(net.experts).__name__ == "Qwen3MoeExperts"
    ours, _ = twins()
    ours.experts.base_layer.config._experts_implementation = "sonicmoe"
    with pytest.raises(RuntimeError, match="the experts implementation is 'sonicmoe'.*nothing was computed"):
        ours(torch.arange(ROWS))
    ours.experts.base_layer.config._experts_implementation = "eager"
    fused_lora.save_adapter(ours, tmp_path / "a")
    with pytest.raises(AdapterError, match="target_parameters.*no parameter of the model is named"):
        fused_lora.load_adapter(nn.Sequential(nn.Linear(3, 3)), tmp_path / "a")
    with pytest.raises(AdapterError, match="target_parameters.*read with the model that they are for"):
        fused_lora.adapters.read_adapter(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / FILE)
    key = "base_model.model.experts.lora_A.weight"
    for broken, text in (
        (tensors[key][1:], rf"\[{EXPERTS} experts \* r, K\]"),
        (tensors[key][:, 1:], r"a shape \[24, 24\] for the layer 'experts.down_proj'"),
    ):
        save_file({**tensors, key: broken.contiguous()}, tmp_path / "a" / FILE)
        with pytest.raises(AdapterError, match=text), quiet():
            fused_lora.load_adapter(Block(), tmp_path / "a")
