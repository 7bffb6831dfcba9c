"""PEFT's ``ParamWrapper`` (``target_parameters``) over stacked experts: LoRA that is never folded into their weights.

PEFT nests one wrapper for each parameter around the experts. Each call of it parametrises the stack: W + s B A of all
experts is formed, whichever of them have rows. Here the outermost wrapper computes the experts with the terms of all
wrappers inside; where one of them or the experts are out of the ordinary, PEFT's own forward runs. A module with a
matrix, as a router, is called with W + s B A here, too, but not parametrised for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fused_lora.bases import Base, experts
from fused_lora.bases.base import why_not_own_call, why_not_plain_tensor, why_not_plain_weight
from fused_lora.integrations.peft_linear import BEHAVIOURS, FUSED, AcceleratedLinear, _count
from fused_lora.modules.changes import CHANGING, wait_for_change
from fused_lora.modules.fusable import why_inference, why_transformed
from fused_lora.modules.mixin import FusedLoraBehaviour


class AcceleratedExperts(AcceleratedLinear):
    """Forward, merge and unmerge of a ``lora.ParamWrapper``, for a class that has PEFT's as its next base."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the experts' own, such as (hidden [tokens, K], top_k_index, top_k_weights [tokens, top_k])."""
        if CHANGING:
            wait_for_change(self)
        reason = self.why_class_replaced() or self.why_not_fused() or self._why_not_call((x, *args), kwargs)
        if reason:
            _count(reason)
            return super(FusedLoraBehaviour, self).forward(x, *args, **kwargs)
        _count(FUSED)
        terms = {w.parameter_name: w._terms() for w in _wrappers(self)}
        return experts.experts_forward(self.get_base_layer(), (x, *args), terms)

    def why_not_fused(self) -> str | None:
        """Why a call runs PEFT's own forward; None where it does not."""
        base, active = self.get_base_layer(), False
        for wrapper in _wrappers(self):
            if type(wrapper) is not type(self):
                return "not accelerated: call fused_lora.accelerate(model)"
            if wrapper.disable_adapters:
                return "adapters are disabled"
            if wrapper.merged:
                return "merged: the base layer alone"
            if wrapper is not self and (why := why_not_own_call(wrapper, "a wrapper inside")):
                return why
            if why := experts.why_not_fused(base, wrapper.parameter_name) or wrapper._why_not_terms():
                return why
            active = active or bool(wrapper._present(wrapper.active_adapters))
        return None if active else "no active adapter in this layer"

    def _why_not_call(self, call: tuple, kwargs: dict) -> str | None:
        base = self.get_base_layer()
        form, x = experts.form_of(base), call[0]
        stacked = len(call) == len(form.inputs) and all(isinstance(t, Tensor) and t.dim() == 2 for t in call)
        if kwargs or not (stacked or form.calls_module):
            return "further arguments"
        if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
            return "a dispatch mode over experts"
        if form.fault(base, call):
            return "shapes or dtypes do not belong together"
        hooked = "a hook on all modules" if _has_any_global_hook() else None
        reason = why_not_plain_tensor(x) or experts.why_not_there(base, call) or why_transformed() or hooked
        parts = [part for w in _wrappers(self) for part in w._parts(w._present(w.active_adapters))]
        return reason or why_inference(x, parts, base)

    def _why_not_terms(self) -> str | None:
        base = self.get_base_layer()
        if self._transposed() != experts.form_of(base).is_transposed(base):
            return "the adapter's orientation is not that of the experts"
        for name in self._present(self.active_adapters):
            A, B = (why_not_plain_weight(part[name]._parameters.get("weight")) for part in (self.lora_A, self.lora_B))
            if why := self._why_not_term(name) or A or B:
                return why
        return None

    def _terms(self) -> list[experts.ExpertTerm]:
        parts = ((self.lora_A[n].weight, self.lora_B[n].weight, n) for n in self._present(self.active_adapters))
        return [experts.ExpertTerm(A, B, float(self.scaling[n])) for A, B, n in parts]

    def _transposed(self) -> bool:
        swapped = getattr(self, "_did_swap_in_out_features", False)  # PEFT before 0.19.1 never exchanges them
        return self.get_param().dim() == 3 and not swapped

    def _merge_place(self) -> tuple[nn.Module, Base]:
        return self.get_base_layer(), experts.kind(self.parameter_name, self._transposed())

    def _fits_exactly(self, names: list[str]) -> bool:
        base, kind = self._merge_place()
        if kind.why_not_merged(base):
            return False
        weight = base._parameters[self.parameter_name]
        E, *shape = (1, *weight.shape)[-3:]
        shape = tuple(reversed(shape) if self._transposed() else shape)
        pairs = {name: (self.lora_A[name].weight, self.lora_B[name].weight) for name in names}
        plain = all(n not in self.lora_variant and A.shape[:1] == (self.r[n] * E,) for n, (A, _) in pairs.items())
        return plain and all(self._fits(name, *pair, shape, weight.device) for name, pair in pairs.items())


def _wrappers(outermost: Any) -> Iterator[Any]:
    """PEFT's wrappers around one module, from the outside in."""
    module = outermost
    while hasattr(module, "parameter_name"):
        yield module
        module = module._modules["base_layer"]


BEHAVIOURS["ParamWrapper"] = AcceleratedExperts
