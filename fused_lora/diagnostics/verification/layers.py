"""Show LoRA layers merged and unmerged, with their own merge and unmerge, without changing them.

To show a layer in its other state, its weight is replaced by a copy. The original storage is put back afterwards and is
never written. This works for every class with PEFT's attributes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases import base_of
from fused_lora.bases.base import Factors
from fused_lora.modules.embedding import embed_scale
from fused_lora.modules.names import some

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


@dataclass
class Layer:
    """A layer, its active adapters, and whether it was merged."""

    path: str
    module: Any  # a LoRA layer of this package or of PEFT: the attributes that they share
    names: list[str]
    merged: bool
    broken: str = ""  # why its own unmerge refused, or could not restore what was there

    @property
    def embeds(self) -> bool:
        """Whether it is an embedding: its weight is [K, N] for K tokens, its input their numbers."""
        return isinstance(self.module.base_layer, nn.Embedding)

    @property
    def weight(self) -> Tensor:
        """[N, K] as it is now, dequantised in fp32 if it is quantised."""
        base = self.module.base_layer
        if base_of(base).bits:
            return base_of(base).dense_weight(base, Factors([], [], []), torch.float32)
        weight = self.module.base_layer.weight.data
        return weight.t() if self.embeds or getattr(self.module, "fan_in_fan_out", False) else weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias as it is now."""
        bias = getattr(self.module.base_layer, "bias", None)
        return None if bias is None else bias.data

    def rows(self, x: Tensor, y: Tensor) -> Tensor:
        """The rows [n, K] that the weight is multiplied with in a call with x; for tokens x [n, 1] in y's dtype.

        A token is a row with one number: 1, or what the embedding scales its rows with.
        """
        if not self.embeds:
            return x
        scale = embed_scale(self.module.base_layer)
        one = 1.0 if scale is None else scale.to(self.module.base_layer.weight.dtype).item()
        empty = torch.zeros(len(x), self.weight.shape[1], dtype=y.dtype, device=x.device)
        return empty.scatter_(1, x.long(), one)

    def factors(self) -> list[tuple[Tensor, Tensor, float, Tensor | None]]:
        """(lora_A [r, K], lora_B [N, r], scaling, lora_bias [N] or None) of every adapter, in float64."""
        found = []
        for name in self.names:
            if self.embeds:
                A, B = (part[name].data.double() for part in _held(self.module))
                found.append((A, B, float(self.module.scaling[name]), None))
                continue
            A, B = self.module.lora_A[name].weight.data, self.module.lora_B[name]
            bias = None if B.bias is None else B.bias.data.double()
            found.append((A.double(), B.weight.data.double(), float(self.module.scaling[name]), bias))
        return found

    def delta_factors(self) -> tuple[Tensor, Tensor]:
        """left [N, R] and right [R, K] in float64, left @ right = D = sum_i s_i B_i A_i."""
        factors = self.factors()
        return torch.cat([B * s for _, B, s, _ in factors], 1), torch.cat([A for A, *_ in factors])

    @contextmanager
    def shown(self, merged: bool) -> Iterator[None]:
        """A context in which the layer is merged, or unmerged. Afterwards weight, bias and state are restored."""
        base, kept = self.module.base_layer, _attributes(self.module)
        kind = base_of(base)
        with unchanged(base) as put_back:
            try:
                if merged != self.merged:
                    if merged or not kind.bits:  # the record of a quantised merge knows the parameter itself
                        _copy(base)
                    self._switch(merged)
                    if not merged and self.broken:  # the same way in every pass, or the model would look random
                        put_back()
                        _copy(base)
                        self._take_away()
                if kind.bits:  # whose calls may repack the weight
                    kind.copy_weight(base)
                _activate(self.module, self.names)
                yield
            finally:
                for name in set(vars(self.module)) - _MODULE_ATTRIBUTES - set(kept):
                    delattr(self.module, name)
                vars(self.module).update(kept)

    def _switch(self, merged: bool) -> None:
        if not merged and self.broken:
            return
        with warnings.catch_warnings(record=True) as doubts:
            warnings.simplefilter("always")
            try:
                if merged:
                    self.module.merge(adapter_names=list(self.names))
                else:
                    self.module.unmerge()
            except (ValueError, RuntimeError) as error:
                if merged:
                    raise type(error)(f"model: {self.path} cannot be merged: {error}") from error
                self.broken = str(error)
        if doubts and not merged and not self.broken:  # unmerged, but not to the weight that was merged into
            self.broken = str(doubts[0].message)

    def _take_away(self) -> None:
        """Subtract D from the copy if the layer's own unmerge refuses: the best estimate of the original weight.

        A quantised one stays as it is: the finding says that it was replaced.
        """
        if not base_of(self.module.base_layer).bits:
            left, right = self.delta_factors()
            self.weight.copy_(self.weight.double() - left @ right)
        for _, _, s, bias in self.factors():
            if bias is not None:
                own = self.module.base_layer.bias.data
                own.copy_(own.double() - s * bias)
        self.module.merged_adapters = []
        if hasattr(self.module, "merge_state"):
            self.module.merge_state = None


