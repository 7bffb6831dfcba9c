"""What trains beside LoRA, next to PEFT: modules_to_save and trainable_token_indices."""

import contextlib
import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import fused_lora
from fused_lora import AdapterError, AdapterStore, LoraConfig
from fused_lora.modules.auxiliary import SavedModule, TrainedTokens, auxiliary_modules
from fused_lora.testing.numeric import assert_close
from helpers import training
from helpers.interrupts import everywhere
from helpers.seeds import shifted

VOCABULARY = training.VOCABULARY
TOKENS = [7, 3, 60]
IDS = torch.tensor([[3, 7, 9, 60, 4], [5, 5, 3, 2, 8], [11, 12, 13, 14, 15]])
PREFIX = "base_model.model."


class Net(nn.Module):
    """A body, a head that is a module of several, and a norm."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, 12, padding_idx=3)
        self.body, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)
        self.head = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, ids):
        return self.head(self.norm(torch.tanh(self.body(self.embed_tokens(ids)))))


def llama(tied=False, dtype=torch.float32):
    return training.llama(dtype, tie_word_embeddings=tied).eval()


MODELS = {
    "net": (lambda: Net().eval(), "body"),
    "llama": (llama, "q_proj"),
    "tied llama": (lambda: llama(True), "q_proj"),
}
CONFIGS = {
    "head": {"modules_to_save": ["head"]},
    "tokens": {"trainable_token_indices": TOKENS},
    "tokens by name": {"trainable_token_indices": {"embed_tokens": TOKENS}},
    "both": {"modules_to_save": ["norm"], "trainable_token_indices": TOKENS},
}
CASES = [(model, config) for model in MODELS for config in CONFIGS if (model, config) != ("tied llama", "head")]
each_case = pytest.mark.parametrize("model, config", CASES)


def output(model, ids=IDS, **more):
    result = model(ids, **more)
    return result.logits if hasattr(result, "logits") else result


def fields_of(model, config, **more):
    return {"r": 3, "target_modules": [MODELS[model][1]], "init_lora_weights": False, **CONFIGS[config], **more}


def shake(tensors, seed=0):
    torch.manual_seed(shifted(seed))
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape).to(tensor) * 0.3)


def twins(model, config, adapters=("default",), **more):
    """Ours and PEFT's with the same random values in everything that the adapters train."""
    torch.manual_seed(shifted(1))
    base, fields = MODELS[model][0](), fields_of(model, config, **more)
    theirs = None
    ours = copy.deepcopy(base)
    for name in adapters:
        fused_lora.inject(ours, LoraConfig(**fields), name)
        settings = peft.LoraConfig(**copy.deepcopy(fields))
        if theirs is None:
            theirs = peft.get_peft_model(base, settings, name)
        else:
            theirs.add_adapter(name, settings)
    theirs.eval()
    for seed, name in enumerate(adapters):
        state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        shake(state.values(), seed + 2)  # views of the parameters
        copy_into(ours, name, {key.removeprefix(PREFIX): tensor for key, tensor in state.items()})
    return ours, theirs


