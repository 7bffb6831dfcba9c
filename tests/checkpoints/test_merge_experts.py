"""Merging PEFT's target_parameters into files: stacked experts and single ones, next to PEFT's own merge."""

import os

import peft
import pytest
import torch
import transformers as tf

import fused_lora
from fused_lora.adapters import AdapterError
from fused_lora.checkpoints import merge_checkpoint, unmerge_checkpoint
from fused_lora.testing.numeric import assert_no_worse
from helpers.alone import alone
from helpers.checkpoint_files import SINGLE, change, contents, pieces_of, read_all, write_adapter, write_base
from helpers.experts import ROUTERS, routed, router_config
from helpers.seeds import shifted

HIDDEN, INTER, EXPERTS = 32, 48, 3
SMALL = dict(vocab_size=90, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
MODELS = {  # of single experts on disk, w1 or gate_proj; stacked and transposed, one stack square
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**SMALL, intermediate_size=INTER, num_local_experts=EXPERTS)
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SMALL, moe_intermediate_size=INTER, num_experts=EXPERTS, num_experts_per_tok=2, head_dim=8)
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**SMALL, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=2, head_dim=8)
    ),
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
STACK = "model.layers.0.mlp.experts"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def adapter_of(model, folder, seed, **config):
    """A PEFT model with an adapter that does something, saved."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **config))
    draw = torch.Generator().manual_seed(shifted(seed))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    wrapped.save_pretrained(folder)
    return wrapped


def exact_sums(tensors, wrapped):
    """The ``tensors`` of a model and what the LoRA layers of ``wrapped`` add to them, in fp64."""
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    for path, module in wrapped.named_modules():
        if not isinstance(module, peft.tuners.lora.layer.LoraLayer):
            continue
        A, B, s = (module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"])
        path = path.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper):
            E = module.num_experts
            delta = torch.einsum("ore,eri->eoi", B.double().view(len(B), -1, E), A.double().view(E, -1, A.shape[1]))
            stack = exact[f"{path}.{module.parameter_name}"]
            turned = getattr(module.get_base_layer(), "is_transposed", False)
            stack += s * (delta.transpose(1, 2) if turned else delta).reshape(stack.shape)
        else:
            exact[f"{path}.weight"] += s * B.double() @ A.double()
    return exact


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_merges_the_same(tmp_path, monkeypatch, name, dtype):
    """Beside a linear layer; the names on disk are those of PEFT's merged model, and a record gives all bytes back."""
    pieces_of(monkeypatch, 700)
    torch.manual_seed(shifted(1))
    model = MODELS[name]().to(dtype)
    kind, before = type(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    routers = ["mlp.router.weight" if name == "gpt_oss" else "mlp.gate.weight"]
    wrapped = adapter_of(model, tmp_path / "adapter", 2, target_modules=["q_proj"], target_parameters=BOTH + routers)
    exact = exact_sums(before, wrapped)
    report = merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", record=tmp_path / "record", verify=True
    )
    assert report.checked["worst_ulps"] < 4 and {c["rank"] for c in report.changes} == {4}
    wrapped.merge_and_unload().save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert read_all(tmp_path / "out").keys() == read_all(tmp_path / "theirs").keys()
    ours, theirs = (kind.from_pretrained(tmp_path / folder).state_dict() for folder in ("out", "theirs"))
    moved = {n for n, tensor in ours.items() if not torch.equal(tensor, before[n])}
    assert {n.rpartition(".")[2] for n in moved if "experts" in n} == {"gate_up_proj", "down_proj"} and len(moved) == 8
    for tensor in moved:
        assert_no_worse(ours[tensor], theirs[tensor], exact[tensor], name=tensor)
    unmerge_checkpoint(tmp_path / "out", tmp_path / "record", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "base")


@pytest.mark.parametrize("name", ["granitemoe", "phimoe", "minimax_m2"])
def test_routers_that_have_other_names_on_disk(tmp_path, name):
    torch.manual_seed(shifted(4))
    model = routed(name)
    kind, before = type(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "base")
    targets = {key: value for key, value in router_config(name).items() if key.startswith("target")}
    wrapped = adapter_of(model, tmp_path / "adapter", 5, **targets)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    exact = exact_sums(before, wrapped)
    ours = kind.from_pretrained(tmp_path / "out").state_dict()
    moved = {n for n, tensor in ours.items() if not torch.equal(tensor, before[n])}
    assert moved == {f"model.layers.{i}.{ROUTERS[name][0]}.weight" for i in range(2)}
    for tensor in moved:
        assert_no_worse(ours[tensor], exact[tensor].float(), exact[tensor], name=tensor)
    layers = fused_lora.checkpoints.inspect_adapter(tmp_path / "adapter", tmp_path / "base").layers
    assert [(row["kind"], row["shape"]) for row in layers] == [("LoRA", [4, 16])] * 2


