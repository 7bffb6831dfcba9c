"""verify: healthy models differ by rounding only, every planted bug gets its name, and nothing is left changed."""

import copy
import random
import warnings

import peft
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import fused_lora
from fused_lora import verify
from fused_lora.diagnostics.verification import layers as layer_states
from fused_lora.diagnostics.verification import passes, report, weights
from helpers.hooks import hooks
from helpers.interrupts import everywhere
from helpers.seeds import shifted
from helpers.twins import randomize_adapters, twin_models

ADAPTER = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
KINDS = ["fused_lora", "peft", "accelerated"]


def config(kind=LlamaConfig, **fields):
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return kind(**{**sizes, "num_key_value_heads": 2, "max_position_embeddings": 32, **fields})


def llama(dtype=torch.float32):
    return LlamaForCausalLM(config()).to(dtype).eval()


def make(kind, dtype=torch.float32, adapters=None, base=None):
    ours, theirs = twin_models(llama(dtype) if base is None else base, adapters or {"default": ADAPTER})
    if kind == "accelerated":
        fused_lora.accelerate(theirs)
    return (ours if kind == "fused_lora" else theirs).eval()


def merge(model):
    fused_lora.merge(model)  # of a PEFT model: its merge_adapter


def layers(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}


def bits(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


@pytest.fixture
def ids():
    return torch.randint(0, 61, (2, 9))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_model_differs_by_rounding(kind, dtype, merged, ids):
    model = make(kind, dtype)
    if merged:
        merge(model)
    result = verify(model, ids)
    assert result.ok and result.verdict == "rounding" and not result.findings and not result.notes, str(result)
    assert result.was_merged == merged and len(result.layers) == 14 and result.output.ok
    for check in result.layers:
        assert check.dtype == dtype and check.ok and 0.02 < check.ratio < 1
        assert check.difference >= check.difference_rms > 0
        assert check.difference_rms < 4 * check.expected_rms
    lost = max(check.lost for check in result.layers)
    roundoff = torch.finfo(dtype).eps
    # weights of std 0.02, deltas of about 0.01: what is lost is a rounding of W, measured against D
    assert 0.05 * roundoff < lost < 2 * roundoff


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_false_alarm_over_random_layers(dtype, dora):
    """Any size, rank, scale of weights, inputs, adapters and magnitudes; adapters in fp32 or the dtype of the base."""
    for _ in range(20 if dora else 60):
        K, N = random.choice([1, 3, 17, 64, 256][dora:]), random.choice([1, 5, 64, 200])
        base = nn.Sequential(nn.Linear(K, N, bias=random.random() < 0.5))
        base[0].weight.data.normal_(std=random.choice([1e-3, 0.02, 1.0]))
        fields = {"target_modules": ["0"], "r": random.choice([1, 2, 16, 64]), "lora_alpha": random.choice([1, 16, 64])}
        fields["use_rslora"] = random.random() < 0.3
        wide, names = random.random() < 0.5, ["one", "two"][: random.choice([1, 2])]
        config, second = peft.LoraConfig(**fields, use_dora=dora), dora and random.random() < 0.5
        model = peft.get_peft_model(base.to(dtype), config, "one", autocast_adapter_dtype=wide)
        model.add_adapter("two", peft.LoraConfig(**fields, use_dora=second), autocast_adapter_dtype=wide)
        model.base_model.set_adapter(names)
        randomize_adapters(model.eval(), std=random.choice([1e-3, 0.05, 0.5]))
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data.mul_(1 + 0.2 * torch.randn_like(parameter))
        if random.random() < 0.5:
            fused_lora.accelerate(model)
        exact = not dora or names == ["one"] or hasattr(model.base_model.model[0], "merge_state")
        if random.random() < 0.4 and exact:
            model.merge_adapter()
        x = torch.randn(random.choice([1, 5, 70]), K).to(dtype) * random.choice([1, 10])
        result = verify(model, x)
        assert result.verdict in ("rounding", "lost"), f"{(K, N, fields, wide, names)}: {result.layers[0]}\n{result}"


def test_fidelity_is_what_the_merge_itself_reports(ids):
    model = make("fused_lora", torch.bfloat16)
    found = {check.path: check.lost for check in verify(model, ids).layers}
    fused_lora.merge(model)
    expected = fused_lora.delta_fidelity(model)
    assert found.keys() == expected.keys()
    for path, lost in found.items():
        assert lost == pytest.approx(expected[path], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_difference_is_that_of_a_real_merge(kind, ids):
    model = make(kind, torch.bfloat16)
    result = verify(model, ids)
    with torch.no_grad():
        unmerged = model(ids).logits
        merge(model)
        merged = model(ids).logits
    assert result.output.difference == (merged.double() - unmerged.double()).abs().max().item() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merged", [False, True])
def test_conv1d_lora_bias_and_several_adapters(kind, merged, ids):
    sizes = dict(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    base = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    fields = {**ADAPTER, "lora_bias": True}
    model = make(kind, adapters={"one": fields, "two": {**fields, "r": 2}}, base=base)
    (fused_lora.set_adapter if kind == "fused_lora" else peft.PeftModel.set_adapter)(model, "one")
    active = ["one", "two"]
    fused_lora.set_adapter(model, active) if kind == "fused_lora" else model.base_model.set_adapter(active)
    if merged:
        merge(model)
    result = verify(model, ids)
    assert result.ok, str(result)
    assert {check.adapters for check in result.layers} == {("one", "two")} and len(result.layers) == 4


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_changed(kind, merged, ids):
    model = make(kind, torch.bfloat16)
    if merged:
        merge(model)
    model.train()
    some = list(model.modules())
    for module in some[::3]:
        module.training = False
    flags = [m.training for m in some]
    before, pointers = bits(model), {n: p.data_ptr() for n, p in model.named_parameters()}
    states = {n: (list(m.merged_adapters), getattr(m, "merge_state", None)) for n, m in layers(model).items()}
    active = {n: m.active_adapters for n, m in layers(model).items()}
    names = {n: set(vars(m)) for n, m in layers(model).items()}
    generator = torch.get_rng_state()
    verify(model, ids)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [m.training for m in some] == flags
    assert pointers == {n: p.data_ptr() for n, p in model.named_parameters()}
    for name, tensor in bits(model).items():
        assert torch.equal(tensor, before[name]), name
    for name, module in layers(model).items():
        assert (list(module.merged_adapters), getattr(module, "merge_state", None)) == states[name]
        assert module.active_adapters == active[name] and set(vars(module)) == names[name]
    for module in some:
        assert not hooks(module)
    assert all(p.grad is None for p in model.parameters())
    if kind == "fused_lora" and merged:
        fused_lora.unmerge(model)  # its record still fits, to the bit


def test_an_error_in_the_model_leaves_nothing_changed():
    model = make("fused_lora").train()
    fused_lora.merge(model)
    before, held = bits(model), [list(hooks(m)) for m in model.modules()]
    inner = layers(model)["model.layers.1.mlp.up_proj"]

    def fail(*_):
        raise OSError("broken inside")

    handle = inner.base_layer.register_forward_hook(fail)
    with pytest.raises(OSError, match="broken inside"):
        verify(model, torch.zeros(1, 4, dtype=torch.long))
    handle.remove()
    assert model.training and all(m.merged for m in layers(model).values())
    for name, tensor in bits(model).items():
        assert torch.equal(tensor, before[name]), name
    assert [list(hooks(m)) for m in model.modules()] == held
    fused_lora.unmerge(model)


class Around(nn.Module):
    """A model, and what becomes of its output; it counts its calls."""

    def __init__(self, model, after=lambda output: output):
        super().__init__()
        self.model, self.after = model, after
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.after(self.model(x))


def test_buffers_are_restored(ids):
    model = Around(make("fused_lora"))
    assert verify(model, ids).ok and model.calls == 0


def test_two_runs_give_the_same_table(ids):
    model = make("peft")
    torch.manual_seed(shifted(1))
    first = str(verify(model, ids))
    torch.manual_seed(shifted(2))
    assert str(verify(model, ids)) == first
    assert "q_proj" in first and "verdict: every difference is rounding" in first


@pytest.mark.parametrize("inputs", ["tensor", "mapping", "tuple"])
def test_forms_of_inputs(inputs, ids):
    model = make("fused_lora")
    forms = {"tensor": ids, "mapping": {"input_ids": ids, "use_cache": False}, "tuple": (ids,)}
    assert verify(model, forms[inputs]).ok


def test_a_plain_stack_of_layers_and_few_rows():
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8)).eval()
    fused_lora.inject(model, fused_lora.LoraConfig(target_modules=["0", "2"], r=3, init_lora_weights=False))
    randomize_adapters(model)
    result = verify(model, torch.randn(100, 24), max_rows=5)
    assert result.ok and len(result.layers) == 2


# dropout


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_that_eval_does_not_reach(kind, ids):
    model = make(kind)
    stuck = [n for n, m in model.named_modules() if isinstance(m, nn.Dropout)][3]
    module = model.get_submodule(stuck)
    module.train(True)
    module.train = lambda mode=True: module
    result = verify(model, ids)
    assert result.causes == [report.DROPOUT] and result.verdict == "bug"
    text = str(result)
    assert "after model.eval()" in text and stuck in text
    found = [f for f in result.findings if "depends on the seed" in f.message]
    assert found and found[0].layers == (stuck.partition(".lora_dropout")[0],)


def test_one_dropout_in_training_mode_in_a_model_in_eval_mode(ids):
    model = make("peft")
    name, module = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Dropout))
    module.train()
    result = verify(model, ids)
    assert result.causes == [report.DROPOUT] and result.findings[0].layers == (name,) and module.training