def copy_into(model, name, state):
    """The tensors of a checkpoint, keys without prefix, into one adapter of ours."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for key, tensor in state.items():
            path, _, end = key.partition(".lora_") if ".lora_" in key else key.partition(".token_adapter.")
            if ".lora_" in key:
                modules[path].get_submodule(f"lora_{end[0]}.{name}").weight.copy_(tensor)
            elif end:
                modules[path].trainable_tokens_delta[name].copy_(tensor)
            else:
                wrapper = next(p for p, m in auxiliary_modules(model).items() if key.startswith(f"{p}."))
                copied = modules[wrapper].modules_to_save[name]
                copied.state_dict(keep_vars=True)[key.removeprefix(f"{wrapper}.")].copy_(tensor)


def trained(model):
    """What requires a gradient, under our names."""
    return {bare(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def bare(name):
    """A name in a PeftModel without what PEFT puts around: our wrapper of tokens has one level less."""
    return name.removeprefix(PREFIX).replace("token_adapter.", "")


def numbers(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@each_case
def test_outputs_gradients_and_what_trains_are_pefts(model, config):
    ours, theirs = twins(model, config)
    assert trained(ours) == trained(theirs) and numbers(ours) == numbers(theirs)
    assert_close(output(ours), output(theirs), terms=2000)
    for m in (ours, theirs):
        output(m).square().sum().backward()
    expected = {bare(n): p.grad for n, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, expected[name], terms=5000, name=name)


@each_case
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_unmerge_and_unload_are_pefts(model, config, safe_merge):
    ours, theirs = twins(model, config)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    expected = output(ours)
    fused_lora.merge(ours, safe_merge=safe_merge)
    theirs.merge_adapter(safe_merge=safe_merge)
    assert_close(output(ours), output(theirs), terms=2000)
    assert_close(output(ours), expected, terms=2000)
    fused_lora.unmerge(ours)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    theirs.unmerge_adapter()
    for merged in (True, False):
        plain = fused_lora.unload(copy.deepcopy(ours), merge_adapters=merged)
        other = copy.deepcopy(theirs)
        bare = other.merge_and_unload() if merged else other.unload()
        assert plain.state_dict().keys() == bare.state_dict().keys()
        assert_close(output(plain), output(bare), terms=2000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merges_of_16_bit_models_write_pefts_rows(dtype):
    ours, theirs = (m.to(dtype) for m in twins("llama", "both"))
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    fused_lora.merge(ours)
    theirs.merge_adapter()
    rows = theirs.base_model.model.model.embed_tokens.token_adapter.get_base_layer().weight
    assert torch.equal(auxiliary_modules(ours)["model.embed_tokens"].base_layer.weight, rows)
    fused_lora.unmerge(ours)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


class Counting(nn.Module):
    """A head with an integer buffer and a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.head.register_parameter("scale", nn.Parameter(torch.ones(())))

    def forward(self, x):
        return self.head(self.body(x)) * self.head.scale


def test_heads_with_counters_and_scalars_go_both_ways(tmp_path):
    torch.manual_seed(shifted(6))
    fields = {"r": 2, "target_modules": ["body"], "modules_to_save": ["head"], "init_lora_weights": False}
    base, x = Counting(), torch.randn(5, 8)
    ours = fused_lora.inject(copy.deepcopy(base), LoraConfig(**fields))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    for model, head in ((ours, ours.head), (theirs, theirs.base_model.model.head)):
        head.modules_to_save["default"].scale.data.fill_(3)
        model(x)  # in train mode: the counter rises
        model.eval()
    fused_lora.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors")[f"{PREFIX}head.0.num_batches_tracked"] == 1
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_close(again(x), ours(x), terms=100)
    again = copy.deepcopy(base)
    fused_lora.load_adapter(again, tmp_path / "theirs")
    assert again.head.modules_to_save["default"][0].num_batches_tracked == 1
    assert_close(again(x), theirs(x), terms=100)


@pytest.mark.parametrize("name, wrong", [("head.0.num_batches_tracked", torch.float32), ("head.scale", torch.int64)])
def test_a_counter_is_no_weight(name, wrong, tmp_path):
    fields = {"r": 2, "target_modules": ["body"], "modules_to_save": ["head"]}
    fused_lora.save_adapter(fused_lora.inject(Counting(), LoraConfig(**fields)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, PREFIX + name: tensors[PREFIX + name].to(wrong)}, file)
    model = Counting()
    with pytest.raises(AdapterError, match=f"{name}: expected dtype torch"):
        fused_lora.load_adapter(model, tmp_path)
    assert not auxiliary_modules(model) and not fused_lora.adapter_configs(model)


@pytest.mark.parametrize("change", ["cast", "cut"])
def test_an_embedding_that_was_changed_while_merged_is_not_unmerged(change):
    ours, _ = twins("llama", "tokens")
    fused_lora.merge(ours)
    base = auxiliary_modules(ours)["model.embed_tokens"].base_layer
    base.weight = nn.Parameter(base.weight.data.double() if change == "cast" else base.weight.data[:5].clone())
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(RuntimeError, match="embed_tokens: base_layer.weight was changed or cast while merged"):
        fused_lora.unmerge(ours)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