def test_two_adapters_with_ranks_of_their_own(tmp_path):
    """The rank and alpha of one parameter by a pattern, as PEFT writes for converted adapters; weights beside it."""
    torch.manual_seed(shifted(1))
    model = MODELS["mixtral"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "base")
    config = dict(target_modules=[], target_parameters=BOTH, use_rslora=True)
    patterns = dict(rank_pattern={r".*\.experts\.gate_up_proj": 8}, alpha_pattern={r".*\.experts\.gate_up_proj": 3})
    one = adapter_of(model, tmp_path / "one", 2, **config, **patterns)
    first = exact_sums(before, one)
    second = exact_sums(before, adapter_of(one.unload(), tmp_path / "two", 3, **config))
    pair = [(tmp_path / "one", 0.5), tmp_path / "two"]
    report = merge_checkpoint(tmp_path / "base", pair, tmp_path / "out", verify=True)
    assert sorted({c["rank"] for c in report.changes}) == [8, 12]
    found = tf.MixtralForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name in (f"{STACK}.gate_up_proj", f"{STACK}.down_proj"):
        W = before[name].double()
        exact = W + 0.5 * (first[name] - W) + second[name] - W
        assert_no_worse(found[name], exact.float(), exact)


def stacks(tmp_path, shapes, adapted, E=2, r=3, **config):
    """A base with stacks {name: (rows, columns)} and an adapter with wrappers {path: (in, out)}."""
    base = write_base(tmp_path / "base", {f"{STACK}.{name}": torch.ones(E, *shape) for name, shape in shapes.items()})
    parameters = [f"mlp.experts.{name}" for name in shapes]
    shapes = {f"{STACK}{path}": sizes for path, sizes in adapted.items()}
    adapter = write_adapter(tmp_path / "adapter", shapes, r=E * r, target_parameters=parameters, **config)
    change(adapter / "adapter_config.json", r=r)
    return base, adapter


@pytest.mark.parametrize(
    "shapes, adapted, config, message",
    [
        ({"down_proj": (8, 8)}, {"": (8, 8)}, {}, "which fit in 2 ways"),  # transposed or not?
        ({"up_proj": (8, 4), "down_proj": (8, 4)}, {"": (4, 8), ".base_layer": (4, 8)}, {}, "which fit in 2 ways"),
        ({"down_proj": (8, 4)}, {"": (4, 9)}, {}, "experts \\* r, in"),
        ({"down_proj": (8, 4)}, {"": (4, 8), ".base_layer": (4, 8)}, {}, "2 of the parameters 'down_proj'"),
        ({"down_proj": (8, 4)}, {"": (4, 8)}, {"fan_in_fan_out": True}, "fan_in_fan_out: expected False"),
        ({"down_proj": (8, 4)}, {"": (4, 8)}, {"rank_pattern": {"down_proj": 2}}, "experts \\* r, in"),
        ({"down_proj": (8, 4)}, {"": (4, 8)}, {"use_dora": True}, "use_dora: expected False with target_parameters"),
        (
            {"down_proj": (8, 4)},
            {".other": (4, 8)},
            {"rank_pattern": {"other": 6}},
            "target_parameters: expected tensors for",
        ),
    ],
)
def test_what_is_refused(tmp_path, shapes, adapted, config, message):
    base, adapter = stacks(tmp_path, shapes, adapted, **config)
    with pytest.raises(AdapterError, match=message):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_stack_that_is_not_there_and_one_that_is_of_integers(tmp_path):
    base, adapter = stacks(tmp_path, {"down_proj": (8, 4)}, {"": (4, 8)})
    change(base / SINGLE, **{f"{STACK}.down_proj": torch.ones(2, 8, 4, dtype=torch.int8)})
    with pytest.raises(AdapterError, match="int8 in 'model.layers.0.mlp.experts.down_proj'"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    change(base / SINGLE, **{f"{STACK}.down_proj": None, "model.layers.0.mlp.w": torch.ones(2)})
    with pytest.raises(AdapterError, match="expected 1 of the parameters 'down_proj' .* it has 'model.layers.0.mlp.w'"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_single_experts_of_an_older_peft_are_refused(tmp_path):
    """It took [experts, out, in] for [experts, in, out]."""
    tensors = {f"{STACK}.{e}.{part}_proj.weight": torch.ones(8, 4) for e in range(2) for part in ("gate", "up")}
    base, parameters = write_base(tmp_path / "base", tensors), ["mlp.experts.gate_up_proj"]
    adapter = write_adapter(tmp_path / "adapter", {STACK: (16, 4)}, r=6, target_parameters=parameters)
    change(adapter / "adapter_config.json", r=3)
    with pytest.raises(AdapterError, match="in and out exchanged"):
        merge_checkpoint(base, adapter, tmp_path / "out")


@needs_fork
def test_memory_of_a_stack_holds_a_few_pieces(tmp_path, monkeypatch):
    """A stack of 128 MB with 64 MB of address space beyond what the process has."""
    pieces_of(monkeypatch, 1 << 20)
    base, adapter = stacks(tmp_path, {"down_proj": (4096, 1024)}, {"": (1024, 4096)}, E=8, r=1)
    fused_lora.functional.merge_(torch.zeros(8, 8), [torch.ones(1, 8)], [torch.ones(8, 1)], [1.0])

    @alone
    def merge():
        merge_checkpoint(base, adapter, tmp_path / "out")

    merge()
    assert len(read_all(tmp_path / "out")) == 1