def test_dropout_in_the_model_itself(ids):
    drops = Around(make("fused_lora"), lambda out: nn.functional.dropout(out.logits))  # training=True is its default
    result = verify(drops, ids)
    assert result.causes == [report.DROPOUT] and "no LoRA layer" in str(result)


def test_a_model_in_training_mode_is_a_note(ids):
    model = make("peft").train()
    result = verify(model, ids)
    assert result.ok and model.training and "14 dropouts act" in result.notes[0]


def test_not_deterministic(ids):
    model = make("fused_lora")
    calls = []
    target = layers(model)["model.layers.0.mlp.gate_proj"]
    target.register_forward_hook(lambda m, x, y: calls.append(0) or y * (1 + len(calls) % 5))
    result = verify(model, ids)
    assert result.causes[0] == report.RANDOM and result.findings[0].layers == ("model.layers.0.mlp.gate_proj",)


# double merge


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_reference", [False, True])
def test_an_adapter_on_top_of_its_own_merge(kind, with_reference, ids):
    base = llama()
    original = bits(base)
    model = make(kind, base=base)
    for module in layers(model).values():
        module.base_layer.weight.data += module.get_delta_weight("default")
    result = verify(model, ids, reference=original if with_reference else None)
    assert result.causes == [report.DOUBLE], str(result)
    assert len(result.findings[0].layers) == 14