@each_case
def test_checkpoints_go_both_ways(model, config, tmp_path):
    ours, theirs = twins(model, config)
    fused_lora.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    torch.manual_seed(shifted(1))
    fresh = MODELS[model][0]()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "ours")
    assert_close(output(loaded), output(ours), terms=2000)
    settings = fused_lora.load_adapter(fresh, tmp_path / "theirs")
    assert torch.equal(output(fresh), output(ours))
    assert settings.modules_to_save == CONFIGS[config].get("modules_to_save")
    assert not trained(fresh)
    fused_lora.load_adapter(fresh, tmp_path / "ours", "again", is_trainable=True)
    fused_lora.set_adapter(fresh, "again")
    assert torch.equal(output(fresh), output(ours)) and numbers(fresh) == numbers(ours)


@each_case
def test_several_adapters_are_chosen_disabled_and_deleted_as_in_peft(model, config):
    ours, theirs = twins(model, config, ("a", "b"))
    theirs.base_model.set_adapter("a")
    for name in ("a", "b", "a"):
        fused_lora.set_adapter(ours, name)
        theirs.set_adapter(name)
        assert trained(ours) == trained(theirs)
        assert_close(output(ours), output(theirs), terms=2000)
    with fused_lora.disable_adapters(ours), theirs.disable_adapter():
        assert_close(output(ours), output(theirs), terms=2000)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        fused_lora.set_adapter(ours, ["a", "b"])
    assert fused_lora.active_adapters(ours) == ["a"]
    fused_lora.delete_adapter(ours, "a")
    theirs.delete_adapter("a")
    theirs.set_adapter("b")
    assert fused_lora.active_adapters(ours) == ["b"] and trained(ours) == trained(theirs)
    assert_close(output(ours), output(theirs), terms=2000)


def test_an_adapter_that_has_nothing_here_uses_the_original():
    ours, theirs = twins("net", "both")
    for m, kind in ((ours, LoraConfig), (theirs, peft.LoraConfig)):
        settings = kind(r=2, target_modules=["body"])
        fused_lora.inject(m, settings, "plain") if m is ours else m.add_adapter("plain", settings)
    fused_lora.set_adapter(ours, "plain")
    theirs.set_adapter("plain")
    assert_close(output(ours), output(theirs), terms=2000)
    fused_lora.set_adapter(ours, ["plain", "default"])
    assert auxiliary_modules(ours)["norm"].active_adapter == "default"


@each_case
def test_mixed_batches(model, config):
    ours, _ = twins(model, config, ("a", "b"))
    expected = []
    for name, row in zip(("a", None, "b"), IDS, strict=True):
        if name is None:
            with fused_lora.disable_adapters(ours):
                expected.append(output(ours, row[None]))
        else:
            fused_lora.set_adapter(ours, name)
            expected.append(output(ours, row[None]))
    with fused_lora.adapter_batch(ours, ["a", None, "b"]):
        assert_close(output(ours), torch.cat(expected), terms=2000)


class Turned(nn.Module):
    """A head that gets its rows in another order than the model's inputs have them."""

    def __init__(self, way, head):
        super().__init__()
        self.body, self.head, self.way = nn.Linear(8, 8), head, way

    def forward(self, x):
        y = self.body(x)
        if self.way == "kwargs":
            return self.head(y, x)
        if self.way == "sorted":
            return self.head(y[y[:, 0, 0].argsort()])
        y = y.transpose(0, 1)
        if self.way == "flat":
            return self.head(y.reshape(-1, 8)).view(y.shape).transpose(0, 1)
        return self.head(y.contiguous()).transpose(0, 1)


