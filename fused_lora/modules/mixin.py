"""What a LoRA linear does, for any class with PEFT's attributes: fused forward, mixed batches, exact merge and unmerge.

The class that mixes this in brings ``base_layer``, ``lora_A``, ``lora_B``, ``lora_dropout``, ``lora_magnitude_vector``
(ModuleDicts by adapter name; the last has DoRA adapters only), ``scaling`` (dict), ``active_adapters``,
``merged_adapters`` (lists), ``merged``, ``disable_adapters`` and ``fan_in_fan_out``. Rules and names follow PEFT's
``tuners/lora/layer.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fused_lora.bases import Adapters, Base, base_of, foreign
from fused_lora.bases.base import base_in_eager, keeps_forward
from fused_lora.bases.dense import Dense
from fused_lora.bases.requantised import rounded_bias
from fused_lora.modules import activated, variants
from fused_lora.modules.changes import alone
from fused_lora.modules.fusable import why_inference, why_not_plain, why_not_plain_dropout, why_transformed
from fused_lora.modules.mixed import MixedBatch, Rows, numbers_of, rows_by_name
from fused_lora.modules.offload import is_sharded, refuse_sharded
from fused_lora.ops.checks import as_float, as_scaling, is_known, is_scaling
from fused_lora.ops.linear.op import Memory, _autocast_dtype, _autocasts, _rows, keeps_inference, recalled
from fused_lora.ops.term.op import known_term, lora_term
from fused_lora.ops.term.rows import lora_term_on_rows

BASE = "__base__"  # PEFT's name for "no adapter" in a mixed batch

if TYPE_CHECKING:

    class _Layer(nn.Module):
        """What the class that mixes the behaviour in is otherwise; PEFT gives its attributes no types."""

        _modules: dict[str, Any]

        def __getattr__(self, name: str) -> Any: ...

else:
    _Layer = object


@dataclass
class _Merge:
    """A merge in force: the weight's record, and where a lora_bias went into the bias, that before and the sum after.

    The sum is not rounded yet: a further merge adds to it, and rounds once.
    """

    record: Any  # of the base's kind
    bias_before: Tensor | None = None
    bias_after: Tensor | None = None
    rows_before: Tensor | None = None  # some of the weight's, by which a merge of a model judges what rounding loses


class Later(NamedTuple):
    """A merge or unmerge of a layer that is prepared, and what holds afterwards."""

    layer: Any
    state: _Merge | None
    names: list[str]
    sweep: Any


class FusedLoraBehaviour(_Layer):
    """Forward, merge and unmerge of a LoRA layer over one linear base layer."""

    merge_state: _Merge | None = None
    rounding_seed: int | None = None  # of a merge under way that rounds at random

    def _present(self, names: list[str]) -> list[str]:
        held = self._modules["lora_A"]._modules
        return [name for name in names if name in held]

    def _activated(self, names: list[str]) -> list[str]:
        """Those of the adapters that change the rows from their invocation on alone (aLoRA)."""
        return []

    def _changed_rows(self, x: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Of those that change some of x's rows only: the numbers of these."""
        return {}

    def _active_forward(self, x: Tensor) -> Tensor:
        """Base and all active adapters in one operator; around the base, or part by part, where others have a say."""
        names = self._present(self.active_adapters)
        base = self._modules["base_layer"]
        if not names:
            return base(x)
        rows = self._changed_rows(x, names)
        if rows:
            return activated.activated_forward(self, x, names, rows)[0]
        if self._why_not_plain(names) or why_transformed() or _is_odd(x, self._parts(names), base):
            return variants.composed_forward(self, base(x), x, names)
        kind = base_of(base)
        fused = kind.why_not_fused(base) is None
        # over a dense base the operator says what does not fit
        if type(kind) is not Dense and fused:
            fused = kind.why_not_call(base, x, self.lora_B[names[0]].weight.shape[0]) is None
        if variants.has_magnitude(self, names):
            return variants.dora_forward(self, x, names, fused)
        return self._fused_forward(x, names) if fused else self._around_forward(x, names)[0]

    def _why_not_plain(self, names: list[str]) -> str | None:
        """Why the modules of these adapters cannot run in one operator; None when they can."""
        reason, parts = None, self._parts(names)
        for A, B, drop in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            reason = reason or why_not_plain(A) or why_not_plain(B) or why_not_plain_dropout(drop)
            if A._parameters.get("bias") is not None:
                reason = reason or "lora_A has a bias"
        return reason

    def _fused_forward(self, x: Tensor, names: list[str]) -> Tensor:
        """One operator for base and adapters."""
        base = self._modules["base_layer"]
        y = base_of(base).forward(base, x, self._adapters(names))
        self._learn(x, names)
        return y

    def _learn(self, x: Tensor, names: list[str]) -> None:
        """Of a call that one operator may compute: the next one like it is asked nothing."""
        if not torch.compiler.is_compiling():
            operands, memory = self._operands(x, names), self.__dict__.get("_memory")
            if operands:
                if memory is None:
                    memory = self.__dict__["_memory"] = Memory()
                memory.learn(x, operands)

    def _remembered_forward(self, x: Tensor, names: Sequence[str], rows: Tensor | None = None) -> Tensor | None:
        """What :meth:`_fused_forward` has found for a call like this one before; None where a question is open.

        names: the active adapters. rows: the numbers of those that they change; None: of all.
        """
        if torch.compiler.is_dynamo_compiling():  # whatever else traces is seen in the tensors
            return None
        own = self.__dict__
        memory = own.get("_memory")
        if memory is None or own["merged_adapters"] or forward_ad._current_level >= 0:
            return None
        operands = self._operands(x, names)
        if operands is None:
            return None
        known = memory.find(x, operands)
        if known is None:
            return None
        if rows is None:
            return recalled(known, x, operands)
        _, _, weight, bias, A, B, scaling, dropout = operands
        if keeps_inference((x, *A, *B), (weight, bias)):
            return None
        y = own["_modules"]["base_layer"](x)
        if not (len(rows) or torch.is_grad_enabled()):
            return y
        term = known_term if known[0] is None else lora_term  # which casts under autocast
        return lora_term_on_rows(y, x, rows, A, B, scaling, dropout, term=term)

    def _operands(self, x: Tensor, names: Sequence[str]) -> tuple | None:
        """What :meth:`Memory.find` takes, of a layer whose parts run their class's forward, no hooks.

        None where they do not, and where the answer is not as simple as that. Nothing is asked of the tensors.
        """
        # written out, and past nn.Module's __getattr__, which slows every attribute down: this runs in every call
        own, lora_A, lora_B, scaling, dropout = self.__dict__, [], [], [], []
        modules, scales = own["_modules"], own["scaling"]
        base = modules["base_layer"]
        kind, parts = base_in_eager(base), [base.__dict__]
        if modules["lora_magnitude_vector"]._modules:
            return None
        A, B, drops = modules["lora_A"], modules["lora_B"], modules["lora_dropout"]
        if not (type(A) is type(B) is type(drops) is nn.ModuleDict):  # who subclasses it may give other modules
            return None
        A, B, drops = A._modules, B._modules, drops._modules
        for name in names:
            a = A.get(name)
            if a is None:
                continue
            b, drop, s = B[name], drops[name], scales[name]
            if type(a) is not nn.Linear or type(b) is not nn.Linear or not isinstance(s, float) or not is_scaling(s):
                return None
            of_a, of_b, of_drop = a.__dict__, b.__dict__, drop.__dict__
            if type(drop) is nn.Dropout and not of_drop["inplace"]:
                dropout.append(of_drop["p"] if of_drop["training"] else 0.0)
            elif type(drop) is nn.Identity:
                dropout.append(0.0)
            else:
                return None
            parts += of_a, of_b, of_drop
            a, b = of_a["_parameters"], of_b["_parameters"]
            if a.get("bias") is not None or b.get("bias") is not None:
                return None
            lora_A.append(a.get("weight"))
            lora_B.append(b.get("weight"))
            scaling.append(float(s))  # numpy's is a float, too
        for own in parts:
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or ("forward" in own and not keeps_forward(own))
            ):
                return None
        if not lora_A:
            return None
        parameters = parts[0]["_parameters"]
        seen, bias, further = parameters.get("weight"), parameters.get("bias"), ()
        weight = seen
        if type(kind) is not Dense:
            weight = kind.operand(base, x)
            if weight is None:
                return None
            further = weight.kind
        elif kind.transposed and seen is not None:
            weight = seen = seen.t()
        return (bias is None, *dropout, *further), seen, weight, bias, lora_A, lora_B, scaling, dropout

    def _around_forward(self, x: Tensor, names: list[str], *args, **kwargs) -> tuple[Tensor, str | None]:
        """The base layer's own call and one operator for all adapters; (y, why the adapters' modules were called)."""
        base = self._modules["base_layer"]
        y, reason = foreign.forward_around(base, x, self._adapters(names), *args, **kwargs)
        return (variants.composed_forward(self, y, x, names) if reason else y), reason

    def _adapters(self, names: list[str]) -> Adapters:
        """What the operators take of them. A scaling may be a 0-d tensor, which is read on its device only."""
        # past nn.Module's __getattr__, which takes longer than the reads: this runs in every call
        lora_A, lora_B, scaling, dropout, bias = [], [], [], [], None
        parts, magnitudes = self._parts(names), self._modules["lora_magnitude_vector"]._modules
        for name, A, B_layer, drop in zip(names, parts[::3], parts[1::3], parts[2::3], strict=True):
            B: Any = B_layer._parameters["weight"]
            s, lora_bias = self._scaling(name), B_layer._parameters["bias"]
            if lora_bias is not None:  # s_i times each lora_bias, in fp32 or wider
                term = wide(lora_bias) * s
                bias = term if bias is None else bias + term
            if isinstance(s, Tensor):
                B, s = wide(B) * s, 1.0
            lora_A.append(A._parameters["weight"])
            lora_B.append(B)
            scaling.append(s)
            drops = drop.training and isinstance(drop, nn.Dropout)
            if name in magnitudes and not self.training:  # PEFT's DoRA asks the layer
                drops = False
            dropout.append(drop.p if drops else 0.0)
        return Adapters(lora_A, lora_B, scaling, dropout, bias)

    def _scaling(self, name: str) -> Any:
        """A number as a float, a 0-d tensor as it is; ValueError where the products are known not to take it."""
        s = self.scaling[name]
        if isinstance(s, Tensor):
            if is_known(s):
                as_scaling(s.detach())
            return s
        return as_float("scaling", s) if torch.compiler.is_compiling() else as_scaling(s)

    def _row_norms(self, name: str) -> Tensor:
        """What the magnitude of a DoRA adapter is divided by."""
        return variants.row_norms(self, name)

    def _note_norms(self, name: str, norms: Tensor) -> None:
        """Of a DoRA adapter that is about to be merged."""

    def _rows_of(self, x: Tensor, adapter_names: Sequence[str | None] | None, batch: MixedBatch | None) -> Rows:
        """Whose the rows of x [..., K] are.

        adapter_names: one per index of x's first dimension. batch: if None, else it knows the rows of all layers.
        """
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if adapter_names is not None:
            return rows_by_name(adapter_names, x)
        assert batch is not None
        return batch.rows(self, x)

    def _mixed_forward(self, x: Tensor, adapter_names: Sequence[str | None] | None, batch: MixedBatch | None) -> Tensor:
        """Rows of one batch under different adapters: base once for all, each adapter's term for its rows only."""
        rows_of = self._rows_of(x, adapter_names, batch)
        names = self._present(list(rows_of))
        if variants.has_magnitude(self, names):
            raise ValueError("Cannot pass `adapter_names` when DoRA is enabled.")
        scaling = [self._scaling(name) for name in names]
        changed = self._changed_rows(x, names)
        result = self.base_layer(x)
        flat_x, flat = _rows(x), _rows(result)
        if 0 in flat.stride():  # expanded: what is added to one row would be added to others
            flat = flat.contiguous()
        plain = self._plain_factors(flat, flat_x, names)
        for i, name in enumerate(names):
            rows = rows_of[name]
            if name in changed:
                numbers = numbers_of(rows, x)
                rows = numbers[torch.isin(numbers, changed[name])]
            if plain:
                A, B = (each[i] for each in plain)
                if isinstance(rows, slice):
                    flat[rows].addmm_(torch.mm(flat_x[rows], A.t()), B.t(), alpha=scaling[i])
                else:
                    S = torch.mm(flat_x.index_select(0, rows), A.t())
                    flat.index_add_(0, rows, torch.mm(S, B.t()), alpha=scaling[i])
                continue
            A, B = self.lora_A[name], self.lora_B[name]
            # a copy of neighbours, too: hooks may change it, a backward reads it after x was changed
            part = flat_x[rows].to(A.weight.dtype, copy=isinstance(rows, slice))
            term = B(A(self.lora_dropout[name](part))) * scaling[i]
            flat[rows] = (flat[rows] + term).to(result.dtype)  # summed in the wider dtype, rounded once
        return flat.view(result.shape)

    def _plain_factors(self, flat: Tensor, x: Tensor, names: list[str]) -> tuple | None:
        """A and B of each adapter, where two products and a sum in place are all; it takes half the time.

        None where something learns, listens or drops, and where dtypes differ, be it by autocast.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or why_transformed():
            return None
        if _autocast_dtype(flat) not in (None, flat.dtype):  # one product's output would not fit the other
            return None
        operands = self._operands(x, names)
        if operands is None or any(operands[-1]):
            return None
        lora_A, lora_B = operands[4:6]
        parts = flat, x, *lora_A, *lora_B
        plain = all(type(t) in (Tensor, nn.Parameter) and t.dtype is flat.dtype for t in parts)
        return (lora_A, lora_B) if plain else None

    @alone
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight in place: W <- round(W + sum_i s_i B_i A_i), with one rounding.

        Every merge is a safe one: non-finite results are refused before the weight is touched. Merging further
        adapters restores W first and adds all of them at once, so the order of merges does not matter.

        Args:
            safe_merge: accepted for PEFT's sake.
            adapter_names: names to merge; None means the active ones. Names that the layer lacks are skipped, names
                already merged are dropped with a warning. A name given twice counts twice, as in the forward.

        Raises:
            TypeError: adapter_names is a str. ValueError: a weight would become NaN or infinite.
            RuntimeError: an adapter has a lora_bias and the base layer no bias, or the base weight is not a parameter.
        """
        names = self._present(self._names_to_merge(adapter_names))
        if names:
            self._merge_names(names)

    def _merge_place(self) -> tuple[nn.Module, Base]:
        """The module with the weight that a merge changes, and what answers for it."""
        base = self._modules["base_layer"]
        return base, base_of(base)

    def _merge_names(self, names: list[str]) -> None:
        refuse_sharded(self, "merged")
        base, kind = self._merge_place()
        weight = base._parameters.get("weight")
        if weight is not None and weight.is_meta:
            raise RuntimeError(
                "base_layer.weight is offloaded (meta device), so nothing can be merged into it; `fused-lora merge` "
                "merges files, without a model"
            )
        if why := kind.why_not_merged(base):
            raise RuntimeError(
                f"base_layer: {why}; expected a plain floating matrix, so nothing was merged into it"
                "; serve it unmerged, or dequantise the model first"
            )
        if kind.bits and variants.has_magnitude(self, names):
            raise RuntimeError(f"base_layer: DoRA of {names} cannot be merged into {kind.bits} bits; dequantise first")
        bias, old = self._check_bias_merge(names), self.merge_state
        if old is not None and _bias_changed(getattr(self.base_layer, "bias", None), old):
            raise RuntimeError("base_layer.bias was changed while merged; nothing more was merged")
        state = _Merge(None) if old is None else replace(old, record=None)
        if bias is not None:
            state.bias_before = self.base_layer.bias.data.clone() if state.bias_before is None else state.bias_before
            state.bias_after = bias
        self._write(state, None if bias is None else self.base_layer.bias.data.clone(), names)

    def _merge_later(self, names: list[str], old: _Merge | None = None) -> Later | None:
        """What :meth:`_merge_names`, or in place of an ``old`` merge :meth:`_switch`, would do, to run with other
        layers; None where it must do that itself."""
        base, kind = self._merge_place()
        weight = base._parameters.get("weight")
        if self.merge_state is not old or bool(self.merged) != (old is not None):
            return None
        if self._with_bias(names) or kind.why_not_merged(base):
            return None
        if (weight is not None and weight.is_meta) or is_sharded(self):
            return None
        if kind.bits and variants.has_magnitude(self, names):
            return None
        record = None if old is None else old.record
        found = kind.merge_later(base, variants.factors(self, names), self.fan_in_fan_out, record)
        return None if found is None else Later(self, _Merge(found[0]), names, found[1])

    def _switches(self, names: list[str]) -> bool:
        """Whether :meth:`_switch` can merge these in the place of what is merged."""
        state, (base, kind) = self.merge_state, self._merge_place()
        if not self.merged or state is None or state.bias_after is not None or not names:
            return False
        if not kind.in_one_pass or kind.why_not_merged(base) or is_sharded(self):
            return False
        return not self._with_bias(names) and not variants.has_magnitude(self, names)  # norms of the base weight

    def _switch(self, names: list[str]) -> None:
        """These in the place of what is merged, or nothing."""
        assert self.merge_state is not None
        attributes, merged, state = self.__dict__, self.merged_adapters, _Merge(None)
        state.record = self._merge_factors(variants.factors(self, names), names, self.merge_state.record)
        attributes["merge_state"] = state  # no call from here to the end: see _write
        merged[:] = names

    def _unmerge_later(self) -> Later | None:
        """The same of :meth:`unmerge`."""
        state, (base, kind) = self.merge_state, self._merge_place()
        if state is None or state.bias_after is not None or is_sharded(self):
            return None
        sweep = kind.unmerge_later(base, state.record)
        return None if sweep is None else Later(self, None, [], sweep)

    def _write(self, state: _Merge, bias: Tensor | None, names: list[str]) -> None:
        """Write weight and bias (``bias``: what it holds now) and note it, or nothing.

        An interrupt must not lose the record: the weight would never come back. So no call follows the merge, not
        even nn.Module's __setattr__.
        """
        attributes, merged = self.__dict__, self.merged_adapters
        try:
            if bias is not None:
                self.base_layer.bias.data.copy_(state.bias_after)
            state.record = self._merge_weight(names)
        finally:
            if state.record is not None:
                attributes["merge_state"] = state
                merged += names
            elif bias is not None:
                self.base_layer.bias.data.copy_(bias)

    def _merge_weight(self, names: list[str]) -> Any:
        """Beside what is merged already: all of it at once into the restored weight."""
        old = self.merge_state
        if old is None:
            return self._merge_factors(variants.factors(self, names), names)
        base, kind = self._merge_place()
        frozen = kind.factors(old.record, self.fan_in_fan_out)
        kind.unmerge_(base, old.record)
        try:
            return self._merge_factors(variants.factors(self, names, frozen), names)
        except BaseException:
            old.record = self._merge_factors(frozen, names)  # the same factors give the same bits again
            raise

    def _merge_factors(self, factors, names: list[str], old: Any = None) -> Any:
        """old: the record of what is merged now, and goes."""
        base, kind = self._merge_place()
        try:
            if old is not None:
                return kind.switch_(base, old, factors, self.fan_in_fan_out)
            return kind.merge_(base, factors, self.fan_in_fan_out)
        except ValueError as error:
            raise ValueError(f"{error} (adapters {names}); nothing was merged") from None

    @alone
    def restore_merge(self, state: _Merge, names: list[str]) -> None:
        """Go back to a merge that :meth:`unmerge` just ended: the same bits, names and record."""
        attributes, merged = self.__dict__, self.merged_adapters
        if state.bias_after is not None:
            self.base_layer.bias.data.copy_(state.bias_after)
        factors = self._merge_place()[1].factors(state.record, self.fan_in_fan_out)
        state.record = self._merge_factors(factors, names)
        attributes["merge_state"] = state
        merged += names

    @alone
    def unmerge(self) -> None:
        """Take every merged adapter away again: the base weight (and bias) gets back the bits it had before.

        Raises:
            RuntimeError: the weight or bias was changed while merged. Nothing is changed.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
            return
        refuse_sharded(self, "unmerged")
        state, bias = self.merge_state, getattr(self.base_layer, "bias", None)
        if state is None:
            raise RuntimeError("merged_adapters names adapters that this layer has not merged itself")
        if _bias_changed(bias, state):
            raise RuntimeError("base_layer.bias was changed while merged; nothing was unmerged")
        attributes, merged, (base, kind) = self.__dict__, self.merged_adapters, self._merge_place()
        try:
            if state.bias_before is not None:
                bias.data.copy_(state.bias_before)
            kind.unmerge_(base, state.record)
        except BaseException:
            if state.bias_before is not None:
                bias.data.copy_(state.bias_after)
            raise
        attributes["merge_state"] = None  # no call from unmerge_ to the end: see _write
        merged[:] = ()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s B A of one adapter in the adapter's dtype, laid out as the base weight ([N, K], or [K, N] transposed)."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        dtype = B.dtype
        if B.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
            A, B = A.float(), B.float()  # a 16-bit product without hardware support takes forever
        delta = (B @ A) * self._scaling(adapter)
        return (delta.T if self.fan_in_fan_out else delta).to(dtype)

    def delta_fidelity(self) -> float:
        """Share of the merged delta that rounding lost, ||(Wm - W) - D|| / ||D||. RuntimeError when not merged."""
        if self.merge_state is None:
            raise RuntimeError("delta_fidelity needs a merged layer")
        base, kind = self._merge_place()
        return kind.delta_fidelity(base, self.merge_state.record)

    def dense_parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight [N, K] and bias [N] of an nn.Linear of ``dtype`` that does what base and active adapters do.

        Only over a quantised base. Nothing is changed.

        Raises:
            ValueError: a number would not be finite.
            RuntimeError: an adapter has a lora_bias and the base layer no bias.
        """
        names, base = self._present(self.active_adapters), self.base_layer
        bias = self._check_bias_merge(names, dtype)
        bias = rounded_bias(base.bias if bias is None else bias, dtype)
        with torch.no_grad():
            return base_of(base).dense_weight(base, variants.factors(self, names), dtype), bias

    def _names_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else adapter_names
        if isinstance(names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
        names = list(names)  # a name given twice counts twice, as in the forward
        if self.merged:
            names = [name for name in names if name not in self.merged_adapters]
            if names:
                warnings.warn(
                    f"Already following adapters were merged {','.join(self.merged_adapters)}. "
                    f"You are now additionally merging {','.join(names)}.",
                    stacklevel=4,
                )
            else:
                warnings.warn("All adapters are already merged, nothing to do.", stacklevel=4)
        return names

    def _check_bias_merge(self, names: list[str], dtype: torch.dtype | None = None) -> Tensor | None:
        """The bias after the merge, in fp32 or wider, finite in its own dtype or ``dtype``; None without lora_bias."""
        with_bias = self._with_bias(names)
        if not with_bias:
            return None
        bias = getattr(self.base_layer, "bias", None)
        if bias is None:
            raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
        held = None if self.merge_state is None else self.merge_state.bias_after
        total = wide(bias.data) if held is None else held.to(bias.device)
        for name in with_bias:
            term = self.lora_B[name].bias.data
            total = total + wide(term) * as_float("scaling", self.scaling[name])
        if not torch.isfinite(total.to(dtype or bias.dtype)).all():
            raise ValueError(f"NaNs or infinities detected in the merged bias; the adapters {names} seem to be broken")
        return total

    def _with_bias(self, names: list[str]) -> list[str]:
        held = self._modules["lora_B"]._modules
        return [name for name in names if getattr(held[name], "bias", None) is not None]

    def _parts(self, names: list[str]) -> list[nn.Module]:
        """lora_A, lora_B and lora_dropout of each adapter."""
        modules = self._modules
        A, B, dropout = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
        found = []
        for name in names:
            found += A[name], B[name], dropout[name]
        return found


def _is_odd(x: Any, parts: list[nn.Module], base: nn.Module) -> bool:
    """Whether only PEFT's calls may take an input and adapters: a sparse one, some that no backward can keep, or
    float64 ones under autocast, which leaves them so."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return False
    if _autocasts(x) and any(
        p.dtype is torch.float64 for part in parts for p in part._parameters.values() if p is not None
    ):
        return True
    return x.layout is not torch.strided or why_inference(x, parts, base) is not None


def _bias_changed(bias: Tensor | None, state: _Merge) -> bool:
    """Since a merge that wrote it."""
    after = state.bias_after
    return after is not None and (bias is None or not torch.equal(bias.data, after.to(bias)))


def wide(tensor: Tensor) -> Tensor:
    """In fp32, or as it is where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
