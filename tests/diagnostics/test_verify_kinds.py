"""verify of DoRA layers and stacked experts: rounding alone passes, every planted bug is named with its parameter."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file

import fused_lora
from fused_lora import verify
from fused_lora.diagnostics.verification import report
from helpers.accelerated import TOKENS, Net, wrap
from helpers.experts import BOTH, Block, llama4, moe, routed
from helpers.seeds import shifted
from helpers.unchanged import assert_bits, parameter_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["inject", "PEFT", "accelerated"]
DORA = {"v": {"use_dora": True}, "plain": {}, "w": {"use_dora": True, "r": 3, "use_rslora": True}}
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def make(kind, base, adapters, names, std=0.2, **fields):
    """``base`` with random adapters, of which ``names`` are active."""
    base = base.eval()
    if kind == "inject":
        for name, own in adapters.items():
            fused_lora.inject(base, fused_lora.LoraConfig(**{"r": 4, "lora_alpha": 6, **fields, **own}), name)
        model = base
    else:
        model = wrap(base, adapters, **fields)
        model = fused_lora.accelerate(model) if kind == "accelerated" else model
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.normal_(std=std)
    activate(model, names)
    return model.eval()


def activate(model, names):
    model.base_model.set_adapter(names) if isinstance(model, peft.PeftModel) else fused_lora.set_adapter(model, names)


def dora(kind, dtype=torch.float32, names=("v",)):
    return make(kind, Net(dtype), DORA, list(names), target_modules=["lin0", "lin1", "conv1d", "head"])


def experts(kind, dtype=torch.float32, name="qwen3_moe", names=("a",), base=None, **fields):
    base = Block(name, dtype) if base is None else base
    return make(kind, base, {"a": {}, "b": {"r": 2}}, list(names), **{**BOTH, **fields})


def ids():
    return torch.randint(0, TOKENS, (6, 7))


def lora(model):
    """LoRA layers by the names of their parameters or modules; PEFT's wrappers by those of theirs."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "merged_adapters"):
            found[getattr(module, "parameter_name", "weight").replace("weight", path.rpartition(".")[2])] = module
    return found


def merge(model):
    fused_lora.merge(model) if not isinstance(model, peft.PeftModel) else model.merge_adapter()


def assert_healthy(model, count, dtype, merged, paths):
    if merged:
        merge(model)
    before = parameter_bits(model)
    result = verify(model, ids())
    assert result.ok and result.verdict == "rounding" and len(result.layers) == count, str(result)
    assert result.was_merged == merged and all(any(c.path.endswith(p) for p in paths) for c in result.layers)
    for check in result.layers:
        assert check.dtype == dtype and check.difference >= check.difference_rms
        assert 0 < check.unmerged < 1 and 0 < check.weight < 1 and 0 < check.merged < 1
        assert check.difference_rms < 4 * check.expected_rms and 0 < check.lost < 0.02
    assert_bits(model, before)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dora_differs_by_rounding(kind, dtype, merged):
    names = ["v"] if kind == "PEFT" and merged else ["v", "plain", "w"]
    assert_healthy(dora(kind, dtype, names), 4, dtype, merged, ["lin0", "lin1", "conv1d", "head"])


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_differ_by_rounding(kind, dtype, merged):
    # halves, [experts, N, K]; turns, [experts, K, N]; turned, of all tokens
    name = {torch.float32: "qwen3_moe", torch.bfloat16: "gpt_oss", torch.float16: "llama4"}[dtype]
    assert_healthy(experts(kind, dtype, name, ["a", "b"]), 2, dtype, merged, STACKS)


def right_references(kind, model, x, folder):
    """The model unloaded with its adapter merged, and the adapter's file, whose tensors are returned."""
    copied = copy.deepcopy(model)
    unloaded = fused_lora.unload(copied, merge_adapters=True) if kind == "inject" else copied.merge_and_unload()
    merged = verify(model, x, reference=unloaded)
    assert merged.ok and merged.reference.difference > 0, str(merged)
    if kind == "inject":
        fused_lora.save_adapter(model, folder, folder.name)
    else:
        model.save_pretrained(folder.parent, selected_adapters=[folder.name])
    file = load_file(folder / "adapter_model.safetensors")
    assert verify(model, x, reference=file).ok
    return file