@contextmanager
def unchanged(base: Any) -> Iterator[Callable[[], None]]:
    """A context after which a base layer's weight, bias and attributes are those of before.

    It gives a function that puts them back at once.
    """
    parameters = base._parameters.copy()
    attributes = {name: value for name, value in vars(base).items() if name not in _MODULE_ATTRIBUTES}
    data = {name: parameter.data for name, parameter in parameters.items() if parameter is not None}

    def put_back() -> None:
        base._parameters.clear()  # for the order: a merge of PEFT's may register the weight anew
        base._parameters.update(parameters)
        for name, numbers in data.items():
            base._parameters[name].data = numbers
        for name in set(vars(base)) - _MODULE_ATTRIBUTES - set(attributes):
            delattr(base, name)
        vars(base).update(attributes)

    try:
        yield put_back
    finally:
        put_back()


def _copy(base: Any) -> None:
    base_of(base).copy_weight(base)
    if getattr(base, "bias", None) is not None:
        base.bias.data = base.bias.data.clone()


def find_layers(model: nn.Module) -> tuple[list[Layer], dict[str, str]]:
    """LoRA layers that can be verified, and those that cannot: path -> why."""
    layers, skipped = [], {}
    module: Any
    for path, module in model.named_modules():
        if not all(hasattr(module, name) for name in ("base_layer", "merged_adapters", "active_adapters", "scaling")):
            continue
        merged, held = bool(module.merged_adapters), _held(module)[0]
        names = [n for n in (module.merged_adapters if merged else module.active_adapters) if n in held]
        why = _unfit(module, names)
        if why:
            skipped[path] = why
        elif names:
            layers.append(Layer(path, module, names, merged))
    return layers, skipped


def check_state(model: nn.Module) -> None:
    """Raise RuntimeError where merged and unmerged cannot be compared at all."""
    for path, module in model.named_modules():
        if getattr(module, "merged_adapters", None) is None or not hasattr(module, "base_layer"):
            continue
        if getattr(module, "disable_adapters", False) is True:
            raise RuntimeError(f"model: its adapters are disabled ({path}), so there is nothing to verify")
        if getattr(module, "mixed_batch", None) is not None:
            raise RuntimeError("model: verify inside adapter_batch cannot compare with a merged model")


def _unfit(module: Any, names: list[str]) -> str:
    base = module.base_layer
    if not len(_held(module)[0]):
        return f"{type(module).__name__} over {type(base).__name__} is no linear layer"
    if hasattr(module, "parameter_name") and module.parameter_name != "weight":
        return f"adapters of the stacked experts' {module.parameter_name} are not compared"
    weight = getattr(base, "_parameters", {}).get("weight")
    variants = {**getattr(module, "lora_variant", {}), **getattr(module, "activated", {})}
    if other := [name for name in names if name in variants or name in module.lora_magnitude_vector]:
        return f"adapters {some(other)} are DoRA or another variant: verify compares plain LoRA, x W^T + s x A^T B^T"
    embeds = isinstance(base, nn.Embedding)
    if weight is None or weight.dim() != 2 or not (embeds or hasattr(base, "bias")):
        return f"{type(base).__name__} has no plain 2-D weight"
    if base_of(base).bits:
        return _unfit_quantised(module, names)
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {weight.dtype}: quantised or distributed"
    if weight.device.type == "meta":
        return "its weight is on the meta device"
    if embeds:
        return "max_norm changes its rows" if base.max_norm is not None else ""
    if base.bias is None and any(module.lora_B[name].bias is not None for name in names):
        return "its lora_bias has no base bias to be merged into"
    return ""


def _held(module: Any) -> tuple[Any, Any]:
    """lora_A and lora_B by adapter name: of an embedding those that it has as parameters."""
    parts = module._modules
    if parts.get("lora_embedding_A"):
        return parts["lora_embedding_A"], parts["lora_embedding_B"]
    return parts.get("lora_A", {}), parts.get("lora_B", {})


def adapter_weights(layer: Layer) -> list[Tensor]:
    """lora_A of each adapter."""
    held = _held(layer.module)[0]
    return [part if isinstance(part, Tensor) else part.weight for part in (held[name] for name in layer.names)]


def _unfit_quantised(module: Any, names: list[str]) -> str:
    base = module.base_layer
    kind = base_of(base)
    if why := kind.why_not_adapted(base) or kind.why_not_merged(base):
        return why
    grid = kind.grid(base)
    if grid is None:
        return "no bound is known for its arithmetic"
    if base.in_features % grid.blocksize:
        return "in_features is no multiple of the blocksize"
    exactly = hasattr(module, "merge_state")  # what PEFT's own class merges keeps nothing of the weight before
    if module.merged_adapters and not (exactly and module.merge_state):
        return f"PEFT merged it into {kind.bits} bits, the weight of before is gone"
    return "" if exactly or len(names) == 1 else "PEFT quantises again for each adapter; accelerate the model first"


def _attributes(module: nn.Module) -> dict:
    """The module's own attributes, with lists and dicts copied because a merge changes them in place."""
    kept = {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}
    return {name: value.copy() if type(value) in (list, dict) else value for name, value in kept.items()}


def _activate(module: Any, names: list[str]) -> None:
    if list(module.active_adapters) == names:
        return
    attribute = "_active_adapter" if hasattr(module, "_active_adapter") else "active_adapters"
    setattr(module, attribute, list(names))
