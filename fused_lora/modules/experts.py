"""Experts with LoRA: one layer for each stacked parameter [experts, out, in] that ``target_parameters`` names.

A :class:`LoraExperts` stands in place of the experts. It has a :class:`LoraStack` under the name of each adapted
parameter, whose path is the parameter's. Files have PEFT's names: see :func:`file_paths`.

The ``weight`` [out, in] of any module, as of a router, is a stack of one. Such a module is called with W + s B A.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.bases import Base, base_of, experts
from fused_lora.bases.experts import NAMES, StackedTerm, form_of, positional, replace_rows, why_not_fused
from fused_lora.bases.foreign import Foreign
from fused_lora.modules.auxiliary import InPlaceOf
from fused_lora.modules.changes import CHANGING, alone, wait_for_change
from fused_lora.modules.config import WITH_PARAMETERS, LayerTensors, LoraConfig
from fused_lora.modules.fusable import why_not_here, why_not_plain_dropout
from fused_lora.modules.layer import LoraLayer, check_options
from fused_lora.modules.linear import draw
from fused_lora.modules.merged_state import MergedState
from fused_lora.modules.mixed import MixedBatch, numbers_of
from fused_lora.modules.mixin import wide
from fused_lora.modules.targets import (
    ALL_LINEAR,
    all_linear,
    base_layer_of,
    candidates,
    excluded,
    is_supported,
)
from fused_lora.modules.tree import unwrapped
from fused_lora.ops.checks import as_scaling

__all__ = [
    "NAMES",
    "LoraExperts",
    "LoraStack",
    "Stack",
    "StackedTerm",
    "all_parameters",
    "file_paths",
    "form_of",
    "match_parameters",
    "place_of",
    "positional",
    "replace_rows",
    "stack_at",
    "stacks_of",
    "why_not_fused",
    "with_parameters",
]
# names that PEFT takes from "all-linear" for models of these families, as transformers calls them
_LINEAR_ONCE = {"mixtral": {"gate", "w1", "w2", "w3"}, "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"}}
RANDOM = (True, False, "gaussian")  # init_lora_weights that draw for experts


class Stack(NamedTuple):
    """A stacked parameter of a model: the path of its module, its name there, the module, experts, K and N."""

    place: str
    name: str
    module: Any
    experts: int
    K: int
    N: int

    @property
    def path(self) -> str:
        """Of the parameter."""
        return f"{self.place}.{self.name}"

    @property
    def parameter(self) -> Tensor:
        """[experts, N, K], or [experts, K, N] where it is ``transposed``; a matrix [N, K]."""
        return self.module._parameters[self.name]

    @property
    def transposed(self) -> bool:
        """Whether PEFT takes the parameter for [experts, K, N]."""
        return form_of(self.module).is_transposed(self.module)

    @property
    def folds(self) -> bool:
        """Whether a call has W + s B A in its place, so that there is no dropout."""
        return form_of(self.module).calls_module


def match_parameters(model: nn.Module, config: LoraConfig, all_names: bool = False) -> dict[str, Stack]:
    """The parameters that ``config.target_parameters`` names, by path: whole paths or their last parts, as in PEFT.

    Raises:
        ValueError: nothing matches, or not every name does where ``all_names`` must; or a match is no stacked parameter
            of experts that transformers registers and no matrix ``weight`` that a call can have another in place of.
    """
    targets = set(config.target_parameters or ())
    if not targets:
        return {}
    found: dict[str, Stack] = {}
    for place, module in candidates(model):
        base = base_layer_of(module)
        for name in base._parameters:
            path = f"{place}.{name}"
            if path in targets or any(path.endswith(f".{target}") for target in targets):
                if why := experts.why_not_adapted(base, name):
                    raise ValueError(f"target_parameters matches {path!r}, which is not supported: {why}")
                found[path] = _stack(base, place, name)
    lacking = [t for t in sorted(targets) if not any(path == t or path.endswith(f".{t}") for path in found)]
    if lacking and (all_names or not found):
        raise ValueError(f"target_parameters: no parameter of the model is named {', '.join(map(repr, lacking))}")
    return found


def with_parameters(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """``config`` as PEFT changes "all-linear" for some models of experts: the linear layers by their last names, and in
    target_parameters what was a linear layer in transformers 4. Of that only what can get LoRA by this config, also by
    ``exclude_modules`` and ``modules_to_save``, which PEFT does not ask there.

    Source: PEFT 0.21 ``_convert_peft_config_moe`` (peft/utils/transformers_weight_conversion.py).
    """
    targets, mapping = config.target_modules, sys.modules.get("transformers.conversion_mapping")
    kind = getattr(getattr(unwrapped(model), "config", None), "model_type", None)
    family = {**getattr(mapping, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}.get(kind)
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR or family not in _LINEAR_ONCE:
        return config
    bases = [(place, base_layer_of(module)) for place, module in candidates(model)]
    held = {f"{place}.{name}": base for place, base in bases for name in base._parameters}
    found = []
    for target in ("gate.weight", "gate_up_proj", "down_proj"):
        meant = {path: base for path, base in held.items() if path.endswith(f".{target}")}
        wanted = [path for path in meant if not excluded(config, path.rpartition(".")[0])]
        reasons = [experts.why_not_adapted(base, target.rpartition(".")[2]) for base in meant.values()]
        dropped = config.lora_dropout and any(form_of(base).calls_module for base in meant.values())
        if not any(reasons) and not dropped:
            found += [target] if wanted and len(wanted) == len(meant) else wanted
    plain = all(getattr(config, name) == value for name, value in WITH_PARAMETERS.items())
    if not found or not plain or config.init_lora_weights not in RANDOM:
        return config
    # gate and up are two layers in one
    twice = [r".*\.gate_up_proj"] if any(name.endswith("gate_up_proj") for name in found) else []
    return dataclasses.replace(
        config,
        target_modules={path.rpartition(".")[2] for path in all_linear(model, config)} - _LINEAR_ONCE[family],
        target_parameters=sorted({*(config.target_parameters or ()), *found}),
        rank_pattern={**config.rank_pattern, **dict.fromkeys(twice, 2 * config.r)},
        alpha_pattern={**config.alpha_pattern, **dict.fromkeys(twice, 2 * config.lora_alpha)},
    )


def all_parameters(model: nn.Module) -> dict[str, Stack]:
    """The parameters of a model that can get LoRA and are of no linear layer, by path."""
    held = ((place, base_layer_of(module)) for place, module in candidates(model))
    return {s.path: s for place, base in held for s in stacks_of(base, place) if not is_supported(base)}


def stack_at(modules: Mapping[str, nn.Module], path: str) -> Stack | None:
    """The stacked parameter at this path, if that is one which can get LoRA."""
    place, _, name = path.rpartition(".")
    base = base_layer_of(modules[place]) if place in modules else None
    return None if base is None or experts.why_not_adapted(base, name) else _stack(base, place, name)


def stacks_of(module: Any, place: str) -> list[Stack]:
    """The parameters of a plain module that can get LoRA, but for the weight of a linear layer."""
    if type(base_of(module)) is not Foreign or type(module).forward is nn.Linear.forward:
        return []
    return [_stack(module, place, name) for name in module._parameters if not experts.why_not_adapted(module, name)]


def _stack(module: Any, place: str, name: str) -> Stack:
    E, first, second = (1, *module._parameters[name].shape)[-3:]
    K, N = (first, second) if form_of(module).is_transposed(module) else (second, first)
    return Stack(place, name, module, E, K, N)


def file_paths(parameters: Iterable[str]) -> dict[str, str]:
    """The path that PEFT's files have for each parameter: it wraps one after another around their module.

    The last is ``experts``, the one before ``experts.base_layer``, and so on, in the module's own order, which that of
    the ``parameters`` must be.
    """
    held: dict[str, list[str]] = {}
    for path in parameters:
        held.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        path: place + ".base_layer" * (len(paths) - 1 - i)
        for place, paths in held.items()
        for i, path in enumerate(paths)
    }


class LoraStack(LoraLayer):
    """The adapters of one stacked parameter: lora_A [experts * r, K], lora_B [N, r * experts], in PEFT's packing.

    Its :class:`LoraExperts` computes with it. lora_bias and DoRA are refused, as by PEFT; dropout, which PEFT refuses,
    draws a mask of a row for each token and place among its experts, or for each row that Llama-4's experts get. A
    matrix has no dropout.
    """

    kinds_of_parts = ("lora_A", "lora_B")
    fan_in_fan_out = False

    def __init__(self, stack: Stack):
        super().__init__()
        self._of = [stack.module]  # in a list it is no submodule, and has no second set of keys
        self.parameter_name, self.experts = stack.name, stack.experts
        self.in_features, self.out_features = stack.K, stack.N
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self._start()
        self.train(stack.module.training)

    @property
    def base_layer(self) -> Any:
        """The experts' module."""
        return self._of[0]

    @property
    def weight(self) -> Tensor:
        """The stacked parameter."""
        return self.base_layer._parameters[self.parameter_name]

    @property
    def transposed(self) -> bool:
        """Whether it is [experts, K, N]."""
        return form_of(self.base_layer).is_transposed(self.base_layer)

    @property
    def bias(self) -> None:
        """Biases of experts are not adapted."""
        return None

    @alone
    def add_adapter(
        self,
        adapter_name: str,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        autocast_adapter_dtype: bool = True,
        tensors: LayerTensors | None = None,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Add an adapter of rank r in each expert, inactive and frozen until :meth:`set_adapter`.

        ``tensors`` gives A [experts * r, K] and B [N, r * experts] instead of drawing them; their dtype stays.
        ``ranks`` of single experts are at most r: beyond them A and B are drawn as zeros, which have no gradient.
        """
        flags = dict(use_rslora=use_rslora, autocast_adapter_dtype=autocast_adapter_dtype)
        check_options(r, lora_alpha, lora_dropout, init_lora_weights, **flags)
        if ranks is not None and (len(ranks) != self.experts or not all(1 <= rank <= r for rank in ranks)):
            raise ValueError(f"ranks: expected {self.experts} ranks from 1 to {r}, got {list(ranks)}")
        self._check_new(adapter_name)
        K, N, rows = self.in_features, self.out_features, r * self.experts
        if tensors is None and init_lora_weights not in RANDOM:
            raise ValueError(f"init_lora_weights: expected one of {RANDOM} for experts, got {init_lora_weights!r}")
        A, B = draw(K, N, rows, init_lora_weights, tensors=tensors, experts=self.experts)
        for e, rank in enumerate(ranks or ()) if tensors is None else ():
            A.weight.data.view(self.experts, r, K)[e, rank:] = 0
            B.weight.data.view(N, r, self.experts)[:, rank:, e] = 0
        device, dtype = self.weight.device, self.weight.dtype
        for held, part in ((self.lora_A, A), (self.lora_B, B)):
            placed = self._placed(part, device, dtype, autocast_adapter_dtype, tensors is None)
            held[adapter_name] = placed.requires_grad_(False)
        self._note(adapter_name, r, lora_alpha, lora_dropout, use_rslora)

    def _drawn_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def terms(self, names: list[str]) -> list[experts.ExpertTerm]:
        """What these adapters add."""
        pairs = ((self.lora_A[n].weight, self.lora_B[n].weight, n) for n in self._present(names))
        return [experts.ExpertTerm(A, B, as_scaling(self.scaling[n]), self._dropout(n)) for A, B, n in pairs]

    def _dropout(self, name: str) -> float:
        drop: Any = self.lora_dropout[name]
        return drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0

    def of_expert(self, expert: int, name: str) -> tuple[Tensor, Tensor]:
        """lora_A [r, K] and lora_B [N, r] of one expert."""
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        r = self.r[name]
        return A[expert * r : (expert + 1) * r], B[:, expert :: self.experts]

    def file_tensors(self, name: str) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        """Of one adapter: end of its key in a file -> (tensor, shape of the whole)."""
        rows = self.r[name] * self.experts
        return {
            ".lora_A.weight": (self.lora_A[name].weight, (rows, self.in_features)),
            ".lora_B.weight": (self.lora_B[name].weight, (self.out_features, rows)),
        }

    def why_not_fused(self) -> str | None:
        """Why a call raises, as the experts are now; None where it does not."""
        if why := experts.why_not_fused(self.base_layer, self.parameter_name):
            return why
        for name in self._present(self.active_adapters):
            if why := why_not_plain_dropout(self.lora_dropout[name]):
                return why
        return why_not_here()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s B_e A_e of each expert, laid out as the parameter, in the adapter's dtype."""
        A, B = (part[adapter].weight for part in (self.lora_A, self.lora_B))
        unpacked_A, unpacked_B = experts.unpacked(wide(A), wide(B), self.experts)
        delta = (unpacked_B @ unpacked_A * self._scaling(adapter)).to(B.dtype)
        return (delta.transpose(1, 2) if self.transposed else delta).reshape(self.weight.shape)

    def _merge_place(self) -> tuple[nn.Module, Base]:
        return self.base_layer, experts.kind(self.parameter_name, self.transposed)

    def _merge_later(self, names: list[str], old: object = None) -> None:
        return None

    def _unmerge_later(self) -> None:
        return None

    def _merged_weights(self) -> list[tuple[str, Any, list[str]]]:
        return []  # the experts around it have the key

    def forward(self, *args: Any) -> None:
        """Nobody calls a parameter."""
        raise RuntimeError(f"{self.parameter_name} is a parameter: call the experts around it")

    def extra_repr(self) -> str:
        return f"experts={self.experts}, in={self.in_features}, out={self.out_features}, active={self.active_adapters}"


def place_of(path: str, layer: nn.Module) -> str:
    """Where the module with a LoRA layer's weight stands: of a stacked parameter its experts' path."""
    return path.rpartition(".")[0] if isinstance(layer, LoraStack) else path


class LoraExperts(MergedState, InPlaceOf):
    """Experts, and a :class:`LoraStack` under the name of each adapted parameter. The experts are kept, not copied."""

    base_layer: Any

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.train(base_layer.training)

    def stacks(self) -> dict[str, LoraStack]:
        """The layers, by the name of the parameter."""
        return {name: part for name, part in self._modules.items() if isinstance(part, LoraStack)}

    @property
    def weight(self) -> Tensor:
        """The module's own: not the layer of that name."""
        return self.base_layer.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own: of experts hidden_states [tokens, K], top_k_index and top_k_weights [tokens, top_k].

        Llama-4's experts get hidden_states [experts * tokens, K] alone, a module with an adapted matrix what it wants.

        Raises:
            RuntimeError: with active adapters, where the experts are out of the ordinary: hooked, of an implementation
                of other arithmetic, spread over processes. Nothing is computed.
        """
        if CHANGING:
            wait_for_change(self)
        stacks = self.stacks()
        for stack in stacks.values():
            if stack.disable_adapters and stack.merged:
                stack.unmerge()
        if any(stack.disable_adapters for stack in stacks.values()):
            return self.base_layer(*args, **kwargs)
        mixed = [s.mixed_batch for s in stacks.values() if s.mixed_batch is not None]
        call = positional(self.base_layer, args, kwargs)
        if mixed:
            return self._mixed_forward(call, stacks, mixed[0])
        terms = {n: s.terms(s.active_adapters) for n, s in stacks.items() if not s.merged}
        if not any(terms.values()):
            return self.base_layer(*args, **kwargs)
        self._check_call(terms)
        return experts.experts_forward(self.base_layer, call, terms)

    def _merged_weights(self) -> list[tuple[str, Any, list[str]]]:
        return [(f"base_layer.{name}", stack, list(stack.merged_adapters)) for name, stack in self.stacks().items()]

    def _mixed_forward(self, call: tuple[Any, ...], stacks: Mapping[str, LoraStack], batch: MixedBatch) -> Any:
        """Tokens of one batch under different adapters; base rows keep the experts' bits."""
        if any(stack.merged for stack in stacks.values()):
            raise ValueError("adapter_batch: an adapter of the experts is merged; unmerge first")
        alone = form_of(self.base_layer).why_not_alone(self.base_layer)
        rows_of = batch.rows(next(iter(stacks.values())), call[0], alone)
        each = [(rows, {n: s.terms([name]) for n, s in stacks.items()}) for name, rows in rows_of.items()]
        groups = [(numbers_of(rows, call[0]), terms) for rows, terms in each if any(terms.values())]
        groups = [(rows, terms) for rows, terms in groups if len(rows)]
        if not groups:
            return experts.run(self.base_layer, call)
        self._check_call({n: s.terms(s.adapters) for n, s in stacks.items()})
        return experts.forward_of_groups(self.base_layer, call, groups)

    def _check_call(self, terms: Mapping[str, Any]) -> None:
        stacks = self.stacks()
        reasons = [why for name, own in terms.items() if own and (why := stacks[name].why_not_fused())]
        if reasons:
            why = f"{reasons[0]}; expected the experts' own call, so nothing was computed"
            raise RuntimeError(f"experts with LoRA: {why}")