@pytest.mark.parametrize("way", ["flat", "time first", "sorted", "tuple", "kwargs"])
def test_rows_of_a_mixed_batch_are_followed_to_modules_beside(way):
    """Computed where they are known, and refused otherwise, never under another adapter."""
    head = nn.LSTM(8, 8) if way == "tuple" else nn.Bilinear(8, 8, 8) if way == "kwargs" else nn.Linear(8, 8)
    model = Turned(way, head).eval()
    for name in "ab":
        fused_lora.inject(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]), name)
    for parameter in model.head.modules_to_save.parameters():
        parameter.data.normal_()
    x, names = torch.randn(3, 6, 8), ["a", "b", "a"]
    with fused_lora.adapter_batch(model, ["b", "b", "b"]):  # of one adapter any rows may come
        model(x) if way != "tuple" else model.head(x)
    if way != "flat":
        message = "adapter_batch: expected" if way in ("tuple", "kwargs") else "'head' got an input"
        with fused_lora.adapter_batch(model, names), pytest.raises(ValueError, match=message):
            model.head(x) if way == "tuple" else model(x)
        return
    expected = []
    for name in "ab":
        fused_lora.set_adapter(model, name)
        expected.append(model(x))
    with fused_lora.adapter_batch(model, names):
        for _ in range(2):
            assert_close(model(x), torch.stack([expected["ab".index(n)][i] for i, n in enumerate(names)]), terms=100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_pefts(dtype, tmp_path):
    fields = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": TOKENS}
    ours, theirs = llama(dtype=dtype), llama(dtype=dtype)
    fused_lora.inject(ours, LoraConfig(**fields))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**fields))
    found = {n: p.dtype for n, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert found[bare(name)] == parameter.dtype
    fused_lora.save_adapter(ours, tmp_path)
    for autocast in (True, False):
        loaded, other = llama(dtype=dtype), llama(dtype=dtype)
        fused_lora.load_adapter(loaded, tmp_path, autocast_adapter_dtype=autocast)
        other = peft.PeftModel.from_pretrained(other, tmp_path, autocast_adapter_dtype=autocast)
        found = {n: p.dtype for n, p in loaded.named_parameters()}
        for name, parameter in other.named_parameters():
            assert found[bare(name)] == parameter.dtype


HEADS = {"SEQ_CLS": "score", "TOKEN_CLS": "score", "QUESTION_ANS": "qa_outputs"}


def test_rows_of_tokens_are_scaled_as_the_embedding_scales():
    """In the weight's dtype: a scale that is held in fp32 would give new rows other bits than those they begin as."""
    scaled = Gemma3TextScaledWordEmbedding(VOCABULARY, 12, 0, embed_scale=55.4256)
    scaled.weight.data = scaled.weight.data.bfloat16()
    net = nn.Sequential(scaled, nn.Linear(12, 4).bfloat16())
    before = scaled(IDS)
    fused_lora.inject(net, LoraConfig(target_modules=["1"], trainable_token_indices={"0": TOKENS}))
    assert scaled.embed_scale.dtype is torch.float32 and torch.equal(net[0](IDS), before)


@pytest.mark.parametrize("task", HEADS)
def test_the_head_of_a_task_trains_and_is_saved(task, tmp_path):
    config = training.llama().config
    config.num_labels = 3
    base = LlamaForSequenceClassification(config).eval()
    if task == "QUESTION_ANS":
        base = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "qa_outputs": nn.Linear(6, 2)})
    settings = LoraConfig(r=2, target_modules="all-linear", task_type=task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none says that the head gets no adapter
        fused_lora.inject(base, settings)
    assert settings.modules_to_save is None and isinstance(base.get_submodule(HEADS[task]), SavedModule)
    assert any(HEADS[task] in name for name in trained(base))
    fused_lora.save_adapter(base, tmp_path)
    assert f"{PREFIX}{HEADS[task]}.weight" in load_file(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_the_head_of_a_task_is_read_where_the_config_does_not_name_it(task, tmp_path):
    """As older releases of PEFT save them: modules_to_save is null in the config, the head is in the file."""
    kind = LlamaForSequenceClassification if task == "SEQ_CLS" else LlamaForTokenClassification
    base = kind(training.llama(num_labels=3).config).eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task))
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old/adapter_config.json").read_text())
    (tmp_path / "old/adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    fused_lora.convert_adapter(tmp_path / "old", tmp_path / "new")
    expected = output(theirs.eval())
    for folder in ("old", "new"):
        ours = copy.deepcopy(base)
        assert {"classifier", "score"} <= {*fused_lora.load_adapter(ours, tmp_path / folder).modules_to_save}
        assert_close(output(ours), expected, terms=1000)
    base.save_pretrained(tmp_path / "base")
    fused_lora.merge_checkpoint(tmp_path / "base", tmp_path / "old", tmp_path / "merged")
    assert_close(output(kind.from_pretrained(tmp_path / "merged")), expected, terms=1000)
    (tmp_path / "old/adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None, "bias": "all"}))
    with pytest.raises(fused_lora.AdapterError, match=f"bias: expected none.*head of {task}"):
        fused_lora.load_adapter(base, tmp_path / "old")


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"bias": "lora_only", "target_modules": ["q_proj", "score"]}])
def test_a_bias_of_a_head_is_no_head(fields, tmp_path):
    """A LoraModel without the model of a task around it saves none."""
    base = LlamaForSequenceClassification(training.llama(num_labels=3).config).eval()
    base.score = nn.Linear(base.score.in_features, 3)
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", **{"target_modules": ["q_proj"], **fields})
    theirs = peft.tuners.lora.LoraModel(copy.deepcopy(base), config, "default")
    shake(p for p in theirs.parameters() if p.requires_grad)
    config.save_pretrained(tmp_path)
    tensors = peft.get_peft_model_state_dict(theirs.model, adapter_name="default")
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    ours = copy.deepcopy(base)
    # PEFT's model of the task, which has a head of its own for each adapter, raises a KeyError
    own = contextlib.nullcontext() if "score" in config.target_modules else pytest.warns(match=r"no head.*, 'score'$")
    with own:
        assert not fused_lora.load_adapter(ours, tmp_path).modules_to_save
    assert_close(output(ours), output(theirs.eval()), terms=1000)
    if "score" not in config.target_modules:
        with pytest.raises(KeyError):
            peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_what_trains_and_is_not_saved_is_named(tmp_path):
    net = fused_lora.inject(Net(), LoraConfig(r=2, target_modules=["body"]))
    net.head.requires_grad_(True)
    with pytest.warns(UserWarning, match="4 parameters train and are not saved with the adapter, 'head.0.weight'"):
        fused_lora.save_adapter(net, tmp_path)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@each_case