def test_peft_made_to_merge_twice(ids):
    model = make("peft")
    model.merge_adapter()
    for module in layers(model).values():
        module.merged_adapters.clear()
    model.merge_adapter()
    result = verify(model, ids)
    assert result.causes == [report.DOUBLE] and result.was_merged


def test_a_delta_added_to_merged_weights(ids):
    model = make("fused_lora")
    fused_lora.merge(model)
    for module in layers(model).values():
        module.base_layer.weight.data += module.get_delta_weight("default")
    before = bits(model)
    result = verify(model, ids)
    assert result.causes == [report.DOUBLE] and "once more" in str(result)
    assert all(torch.equal(t, before[n]) for n, t in bits(model).items())


def test_a_reference_with_the_adapter_in_twice(ids):
    model = make("fused_lora")
    twice = copy.deepcopy(model)
    for module in layers(twice).values():
        module.base_layer.weight.data += 2 * module.get_delta_weight("default")
    reference = fused_lora.unload(twice)
    result = verify(model, ids, reference=reference)
    assert result.causes == [report.DOUBLE] and "in it twice" in str(result)


# wrong base


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_over_another_base(kind, ids):
    model = make(kind)
    other = copy.deepcopy(model)
    chosen = [m for n, m in layers(other).items() if "q_proj" in n]
    for module in chosen:
        module.base_layer.weight.data += 1e-3 * torch.randn_like(module.base_layer.weight)
    result = verify(other, ids, reference=model)
    assert result.causes == [report.BASE], str(result)
    assert len(result.findings[0].layers) == 2 and all("q_proj" in path for path in result.findings[0].layers)
    assert not result.reference.ok


def test_a_merged_weight_that_was_replaced(ids):
    model = make("fused_lora")
    fused_lora.merge(model)
    broken = layers(model)["model.layers.0.self_attn.q_proj"]
    broken.base_layer.weight.data.copy_(torch.randn(32, 32) * 0.02)
    result = verify(model, ids)
    assert result.causes == [report.BASE] and result.findings[0].layers == ("model.layers.0.self_attn.q_proj",)


