"""LoraConfig: PEFT's names and defaults for what this package computes. Everything else is refused, never ignored.

    y = x W^T + b + scaling * D(x) A^T B^T        scaling = lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA)

Source: field names, order, defaults and the pattern rule follow PEFT 0.21 (peft/tuners/lora/config.py); LoRA is
arXiv:2106.09685, rsLoRA arXiv:2312.03732.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

MAX_RANK = 65536
MAX_ALPHA = 2.0**20  # far above any use; larger values only overflow 16-bit weights
# what a config with target_parameters has in these fields
WITH_PARAMETERS: dict[str, Any] = dict(
    fan_in_fan_out=False, lora_bias=False, use_dora=False, bias="none", alora_invocation_tokens=None
)
DROPOUT = "lora_dropout_with_target_parameters"  # an entry of adapter_config.json
_FLAGS = ("fan_in_fan_out", "use_rslora", "lora_bias", "use_dora", "inference_mode")
BIAS_MODES = ("none", "all", "lora_only")
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# PEFT's names for the heads of these tasks
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# keys of adapter_config.json that never change the maths of what is supported: kept for rewriting, with these types
_INERT: dict[str, tuple[type, ...]] = {
    "auto_mapping": (dict,),
    "peft_version": (str,),
    "megatron_core": (str,),  # read by PEFT only beside a megatron_config
    "qalora_group_size": (int,),  # read by PEFT only with use_qalora
    # read by PEFT only for an adapter that begins with the init_lora_weights of that name
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config", "loftq_config"), (dict,)),
    "runtime_config": (dict,),
    "ensure_weight_tying": (bool,),  # of tied embeddings and heads alone; auxiliary.check_tying refuses those
}


@dataclass
class LayerTensors:
    """The tensors of one layer's adapter.

    Args:
        lora_A: [r, K].
        lora_B: [N, r].
        lora_bias: [N], the bias of lora_B (``lora_bias=True``), or None.
        base_bias: [N], the trained bias of the base layer (``bias="lora_only"`` or ``"all"``), or None.
        lora_magnitude: [N], the magnitude of DoRA (``use_dora=True``), or None.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    lora_bias: torch.Tensor | None = None
    base_bias: torch.Tensor | None = None
    lora_magnitude: torch.Tensor | None = None


class FieldError(Exception):
    """A field of a LoraConfig, or an argument like one, is refused: a FieldTypeError or a FieldValueError.

    Attributes:
        field: its name.
        expected: what it must be, as text.
        found: what it is, or the part of it at fault.
        part: what of the field, as ``['q_proj']`` of a dict, or "".
    """

    def __init__(self, field: str, expected: str, found: Any, part: str = ""):
        super().__init__(field, expected, found, part)
        self.field, self.expected, self.found, self.part = field, expected, found, part

    def __str__(self) -> str:
        return f"{self.field}{self.part} must be {self.expected}, got {self.found!r}"


class FieldTypeError(FieldError, TypeError):
    """A field of the wrong type. A TypeError."""


class FieldValueError(FieldError, ValueError):
    """A field whose value is out of range or not supported. A ValueError."""


