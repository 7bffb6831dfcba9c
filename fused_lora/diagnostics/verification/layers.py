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
from fused_lora.modules.tree import held_parts
from fused_lora.ops.merge.exact import Adapter

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


@dataclass
class Layer:
    """A layer that is called, its active adapters, and whether it was merged."""

    path: str
    module: Any  # a LoRA layer of this package or of PEFT: the attributes that they share
    names: list[str]
    merged: bool
    broken: str = ""  # why its own unmerge refused, or could not restore what was there

    @property
    def paths(self) -> list[str]:
        """Of its checks: one for each weight."""
        return [self.path]

    @property
    def embeds(self) -> bool:
        """Whether it is an embedding: its weight is [K, N] for K tokens, its input their numbers."""
        return isinstance(self.base, nn.Embedding)

    @property
    def base(self) -> Any:
        """The module with the weight."""
        return self.module.base_layer

    @property
    def holders(self) -> list[tuple[Any, list[str]]]:
        """The LoRA layers that merge and unmerge, and the adapters of each."""
        return [(self.module, self.names)]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The weights as they are stored, by the paths of their checks."""
        return {self.path: self.base.weight}

    def weights(self) -> dict[str, Tensor]:
        """The same as they are now, dequantised in fp32 where they are quantised."""
        if base_of(self.base).bits:
            return {self.path: base_of(self.base).dense_weight(self.base, Factors([], [], []), torch.float32)}
        return {path: parameter.data for path, parameter in self.parameters.items()}

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """A weight, as it is stored or as a checkpoint has it, as matrices [N, K]."""
        return [weight.t() if self.embeds or getattr(self.module, "fan_in_fan_out", False) else weight]

    @property
    def weight(self) -> Tensor:
        """[N, K] as it is now."""
        return self.matrices(self.weights()[self.path])[0]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias as it is now."""
        bias = getattr(self.base, "bias", None)
        return None if bias is None else bias.data

    def kept(self, args: tuple, kwargs: dict) -> Tensor | None:
        """What is kept of a call's input, [..., K]; of tokens [..., 1]. None where it has none."""
        if not args:
            return None
        return args[0].unsqueeze(-1) if self.embeds else args[0]

    def results(self, y: Tensor) -> Tensor:
        """A call's output with the rows of what is kept of its input."""
        return y

    def call(self, x: Tensor) -> Tensor:
        """The layer's output for rows that were kept, [n, N]."""
        y = self.module(x[:, 0] if self.embeds else x)
        return y.reshape(len(x), y.shape[-1])

    def rows(self, x: Tensor, y: Tensor) -> Tensor:
        """The rows [n, K] that the weight is multiplied with in a call with x; for tokens x [n, 1] in y's dtype.

        A token is a row with one number: 1, or what the embedding scales its rows with.
        """
        if not self.embeds:
            return x
        scale = embed_scale(self.base)
        one = 1.0 if scale is None else scale.to(self.base.weight.dtype).item()
        empty = torch.zeros(len(x), self.weight.shape[1], dtype=y.dtype, device=x.device)
        return empty.scatter_(1, x.long(), one)

    def adapters(self) -> list[Adapter]:
        """Every adapter, in float64."""
        return [_adapter(self.module, name, self.embeds) for name in self.names]

    def changes(self) -> dict[str, list[list[Adapter]]]:
        """What changes each weight, by the path of its check: the adapters of each of its matrices."""
        return {self.path: [self.adapters()]}

    def parts(self) -> dict[str, Tensor]:
        """The adapters' tensors as they are, by the ends of their names in a state dict."""
        if self.embeds:
            held = zip(("lora_embedding_A", "lora_embedding_B"), held_parts(self.module), strict=True)
            return {f"{kind}.{name}": parts[name].data for kind, parts in held for name in self.names}
        found = {}
        for name in self.names:
            for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
                if name in (parts := getattr(self.module, kind)):
                    found[f"{kind}.{name}.weight"] = parts[name].weight.data
                    if (bias := getattr(parts[name], "bias", None)) is not None:
                        found[f"{kind}.{name}.bias"] = bias.data
        return found

    @contextmanager
    def shown(self, merged: bool) -> Iterator[None]:
        """A context in which the layer is merged, or unmerged. Afterwards weight, bias and state are restored."""
        kind, put_back = base_of(self.base), self.keep()
        try:
            if merged != self.merged:
                if merged or not kind.bits:  # the record of a quantised merge knows the parameter itself
                    self._copy()
                self._switch(merged)
                if not merged and self.broken:  # the same way in every pass, or the model would look random
                    put_back()
                    self._copy()
                    self._take_away()
                    for module, _ in self.holders:
                        module.merged_adapters = []
                        if hasattr(module, "merge_state"):
                            module.merge_state = None
            if kind.bits:  # whose calls may repack the weight
                kind.copy_weight(self.base)
            for module, names in self.holders:
                _activate(module, names)
            yield
        finally:
            put_back()

    def keep(self) -> Callable[[], None]:
        """What puts weight, bias and state back as they are now, any number of times."""
        put_back = keep(self.base)
        kept = [(module, _attributes(module)) for module, _ in self.holders]

        def put_all_back() -> None:
            put_back()
            for module, attributes in kept:
                _set_attributes(module, attributes)

        return put_all_back

    def _copy(self) -> None:
        base_of(self.base).copy_weight(self.base)
        if getattr(self.base, "bias", None) is not None:
            self.base.bias.data = self.base.bias.data.clone()

    def _switch(self, merged: bool) -> None:
        if not merged and self.broken:
            return
        with warnings.catch_warnings(record=True) as doubts:
            warnings.simplefilter("always")
            try:
                for module, names in self.holders:
                    module.merge(adapter_names=list(names)) if merged else module.unmerge()
            except (ValueError, RuntimeError) as error:
                if merged:
                    raise type(error)(f"model: {self.path} cannot be merged: {error}") from error
                self.broken = str(error)
        if doubts and not merged and not self.broken:  # unmerged, but not to the weight that was merged into
            self.broken = str(doubts[0].message)

    def _take_away(self) -> None:
        """Take D from the copy if the layer's own unmerge refuses: the best estimate of the original weight.

        A quantised one stays as it is: the finding says that it was replaced. So does one with DoRA that PEFT has
        merged: its c depends on the weight that is not there.
        """
        adapters, state = self.adapters(), getattr(self.module, "merge_state", None)
        dora = any(a.magnitude is not None for a in adapters)
        if not (base_of(self.base).bits or (dora and state is None)):
            W, scale = self.weight.double(), None
            parts = [(a.lora_A, a.lora_B, a.scaling) for a in adapters]
            if dora:
                A, B, s, scale, _ = base_of(self.base).factors(state.record, self.module.fan_in_fan_out)
                parts = list(zip(A, B, s, strict=True))
            for A, B, s in parts:
                W = W - s * (B.double() @ A.double())
            self.weight.copy_(W if scale is None else W / scale.double()[:, None])
        for a in adapters:
            if a.bias is not None:
                own = self.base.bias.data
                own.copy_(own.double() - a.scaling * a.bias)