# quantisation


@pytest.mark.parametrize("kept_dtype", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_rounded_after_training(kind, kept_dtype, ids):
    model = make(kind)
    rounded = copy.deepcopy(model)
    for module in layers(rounded).values():
        weight = module.base_layer.weight.data.bfloat16()
        module.base_layer.weight.data = weight.float() if kept_dtype else weight
    if not kept_dtype:
        rounded.bfloat16()
    result = verify(rounded, ids, reference=model if kept_dtype else dict(model.state_dict()))
    assert result.causes[0] == report.QUANTISED, str(result)
    assert "bfloat16" in result.findings[0].message and len(result.findings[0].layers) == 14


def test_a_base_on_a_grid_of_16_values(ids):
    model = make("fused_lora", base=LlamaForCausalLM(config(hidden_size=64, intermediate_size=96)).eval())
    coarse = copy.deepcopy(model)
    for module in layers(coarse).values():
        weight = module.base_layer.weight.data
        step = weight.abs().amax(1, keepdim=True) / 7
        weight.copy_((weight / step).round() * step)
    result = verify(coarse, ids, reference=model)
    assert result.causes == [report.QUANTISED] and "values a row" in str(result)


def test_a_merged_weight_that_was_rounded(ids):
    model = make("fused_lora")
    fused_lora.merge(model)
    for module in layers(model).values():
        module.base_layer.weight.data.copy_(module.base_layer.weight.data.bfloat16())
    result = verify(model, ids)
    assert result.causes == [report.QUANTISED] and "after the merge" in str(result)


# everything else


@pytest.mark.parametrize("kind", KINDS)
def test_references_that_agree(kind, ids):
    base = llama()
    original = copy.deepcopy(base)
    model = make(kind, base=base)
    same = verify(model, ids, reference=copy.deepcopy(model))
    assert same.ok and same.reference.difference == 0.0
    plain = verify(model, ids, reference=original)
    assert plain.ok and plain.reference is None and "without the adapter" in plain.notes[0]
    copied = copy.deepcopy(model)
    merged = fused_lora.unload(copied, merge_adapters=True) if kind == "fused_lora" else copied.merge_and_unload()
    against = verify(model, ids, reference=merged)
    assert against.ok and against.reference.ok and against.reference.difference > 0, str(against)
    merge(model)
    assert verify(model, ids, reference=original).ok


def test_an_adapter_trained_while_merged_is_stale(ids):
    model = make("fused_lora")
    fused_lora.merge(model)
    layers(model)["model.layers.1.mlp.down_proj"].lora_B["default"].weight.data += 0.01
    result = verify(model, ids)
    assert result.causes == [report.STALE] and result.findings[0].layers == ("model.layers.1.mlp.down_proj",)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_another_module_uses_too(kind, ids):
    base = LlamaForCausalLM(config(tie_word_embeddings=True)).eval()
    model = make(kind, adapters={"default": {**ADAPTER, "target_modules": ["q_proj", "lm_head"]}}, base=base)
    result = verify(model, ids)
    assert result.causes == [report.SHARED] and result.findings[0].layers[0].endswith("lm_head")


def test_a_reloaded_adapter_that_was_not_loaded(ids):
    model = make("peft")
    fresh = copy.deepcopy(model)
    for module in layers(fresh).values():
        nn.init.zeros_(module.lora_B["default"].weight)
    result = verify(fresh, ids, reference=model)
    assert result.causes == [report.ADAPTER] and any("every lora_B is zero" in note for note in result.notes)
    assert verify(model, ids, reference=peft.get_peft_model_state_dict(model)).ok
    assert verify(fresh, ids, reference=peft.get_peft_model_state_dict(model)).causes == [report.ADAPTER]


@pytest.mark.parametrize("merged", [False, True])
def test_a_head_that_was_not_saved(merged, ids):
    base = LlamaForSequenceClassification(config(num_labels=3, pad_token_id=0)).eval()
    fields = {**ADAPTER, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
    model = peft.get_peft_model(base, peft.LoraConfig(**fields)).eval()
    randomize_adapters(model)
    other = copy.deepcopy(model)
    other.base_model.model.score.modules_to_save["default"].weight.data.normal_()
    if merged:
        other.merge_adapter()
    assert verify(model, ids, reference=copy.deepcopy(model)).ok
    result = verify(other, ids, reference=model)
    assert result.causes == [report.PARAMETERS] and result.findings[0].layers == ("score.weight",)


@pytest.mark.parametrize("as_mapping", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_of_lora_layers_are_compared(dtype, as_mapping, ids):
    """The base's, with a merged lora_bias or without, and lora_B's."""
    base = LlamaForCausalLM(config(attention_bias=True)).to(dtype).eval()
    model = fused_lora.inject(base, fused_lora.LoraConfig(target_modules=["q_proj"], lora_bias=True)).eval()
    for layer in layers(model).values():
        layer.lora_B["default"].bias.data.normal_()
        layer.lora_B["default"].weight.data.normal_(std=0.1)
    merged = copy.deepcopy(model)
    fused_lora.merge(merged)

    def causes(one, other):
        return verify(one, ids, reference=dict(other.state_dict()) if as_mapping else other).causes

    for one in (model, merged):
        for other in (model, merged):
            assert causes(one, other) == []
    own, path = copy.deepcopy(merged), "model.layers.1.self_attn.q_proj"
    layers(own)[path].base_layer.bias.data[3] += 0.1
    found = verify(model, ids, reference=dict(own.state_dict()) if as_mapping else own).findings
    assert found[0].cause == report.PARAMETERS and found[0].layers == (f"{path}.bias",)
    own = copy.deepcopy(model)
    layers(own)[path].lora_B["default"].bias.data[3] += 0.1
    assert causes(model, own)[0] == report.ADAPTER


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", ["adapter", "embedding"])
def test_merged_token_rows_that_are_not_the_adapters_are_stale(kind, changed, ids):
    settings = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5], init_lora_weights=False)
    model = (fused_lora.inject if kind == "fused_lora" else peft.get_peft_model)(llama(), settings).eval()
    if kind == "accelerated":
        fused_lora.accelerate(model)
    merge(model)
    assert verify(model, ids).ok
    for module in model.modules():
        if hasattr(module, "trainable_tokens_delta"):
            rows = module.trainable_tokens_delta["default"] if changed == "adapter" else module.base_layer.weight
            rows.data[-1 if changed == "adapter" else 5] += 0.5
    result = verify(model, ids)
    assert result.causes == [report.STALE] and "embed_tokens" in result.findings[0].layers[0]


def test_an_output_that_is_not_the_lora_formula(ids):
    model = make("fused_lora")
    name = "model.layers.0.self_attn.v_proj"
    layers(model)[name].register_forward_hook(lambda m, x, y: y if m.merged else y * 1.01)
    result = verify(model, ids)
    assert result.causes[0] == report.FORWARD and result.findings[0].layers == (name,)


def test_a_merge_that_adds_something_else(ids, monkeypatch):
    model = make("peft")
    module = layers(model)["base_model.model.model.layers.0.self_attn.v_proj"]
    delta = type(module).get_delta_weight
    monkeypatch.setattr(module, "get_delta_weight", lambda name: delta(module, name) * 1.01)
    result = verify(model, ids)
    assert result.causes == [report.MERGE] and "v_proj" in result.findings[0].layers[0]


def test_a_base_layer_that_computes_something_else(ids):
    model = make("fused_lora")
    layers(model)["model.layers.0.self_attn.v_proj"].base_layer.register_forward_hook(lambda m, x, y: y.half().float())
    assert verify(model, ids).causes == [report.FORWARD, report.MERGED_FORWARD]
    fused_lora.merge(model)
    assert verify(model, ids).causes == [report.FORWARD, report.MERGED_FORWARD]


def test_layers_of_other_variants_are_listed(ids):
    fields = {**ADAPTER, "target_modules": ["embed_tokens"], "use_dora": True}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**fields))
    model.add_adapter("plain", peft.LoraConfig(**{**fields, "use_dora": False, "target_modules": ["v_proj"]}))
    model.base_model.set_adapter(["default", "plain"])
    result = verify(model.eval(), ids)
    assert not result.ok and result.verdict == "incomplete" and not result.findings
    assert len(result.layers) == 2 and len(result.skipped) == 1
    skipped = next(iter(result.skipped.values()))
    assert skipped.startswith("adapters 'default' are another variant") and f": {skipped}" in str(result)