def scaling(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``, as PEFT computes it in Python floats."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def is_neutral(value: Any) -> bool:
    """Whether a config value means "not used": None, False or an empty container or string."""
    return value is None or value is False or (isinstance(value, (str, list, dict, tuple, set)) and len(value) == 0)


@dataclass
class LoraConfig:
    """Which layers of a model get LoRA adapters, and of what kind.

    Args:
        r: default rank, 1 to 65536.
        target_modules: a list of names (whole paths, or their last parts), one regular expression for the whole path
            (str), or ``"all-linear"``.
        exclude_modules: names or one regular expression. A module that matches is not adapted.
        lora_alpha: default numerator of the scaling.
        lora_dropout: probability in [0, 1] on the input of A.
        fan_in_fan_out: recorded for PEFT only. The module's type gives the layout of its weight.
        bias: "none", "all" or "lora_only": which biases of the model train and are saved with the adapter.
        use_rslora: scaling is lora_alpha / sqrt(r).
        modules_to_save: ends of paths of modules that train as a whole and are saved with the adapter, as a head.
        init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal with std 1/r, B zero), "orthogonal"
            (even ranks) or False (both as nn.Linear draws them). "eva", which draws A from data, is for files only.
        layers_to_transform, layers_pattern: restrict a list of names to these layer numbers.
        rank_pattern, alpha_pattern: regular expression for the end of a path -> its rank or alpha. The first match
            decides.
        target_parameters: paths of stacked parameters of experts, or their last parts, as ["experts.gate_up_proj"].
            Without fan_in_fan_out, lora_bias and DoRA, as in PEFT, and without bias; target_modules may be None then.
            A key of rank_pattern may name one expert, as "experts.down_proj.3": a rank of at most the parameter's.
        trainable_token_indices: tokens whose rows of the input embedding train and are saved with the adapter, or
            {end of a path: tokens}. A head that the model's config ties to the embedding follows.
        use_dora: DoRA: W + scaling B A, its rows scaled to a trained magnitude. Not with lora_bias.
        alora_invocation_tokens: aLoRA: of each sequence the adapter changes the rows from the last place of these
            tokens on, the rows before are the base's. Not with DoRA, experts, embeddings or merges.
        lora_bias: give lora_B a bias.
        base_model_name_or_path, revision, task_type, inference_mode: recorded for PEFT.
        extra: other keys of an adapter_config.json, kept for writing it again. Accepted are neutral values (None,
            False, empty) and a few keys that do not change the result.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a value out of range, or ``extra`` asking for something not supported.
    """

    r: int = 8
    target_modules: set[str] | str | None = None
    exclude_modules: set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    use_dora: bool = False
    alora_invocation_tokens: list[int] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    inference_mode: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set, frozenset)):
                _check_items(name, value, str)
                setattr(self, name, set(value))
        if isinstance(self.target_parameters, (set, frozenset, tuple)):
            self.target_parameters = sorted(self.target_parameters)
        for name in ("rank_pattern", "alpha_pattern", "extra"):
            if getattr(self, name) is None:
                setattr(self, name, {})
        self.validate()

    def validate(self) -> None:
        """Check every field. The constructor calls it; call it again after you change a field."""
        for name in _FLAGS:
            check_bool(name, getattr(self, name))
        for name in ("base_model_name_or_path", "revision", "task_type"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise FieldTypeError(name, "a str or None", getattr(self, name))
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise FieldValueError("task_type", f"one of {', '.join(TASK_TYPES)} or None", self.task_type)
        check_rank("r", self.r)
        check_alpha("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        if self.bias not in BIAS_MODES:
            raise FieldValueError("bias", f"one of {', '.join(BIAS_MODES)}", self.bias)
        self._validate_init()
        self._validate_targets()
        self._validate_patterns()
        self._validate_saved()
        self._validate_parameters()
        self._validate_invocation()
        self._validate_extra()

    def _validate_init(self) -> None:
        init = self.init_lora_weights
        check_init(init)
        if self.lora_bias and not isinstance(init, bool):
            raise FieldValueError("init_lora_weights", "True or False with lora_bias=True", init)
        if self.lora_bias and self.use_dora:
            raise FieldValueError("use_dora", "False with lora_bias=True", self.use_dora)

    def _validate_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set, frozenset)):
                _check_items(name, value, str)
            elif not isinstance(value, (str, type(None))):
                raise FieldTypeError(name, "a list of names, one regular expression or None", value)
        for name, kind in (("layers_to_transform", int), ("layers_pattern", str)):
            value = getattr(self, name)
            if value is not None:
                _check_items(name, value if isinstance(value, (list, tuple)) else [value], kind)
                if isinstance(self.target_modules, str):
                    raise FieldValueError(name, "None when target_modules is a str", value)
        if self.layers_pattern and self.layers_to_transform is None:
            raise FieldValueError("layers_pattern", "None without layers_to_transform", self.layers_pattern)

    def _validate_patterns(self) -> None:
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            pattern = getattr(self, name)
            if not isinstance(pattern, dict):
                raise FieldTypeError(name, "a dict", pattern)
            for key, value in pattern.items():
                if not isinstance(key, str):
                    raise FieldTypeError(name, "a dict with str keys", key)
                check(name, value, f"[{key!r}]")

    def _validate_saved(self) -> None:
        names, tokens = self.modules_to_save, self.trainable_token_indices
        _check_names("modules_to_save", names)
        for name, indices in (tokens if isinstance(tokens, dict) else {"": tokens}).items():
            if tokens is None:
                break
            if not isinstance(name, str) or not isinstance(indices, (list, tuple)):
                raise FieldTypeError("trainable_token_indices", "a list of integers or a dict of them", tokens)
            _check_items("trainable_token_indices", indices, int)
            if not indices or len(set(indices)) != len(indices) or (isinstance(tokens, dict) and not name):
                raise FieldValueError("trainable_token_indices", "different tokens, at least one", tokens)
        if self.bias == "all" and (names or tokens):
            expected = "none or lora_only with modules_to_save or trainable_token_indices"
            raise FieldValueError("bias", expected, self.bias)

    def _validate_parameters(self) -> None:
        names = self.target_parameters
        _check_names("target_parameters", names)
        for name, value in WITH_PARAMETERS.items() if names else ():
            if getattr(self, name) != value:
                raise FieldValueError(name, f"{value!r} with target_parameters", getattr(self, name))

    def _validate_invocation(self) -> None:
        tokens = self.alora_invocation_tokens
        if not isinstance(tokens, (list, tuple, type(None))):
            raise FieldTypeError("alora_invocation_tokens", "a list of token ids or None", tokens)
        _check_items("alora_invocation_tokens", tokens or (), int)
        if tokens and self.use_dora:
            raise FieldValueError("use_dora", "False with alora_invocation_tokens", self.use_dora)
        if tokens and self.task_type not in (None, "CAUSAL_LM"):
            raise FieldValueError("task_type", "CAUSAL_LM or None with alora_invocation_tokens", self.task_type)

    def _validate_extra(self) -> None:
        if not isinstance(self.extra, dict):
            raise FieldTypeError("extra", "a dict", self.extra)
        for key, value in self.extra.items():
            if key in _FIELDS or key in ("peft_type", "extra"):
                raise FieldValueError("extra", f"without {key!r}, a field of LoraConfig", self.extra)
            if key in _INERT and type(value) in _INERT[key]:
                continue
            if not is_neutral(value):
                text = "null, false or empty: it is not supported by fused_lora; remove it if it is a trainer's note"
                raise FieldValueError(key, text, value)

    def layer_rank_alpha(self, name: str) -> tuple[int, float]:
        """(r, lora_alpha) of the module at path ``name``, by PEFT's rule.

        The first key of rank_pattern (alpha_pattern) that matches the end of the path decides. Without a match it is
        ``r`` (``lora_alpha``). A key k matches where ``re.match(rf"(.*\\.)?({k})$", name)`` does.
        """
        rank = _first_match(self.rank_pattern, name, self.r)
        return rank, _first_match(self.alpha_pattern, name, self.lora_alpha)

    def expert_ranks(self, name: str, experts: int) -> list[int] | None:
        """The rank of each expert of the stacked parameter at path ``name``; None where all have the parameter's.

        rank_pattern decides, asked for ``name`` and the expert's number, as "experts.down_proj.3".

        Raises:
            ValueError: an expert's rank is above that of the parameter.
        """
        r = self.layer_rank_alpha(name)[0]
        ranks = [_first_match(self.rank_pattern, f"{name}.{e}", r) for e in range(experts)] if self.rank_pattern else []
        if above := [e for e, rank in enumerate(ranks) if rank > r]:
            raise FieldValueError(
                "rank_pattern", f"at most {r}, the rank of {name!r}, for its expert {above[0]}", ranks[above[0]]
            )
        return ranks if any(rank != r for rank in ranks) else None

    def with_heads(self) -> LoraConfig:
        """This config with the heads of its task in modules_to_save, where PEFT puts them."""
        saved = self.modules_to_save or []
        heads = [name for name in HEADS.get(self.task_type or "", ()) if name not in saved]
        return dataclasses.replace(self, modules_to_save=[*saved, *heads]) if heads else self

    def to_dict(self) -> dict[str, Any]:
        """The entries of PEFT's adapter_config.json: fields, ``extra`` and peft_type; sets become sorted lists.

        PEFT reads no adapter of parameters with a dropout: it has the name lora_dropout_with_target_parameters then.
        """
        entries = {name: copy.deepcopy(getattr(self, name)) for name in _FIELDS}
        entries = {key: sorted(value) if isinstance(value, set) else value for key, value in entries.items()}
        if self.target_parameters and self.lora_dropout:  # PEFT would not read the adapter
            entries |= {"lora_dropout": 0.0, DROPOUT: self.lora_dropout}
        return {**copy.deepcopy(self.extra), "peft_type": "LORA", **entries}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> LoraConfig:
        """The config of an adapter_config.json as PEFT writes it.

        Raises:
            TypeError: ``entries`` is not a mapping, or an entry has the wrong type.
            ValueError: peft_type is not LORA, r or lora_alpha is missing, a value is out of range, or an entry asks for
                something that is not supported (megatron_config, ...): an unknown entry is accepted only with a neutral
                value.
        """
        if not isinstance(entries, Mapping):
            raise TypeError(f"expected the entries of an adapter_config.json as a dict, got {type(entries).__name__}")
        if entries.get("peft_type") != "LORA":
            raise FieldValueError("peft_type", "'LORA'", entries.get("peft_type"))
        for key in ("r", "lora_alpha"):
            if key not in entries:
                raise FieldValueError(key, "an entry of adapter_config.json", None)
        known = {key: copy.deepcopy(value) for key, value in entries.items() if key in _FIELDS}
        for key in (*_FLAGS, "init_lora_weights"):  # null in a file means no to PEFT
            if key in known and known[key] is None:
                known[key] = False
        other = {key: copy.deepcopy(value) for key, value in entries.items() if key not in {*_FIELDS, "peft_type"}}
        if not is_neutral(dropout := other.pop(DROPOUT, None)):
            known["lora_dropout"] = dropout
        return cls(**known, extra=other)


