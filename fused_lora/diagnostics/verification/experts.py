"""Stacked experts: both adapted parameters of one call, shown merged and unmerged, and the call in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.bases import experts
from fused_lora.diagnostics.verification.layers import Layer
from fused_lora.diagnostics.verification.weights import CONFIDENCE, Units, product, tiny, unit_of, unmerged_bound
from fused_lora.modules.experts import LoraExperts, LoraStack, file_paths, stacks_of
from fused_lora.modules.names import some
from fused_lora.modules.tree import bare_module
from fused_lora.ops.merge.exact import Adapter, change


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
    if not (isinstance(module, LoraStack) or hasattr(module, "num_experts")):  # the second of PEFT's wrappers
        return None
    name = module.parameter_name
    if path.endswith(f".{name}"):  # a LoraStack in its LoraExperts; PEFT's wrappers are the modules that are called
        return Stack(path.rpartition(".")[0], path, module, names, path)
    place = bare_module(path)
    return Stack(place, f"{place}.{name}", module, names, path)


@dataclass
class ExpertsLayer(Layer):
    """Experts, of which several parameters may have adapters: one call, one check for each parameter."""

    stacks: list[Stack] = field(default_factory=list)
    dtypes: tuple[torch.dtype, ...] = ()  # of a call's tensors

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
        if self.form.calls_module:
            return f"verify does not know what a {type(base).__name__} makes of its products"
        return "a norm follows its experts" if getattr(base, "has_post_expert_norm", False) else ""

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
    def form(self) -> experts.Form:
        """How they run."""
        return experts.form_of(self.base)

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
        if weight.dim() == 2:
            return [weight]
        return list((weight.transpose(1, 2) if self.form.is_transposed(self.base) else weight).unbind(0))

    def changes(self) -> dict[str, list[list[Adapter]]]:
        """As of :class:`Layer`: the adapters of each expert."""
        E = self.form.count(self.base)
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
        """As of :class:`Layer`: the call's tensors beside each other, a row for each token, in float64."""
        names = self.form.inputs
        call = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
        if len(call) != len(names):
            return None
        self.dtypes = tuple(t.dtype for t in call)
        return self.form.by_token(self.base, call)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`kept` put together."""
        parts = self.form.of_tokens(self.base, x)
        return tuple(t.to(dtype) for t, dtype in zip(parts, self.dtypes, strict=True))

    def results(self, y: Tensor) -> Tensor:
        """As of :class:`Layer`."""
        return self.form.results_by_token(self.base, y)

    def call(self, x: Tensor) -> Tensor:
        """As of :class:`Layer`."""
        return self.results(self.module(*self.split(x)))

    def folds(self) -> bool:
        """Whether a call, as the layer is shown, runs with W + D in the weight's dtype, as PEFT's own forward does."""
        if not hasattr(self.module, "parameter_name"):
            return False
        why = getattr(self.module, "why_not_fused", None)
        return why is None or why() is not None

    def _copy(self) -> None:
        for parameter in self.parameters.values():
            parameter.data = parameter.data.clone()

    def _take_away(self) -> None:
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
    base, form, call = layer.base, layer.form, layer.split(x)
    own = {stack.module.parameter_name: stack.path for stack in layer.stacks}

    def project(name: str, e: int, rows: Tensor, off: Tensor | None) -> tuple[Tensor, Tensor]:
        path = own.get(name, "")
        W = layer.matrices(weights[path] if path else base._parameters[name].data)[e].double()
        bias = getattr(base, f"{name}_bias")[e].double() if getattr(base, "has_bias", False) else None
        adapters = changes[path][e] if path in changes else []
        if form.turned:
            W, adapters = W.t(), [a.turned() for a in adapters]
        y = product(rows, W, bias, adapters)
        bound = unmerged_bound(units, rows, W, bias, adapters, y)
        if off is not None:
            W = W + change(W, adapters).part
            bound = bound + torch.minimum(CONFIDENCE * (off.square() @ W.square().t()).sqrt(), off @ W.abs().t())
        return y, bound

    rounding = 2 * units.result
    total = torch.zeros(call[0].shape, dtype=torch.float64, device=x.device)
    size, bound, times = torch.zeros_like(total), torch.zeros_like(total), total.new_zeros(len(total), 1)
    up, down = form.parameters(base)
    for e, rows, hidden, score in form.routes(base, call):
        y, off = project(up, e, hidden.double(), None)
        h = form.activated(base, y)
        off = 2 * _moved(layer, y, h, off) + 8 * rounding * h.abs() + tiny(units.result)
        y, off = project(down, e, h, off)
        score = score.double() if isinstance(score, Tensor) else score
        total.index_add_(0, rows, y * score)
        size.index_add_(0, rows, (y * score).abs())
        bound.index_add_(0, rows, off * abs(score))
        times[rows] += 1
    bound = bound + (times + 1) * rounding * size + rounding * total.abs() + tiny(units.result)
    return layer.results(total), layer.results(bound)


def _moved(layer: ExpertsLayer, y: Tensor, h: Tensor, off: Tensor) -> Tensor:
    """The most that h moves when gate and up move by ``off``, together or against each other, in halves or in turns."""
    N = y.shape[1]
    turns = torch.ones(N, dtype=y.dtype, device=y.device)
    halves = turns.clone()
    turns[::2], halves[: N // 2] = -1, -1
    found = torch.zeros_like(h)
    for signs in (torch.ones_like(turns), turns, halves):
        for side in (signs, -signs):
            found = torch.maximum(found, (layer.form.activated(layer.base, y + side * off) - h).abs())
    return found


def units_of(layer: ExpertsLayer, x: Tensor, y: Tensor) -> Units:
    """The roundoffs of the layer as it is shown."""
    weight = next(iter(layer.weights().values()))
    lora_A = [stack.module.lora_A[name].weight for stack in layer.stacks for name in stack.names]
    folds = layer.folds()
    units = Units.of(layer.split(x)[0], y, weight, lora_A, weight.dtype if folds else None)
    return units.folded(unit_of(weight.dtype)) if folds else units