def test_layers_that_are_not_called_are_listed(ids):
    fields = {**ADAPTER, "target_modules": ["q_proj"]}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**fields)).eval()
    randomize_adapters(model)
    model.spare = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    result = verify(model, ids)
    assert result.verdict == "incomplete" and len(result.layers) == 2
    assert list(result.skipped.values()) == ["it was not called"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["inject", "PEFT", "accelerated"])
def test_embeddings_are_compared(ids, kind, dtype):
    fields = {**ADAPTER, "target_modules": ["q_proj", "embed_tokens"]}
    base = llama(dtype)
    if kind == "inject":
        model = fused_lora.inject(base, fused_lora.LoraConfig(**fields)).eval()
    else:
        model = peft.get_peft_model(base, peft.LoraConfig(**fields)).eval()
        model = fused_lora.accelerate(model) if kind == "accelerated" else model
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = verify(model, ids)
    assert result.ok and not result.skipped and len(result.layers) == 3, str(result)
    assert any(check.path.endswith("embed_tokens") and 0 < check.unmerged < 1 for check in result.layers)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    embedding = next(m for m in model.modules() if getattr(m, "lora_embedding_A", None))
    own = embedding.get_delta_weight
    embedding.get_delta_weight = lambda name: own(name) * 1.5
    if kind == "PEFT":  # whose merge asks for it
        assert [finding.cause for finding in verify(model, ids).findings] == [report.MERGE]