def as_lora_config(config: Any) -> LoraConfig:
    """``config``, checked again: a field may have been changed by hand. A ``peft.LoraConfig`` is converted.

    Raises:
        TypeError: neither kind of config, or a field of the wrong type.
        ValueError: a value out of range, or a field of ``peft.LoraConfig`` that is not supported and is in use.
    """
    if isinstance(config, LoraConfig):
        config.validate()
        return config
    peft = sys.modules.get("peft")  # nobody can hold one of PEFT's configs before PEFT was imported
    if peft is None or not isinstance(config, peft.LoraConfig):
        raise TypeError(f"config: expected fused_lora.LoraConfig or peft.LoraConfig, got {type(config).__name__}")
    if getattr(config, "_custom_modules", None):
        raise ValueError("config: layers registered with _register_custom_module are not supported by fused_lora")
    entries = config.to_dict()
    # enums in a config in memory, plain strings in a file
    for name in ("peft_type", "task_type"):
        entries[name] = getattr(entries[name], "value", entries[name])
    try:
        return LoraConfig.from_dict(entries)
    except FieldError as error:
        raise type(error)(f"config: {error.field}", error.expected, error.found, error.part) from None


_FIELDS = tuple(f.name for f in dataclasses.fields(LoraConfig) if f.name != "extra")