def test_copies(model, config, how):
    ours, _ = twins(model, config)
    fused_lora.merge(ours)
    copied = how(ours)
    fused_lora.unmerge(copied)
    assert all(layer.merged for layer in fused_lora.lora_layers(ours).values())
    for wrapper in auxiliary_modules(copied).values():
        if isinstance(wrapper, TrainedTokens):
            assert wrapper.owner in set(copied.modules())
    fused_lora.unmerge(ours)
    assert torch.equal(output(copied), output(ours))


WRONG = {
    "no such module": ({"trainable_token_indices": {"nothing": [1]}}, "no module of the model has a path"),
    "no embedding": ({"trainable_token_indices": {"norm": [1]}}, "expected 'norm' to be an nn.Embedding"),
    "no such token": ({"trainable_token_indices": [VOCABULARY]}, f"has {VOCABULARY} tokens, got {VOCABULARY}"),
    "both": ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "expected one of them"),
    "two names": (
        {"trainable_token_indices": {"embed_tokens": [1], "tokens": [2]}},
        "two of 'embed_tokens', 'tokens' mean 'embed_tokens', with other tokens",
    ),
    "a list": ({"modules_to_save": ["blocks"]}, "is a ModuleList, which cannot be called"),
    "shared": ({"modules_to_save": ["twin"]}, "is used at several places"),
    "lora inside": ({"modules_to_save": ["other"], "target_modules": ["body"]}, "has LoRA layers of another adapter"),
    "lora on it": ({"trainable_token_indices": {"head.2": [1]}, "target_modules": ["2"]}, "cannot have LoRA too"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_change_nothing(case):
    net = Net()
    net.blocks, net.twin, net.again = nn.ModuleList([nn.Linear(2, 2)]), (same := nn.Linear(2, 2)), same
    net.other = nn.Sequential(nn.Linear(2, 2))
    fused_lora.inject(net, LoraConfig(r=2, target_modules=["other.0"]), "first")
    before, flags = net.state_dict(), [p.requires_grad for p in net.parameters()]
    fields, said = WRONG[case]
    with pytest.raises(ValueError, match=said):
        fused_lora.inject(net, LoraConfig(**{"r": 2, "target_modules": ["body"], **fields}))
    assert net.state_dict().keys() == before.keys() and [p.requires_grad for p in net.parameters()] == flags


@pytest.mark.parametrize("name", ["get", "copy", "popitem", "_keys", "keys"])
def test_names_that_the_containers_have_themselves_change_nothing(name):
    net, _ = twins("net", "both", ("first",))
    before, flags = net.state_dict(), [p.requires_grad for p in net.parameters()]
    with pytest.raises(ValueError, match=f"adapter_name: '{name}' is an attribute of nn..*Dict, choose another name"):
        fused_lora.inject(net, LoraConfig(r=2, target_modules=["body"], trainable_token_indices=[1]), name)
    assert net.state_dict().keys() == before.keys() and [p.requires_grad for p in net.parameters()] == flags
    assert list(fused_lora.adapter_configs(net)) == ["first"]


def test_merges_that_cannot_be_taken_back_are_refused():
    ours, _ = twins("llama", "tokens", ("a", "b"))
    fused_lora.merge(ours, ["a"])
    bits = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ValueError, match="embed_tokens: trainable_token_indices: .'a', 'b'. train the same tokens"):
        fused_lora.merge(ours, ["b"])
    assert all(torch.equal(tensor, bits[name]) for name, tensor in ours.state_dict().items())
    fused_lora.unmerge(ours)
    embedding = auxiliary_modules(ours)["model.embed_tokens"]
    embedding.trainable_tokens_delta["a"].data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaNs or infinities detected in the token rows"):
        fused_lora.merge(ours, ["a"])
    assert not any(layer.merged for layer in fused_lora.lora_layers(ours).values())
    fused_lora.merge(ours, ["b"])
    embedding.base_layer.weight.data[TOKENS[0], 0] += 1
    with pytest.raises(RuntimeError, match="was changed or cast while merged"):
        fused_lora.unmerge(ours)
    assert all(layer.merged for layer in fused_lora.lora_layers(ours).values())


