"""Stacked experts of transformers: may they be adapted, their call with LoRA, and merges expert by expert.

``expert_forms`` has what classes of experts differ in, ``expert_terms`` what adapters add to each of their products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases.base import Base, Factors, only_moves, why_replaced
from fused_lora.bases.expert_forms import Form, Terms, find_form, form_of, positional, run
from fused_lora.bases.expert_terms import ExpertTerm, StackedTerm, unpacked
from fused_lora.ops.checks import FLOAT_DTYPES
from fused_lora.ops.merge import op as merging
from fused_lora.ops.native import DONE, MERGE, UNMERGE

__all__ = [
    "ExpertTerm",
    "Experts",
    "Form",
    "StackedTerm",
    "experts_forward",
    "form_of",
    "forward_of_groups",
    "kind",
    "positional",
    "replace_rows",
    "run",
    "unpacked",
    "why_not_adapted",
    "why_not_fused",
    "why_not_there",
]
NAMES = ("gate_up_proj", "up_proj", "down_proj")  # in the order in which transformers registers them


def why_not_adapted(experts: Any, name: str) -> str | None:
    """None when adapters of the parameter ``name`` of ``experts`` can be computed, else the reason."""
    form = find_form(experts)
    if form is None or (form.calls_module and name != "weight"):
        return f"{type(experts).__name__} is not in transformers' registry of experts"
    if name not in (names := form.parameters(experts) if form.calls_module else NAMES):
        return f"{name} is not one of {', '.join(names)}"
    for own in form.parameters(experts):
        if why := why_not_stacked(experts._parameters.get(own), form.dim):
            return f"{own} is {why}"
    return form.why_not_adapted(experts)


def why_not_fused(experts: Any, name: str, own_hooks: int = 0) -> str | None:
    """None when :func:`experts_forward` may stand in for a call of ``experts`` with adapters of its ``name``.

    own_hooks: forward hooks of the experts that know of it.
    """
    if why := why_not_adapted(experts, name) or form_of(experts).why_not_fused(experts):
        return why
    if not form_of(experts).calls_module:
        before = experts._forward_pre_hooks or experts._backward_hooks or experts._backward_pre_hooks
        if before or len(experts._forward_hooks) > own_hooks:
            return "a hook on the experts"
    return None if only_moves(experts) else why_replaced(experts, "the experts")


def why_not_there(experts: Any, call: Sequence[Any]) -> str | None:
    """None where a call's tensors are on the experts' device: a hook of accelerate would move them, this does not."""
    form = form_of(experts)
    if "_hf_hook" in experts.__dict__ and not form.calls_module:
        device = experts._parameters[form.parameters(experts)[0]].device
        if found := {t.device for t in call if isinstance(t, Tensor)} - {device}:
            return f"the experts are on {device}, and their inputs on {', '.join(map(str, found))}"
    return None


def why_not_stacked(weight: Any, dim: int = 3) -> str | None:
    """None for an ordinary floating parameter of so many dimensions, else what it is instead."""
    if type(weight) is not nn.Parameter:  # parametrized: computed anew at each use
        return "not a parameter of its own" if weight is None else f"a {type(weight).__name__}"
    if weight.dim() != dim or weight.dtype not in FLOAT_DTYPES or weight.layout is not torch.strided:
        return f"{weight.dtype} of {weight.dim()} dimensions"
    return "on the meta device: not loaded, or offloaded between calls" if weight.is_meta else None


def experts_forward(experts: Any, call: Sequence[Any], terms: Terms) -> Any:
    """What ``experts`` give for a call, with the terms of adapters added to each of their products.

    Args:
        call: the tensors that the experts' form names (``inputs``), as hidden [tokens, K], top_k_index and
            top_k_weights [tokens, top_k]; or any arguments of a module that is called. terms: of each adapted
            parameter, by its name.

    Raises:
        ValueError: not as many tensors, their shapes do not belong together, or an expert is not there.
        TypeError: hidden is not floating, or top_k_index no integers.
        RuntimeError: :func:`why_not_there` has a reason.
    """
    form = form_of(experts)
    _check_call(form, experts, call, form.fault)
    return form.forward(experts, call, terms)


def forward_of_groups(experts: Any, call: Sequence[Any], groups: Sequence[tuple[Tensor, Terms]]) -> Any:
    """The same for a call whose rows have different terms; the others keep their bits.

    Args:
        call: as of :func:`experts_forward`. groups: numbers of rows, int64, and the terms that they have.
    """
    form = form_of(experts)
    _check_call(form, experts, call, form.fault_of_rows)
    return form.forward_of_groups(experts, call, groups)


def _check_call(form: Form, experts: Any, call: Sequence[Any], fault_in: Callable) -> None:
    if form.inputs and len(call) != len(form.inputs):
        raise ValueError(f"{type(experts).__name__}: expected {', '.join(form.inputs)}, got {len(call)} tensors")
    if fault := fault_in(experts, call):
        raise fault
    if why := why_not_there(experts, call):
        raise RuntimeError(f"{type(experts).__name__}: {why}; expected one device, or a device_map of whole layers")


def replace_rows(experts: Any, y: Any, call: Sequence[Any], groups: Sequence[tuple[Tensor, Terms]]) -> Any:
    """y, what the experts gave for a call, with the results under adapters of some of its rows; in place if it can be.

    As :func:`forward_of_groups`. Between the two products of an expert is a gate, so nothing can be added behind.
    """
    form = form_of(experts)
    _check_call(form, experts, call, form.fault_of_rows)
    for rows, terms in groups:
        y = form.replace_rows(experts, y, call, rows, terms)
    return y


@functools.cache
def kind(name: str, transposed: bool) -> Experts:
    """What answers for a stacked parameter."""
    return Experts(name, transposed)


class Experts(Base):
    """One stacked parameter of a module for merges: every expert is a matrix of its own. A matrix is a stack of one.

    transposed: the stack is [experts, in, out]; what a layer says with ``fan_in_fan_out`` is not asked.
    """

    def __init__(self, name: str, transposed: bool):
        self.name, self.transposed = name, transposed

    def why_not_merged(self, module: Any) -> str | None:
        """None for an ordinary stack of matrices."""
        weight = module._parameters.get(self.name)
        why = why_not_stacked(weight, 2 if isinstance(weight, Tensor) and weight.dim() == 2 else 3)
        return why and f"{self.name} is {why}"

    def merge_(self, module: Any, factors: Factors, fan_in_fan_out: bool) -> list[merging.MergeRecord]:
        """As :meth:`Base.merge_`; all experts or none. One record an expert."""
        matrices = self._matrices(module)
        each = [Factors(*parts) for parts in _by_expert(factors, len(matrices))]
        if records := self._together(matrices, each, [None] * len(matrices)):
            return records
        records = []
        try:
            for W, (A, B, scaling, row_scale, seed) in zip(matrices, each, strict=True):  # see native.safe_in_a_child
                records.append(merging.merge_(W, A, B, scaling, row_scale, seed, fan_in_fan_out=self.transposed))
        except BaseException:
            for W, own in zip(matrices, records, strict=False):
                merging.unmerge_(W, own)
            raise
        return records

    def _together(self, matrices: list[Tensor], each: list[Factors], old: list[Any]) -> list[merging.MergeRecord]:
        """The records of merges, or of switches, of all experts at once; empty where that cannot be."""
        every = zip(matrices, each, old, strict=True)
        jobs = [merging.merge_later(W, own, self.transposed, before) for W, own, before in every]
        found = [job for job in jobs if job is not None]
        records = [record for record, _ in found]
        done = len(found) == len(jobs) and _all_at_once([sweep for _, sweep in found], MERGE)
        return records if done else []  # no call or loop since: an interrupt in one would lose the records

    def switch_(
        self, module: Any, record: list[merging.MergeRecord], factors: Factors, fan_in_fan_out: bool
    ) -> list[merging.MergeRecord]:
        """As :meth:`Base.switch_`; all experts or none. In one pass where all go at once."""
        matrices = self._matrices(module)
        self._check_experts(matrices, record)
        each = [Factors(*parts) for parts in _by_expert(factors, len(matrices))]
        if records := self._together(matrices, each, record):
            return records
        frozen = self.factors(record, fan_in_fan_out)
        self.unmerge_(module, record)
        try:
            return self.merge_(module, factors, fan_in_fan_out)
        except BaseException:
            record[:] = self.merge_(module, frozen, fan_in_fan_out)  # the same factors give the same bits again
            raise

    def _check_experts(self, matrices: list[Tensor], record: list[merging.MergeRecord]) -> None:
        if len(matrices) != len(record):
            raise RuntimeError(f"{self.name}: it has {len(matrices)} experts and had {len(record)} when it was merged")

    def unmerge_(self, module: Any, record: list[merging.MergeRecord]) -> None:
        """As :meth:`Base.unmerge_`; all experts or none."""
        matrices = self._matrices(module)
        self._check_experts(matrices, record)
        sweeps = [merging.unmerge_later(W, own) for W, own in zip(matrices, record, strict=True)]
        if all(sweeps) and _all_at_once(sweeps, UNMERGE):
            return
        done = 0
        try:
            for W, own in zip(matrices, record, strict=True):
                merging.unmerge_(W, own)
                done += 1
        except BaseException:
            for i in range(done):  # the same factors give the same bits again
                record[i] = merging.merge_(matrices[i], *merging.factors(record[i], False))
            raise

    def factors(self, record: list[merging.MergeRecord], fan_in_fan_out: bool) -> Factors:
        """The adapters that were merged, frozen, as one in PEFT's packing."""
        parts = [merging.factors(own, self.transposed) for own in record]
        A, B = torch.cat([A for [A], *_ in parts]), torch.stack([B for _, [B], *_ in parts], 2)
        return Factors([A], [B.reshape(B.shape[0], -1)], [1.0])

    def delta_fidelity(self, module: Any, record: list[merging.MergeRecord]) -> float:
        """As :meth:`Base.delta_fidelity`, of the expert that lost most."""
        lost = [merging.delta_fidelity(W, own) for W, own in zip(self._matrices(module), record, strict=True)]
        return max(lost)

    def _matrices(self, module: Any) -> list[Tensor]:
        weight = self.matrix(module).detach()
        return [weight] if weight.dim() == 2 else list(weight.unbind(0))


def _all_at_once(sweeps: list[Any], mode: int) -> bool:
    """Whether it was done."""
    try:
        return len({sweep.kind for sweep in sweeps}) == 1 and merging.run_together(sweeps, mode) == DONE
    except torch.OutOfMemoryError:  # one by one takes less
        return False


def _by_expert(factors: Factors, experts: int) -> list[tuple[list[Tensor], list[Tensor], list[float]]]:
    """lora_A [r, in], lora_B [out, r] and scaling of each expert."""
    lora_A, lora_B, scaling = factors[:3]
    A = [t.detach().reshape(experts, -1, t.shape[1]) for t in lora_A]
    B = [t.detach().reshape(t.shape[0], -1, experts) for t in lora_B]
    return [([a[e] for a in A], [b[..., e] for b in B], list(scaling)) for e in range(experts)]