@pytest.mark.parametrize("make", [moe, llama4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_and_its_references(kind, make, tmp_path):
    """Experts beside linear layers against a copy, the base, the merged model, and the adapter's file."""
    base, place = make(), "mlp" if make is moe else "feed_forward"
    original = copy.deepcopy(base)
    model = experts(kind, base=base, target_modules=["q_proj"])
    tokens = torch.randint(0, TOKENS, (2, 6))
    assert verify(model, tokens).ok and len(verify(model, tokens).layers) == 6
    same = verify(model, tokens, reference=copy.deepcopy(model))
    assert same.ok and same.reference.difference == 0.0
    plain = verify(model, tokens, reference=original)
    assert plain.ok and "without the adapter" in plain.notes[0]
    file = right_references(kind, model, tokens, tmp_path / "a")
    assert sum(".experts." in key for key in file) == 8
    key = next(key for key in file if f"layers.1.{place}.experts.base_layer.lora_B" in key)  # PEFT's gate_up_proj
    file[key] += 1.0
    result = verify(model, tokens, reference=file)
    assert result.causes == [report.ADAPTER], str(result)
    assert result.findings[0].layers == (f"model.layers.1.{place}.experts.gate_up_proj.lora_B.a.weight",)


@pytest.mark.parametrize("kind", KINDS)
def test_dora_and_its_references(kind, tmp_path):
    original = Net().eval()
    model = make(kind, copy.deepcopy(original), DORA, ["v"], target_modules=["lin0", "conv1d"])
    assert verify(model, ids(), reference=copy.deepcopy(model)).ok
    assert verify(model, ids(), reference=original).ok
    file = right_references(kind, model, ids(), tmp_path / "v")
    file["base_model.model.conv1d.lora_magnitude_vector"] *= 1.5
    result = verify(model, ids(), reference=file)
    assert result.causes == [report.ADAPTER], str(result)
    assert result.findings[0].layers == ("conv1d.lora_magnitude_vector.v.weight",)


def stale(model, layer):
    merge(model)
    layer.lora_B[layer.active_adapters[0]].weight.data.mul_(1.1)


def replaced(model, layer):
    merge(model)
    weight = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.base_layer
    weight = weight._parameters[getattr(layer, "parameter_name", "weight")]
    weight.data.copy_(torch.randn_like(weight) * 0.3)


def wrong_merge(model, layer):
    own = type(layer).get_delta_weight
    layer.get_delta_weight = lambda name: own(layer, name) * 1.1


def wrong_call(model, layer):
    called = next((m for m in model.modules() if type(m).__name__ == "LoraExperts"), None)
    called = called or (lora(model)["down_proj"] if hasattr(layer, "parameter_name") and "proj" in layer.parameter_name
                        else layer)  # fmt: skip
    called.register_forward_hook(lambda m, args, y: y if getattr(layer, "merged_adapters", None) else y * 1.2)


BUGS = {
    "stale": (stale, report.STALE, ["inject", "accelerated"]),
    "replaced": (replaced, report.BASE, ["inject", "accelerated"]),  # PEFT's unmerge does not notice it
    "merge": (wrong_merge, report.MERGE, ["PEFT"]),  # the others do not ask for it
    "call": (wrong_call, report.FORWARD, KINDS),
}


def turned_experts(kind):
    return experts(kind, name="llama4")


@pytest.mark.parametrize("place, build", [("conv1d", dora), ("gate_up_proj", experts), ("down_proj", turned_experts)])
@pytest.mark.parametrize("bug, kind", [(bug, kind) for bug, (*_, kinds) in BUGS.items() for kind in kinds])
def test_a_bug_is_named_with_its_layer(bug, kind, place, build):
    model = build(kind)
    plant, cause, _ = BUGS[bug]
    plant(model, lora(model)[place])
    before = parameter_bits(model)
    result = verify(model, ids())
    assert result.causes[0] == cause and result.verdict == "bug", str(result)
    assert any(path.endswith(place) for path in result.findings[0].layers)
    if cause in (report.STALE, report.MERGE) or build is dora:  # a call of experts has both parameters in it
        assert len(result.findings[0].layers) == 1
    assert_bits(model, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place, build", [("lin0", dora), ("down_proj", experts), ("gate_up_proj", turned_experts)])
def test_a_base_that_is_not_the_references(kind, place, build):
    """The merged weight as the base, one changed element, a grid: the parameter is named, of experts, too."""
    model = build(kind)
    other = copy.deepcopy(model)
    layer = lora(other)[place]
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.base_layer
    weight = base._parameters[getattr(layer, "parameter_name", "weight")]
    with torch.no_grad():
        original = weight.clone()
        layer.merge()
        merged = weight.clone()
        layer.unmerge()
        for numbers, cause in (
            (merged, report.DOUBLE),
            (original + (torch.arange(original.numel()) == 7).view_as(original), report.BASE),
            (original.bfloat16().float(), report.QUANTISED),
        ):
            weight.copy_(numbers)
            result = verify(other, ids(), reference=model)
            assert result.causes[0] == cause, str(result)
            assert len(result.findings[0].layers) == 1 and result.findings[0].layers[0].endswith(place)


def test_an_adapter_over_its_own_merge_is_found_without_a_reference():
    """Of DoRA by the norms of the rows, too."""
    base = Block()
    for model, paths in ((dora("PEFT"), 4), (dora("accelerated"), 4), (experts("accelerated", base=base), 2)):
        for layer in lora(model).values():
            layer.merge()
            if hasattr(layer, "merge_state"):
                layer.merge_state = None
            layer.merged_adapters.clear()
        result = verify(model, ids())
        assert result.causes == [report.DOUBLE] and len(result.findings[0].layers) == paths, str(result)


def test_what_is_not_compared_is_listed():
    model = experts("inject")
    model.experts.base_layer.config._experts_implementation = "sonicmoe"
    with pytest.raises(
        RuntimeError, match="found none: the experts implementation is 'sonicmoe' ..experts.gate_up_proj"
    ):
        verify(model, ids())
    model = experts("accelerated")
    lora(model)["down_proj"].merge()
    with pytest.raises(RuntimeError, match="some of its parameters are merged, and others are not"):
        verify(model, ids())
    net = dora("PEFT", names=["v", "w"])
    net.merge_adapter()
    with pytest.raises(RuntimeError, match="PEFT merged 'v', 'w', DoRA among them"):
        verify(net, ids())
    net = wrap(Net().eval(), {"v": {"use_dora": True}, "b": {"lora_bias": True}}, target_modules=["lin0"])
    net.base_model.set_adapter(["v", "b"])
    with pytest.raises(RuntimeError, match="adapters 'v' are DoRA beside a lora_bias"):
        verify(net, ids())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_routers_are_compared_with_a_reference_alone(kind):
    """What a router makes of its products is not known, so that it is listed. Its weight may be the reference's."""
    torch.manual_seed(shifted(7))
    fields = dict(target_modules=["q_proj"], target_parameters=["gate.weight"])
    model = make(kind, routed("qwen3_moe"), {"default": {}}, ["default"], **fields)
    merged = copy.deepcopy(model)
    merged = merged.merge_and_unload() if kind != "inject" else fused_lora.unload(merged, merge_adapters=True)
    before, tokens = parameter_bits(model), ids()
    for reference in (None, merged):
        found = verify(model, tokens, reference=reference)
        assert not found.findings and [path.split("mlp.")[1][:4] for path in found.skipped] == ["gate"] * 2
        assert all("makes of its products" in why for why in found.skipped.values())
    merged.model.layers[1].mlp.gate.weight.data[0] += 1
    (finding,) = verify(model, tokens, reference=merged).findings
    assert finding.cause == report.BASE and "layers.1.mlp.gate" in finding.layers[0]
    assert_bits(model, before)