def test_new_rows_do_not_begin_as_merged_ones(tmp_path):
    ours, _ = twins("llama", "tokens", ("a", "b"))
    fused_lora.save_adapter(ours, tmp_path, "b")
    fused_lora.delete_adapter(ours, "b")
    fused_lora.merge(ours, ["a"])
    keys, config = ours.state_dict().keys(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS)
    with pytest.raises(RuntimeError, match=r"adapters \['a'\] are merged"):
        fused_lora.inject(ours, config, "c")
    assert ours.state_dict().keys() == keys
    fused_lora.load_adapter(ours, tmp_path, "b")  # which brings its own
    fused_lora.unmerge(ours)
    fused_lora.inject(ours, config, "c")
    embedding = auxiliary_modules(ours)["model.embed_tokens"]
    assert torch.equal(embedding.held["c"], embedding.base_layer.weight[TOKENS])


@pytest.mark.parametrize("action", ["merge", "unmerge", "switch"])
def test_an_interrupt_of_a_merge_of_tokens(action):
    """Wherever Python handles signals the embedding has all rows of what is merged, and its own behind an unmerge."""
    net, rows = Net(), {"a": TOKENS, "b": [1], "c": [2, 4]}
    for name, tokens in rows.items():
        fused_lora.inject(net, LoraConfig(r=2, target_modules=["body"], trainable_token_indices=tokens), name)
    embedding, states = net.embed_tokens, {"": net.state_dict()["embed_tokens.base_layer.weight"].clone()}
    for name in rows:
        embedding.trainable_tokens_delta[name].data.normal_()
    acts = {
        "merge": ([], lambda: fused_lora.merge(net, ["a", "b"])),
        "unmerge": (["a", "b"], lambda: fused_lora.unmerge(net)),
        "switch": (["a"], lambda: fused_lora.switch(net, ["b", "c"])),
    }
    for names in (["a"], ["a", "b"], ["b", "c"]):
        fused_lora.switch(net, names)
        states["".join(names)] = embedding.base_layer.weight.detach().clone()
    before, act = acts[action]
    places = 0
    for place in everywhere(lambda: fused_lora.switch(net, before), act):
        merged = "".join(embedding.merged_adapters)
        assert torch.equal(embedding.base_layer.weight, states[merged]), place
        assert net.body.merged_adapters == embedding.merged_adapters, place
        places += 1
    assert places > 50
    fused_lora.switch(net, [])
    assert torch.equal(embedding.base_layer.weight, states[""])


