"""Stacked experts as transformers keeps them, [experts, out, in] or [experts, in, out]: forward and merge of LoRA.

An adapter of one such parameter is PEFT's (``target_parameters``): lora_A [experts * r, in], whose slowest part is the
expert, and lora_B [out, r * experts], whose fastest part is the expert. The forward never forms W + s B A. Rows are
sorted by expert as in transformers' "grouped_mm", and two more grouped products add the terms to each.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.bases.base import Base, Factors, why_not_own_call, why_replaced
from fused_lora.ops.checks import FLOAT_DTYPES
from fused_lora.ops.dora.op import dropped
from fused_lora.ops.linear.op import draw_seeds
from fused_lora.ops.merge import op as merging
from fused_lora.ops.native import DONE, MERGE, UNMERGE

NAMES = ("gate_up_proj", "up_proj", "down_proj")
IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")  # of one arithmetic: which experts a row goes through
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "num_experts", "_is_expert_parallel")


class ExpertTerm(NamedTuple):
    """One adapter of one stacked parameter: lora_A [experts * r, in], lora_B [out, r * experts], scaling, dropout."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float = 0.0

    def stacks(self, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """lora_A [experts, r, in] and lora_B [experts, out, r] in ``dtype``, r padded to whole 16 bytes."""
        return unpacked(self.lora_A.to(dtype), self.lora_B.to(dtype), experts)


class StackedTerm(NamedTuple):
    """The same with lora_A [experts, r, in] and lora_B [experts, out, r], r of whole 16 bytes already."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float = 0.0

    def stacks(self, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both in ``dtype``."""
        return self.lora_A.to(dtype), self.lora_B.to(dtype)


Term = ExpertTerm | StackedTerm


def why_not_adapted(experts: Any, name: str) -> str | None:
    """None when adapters of the parameter ``name`` of ``experts`` can be computed, else the reason."""
    kind = type(experts).__name__
    if not all(hasattr(experts, flag) for flag in (*_FLAGS, "_apply_gate", "config")):
        return f"{kind} is not in transformers' registry of experts"
    if name not in NAMES:
        return f"{name} is not one of {', '.join(NAMES)}"
    if experts._is_expert_parallel:
        return "experts are spread over processes"
    held = experts._parameters
    for own in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        if why := why_not_stacked(held.get(own)):
            return f"{own} is {why}"
        if held[own].dtype is torch.float64:
            return "float64 experts have no grouped product"
    return None


def why_not_fused(experts: Any, name: str, own_hooks: int = 0) -> str | None:
    """None when :func:`experts_forward` may stand in for a call of ``experts`` with adapters of its ``name``.

    own_hooks: forward hooks of the experts that know of it.
    """
    if why := why_not_adapted(experts, name):
        return why
    implementation = getattr(experts.config, "_experts_implementation", None)
    if implementation not in IMPLEMENTATIONS:
        return f"the experts implementation is {implementation!r}"
    if not own_hooks:
        return why_not_own_call(experts, "the experts")
    before = experts._forward_pre_hooks or experts._backward_hooks or experts._backward_pre_hooks
    hooked = before or len(experts._forward_hooks) > own_hooks
    return "a hook on the experts" if hooked else why_replaced(experts, "the experts")


def why_not_stacked(weight: Any) -> str | None:
    """None for an ordinary floating parameter of three dimensions, else what it is instead."""
    if type(weight) is not nn.Parameter:  # parametrized: computed anew at each use
        return "not a parameter of its own" if weight is None else f"a {type(weight).__name__}"
    if weight.dim() != 3 or weight.dtype not in FLOAT_DTYPES or weight.layout is not torch.strided:
        return f"{weight.dtype} of {weight.dim()} dimensions"
    return "on the meta device" if weight.is_meta else None


def experts_forward(
    experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, terms: Mapping[str, Sequence[Term]]
) -> Tensor:
    """hidden [tokens, K] through the top_k experts of each token, [tokens, K]: transformers' "grouped_mm" with terms.

    Deterministic: a token's results are summed in the order of its experts' places, with no atomics. A mask of dropout
    has a row for each place of a token, token * top_k + place, whatever its expert is; each projection and adapter
    draws one of its own.

    Args:
        top_k_index, top_k_weights: [tokens, top_k]. terms: of each adapted parameter, by its name.

    Raises:
        ValueError: hidden, top_k_index and top_k_weights differ in their tokens, or an expert is not there.
        TypeError: hidden is not floating, or top_k_index no integers.
    """
    from transformers.integrations.moe import _grouped_linear

    _check_call(hidden, top_k_index, top_k_weights)
    tokens, top_k = top_k_index.shape
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    _check_experts(ids, experts.num_experts)
    # of a size that does not depend on numbers, so that it compiles
    offsets = torch.searchsorted(ids, torch.arange(experts.num_experts, device=ids.device), right=True, out_int32=True)

    def project(x: Tensor, name: str) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[ids] if experts.has_bias else None
        y = _grouped_linear(x, getattr(experts, name), offsets, bias=bias, is_transposed=experts.is_transposed)
        return add_terms(y, x, terms.get(name, ()), offsets, order)

    y = project(hidden[order // top_k], "gate_up_proj" if experts.has_gate else "up_proj")
    y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = project(y, "down_proj")
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order, None]
    return y[_back(order)].view(tokens, top_k, y.shape[-1]).sum(1).to(hidden.dtype)


def _check_call(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"hidden_states: expected a floating dtype, got {hidden.dtype}")
    if top_k_index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"top_k_index: expected int32 or int64, got {top_k_index.dtype}")
    shape, weights = tuple(top_k_index.shape), tuple(top_k_weights.shape)
    if len(shape) != 2 or shape != weights or hidden.dim() != 2 or len(hidden) != shape[0]:
        raise ValueError(
            f"hidden_states, top_k_index, top_k_weights: expected [tokens, K] and twice [tokens, top_k], "
            f"got {tuple(hidden.shape)}, {shape} and {weights}"
        )


def _check_experts(ids: Tensor, experts: int) -> None:
    """Raise ValueError unless sorted numbers of experts are all there. Compiled code cannot ask."""
    if torch.compiler.is_compiling() or not len(ids):
        return
    first, last = torch.stack((ids[0], ids[-1])).tolist()  # one wait for the device
    if first < 0 or last >= experts:
        raise ValueError(f"top_k_index: expected experts below {experts}, got {first if first < 0 else last}")


def replace_rows(
    experts: Any,
    y: Tensor,
    call: tuple[Tensor, Tensor, Tensor],
    groups: Sequence[tuple[Tensor, Mapping[str, Sequence[Term]]]],
) -> None:
    """Put into y [tokens, K], what the experts gave for a call, the results under adapters of some of its tokens.

    The other rows keep their bits. Between the two products of an expert is a gate, so nothing can be added behind.

    Args:
        call: hidden, top_k_index and top_k_weights. groups: numbers of tokens, int64, and the terms that they have.
    """
    hidden, index, weights = call
    for rows, terms in groups:
        y[rows] = experts_forward(experts, hidden[rows], index[rows], weights[rows], terms).to(y.dtype)


def _back(order: Tensor) -> Tensor:
    """Where each row of before is now: the inverse of a permutation."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return back


def add_terms(y: Tensor, x: Tensor, terms: Sequence[Term], offsets: Tensor, order: Tensor | None = None) -> Tensor:
    """y + sum_i s_i D_i(x) A_i^T B_i^T with the A and B of each row's expert, rounded once to y's dtype.

    y: [rows, N], x: [rows, K], sorted by expert. offsets: int32 [experts], where the rows of each end. order: int64
    [rows], which of the rows by token and place among its experts each is; for dropout, whose mask has these rows.
    """
    if not terms:
        return y
    wide = torch.float32 if y.is_cpu else y.dtype  # tensor cores sum 16-bit products in fp32 anyway
    total = y
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(wide, y.dtype if y.dtype is torch.float64 else wide)
        for term in terms:
            A, B = term.stacks(len(offsets), dtype)
            kept = x.to(dtype)
            if term.dropout:
                assert order is not None
                kept = dropped(kept[_back(order)], draw_seeds(1, x.device), term.dropout)[order]
            S = _grouped_product(kept, A, offsets)
            total = torch.add(total, _grouped_product(S, B, offsets), alpha=term.scaling)
        return total.to(y.dtype)


def _grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x W_e^T for the expert of each row; weight [experts, N, K]."""
    from transformers.integrations.moe import _grouped_mm

    return _grouped_mm(x, weight.transpose(1, 2), offs=offsets)


def unpacked(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """lora_A [experts, r, in] and lora_B [experts, out, r] of PEFT's packing, r padded to whole 16 bytes."""
    A = lora_A.reshape(experts, -1, lora_A.shape[1])
    B = lora_B.reshape(lora_B.shape[0], -1, experts).permute(2, 0, 1)
    missing = -A.shape[1] % (16 // A.element_size())  # grouped products want rows that begin at 16 bytes
    if missing:
        A, B = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))
    return A.contiguous(), B.contiguous()


@functools.cache
def kind(name: str, transposed: bool) -> Experts:
    """What answers for a stacked parameter."""
    return Experts(name, transposed)


class Experts(Base):
    """One stacked parameter of a module, for merges: every expert is a matrix of its own.

    transposed: the stack is [experts, in, out]; what a layer says with ``fan_in_fan_out`` is not asked.
    """

    def __init__(self, name: str, transposed: bool):
        self.name, self.transposed = name, transposed

    def why_not_merged(self, module: Any) -> str | None:
        """None for an ordinary stack of matrices."""
        why = why_not_stacked(module._parameters.get(self.name))
        return why and f"{self.name} is {why}"

    def merge_(self, module: Any, factors: Factors, fan_in_fan_out: bool) -> list[merging.MergeRecord]:
        """As :meth:`Base.merge_`; all experts or none. One record an expert."""
        matrices = self._matrices(module)
        each = [Factors(*parts) for parts in _by_expert(factors, len(matrices))]
        if records := self._together(matrices, each, [None] * len(matrices)):
            return records
        records = []
        try:
            for W, own in zip(matrices, each, strict=True):
                records.append(merging.merge_(W, *own, fan_in_fan_out=self.transposed))
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
        done = len(found) == len(jobs) and _all_at_once([sweep for _, sweep in found], MERGE)
        return [record for record, _ in found] if done else []

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
        lost = [merging.delta_fidelity(W, own)[1] for W, own in zip(self._matrices(module), record, strict=True)]
        return max(lost)

    def _matrices(self, module: Any) -> list[Tensor]:
        return list(module._parameters[self.name].detach().unbind(0))


def _all_at_once(sweeps: list[Any], mode: int) -> bool:
    """Whether it was done."""
    return len({sweep.kind for sweep in sweeps}) == 1 and merging.run_together(sweeps, mode) == DONE


def _by_expert(factors: Factors, experts: int) -> list[tuple[list[Tensor], list[Tensor], list[float]]]:
    """lora_A [r, in], lora_B [out, r] and scaling of each expert."""
    lora_A, lora_B, scaling = factors[:3]
    A = [t.detach().reshape(experts, -1, t.shape[1]) for t in lora_A]
    B = [t.detach().reshape(t.shape[0], -1, experts) for t in lora_B]
    return [([a[e] for a in A], [b[..., e] for b in B], list(scaling)) for e in range(experts)]
