"""match_targets picks exactly the modules that PEFT adapts, and says what is wrong when it cannot."""

import copy
import re
import subprocess
import sys
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
)

import fused_lora
from fused_lora.modules.config import LoraConfig
from fused_lora.modules.targets import in_out_features, is_conv1d, is_supported, match_targets
from helpers.accelerated import quiet
from helpers.experts import routed
from helpers.seeds import shifted
from helpers.waiting import HANG


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v, self.xq = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)


class Toy(nn.Module):
    """Two lists of layers, so that layers_pattern matters; q is shared between the first two layers."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(5, 8)
        self.layers = nn.ModuleList([Block() for _ in range(12)])
        self.tower = nn.ModuleList([Block() for _ in range(2)])
        self.layers[1].q = self.layers[0].q
        self.q = nn.Linear(8, 8)


LLAMA = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_labels=2
)
MODELS = {
    "toy": Toy,
    "nested": lambda: nn.ModuleDict({"model": Toy()}),
    "sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "llama_headless": lambda: LlamaModel(LlamaConfig(**LLAMA)),
    "llama_cls": lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA, pad_token_id=0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)),
}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(shifted(0))
    return {name: make() for name, make in MODELS.items()}


def peft_targets(model, **kwargs):
    """Paths that PEFT puts a LoRA layer at, in its order of creation."""
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**kwargs)).base_model.targeted_module_names


CASES = [
    ("toy", {"target_modules": ["q", "v"]}),
    ("toy", {"target_modules": ["layers.1.q", "layers.0.mlp.0", "q"]}),
    ("toy", {"target_modules": ["0"], "exclude_modules": ["layers.0", "tower.0", "layers", "0"][:2]}),
    ("toy", {"target_modules": ["q", "v"], "exclude_modules": ["layers.3.q", "tower.1.v"]}),
    ("toy", {"target_modules": ["q", "v"], "exclude_modules": r"layers\.\d+\.q"}),
    ("toy", {"target_modules": r"layers\.[02]\.(q|mlp\.2)"}),
    ("toy", {"target_modules": r".*\.1\.(q|v)|q"}),
    ("toy", {"target_modules": ["q", "v"], "layers_to_transform": 1}),
    ("toy", {"target_modules": ["q", "v"], "layers_to_transform": [0, 11]}),
    ("toy", {"target_modules": ["v", "layers.5.q"], "layers_to_transform": [0]}),
    ("toy", {"target_modules": ["q", "v"], "layers_to_transform": []}),
    ("toy", {"target_modules": ["q", "v"], "layers_to_transform": [1], "layers_pattern": "tower"}),
    ("toy", {"target_modules": ["v"], "layers_to_transform": [1], "layers_pattern": ["tower", "l.*s"]}),
    ("nested", {"target_modules": ["v"], "layers_to_transform": [1], "layers_pattern": []}),
    ("nested", {"target_modules": ["mlp.0", "mlp.2"], "layers_to_transform": [0, 2]}),
    ("nested", {"target_modules": ["q", "xq"], "layers_to_transform": 0, "layers_pattern": ["tower"]}),
    ("toy", {"target_modules": "all-linear"}),
    ("toy", {"target_modules": "ALL-Linear", "exclude_modules": ["q"]}),
    ("sequential", {"target_modules": ["0"]}),
    ("sequential", {"target_modules": "1.1"}),
    ("sequential", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 2, "layers_pattern": "layers"}),
    ("llama_tied", {"target_modules": "all-linear"}),
    ("llama_headless", {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}),
    ("llama_cls", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"]}),
]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has", "ignore:Model with")
@pytest.mark.parametrize(("model", "kwargs"), CASES)
def test_same_modules_as_peft(models, model, kwargs):
    expected = peft_targets(models[model], **kwargs)
    assert match_targets(models[model], LoraConfig(**kwargs)) == expected
    assert expected


def test_head_of_a_classifier_is_left_alone(models):
    # the head trains whole for SEQ_CLS, beside LoRA; here only the choice is compared
    model = models["llama_cls"]
    found = match_targets(model, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert found == peft_targets(model, target_modules="all-linear", task_type="SEQ_CLS")
    assert "score" not in found and "score" in match_targets(model, LoraConfig(target_modules="all-linear"))


def test_experts_take_the_first_number_of_the_path():
    experts = [nn.ModuleDict({"experts": nn.ModuleList([Block() for _ in range(3)])}) for _ in range(2)]
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(experts)})})
    config = {"target_modules": ["q"], "layers_to_transform": [1]}
    found = match_targets(model, LoraConfig(**config))
    assert found == [f"model.layers.1.experts.{i}.q" for i in range(3)] == peft_targets(model, **config)


def test_fused_expert_weights_are_not_linear_layers():
    config = dict(LLAMA, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, num_hidden_layers=1)
    model = MixtralForCausalLM(MixtralConfig(**config))
    assert match_targets(model, LoraConfig(target_modules="all-linear")) == peft_targets(
        model, target_modules="all-linear"
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "target_modules is None"),
        (
            {"target_modules": ["nope"]},
            r"no module matches target_modules=\['nope'\].* 2, .*v, xq; the first is 'layers",
        ),
        ({"target_modules": []}, "no module matches"),
        ({"target_modules": ["q"], "exclude_modules": ["q"]}, r"exclude_modules=\['q'\]"),
        ({"target_modules": ["v"], "layers_to_transform": [99]}, r"layers_to_transform=\[99\]"),
        ({"target_modules": "layers.*"}, "matches 'layers', a .*ModuleList"),
        ({"target_modules": ["norm"]}, "'layers.0.norm', a .*LayerNorm"),
        ({"target_modules": "(q"}, r"target_modules: '\(q' is not a regular expression"),
        ({"target_modules": ["q"], "exclude_modules": "*"}, "exclude_modules: .* not a regular expression"),
        ({"target_modules": ["q"], "rank_pattern": {"[": 3}}, "rank_pattern: .* not a regular expression"),
        (
            {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "["},
            "layers_pattern: .* not a regular expression",
        ),
    ],
)
def test_errors_name_what_came_and_what_exists(models, kwargs, message):
    with pytest.raises(ValueError, match=message):
        match_targets(models["toy"], LoraConfig(**kwargs))


def test_quantised_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"its weight is a Parameter of torch.uint8 \(8, 1\)"):
        match_targets(model, LoraConfig(target_modules=["0"]))


class LoraLinear(nn.Module):
    """Stands for an adapted layer: targeting knows it by its name and base_layer alone."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})