def test_files_that_do_not_fit(tmp_path):
    ours, _ = twins("net", "both")
    fused_lora.save_adapter(ours, tmp_path)
    other = Net()
    other.norm = nn.LayerNorm(12, bias=False)
    with pytest.raises(AdapterError, match="norm.bias: expected a tensor of the model"):
        fused_lora.load_adapter(other, tmp_path)
    other.norm, other.embed_tokens = nn.LayerNorm(12), nn.Embedding(VOCABULARY, 14)
    with pytest.raises(AdapterError, match=r"trainable_tokens_delta: expected a shape \[3, 14\], found \[3, 12\]"):
        fused_lora.load_adapter(other, tmp_path)
    assert not auxiliary_modules(other)
    with pytest.raises(ValueError, match="modules_to_save or trainable_token_indices.*Merge this one"):
        AdapterStore(Net().eval()).load("a", tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_comes_back_through_transformers(tied, tmp_path):
    ours, _ = twins("tied llama" if tied else "llama", "both")
    expected = output(ours)
    fused_lora.merge(ours)
    ours.save_pretrained(tmp_path)
    assert_close(output(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, terms=2000)


def test_embeddings_that_differ_are_untied(tmp_path):
    torch.manual_seed(shifted(1))
    ours = fused_lora.inject(llama(True), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    shake([ours.lm_head.modules_to_save["default"].weight])
    expected = output(ours)
    fused_lora.merge(ours)
    with pytest.raises(RuntimeError, match="the config ties the two embeddings"):
        ours.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="config.tie_word_embeddings is set to False"):
        fused_lora.unload(ours)
    ours.save_pretrained(tmp_path)
    assert_close(output(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, terms=2000)


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "tied, fields",
    [
        (True, {"target_modules": ["q_proj"]}),
        (True, {"target_modules": "all-linear"}),
        (True, {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS}),
        (False, {"target_modules": ["embed_tokens", "lm_head"]}),
        (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_ensure_weight_tying_without_an_adapter_of_what_is_tied_changes_nothing(tied, fields, tmp_path):
    config = peft.LoraConfig(r=2, ensure_weight_tying=True, init_lora_weights=False, **fields)
    torch.manual_seed(shifted(1))
    base = llama(tied)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    shake([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    fused_lora.load_adapter(ours, tmp_path)
    assert_close(output(ours), output(theirs.eval()), terms=2000)
    fused_lora.inject(base, peft.LoraConfig(r=2, ensure_weight_tying=True, **fields))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_one_adapter_for_an_embedding_and_its_head_is_refused(name, tmp_path):
    for fields in ({"target_modules": ["q_proj", name]}, {"target_modules": ["q_proj"], "modules_to_save": [name]}):
        base = llama(True)
        config = peft.LoraConfig(r=2, ensure_weight_tying=True, **fields)
        with pytest.raises(ValueError, match="ensure_weight_tying must be False for .* of the embedding and of the"):
            fused_lora.inject(base, copy.deepcopy(config))
        peft.get_peft_model(llama(True), config).save_pretrained(tmp_path)
        for load in (fused_lora.load_adapter, lambda model, folder: AdapterStore(model).load("a", folder)):
            with pytest.raises(AdapterError, match="ensure_weight_tying"):
                load(base, tmp_path)
        assert not fused_lora.lora_layers(base) and not auxiliary_modules(base)


@pytest.mark.parametrize("fields", [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}, {}])
def test_a_resized_vocabulary_is_named_with_what_to_do(fields, tmp_path):
    beside = {} if fields else {"modules_to_save": ["embed_tokens", "lm_head"]}
    larger = llama()
    larger.resize_token_embeddings(VOCABULARY + 6)
    fused_lora.inject(larger, LoraConfig(r=2, **{"target_modules": ["q_proj"], **fields, **beside}))
    fused_lora.save_adapter(larger, tmp_path)
    ours = llama()
    with pytest.raises(AdapterError, match=r"vocabulary.*resize_token_embeddings"):
        fused_lora.load_adapter(ours, tmp_path)
    ours.resize_token_embeddings(VOCABULARY + 6)
    fused_lora.load_adapter(ours, tmp_path)


def test_a_merge_into_tied_embeddings_tells_what_to_do():
    ours = fused_lora.inject(llama(True), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(RuntimeError, match="lm_head: the weight is shared by .*`fused-lora merge` gives a tied head"):
        fused_lora.merge(ours)
