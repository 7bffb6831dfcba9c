"""LoraConfig: PEFT's names and defaults, its file form both ways, and a clear refusal of everything not supported."""

import dataclasses
import json
import math
import pickle
import re

import peft
import pytest
from peft.utils.other import get_pattern_key
from torch import nn

from fused_lora.modules.config import FieldTypeError, LoraConfig, as_lora_config, is_neutral, scaling


def peft_file(tmp_path, **kwargs):
    """The entries of the adapter_config.json that PEFT writes."""
    peft.LoraConfig(**kwargs).save_pretrained(tmp_path)
    return json.loads((tmp_path / "adapter_config.json").read_text())


def test_defaults_and_order_are_pefts():
    theirs = {f.name: getattr(peft.LoraConfig(), f.name) for f in dataclasses.fields(peft.LoraConfig)}
    ours = {f.name: getattr(LoraConfig(), f.name) for f in dataclasses.fields(LoraConfig) if f.name != "extra"}
    assert ours == {name: theirs[name] for name in ours}
    shared = [name for name in theirs if name in ours]
    recorded = ["task_type", "base_model_name_or_path", "revision", "inference_mode"]  # PEFT inherits these
    own = [f.name for f in dataclasses.fields(LoraConfig) if f.name != "extra"]
    assert [n for n in own if n not in recorded] == [n for n in shared if n not in recorded]
    assert len(own) == 23


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"r": 4, "lora_alpha": 32, "target_modules": ["q", "v"], "exclude_modules": ["x.q"]},
        {"target_modules": r".*\.(q|v)$", "use_rslora": True, "lora_dropout": 0.25},
        {"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"rank_pattern": {"^a.q": 2}, "alpha_pattern": {"a.v": 3.5}, "init_lora_weights": "gaussian"},
        {"bias": "lora_only", "lora_bias": True, "task_type": "CAUSAL_LM", "init_lora_weights": False},
        {"target_modules": ["q"], "use_dora": True},
    ],
    ids=["defaults", "lists", "regex", "layers", "patterns", "biases", "dora"],
)
def test_reads_and_rewrites_pefts_file(tmp_path, kwargs):
    entries = peft_file(tmp_path, **kwargs)
    config = LoraConfig.from_dict(entries)
    for name, value in kwargs.items():
        assert getattr(config, name) == (set(value) if name.endswith("modules") and isinstance(value, list) else value)
    rewritten = config.to_dict()
    assert json.loads(json.dumps(rewritten)) == {
        key: sorted(value) if key.endswith("modules") and isinstance(value, list) else value
        for key, value in entries.items()
    }
    assert LoraConfig.from_dict(rewritten) == config
    assert peft.LoraConfig.from_peft_type(**rewritten) == peft.LoraConfig.from_peft_type(**entries)


def test_every_other_field_of_peft_is_refused_by_name(tmp_path):
    entries = peft_file(tmp_path)
    inert = {"auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "peft_type"}
    inert |= {"eva_config", "corda_config", "lora_ga_config", "loftq_config", "ensure_weight_tying"}
    own = {f.name for f in dataclasses.fields(LoraConfig)}
    unsupported = sorted(set(entries) - own - inert)
    assert "arrow_config" in unsupported and "layer_replication" in unsupported and len(unsupported) >= 8
    for key in unsupported:
        for value in (True, {"a": 1}, [1], "x", 1, 0):
            with pytest.raises(ValueError, match=f"{key} must be null, false or empty: it is not supported"):
                LoraConfig.from_dict({**entries, key: value})
        for value in (None, False, [], {}, ""):
            assert LoraConfig.from_dict({**entries, key: value}).extra[key] == value


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica", "x", 1])
def test_other_initialisations_are_refused(tmp_path, init):
    with pytest.raises(ValueError, match="init_lora_weights"):
        LoraConfig.from_dict({**peft_file(tmp_path), "init_lora_weights": init})


def test_null_means_no(tmp_path):
    flags = ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "inference_mode", "init_lora_weights")
    config = LoraConfig.from_dict({**peft_file(tmp_path), **dict.fromkeys(flags)})
    assert [getattr(config, flag) for flag in flags] == [False] * len(flags)