def test_adapted_layers_match_by_their_own_path_and_never_inside(models):
    model = copy.deepcopy(models["toy"])
    before = match_targets(model, LoraConfig(target_modules="all-linear"))
    for path in ("layers.2.q", "q", "tower.0.mlp.0"):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LoraLinear(model.get_submodule(path)))
    assert match_targets(model, LoraConfig(target_modules="all-linear")) == before
    assert match_targets(model, LoraConfig(target_modules=r".*q.*")) == [n for n in before if n.endswith("q")]
    with pytest.raises(ValueError, match="no module matches"):
        match_targets(model, LoraConfig(target_modules=["default", "base_layer"]))


def test_sizes_of_both_layouts(models):
    c_attn = models["gpt2"].transformer.h[0].attn.c_attn
    assert is_conv1d(c_attn) and is_supported(c_attn) and in_out_features(c_attn) == (16, 48)
    assert not is_conv1d(nn.Linear(3, 5)) and in_out_features(nn.Linear(3, 5)) == (3, 5)
    assert in_out_features(LoraLinear(nn.Linear(3, 5))) == (3, 5)


def test_transformers_is_not_imported():
    code = (
        "import sys, torch.nn as nn\n"
        "from fused_lora.modules.config import LoraConfig\n"
        "from fused_lora.modules.targets import match_targets\n"
        "assert match_targets(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules='all-linear')) == ['0']\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('transformers', 'peft')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG)


def told(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [w for w in found if "is_gradient_checkpointing" not in str(w.message)]


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"rank_pattern": {"k_proj": 2, "q_proj": 3}}, "rank_pattern keys did not match any targeted module.*'k_proj'"),
        ({"alpha_pattern": {"^q_proj": 100}}, r"alpha_pattern keys did not match any targeted module.*'\^q_proj'"),
        ({"exclude_modules": ["nope"]}, "exclude_modules: no module matches 'nope'"),
        ({"exclude_modules": "nope.*"}, r"exclude_modules: no module matches 'nope\.\*'"),
        ({"lora_bias": True}, "lora_bias.*q_proj.*no bias|lora_bias=True.*no bias"),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"model.*q_proj": 3}, "exclude_modules": ["k_proj"]}, None),
    ],
    ids=str,
)
def test_what_matches_nothing_is_told_where_peft_tells_it(fields, text):
    def base():
        torch.manual_seed(shifted(0))
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))

    theirs = told(lambda: peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"], **fields)))
    ours = told(lambda: fused_lora.inject(base(), LoraConfig(target_modules=["q_proj"], **fields)))
    assert len(theirs) == len(ours) == (text is not None)
    for mine, peft_s in zip(ours, theirs, strict=True):
        assert issubclass(peft_s.category, mine.category) and re.search(text, str(mine.message))
        assert mine.filename == __file__


def test_a_target_that_matches_nothing_is_told():
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match="target_modules: no module matches 'querry'; the model has 'query', 'value'"):
        fused_lora.inject(model, LoraConfig(target_modules=["querry", "value"]))