def _first_match(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if matches_end(key, name)), default)


def matches_end(key: str, name: str) -> bool:
    """PEFT's rule for a key of rank_pattern or alpha_pattern: whether it matches the end of the path ``name``."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _check_items(name: str, values: Any, kind: type) -> None:
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FieldTypeError(name, f"made of {kind.__name__} values only", value)
        if kind is int and value < 0:
            raise FieldValueError(name, "made of numbers that are not negative", value)


def _check_names(name: str, values: Any) -> None:
    if not isinstance(values, (list, tuple, type(None))):
        raise FieldTypeError(name, "a list of names or None", values)
    _check_items(name, values or (), str)
    if not all(values or ()):
        raise FieldValueError(name, "a list of names that are not empty", values)


def check_number(name: str, value: Any, part: str = "") -> None:
    """Raise FieldTypeError unless ``value`` is an int or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FieldTypeError(name, "a number", value, part)


def check_rank(name: str, value: Any, part: str = "") -> None:
    """Raise FieldTypeError or FieldValueError unless ``value`` is an int from 1 to MAX_RANK."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldTypeError(name, "a positive integer", value, part)
    if not 1 <= value <= MAX_RANK:
        raise FieldValueError(name, f"a positive integer, at most {MAX_RANK}", value, part)


def check_alpha(name: str, value: Any, part: str = "") -> None:
    """Raise FieldTypeError or FieldValueError unless ``value`` is a number of at most MAX_ALPHA in size."""
    check_number(name, value, part)
    # comparison first: an int of any size compares exactly, NaN compares false
    if not -MAX_ALPHA <= value <= MAX_ALPHA:
        raise FieldValueError(name, f"finite and at most {MAX_ALPHA:.0f} in size", value, part)


def check_dropout(name: str, value: Any) -> None:
    """Raise FieldTypeError or FieldValueError unless ``value`` is a number in [0, 1]."""
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise FieldValueError(name, "in [0, 1]", value)


def check_bool(name: str, value: Any) -> None:
    """Raise FieldTypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise FieldTypeError(name, "True or False", value)


def check_init(value: Any) -> None:
    """Raise FieldValueError unless ``value`` is an init_lora_weights that leaves base weights and forward alone."""
    if not (isinstance(value, bool) or (isinstance(value, str) and value in ("gaussian", "orthogonal", "eva"))):
        raise FieldValueError(
            "init_lora_weights",
            "True, False, 'gaussian', 'orthogonal' or 'eva' (files only): most others rewrite the base weights. PEFT's "
            "save_pretrained with path_initial_model_for_weight_conversion writes a plain adapter. Or save the "
            "rewritten base, too (LoftQ: the quantised one), and set the entry to true in adapter_config.json",
            value,
        )
