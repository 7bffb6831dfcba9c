"""Which modules of a model a LoraConfig adapts: PEFT's matching rules over the names of ``model.named_modules()``.

Source: PEFT 0.21 ``check_target_module_exists`` and ``_maybe_include_all_linear_layers`` (peft/tuners/tuners_utils.py).
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fused_lora.bases import Base, base_of
from fused_lora.bases.dense import is_conv1d
from fused_lora.bases.foreign import has_packed_weight
from fused_lora.bases.matrices import EMBEDDING
from fused_lora.modules.auxiliary import Auxiliary
from fused_lora.modules.config import HEADS, LoraConfig, matches_end
from fused_lora.modules.names import some
from fused_lora.modules.tree import named_modules, places, unwrapped

LINEAR = (
    "torch.nn.Linear, transformers.pytorch_utils.Conv1D, bitsandbytes.nn.Linear4bit and Linear8bitLt, FP8Linear of "
    "transformers, packed layers of GPTQ and AWQ"
)
SUPPORTED = f"{LINEAR}, torch.nn.Embedding"
OWN = ("LoraLinear", "LoraEmbedding", "LoraExperts")  # what stands in a model in place of an adapted module
ALL_LINEAR = "all-linear"
_CLASSIFIER_HEADS = ("score", "classifier")


def is_lora_layer(module: nn.Module) -> bool:
    """Whether ``module`` already has LoRA of this package (recognised by name, PEFT's convention)."""
    return type(module).__name__ in OWN and hasattr(module, "base_layer")


def base_layer_of(module: nn.Module) -> nn.Module:
    """The layer that carries W: ``module.base_layer`` of a LoRA layer, else the module itself."""
    return module.get_submodule("base_layer") if is_lora_layer(module) else module


def kind_of(base: nn.Module) -> Base:
    """What answers for a module that can get LoRA."""
    return EMBEDDING if isinstance(base, nn.Embedding) else base_of(base)


def why_not_linear(module: nn.Module) -> str | None:
    """None when ``module`` is a linear layer whose weight its kind in ``bases/`` knows. Else the reason."""
    base = base_layer_of(module)
    if not (isinstance(base, nn.Linear) or is_conv1d(base) or has_packed_weight(base)):
        return "it is no linear layer"
    return base_of(base).why_not_adapted(base)


def why_not_supported(module: nn.Module) -> str | None:
    """None when ``module`` can get LoRA: a linear layer or an embedding. Else the reason."""
    base = base_layer_of(module)
    return EMBEDDING.why_not_adapted(base) if isinstance(base, nn.Embedding) else why_not_linear(base)


def is_supported(module: nn.Module) -> bool:
    """Whether ``module`` can get LoRA."""
    return why_not_supported(module) is None


def in_out_features(module: nn.Module) -> tuple[int, int]:
    """(K, N) of a supported module."""
    base: Any = base_layer_of(module)
    return kind_of(base).features(base)


def drawn_dtype(base: nn.Module) -> torch.dtype:
    """What new adapters of the layer ``base`` are rounded to."""
    return kind_of(base).adapter_dtype(base) or torch.get_default_dtype()


def adapter_dtype(base: nn.Module) -> torch.dtype:
    """The dtype of adapters of the layer ``base`` before they may be held in fp32. Nothing multiplies in fp8."""
    dtype = drawn_dtype(base)
    return torch.float32 if dtype.itemsize == 1 else dtype


def base_settings(module: nn.Module) -> dict[str, str]:
    """How the weight of a supported module is quantised, in words by topic; empty where it is not, or is broken."""
    base = base_layer_of(module)
    kind = base_of(base)
    return {} if kind.bits and kind.why_not_dense(base) else kind.settings(base)


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``tree.named_modules(model)`` without the root and without the inside of LoRA layers and wrapped modules."""
    inside: tuple[str, ...] = ()
    for name, module in named_modules(model):
        if not name or name.startswith(inside):
            continue
        if is_lora_layer(module) or isinstance(module, Auxiliary):
            inside += (f"{name}.",)
        yield name, module


def match_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Paths of the modules that ``config`` adapts, in ``named_modules()`` order, chosen as PEFT chooses them.

    A str ``target_modules`` must match the whole path. A list holds whole paths or their last parts. ``"all-linear"``
    means every linear layer except the output layer of a transformers model. ``exclude_modules`` is applied first,
    ``layers_to_transform`` last. Shared modules appear once, under their first name.

    Raises:
        ValueError: target_modules is None or not a regular expression, nothing matches, or a matched module is not
            supported.
    """
    if config.target_modules is None and not config.target_parameters:
        raise ValueError("target_modules is None: name the modules to adapt, or pass target_modules='all-linear'")
    _check_expressions(config)
    modules = dict(candidates(model))
    targets = config.target_modules or ()
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = all_linear(model, config)
    matched = [name for name in modules if not excluded(config, name) and _targeted(config, targets, name)]
    if not matched and not config.target_parameters:
        raise ValueError(_no_match(config, modules))
    for name in matched:
        if reason := why_not_supported(modules[name]):
            kind = type(base_layer_of(modules[name]))
            raise ValueError(
                f"target_modules matches {name!r}, a {kind.__module__}.{kind.__qualname__}, which is not supported: "
                f"{reason}; supported are {SUPPORTED}"
            )
    return matched


def warn_unused(
    model: nn.Module,
    config: LoraConfig,
    matched: Sequence[str],
    experts: Sequence[str] = (),
    asked: Collection[str] | None = None,
) -> None:
    """Warn of what a config asks for and ``matched``, the paths that it adapts, do not get.

    matched has the paths of parameters, too, experts those of their experts, which may have ranks of their own. asked:
    target_modules before PEFT's changes for models of experts.
    That is: keys of rank_pattern and alpha_pattern and entries of target_modules, exclude_modules and modules_to_save
    that match nothing; layers without a bias under lora_bias; places of a layer beside its first, the only one where it
    is replaced, as in PEFT; and, for "all-linear", what gets no adapter unasked: in some models the weights of routers
    and of packed experts, which are no linear layers, in others linear layers that are named as those of experts were.
    """
    for name in ("rank_pattern", "alpha_pattern"):
        known = [*matched, *experts] if name == "rank_pattern" else matched
        keys = [key for key in getattr(config, name) if not any(matches_end(key, path) for path in known)]
        if keys:
            text = f"{name} keys did not match any targeted module and were ignored: {some(keys)}"
            warnings.warn(f"The following {text}.", RuntimeWarning, stacklevel=4)
    paths = [path for path, _ in candidates(model)]
    ends = {path[i:] for path in paths for i, letter in enumerate(f".{path}") if letter == "."}
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        value = getattr(config, name)
        if name == "modules_to_save":  # PEFT names two heads of which a model has one
            heads = HEADS.get(config.task_type or "", ())
            lacking = [key for key in value or () if key not in heads and not any(p.endswith(key) for p in paths)]
        elif isinstance(value, str):  # target_modules that match nothing are an error
            lacking = [value] if name == "exclude_modules" and not any(re.fullmatch(value, p) for p in paths) else []
        else:
            lacking = sorted((value or set()) - ends)
        if lacking:
            names = dict.fromkeys(path.rpartition(".")[2] for path in paths)
            text = f"no module matches {some(lacking)}; the model has {some(names, near=lacking[0])}"
            warnings.warn(f"{name}: {text}", stacklevel=4)
    if further := _further_places(model, matched):
        text = f"the model has adapted layers at further places, too, where they get no adapter: {some(further)}"
        warnings.warn(f"target_modules: {text}", stacklevel=4)
    modules = dict(candidates(model)) if config.lora_bias else {}
    if bare := [
        path for path in matched if path in modules and getattr(base_layer_of(modules[path]), "bias", 0) is None
    ]:
        text = f"{some(bare)} have no bias to which a merge could add lora_B's: merge() will be refused"
        warnings.warn(f"lora_bias: {text}", stacklevel=4)
    if isinstance(asked, str) and asked.lower() == ALL_LINEAR:
        every = {path: path for path in sorted(all_linear(model, config))}  # of a weight: its module
        every |= {path: path.rpartition(".")[0] for path in matrices_left(model)}
        known = set(matched)
        left = [path for path, module in every.items() if not excluded(config, module)]
        if left := [path for path in left if known.isdisjoint((path, f"{path}.weight"))]:
            text = f"{len(left)} weights of the model get no adapter: {some(kinds_of(left))}"
            how = "Name layers in target_modules, and stacked experts and routers in target_parameters"
            warnings.warn(f"target_modules='all-linear' means what it means in PEFT; {text}. {how}", stacklevel=4)


def _further_places(model: nn.Module, matched: Sequence[str]) -> list[str]:
    """The paths at which the model has one of these layers, beside the one given."""
    modules = dict(named_modules(model))
    held = [path if path in modules else path.rpartition(".")[0] for path in matched]  # a parameter is of a module
    first = {id(base_layer_of(modules[path])): path for path in held}
    return [
        path
        for path, parent, module in places(model)
        if not is_lora_layer(parent) and first.get(id(module), path) != path
    ]


def kinds_of(paths: Iterable[str]) -> list[str]:
    """Paths with "*" for the numbers above their last name, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", path) for path in paths))


def matrices_left(model: nn.Module) -> list[str]:
    """Paths of parameters that hold matrices to multiply with and belong to no linear layer: of packed experts
    [n, N, K], and the ``weight`` [N, K] of a module of the model's own, as routers have."""
    left = []
    for path, module in candidates(model):
        if is_lora_layer(module) or isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module):
            continue
        if type(module).__module__.startswith("torch.nn."):
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            stacked = parameter.dim() == 3 and parameter.shape[0] > 1
            if stacked or (name == "weight" and parameter.dim() == 2):
                left.append(f"{path}.{name}")
    return left