def test_unknown_entries_need_neutral_values(tmp_path):
    entries = peft_file(tmp_path)
    assert LoraConfig.from_dict({**entries, "use_superlora": False}).to_dict()["use_superlora"] is False
    with pytest.raises(ValueError, match="use_superlora must be null, false or empty"):
        LoraConfig.from_dict({**entries, "use_superlora": 3})
    assert LoraConfig.from_dict({**entries, "ensure_weight_tying": True}).to_dict()["ensure_weight_tying"] is True
    for name, value in (("ensure_weight_tying", 1), ("qalora_group_size", True)):
        with pytest.raises(ValueError, match=f"{name} must be null, false or empty"):
            LoraConfig.from_dict({**entries, name: value})
    with pytest.raises(ValueError, match="peft_type must be 'LORA', got 'IA3'"):
        LoraConfig.from_dict({**entries, "peft_type": "IA3"})
    for missing in ("r", "lora_alpha", "peft_type"):
        with pytest.raises(ValueError, match=missing):
            LoraConfig.from_dict({k: v for k, v in entries.items() if k != missing})
    with pytest.raises(TypeError, match="list"):
        LoraConfig.from_dict([1, 2])
    with pytest.raises(ValueError, match="field of LoraConfig"):
        LoraConfig(extra={"r": 3})


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("r", 0, ValueError),
        ("r", -1, ValueError),
        ("r", 10**9, ValueError),
        ("r", 2**63, ValueError),
        ("r", True, TypeError),
        ("r", 8.5, TypeError),
        ("r", "8", TypeError),
        ("r", None, TypeError),
        ("r", [8], TypeError),
        ("lora_alpha", math.nan, ValueError),
        ("lora_alpha", math.inf, ValueError),
        ("lora_alpha", -math.inf, ValueError),
        ("lora_alpha", 1e30, ValueError),
        ("lora_alpha", 10**400, ValueError),
        ("lora_alpha", True, TypeError),
        ("lora_alpha", "16", TypeError),
        ("lora_alpha", None, TypeError),
        ("lora_dropout", -0.1, ValueError),
        ("lora_dropout", 1.01, ValueError),
        ("lora_dropout", math.nan, ValueError),
        ("lora_dropout", False, TypeError),
        ("lora_dropout", "0.1", TypeError),
        ("bias", "some", ValueError),
        ("bias", None, ValueError),
        ("use_rslora", 1, TypeError),
        ("use_rslora", None, TypeError),
        ("fan_in_fan_out", "no", TypeError),
        ("lora_bias", 0, TypeError),
        ("inference_mode", "yes", TypeError),
        ("target_modules", 3, TypeError),
        ("target_modules", ["q", 3], TypeError),
        ("target_modules", {"q": 1}, TypeError),
        ("exclude_modules", [None], TypeError),
        ("modules_to_save", "head", TypeError),
        ("modules_to_save", [3], TypeError),
        ("modules_to_save", ["head", ""], ValueError),
        ("trainable_token_indices", 3, TypeError),
        ("trainable_token_indices", ["a"], TypeError),
        ("trainable_token_indices", {1: [2]}, TypeError),
        ("trainable_token_indices", {"head": 2}, TypeError),
        ("trainable_token_indices", [], ValueError),
        ("trainable_token_indices", [-1], ValueError),
        ("trainable_token_indices", [4, 4], ValueError),
        ("trainable_token_indices", {"": [4]}, ValueError),
        ("layers_to_transform", "1", TypeError),
        ("layers_to_transform", [True], TypeError),
        ("layers_to_transform", -1, ValueError),
        ("layers_pattern", 1, TypeError),
        ("layers_pattern", "layers", ValueError),
        ("rank_pattern", {"q": 0}, ValueError),
        ("rank_pattern", {"q": "4"}, TypeError),
        ("rank_pattern", {4: 4}, TypeError),
        ("rank_pattern", ["q"], TypeError),
        ("alpha_pattern", {"q": math.nan}, ValueError),
        ("alpha_pattern", {"q": None}, TypeError),
        ("task_type", "CHAT", ValueError),
        ("task_type", 1, TypeError),
        ("revision", 1, TypeError),
        ("base_model_name_or_path", ["x"], TypeError),
        ("extra", ["x"], TypeError),
        ("extra", {"use_qalora": True}, ValueError),
        ("extra", {"auto_mapping": "os"}, ValueError),
        ("extra", {"qalora_group_size": True}, ValueError),
    ],
)
def test_wrong_values_are_refused_by_name(field, value, error):
    named = next(iter(value)) if field == "extra" and isinstance(value, dict) else field
    with pytest.raises(error, match=named):
        LoraConfig(**{field: value})


def test_validate_catches_a_later_change():
    config = LoraConfig()
    config.lora_alpha = math.nan
    with pytest.raises(ValueError, match="lora_alpha"):
        config.validate()
    for field, value in (("layers_to_transform", 1), ("layers_pattern", ["h"])):
        with pytest.raises(ValueError, match=f"{field} must be None when target_modules is a str"):
            LoraConfig(target_modules="all-linear", **{field: value})
    with pytest.raises(ValueError, match="init_lora_weights must be True or False with lora_bias=True"):
        LoraConfig(lora_bias=True, init_lora_weights="gaussian")