def test_a_layer_that_is_called_twice_and_a_weight_of_several_blocks(monkeypatch):
    monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", 100)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(24, 24)

        def forward(self, x):
            return self.lin(self.lin(x).relu())

    model = fused_lora.inject(Twice().eval(), fused_lora.LoraConfig(target_modules=["lin"], init_lora_weights=False))
    x = torch.randn(7, 24)
    whole = verify(model, x)
    assert whole.ok and len(whole.layers) == 1
    monkeypatch.undo()
    assert verify(model, x).layers[0].ratio == pytest.approx(whole.layers[0].ratio)


def test_inside_inference_mode(ids):
    model = make("accelerated", torch.bfloat16)
    before = bits(model)
    with torch.inference_mode():
        assert verify(model, ids.clone()).ok
    assert all(torch.equal(t, before[n]) for n, t in bits(model).items())
    model.train()
    model(ids, labels=ids).loss.backward()


def test_a_compiled_model(ids):
    model = make("fused_lora")
    assert verify(torch.compile(model, backend="eager"), ids, reference=model).ok


@pytest.mark.parametrize("autocast", [False, True])
def test_under_autocast(autocast, ids):
    model = make("peft")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = verify(model, ids)
    assert result.ok, str(result)
    assert (result.output.difference > 1e-5) == autocast


def test_errors_name_the_argument(ids):
    model = make("fused_lora")
    with pytest.raises(TypeError, match="model: expected nn.Module, got int"):
        verify(3, ids)
    with pytest.raises(TypeError, match="inputs: expected a tensor, .* got str"):
        verify(model, "text")
    with pytest.raises(TypeError, match="reference: expected nn.Module or a mapping"):
        verify(model, ids, reference=3)
    with pytest.raises(TypeError, match="seed: expected an int, got"):
        verify(model, ids, seed=1.0)
    with pytest.raises(ValueError, match="max_rows: expected at least 1, got 0"):
        verify(model, ids, max_rows=0)
    with pytest.raises(ValueError, match="reference: expected parameters named as in the model"):
        verify(model, ids, reference={"other.weight": torch.zeros(1)})
    other = make("fused_lora", base=LlamaForCausalLM(config(vocab_size=70)).eval())
    with pytest.raises(ValueError, match=r"reference: expected an output of shape \(2, 9, 61\), got \(2, 9, 70\)"):
        verify(model, ids, reference=other)
    with pytest.raises(ValueError, match=r"reference: expected model.layers.0.self_attn.q_proj.weight \(32, 32\)"):
        verify(model, ids, reference={"model.layers.0.self_attn.q_proj.weight": torch.zeros(1, 2)})
    with pytest.raises(RuntimeError, match="model: expected LoRA layers"):
        verify(llama(), ids)
    with fused_lora.disable_adapters(model), pytest.raises(RuntimeError, match="model: its adapters are disabled"):
        verify(model, ids)
    with fused_lora.adapter_batch(model, [None, "default"]), pytest.raises(RuntimeError, match="inside adapter_batch"):
        verify(model, ids)
    layers(model)["model.layers.0.self_attn.q_proj"].lora_B["default"].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="model: the adapter of model.layers.0.self_attn.q_proj holds NaN"):
        verify(model, ids)


