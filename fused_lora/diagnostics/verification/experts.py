"""Stacked experts: both adapted parameters of one call, shown merged and unmerged, and the call in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.bases import experts
from fused_lora.diagnostics.verification.layers import Layer
from fused_lora.diagnostics.verification.weights import (
    CONFIDENCE,
    Adapter,
    Units,
    change,
    product,
    tiny,
    unit_of,
    unmerged_bound,
)
from fused_lora.modules.experts import LoraExperts, file_paths, stacks_of
from fused_lora.modules.names import some

_CALL = ("hidden_states", "top_k_index", "top_k_weights")


class Stack(NamedTuple):
    """An adapted parameter: the path of the module that is called, and its own; its LoRA layer, and the adapters.

    file_path: what the names of its adapters begin with in PEFT's state dicts.
    """

    place: str
    path: str
    module: Any
    names: list[str]
    file_path: str


def stack_of(path: str, module: Any, names: list[str]) -> Stack | None:
    """The stacked parameter that a LoRA layer at ``path`` is for; None for another layer."""
    name = getattr(module, "parameter_name", "weight")
    if name == "weight":
        return None
    if path.endswith(f".{name}"):  # a LoraStack in its LoraExperts; PEFT's wrappers are the modules that are called
        return Stack(path.rpartition(".")[0], path, module, names, path)
    place = path
    while place.endswith(".base_layer"):
        place = place.removesuffix(".base_layer")
    return Stack(place, f"{place}.{name}", module, names, path)


@dataclass
class ExpertsLayer(Layer):
    """Experts, of which several parameters may have adapters: one call, one check for each parameter."""

    stacks: list[Stack] = field(default_factory=list)
    dtypes: tuple[torch.dtype, ...] = ()  # of a call's hidden, top_k_index and top_k_weights

    @classmethod
    def of(cls, place: str, module: nn.Module, stacks: list[Stack]) -> ExpertsLayer:
        """The experts at ``place`` with these stacks."""
        names = list(dict.fromkeys(name for stack in stacks for name in stack.names))
        if stacks and isinstance(module, LoraExperts) and all(set(stack.names) == set(names) for stack in stacks):
            adapted = {stack.path for stack in stacks}
            inner = file_paths({s.path: s for s in stacks_of(module.base_layer, place) if s.path in adapted})
            stacks = [stack._replace(file_path=inner[stack.path]) for stack in stacks]
        return cls(place, module, names, any(s.module.merged_adapters for s in stacks), stacks=stacks)

    def why_not(self) -> str:
        """Why it cannot be verified, or an empty string."""
        if self.merged and not all(stack.module.merged_adapters for stack in self.stacks):
            return "some of its parameters are merged, and others are not"
        base = self.base
        for stack in self.stacks:
            if any(name in getattr(stack.module, "lora_variant", {}) for name in stack.names):
                return f"adapters {some(stack.names)} are another variant: verify compares LoRA"
            if why := experts.why_not_fused(base, stack.module.parameter_name):
                return why
        return "a norm follows its experts" if base.has_post_expert_norm else ""

    @property
    def paths(self) -> list[str]:
        """Of the parameters."""
        return [stack.path for stack in self.stacks]

    @property
    def embeds(self) -> bool:
        """No."""
        return False

    @property
    def base(self) -> Any:
        """The experts."""
        module = self.stacks[0].module
        return module.get_base_layer() if hasattr(module, "get_base_layer") else module.base_layer

    @property
    def holders(self) -> list[tuple[Any, list[str]]]:
        """As of :class:`Layer`: one for each parameter."""
        return [(stack.module, stack.names) for stack in self.stacks]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """[experts, N, K] or [experts, K, N]."""
        return {stack.path: self.base._parameters[stack.module.parameter_name] for stack in self.stacks}

    def weights(self) -> dict[str, Tensor]:
        """The same as they are now."""
        return {path: parameter.data for path, parameter in self.parameters.items()}

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """The [N, K] of each expert."""
        return list((weight.transpose(1, 2) if self.base.is_transposed else weight).unbind(0))

    def changes(self) -> dict[str, list[list[Adapter]]]:
        """As of :class:`Layer`: the adapters of each expert."""
        E = self.base.num_experts
        return {
            stack.path: [[_of_expert(stack.module, name, e, E) for name in stack.names] for e in range(E)]
            for stack in self.stacks
        }

    def adapters(self) -> list[Adapter]:
        """Of all experts."""
        return [a for matrices in self.changes().values() for own in matrices for a in own]

    def parts(self) -> dict[str, Tensor]:
        """As of :class:`Layer`, with the parameter's name before."""
        return {
            f"{stack.module.parameter_name}.{kind}.{name}.weight": getattr(stack.module, kind)[name].weight.data
            for stack in self.stacks
            for name in stack.names
            for kind in ("lora_A", "lora_B")
        }

    def kept(self, args: tuple, kwargs: dict) -> Tensor | None:
        """hidden [tokens, K], top_k_index and top_k_weights [tokens, top_k] beside each other, in float64."""
        call = [*args, *(kwargs[name] for name in _CALL[len(args) :] if name in kwargs)]
        if len(call) != 3:
            return None
        self.dtypes = tuple(t.dtype for t in call)
        return torch.cat([t.double() for t in call], 1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`kept` put together."""
        K = self.base.hidden_dim if hasattr(self.base, "hidden_dim") else self.base.hidden_size
        top_k = (x.shape[1] - K) // 2
        parts = x.split([K, top_k, top_k], 1)
        hidden, index, weights = (t.to(dtype) for t, dtype in zip(parts, self.dtypes, strict=True))
        return hidden, index, weights

    def call(self, x: Tensor) -> Tensor:
        """As of :class:`Layer`."""
        return self.module(*self.split(x))

    def folds(self) -> bool:
        """Whether a call, as the layer is shown, runs with W + D in the weight's dtype, as PEFT's own forward does."""
        if not hasattr(self.module, "parameter_name"):
            return False
        why = getattr(self.module, "why_not_fused", None)
        return why is None or why() is not None

    def _copy(self) -> None:
        for parameter in self.parameters.values():
            parameter.data = parameter.data.clone()

    def _take_away(self, state: Any) -> None:
        changes = self.changes()
        for path, weight in self.weights().items():
            for W, own in zip(self.matrices(weight), changes[path], strict=True):
                W.copy_(W.double() - change(W.double(), own).part)


def _of_expert(module: Any, name: str, expert: int, experts: int) -> Adapter:
    A, B, r = module.lora_A[name].weight.data, module.lora_B[name].weight.data, module.r[name]
    A, B = A[expert * r : (expert + 1) * r], B[:, expert::experts]
    return Adapter(A.double(), B.double(), float(module.scaling[name]))


def replay(
    layer: ExpertsLayer,
    x: Tensor,
    weights: Mapping[str, Tensor],
    changes: Mapping[str, Sequence[Sequence[Adapter]]],
    units: Units,
) -> tuple[Tensor, Tensor]:
    """The experts' output in float64 for rows that were kept, and the bound on an error of rounding: both [rows, N].

    The bound of the first product goes through the gate by the change that it causes there (twice: to first order, and
    16 roundings of the gate itself), and through the second as errors of an input, independent of each other. A token
    sums its experts in the layer's dtype.

    Args:
        weights: of the adapted parameters, by path. changes: their adapters; empty for merged ones.
    """
    base, (hidden, index, scores) = layer.base, layer.split(x)
    own = {stack.module.parameter_name: stack.path for stack in layer.stacks}

    def project(name: str, e: int, rows: Tensor, off: Tensor | None) -> tuple[Tensor, Tensor]:
        path = own.get(name, "")
        stored = (weights[path] if path else base._parameters[name].data)[e]
        W = (stored.t() if base.is_transposed else stored).double()
        bias = getattr(base, f"{name}_bias")[e].double() if base.has_bias else None
        adapters = changes[path][e] if path in changes else []
        y = product(rows, W, bias, adapters)
        bound = unmerged_bound(units, rows, W, bias, adapters, y)
        if off is not None:
            W = W + change(W, adapters).part
            bound = bound + torch.minimum(CONFIDENCE * (off.square() @ W.square().t()).sqrt(), off @ W.abs().t())
        return y, bound

    rounding = 2 * units.result
    total = torch.zeros(len(x), hidden.shape[1], dtype=torch.float64, device=x.device)
    size, bound = torch.zeros_like(total), torch.zeros_like(total)
    for e in index.unique().tolist():
        tokens, places = torch.where(index == e)
        y, off = project("gate_up_proj" if base.has_gate else "up_proj", e, hidden[tokens].double(), None)
        h = _activated(base, y)
        off = 2 * _moved(base, y, h, off) + 8 * rounding * h.abs() + tiny(units.result)
        y, off = project("down_proj", e, h, off)
        score = scores[tokens, places, None].double()
        total.index_add_(0, tokens, y * score)
        size.index_add_(0, tokens, (y * score).abs())
        bound.index_add_(0, tokens, off * score.abs())
    return total, bound + (index.shape[1] + 1) * rounding * size + rounding * total.abs() + tiny(units.result)


def _activated(base: Any, y: Tensor) -> Tensor:
    return base._apply_gate(y) if base.has_gate else base.act_fn(y)


def _moved(base: Any, y: Tensor, h: Tensor, off: Tensor) -> Tensor:
    """The most that h moves when gate and up move by ``off``, together or against each other, in halves or in turns."""
    N = y.shape[1]
    turns = torch.ones(N, dtype=y.dtype, device=y.device)
    halves = turns.clone()
    turns[::2], halves[: N // 2] = -1, -1
    found = torch.zeros_like(h)
    for signs in (torch.ones_like(turns), turns, halves):
        for side in (signs, -signs):
            found = torch.maximum(found, (_activated(base, y + side * off) - h).abs())
    return found


def units_of(layer: ExpertsLayer, x: Tensor, y: Tensor) -> Units:
    """The roundoffs of the layer as it is shown."""
    weight = next(iter(layer.weights().values()))
    lora_A = [stack.module.lora_A[name].weight for stack in layer.stacks for name in stack.names]
    folds = layer.folds()
    units = Units.of(layer.split(x)[0], y, weight, lora_A, weight.dtype if folds else None)
    return units.folded(unit_of(weight.dtype)) if folds else units