def test_dicts_do_not_share_state_with_the_config():
    entries = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"q": 2}, "loftq_config": {}}
    config = LoraConfig.from_dict(entries)
    entries["rank_pattern"]["q"] = 0
    config.to_dict()["rank_pattern"]["q"] = 0
    config.to_dict()["loftq_config"]["bits"] = 4
    assert config.rank_pattern == {"q": 2} and config.extra == {"loftq_config": {}}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.q", (2, 5.0)),
        ("model.layers.1.q", (4, 5.0)),
        ("q", (4, 5.0)),
        ("model.layers.0.xq", (8, 8)),
        ("model.layers.10.v", (3, 7)),
        ("model.layers.10.v.x", (8, 8)),
    ],
)
def test_layer_rank_alpha_is_pefts_rule(name, expected):
    ranks = {"^model.layers.0.q": 2, "q": 4, r"layers\.\d+\.v": 3, "layers.10.v": 99}
    alphas = {"q|z": 5.0, r".*\.v": 7}
    assert LoraConfig(rank_pattern=ranks, alpha_pattern=alphas).layer_rank_alpha(name) == expected
    theirs = (ranks.get(get_pattern_key(ranks, name), 8), alphas.get(get_pattern_key(alphas, name), 8))
    assert theirs == expected


def test_scaling():
    assert scaling(8, 16) == 2.0
    assert scaling(16, 8, use_rslora=True) == 2.0
    assert scaling(3, 1) == 1 / 3


def test_neutral_is_by_meaning_not_by_truth():
    assert all(is_neutral(v) for v in (None, False, [], {}, "", ()))
    assert not any(is_neutral(v) for v in (0, 0.0, True, [0], "no", {"a": None}))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q", "v"], "r": 4, "lora_alpha": 32, "lora_dropout": 0.25, "task_type": "CAUSAL_LM"},
        {"target_modules": r".*\.(q|v)$", "use_rslora": True, "init_lora_weights": "gaussian"},
        {"target_modules": ["q"], "rank_pattern": {"^a.q": 2}, "alpha_pattern": {"a.v": 3.5}, "bias": "lora_only"},
        {"target_modules": "all-linear", "exclude_modules": ["x.q"], "task_type": peft.TaskType.SEQ_CLS},
    ],
)
def test_pefts_config_is_converted(fields, tmp_path):
    converted = as_lora_config(peft.LoraConfig(**fields))
    assert converted == LoraConfig.from_dict(peft_file(tmp_path, **fields))
    json.dumps(converted.to_dict())  # no enum of PEFT's is left in it
    assert as_lora_config(converted) is converted


@pytest.mark.parametrize(
    "config, error, message",
    [
        (
            peft.LoraConfig(alora_invocation_tokens=[1], use_dora=True),
            ValueError,
            "config: use_dora must be False with alora_invocation_tokens",
        ),
        (peft.LoraConfig(modules_to_save=[""]), ValueError, "config: modules_to_save must be a list of names that"),
        (
            peft.LoraConfig(layer_replication=[(0, 2)]),
            ValueError,
            "config: layer_replication must be null, false or empty",
        ),
        (peft.LoraConfig(init_lora_weights="pissa"), ValueError, "config: init_lora_weights must be"),
        (peft.LoraConfig(r=2.5), TypeError, "config: r must be a positive integer"),
        (peft.IA3Config(), TypeError, "config: expected fused_lora.LoraConfig or peft.LoraConfig, got IA3Config"),
        ({"r": 4}, TypeError, "config: expected fused_lora.LoraConfig or peft.LoraConfig, got dict"),
    ],
    ids=lambda value: value.__class__.__name__ if dataclasses.is_dataclass(value) else None,
)
def test_a_config_that_cannot_be_converted_is_refused_by_name(config, error, message):
    with pytest.raises(error, match=re.escape(message)):
        as_lora_config(config)


def test_registered_layers_and_fields_changed_by_hand_are_refused():
    config = peft.LoraConfig(target_modules=["q"])
    config._register_custom_module({nn.Linear: nn.Linear})
    with pytest.raises(ValueError, match="config: layers registered with _register_custom_module"):
        as_lora_config(config)
    ours = LoraConfig(target_modules=["q"])
    ours.r = 0
    with pytest.raises(ValueError, match="r must be a positive integer"):
        as_lora_config(ours)


@pytest.mark.parametrize("part", ["", "['q']"])
def test_a_refusal_says_which_field_in_parts(part):
    config = {"alpha_pattern": {"q": None}} if part else {"lora_alpha": None}
    with pytest.raises(FieldTypeError) as caught:
        LoraConfig(**config)
    error = caught.value
    assert (error.field, error.part, error.expected, error.found) == (*config, part, "a number", None)
    assert str(error) == f"{error.field}{part} must be a number, got None"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is FieldTypeError and str(again) == str(error)