def all_linear(model: nn.Module, config: LoraConfig) -> set[str]:
    """What "all-linear" stands for: every linear layer except the output embedding of a transformers model, or its
    classification head when task_type is SEQ_CLS."""
    linear = {n for n, m in candidates(model) if isinstance(m, nn.Linear) or is_conv1d(m) or _has_linear(m)}
    head = _output_layer(model, config)
    return linear - {name for name, module in named_modules(model) if module is head and head is not None}


def _has_linear(module: nn.Module) -> bool:
    """Whether ``module`` is LoRA of this package over a linear layer."""
    return is_lora_layer(module) and why_not_linear(module) is None


def _output_layer(model: Any, config: LoraConfig) -> nn.Module | None:
    model = unwrapped(model)
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    output = model.get_output_embeddings()
    if output is not None or config.task_type != "SEQ_CLS":
        return output
    return next((head for n in _CLASSIFIER_HEADS if (head := getattr(model, n, None)) is not None), None)


def literal_targets(model: nn.Module, config: LoraConfig) -> list[str] | None:
    """The paths that ``config`` selects by lists of names, supported or not. None if it needs a regular expression.

    For configs from files: their expressions can take exponential time.
    """
    targets = config.target_modules or (() if config.target_parameters else None)
    if targets is None or isinstance(targets, str) or isinstance(config.exclude_modules, str) or config.layers_pattern:
        return None
    return [name for name, _ in candidates(model) if not excluded(config, name) and _targeted(config, targets, name)]