def test_a_module_to_save_that_matches_nothing_is_told():
    def model():
        return nn.ModuleDict({"query": nn.Linear(4, 4), "score": nn.Linear(4, 4)})

    with pytest.warns(UserWarning, match="modules_to_save: no module matches 'skore'; the model has 'query', 'score'"):
        fused_lora.inject(model(), LoraConfig(target_modules=["query"], modules_to_save=["skore", "score"]))
    # PEFT adds the names of all heads that such a model may have
    peft_s = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    for config in (peft_s, LoraConfig(target_modules=["query"], task_type="SEQ_CLS")):
        assert not told(lambda config=config: fused_lora.inject(model(), config))


def test_further_places_of_a_layer_are_told():
    model = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(4, 4)}), "b": nn.ModuleDict({"k": nn.Linear(4, 4)})})
    model["b"]["q"] = model["a"]["q"]
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q"]), copy.deepcopy(model))
    assert type(theirs["b"]["q"]) is nn.Linear
    for name in ("first", "second"):
        with pytest.warns(UserWarning, match="target_modules: .* at further places, too, .* no adapter: 'b.q'"):
            fused_lora.inject(model, LoraConfig(target_modules=["q"]), name)
        assert not told(lambda name=name: fused_lora.inject(model, LoraConfig(target_modules=["k"]), f"{name}_k"))


def test_further_places_of_a_parameter_are_told():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 8))

        def forward(self, x):
            return x @ self.weight.t()

    model = nn.ModuleDict({"gate": Scores()})
    model["again"] = model["gate"]
    with pytest.warns(UserWarning, match="at further places, too, where they get no adapter: 'again'"):
        fused_lora.inject(model, LoraConfig(target_modules=[], target_parameters=["gate.weight"]))


def test_targets_that_are_all_saved_whole_are_told():
    model = nn.ModuleDict({"body": nn.ModuleDict({"query": nn.Linear(4, 4)})})
    with pytest.raises(ValueError, match=r"no module matches target_modules=\['query'\], modules_to_save=\['body'\]"):
        fused_lora.inject(model, LoraConfig(target_modules=["query"], modules_to_save=["body"]))


@pytest.mark.parametrize("kind, count", [("mixtral", 14), ("glm4_moe", 14), ("afmoe", 14), ("gpt_oss", 8)])
def test_all_linear_adapts_experts_and_routers_where_peft_does(kind, count):
    """What it leaves out is named: shared experts, whose names were those of experts; or experts and routers."""
    model = routed(kind)
    theirs = copy.deepcopy(model)
    with quiet():
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(target_modules="all-linear"))
    texts = told(lambda: fused_lora.inject(model, LoraConfig(target_modules="all-linear")))
    found = {}
    for path, module in theirs.named_modules():
        if hasattr(module, "get_base_layer"):
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{name}.{module.parameter_name}" if hasattr(module, "parameter_name") else name] = module
    ours = fused_lora.lora_layers(model)
    assert ours.keys() == found.keys() and len(ours) == count
    for path, layer in ours.items():
        assert (layer.r, layer.scaling) == (found[path].r, found[path].scaling), path
    left = {
        "mixtral": None,
        "glm4_moe": r"6 weights .*: 'model\.layers\.\*\.mlp\.shared_experts\.down_proj'",
        "afmoe": "8 weights .*self_attn.gate_proj'",
        "gpt_oss": r"6 weights .*mlp\.router\.weight'",
    }[kind]
    assert not texts if left is None else re.search(left, str(texts[0].message)) and len(texts) == 1


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "T5", "Whisper", "FalconMamba"])
def test_all_linear_leaves_nothing_out_of_a_dense_model(kind):
    sizes = {
        "Llama": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4),
        "GPT2": dict(n_embd=32, n_layer=1, n_head=2),
        "T5": dict(d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2),
        "Whisper": dict(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
        )
        | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
        "FalconMamba": dict(hidden_size=32, num_hidden_layers=1, time_step_rank=2),
    }[kind]
    name = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM", "FalconMamba": "FalconMambaForCausalLM"}.get(
        kind, f"{kind}ForConditionalGeneration"
    )
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(vocab_size=64, **sizes))
    assert told(lambda: fused_lora.inject(model, LoraConfig(target_modules="all-linear"))) == []