def test_a_model_without_a_float_output(ids):
    tokens = Around(make("fused_lora"), lambda out: out.logits.argmax(-1))
    with pytest.raises(TypeError, match="model: expected an output with a floating-point tensor, got Tensor"):
        verify(tokens, ids)


@pytest.mark.parametrize("x", [torch.ones(0, 24), torch.full((3, 24), float("nan"))], ids=["no rows", "NaN"])
def test_inputs_that_show_nothing_are_refused(x):
    """They would pass as rounding, or be taken for a bug of every layer."""
    model = fused_lora.inject(nn.Sequential(nn.Linear(24, 8)), fused_lora.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="inputs: expected"):
        verify(model, x)
    assert model.training and not any(hooks(m) for m in model.modules())


@pytest.mark.parametrize("size, verdict", [(0.002, "lost"), (0.2, "rounding")])
def test_a_merge_that_loses_most_of_the_adapter_is_not_ok(size, verdict, ids):
    model = make("fused_lora", torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, size)
    result = verify(model, ids)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fused_lora.merge(model)
    assert any("of the adapters ['default']" in str(w.message) for w in told) == (verdict == "lost")
    lost = fused_lora.delta_fidelity(model)
    expected = sum(max(0.0, 1 - share) for share in lost.values()) / len(lost)
    assert result.verdict == verdict and result.ok == (verdict == "rounding")
    assert result.survives == pytest.approx(expected, abs=1e-3) and f"keeps {result.survives:.1%}" in str(result)
    assert (result.survives < 0.5) == (verdict == "lost")


def test_a_base_that_was_loaded_over_a_merge_is_a_wrong_base_and_nothing_else(ids):
    model = make("accelerated")
    twin = copy.deepcopy(model)
    before = {path: layer.base_layer.weight.clone() for path, layer in layers(model).items()}
    model.merge_adapter()
    for path, layer in layers(model).items():
        layer.base_layer.weight.data.copy_(before[path])
    assert verify(model, ids).causes == ["wrong base"]
    with pytest.warns(UserWarning, match="PEFT's unmerge subtracts"):
        model.unmerge_adapter()
    result = verify(model, ids, reference=twin)
    assert result.causes == ["wrong base"] and "with the adapter taken away" in result.findings[0].message


def test_a_quantised_reference_is_refused_by_name(ids):
    model = fused_lora.inject(llama(), fused_lora.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    packed = {name: p.detach() for name, p in model.named_parameters()}
    name = next(name for name in packed if name.endswith("q_proj.base_layer.weight"))
    packed[name] = packed[name].to(torch.int8)
    with pytest.raises(
        ValueError, match="reference: .*q_proj.weight: a weight is torch.int8; expected a whole floating"
    ):
        verify(model, ids, reference=packed)


@pytest.mark.parametrize("switch", ["none", "legacy", "new"])
def test_tf32_is_seen_whichever_way_it_was_switched_on(switch):
    """Of a GPU's tensors. Torch answers one question for both ways only where nobody has taken the new one."""
    before, matmul = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul
    if switch == "new" and not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has one way")
    try:
        if switch == "legacy":
            torch.set_float32_matmul_precision("high")
        elif switch == "new":
            matmul.fp32_precision = "tf32"
        with FakeTensorMode():
            x = torch.empty(2, 2, device="cuda")
            found = weights.Units.of(x, x, x, [x])
    finally:
        if switch == "new":
            matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)
    assert found.operand == (0.0 if switch == "none" else 2.0**-11)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("part, step", [(layer_states, 7), (passes, 2)])
def test_an_interrupt_leaves_the_model_as_it_was(part, step, merged):
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))
    fused_lora.inject(model, fused_lora.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    if merged:
        fused_lora.merge(model)
    x, layer = torch.randn(3, 8), model[0]

    def state():
        weights = [(name, p.data_ptr(), p.tolist()) for name, p in model.state_dict().items()]
        flags = [module.training for module in model.modules()]
        held = [hooks(module) for module in model.modules()]
        return weights, flags, held, torch.is_grad_enabled(), layer.merged_adapters, layer.active_adapters

    before, places = state(), 0
    for place in everywhere(lambda: None, lambda: verify(model, x), part.__file__, step=step):
        assert state() == before, place
        places += 1
    assert places > 30