def _adapter(module: Any, name: str, embeds: bool) -> Adapter:
    """lora_A [r, K], lora_B [N, r], scaling, lora_bias [N] and magnitude [N] of an adapter, in float64."""
    scaling = float(module.scaling[name])
    if embeds:
        A, B = (part[name].data.double() for part in held_parts(module))
        return Adapter(A, B, scaling)
    A, B = module.lora_A[name].weight.data, module.lora_B[name]
    bias = None if B.bias is None else B.bias.data.double()
    held = module.lora_magnitude_vector
    magnitude = held[name].weight.data.double() if name in held else None
    return Adapter(A.double(), B.weight.data.double(), scaling, bias, magnitude)


def keep(base: Any) -> Callable[[], None]:
    """What puts a base layer's weight, bias and attributes back as they are now, any number of times."""
    parameters = base._parameters.copy()
    attributes = {name: value for name, value in vars(base).items() if name not in _MODULE_ATTRIBUTES}
    data = {name: parameter.data for name, parameter in parameters.items() if parameter is not None}

    def put_back() -> None:
        base._parameters.clear()  # for the order: a merge of PEFT's may register the weight anew
        base._parameters.update(parameters)
        for name, numbers in data.items():
            base._parameters[name].data = numbers
        _set_attributes(base, attributes)

    return put_back


def _attributes(module: nn.Module) -> dict:
    """The module's own attributes, with lists and dicts copied because a merge changes them in place."""
    kept = {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}
    return {name: value.copy() if type(value) in (list, dict) else value for name, value in kept.items()}


def _set_attributes(module: nn.Module, attributes: dict) -> None:
    """Give a module these attributes of its own, and no others."""
    for name in set(vars(module)) - _MODULE_ATTRIBUTES - set(attributes):
        delattr(module, name)
    vars(module).update(attributes)


def _activate(module: Any, names: list[str]) -> None:
    if list(module.active_adapters) == names:
        return
    attribute = "_active_adapter" if hasattr(module, "_active_adapter") else "active_adapters"
    setattr(module, attribute, list(names))