def _listed(name: str, keys: Collection[str]) -> bool:
    """Whether one of ``keys`` is the path ``name`` or its last parts."""
    return name in keys or any(name[i + 1 :] in keys for i, c in enumerate(name) if c == ".")


def _check_expressions(config: LoraConfig) -> None:
    names = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
    for name in names:
        value = getattr(config, name)
        # lists of names are compared, not matched; the keys of the patterns and layers_pattern are expressions
        if isinstance(value, str) or name not in names[:2]:
            for expression in [value] if isinstance(value, str) else value or ():
                try:
                    re.compile(expression)
                except re.error as error:
                    raise ValueError(f"{name}: {expression!r} is not a regular expression ({error})") from None


def excluded(config: LoraConfig, name: str) -> bool:
    """Whether the module at this path gets no LoRA by ``exclude_modules``, or trains as a whole."""
    if any(f".{saved}." in f".{name}." for saved in config.modules_to_save or ()):
        return True
    exclude = config.exclude_modules
    if not exclude:
        return False
    if isinstance(exclude, str):
        return re.fullmatch(exclude, name) is not None
    return _listed(name, exclude)


def _targeted(config: LoraConfig, targets: Collection[str], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True  # a whole path is not subject to layers_to_transform
    return _listed(name, targets) and _in_layers(config, name)


def _in_layers(config: LoraConfig, name: str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = config.layers_pattern or []
    if patterns:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = next((m for p in patterns if (m := re.match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", name))), None)
    else:
        # the first number is the layer; a later one may be an expert
        found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
    return found is not None and int(found["idx"]) in ([wanted] if isinstance(wanted, int) else wanted)


def _no_match(config: LoraConfig, modules: dict[str, nn.Module]) -> str:
    linear = [name for name, module in modules.items() if why_not_linear(module) is None]
    asked = {
        key: value
        for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
        if (value := getattr(config, key)) is not None
    }
    wanted = ", ".join(f"{k}={sorted(v) if isinstance(v, set) else v!r}" for k, v in asked.items())
    ends = sorted({name.rpartition(".")[2] for name in linear})
    return f"no module matches {wanted}. The model has {len(linear)} linear layers" + (
        f", with last names {', '.join(ends[:40])}; the first is {linear[0]!r}" if linear else ""
    )
