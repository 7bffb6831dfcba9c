"""PEFT's ``lora.Linear`` with a fused forward and an exact merge: the class that accelerated layers are given.

Its classes over quantised bases of bitsandbytes, torchao, GPTQ and AWQ get the same.

It adds no parameter and no buffer. Beside its class a layer gets what it remembers of its last calls, and while merged
the record; ``restore`` removes both. Whatever the fused operator does not cover goes to PEFT's own method.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _of_torch

from fused_lora.bases import base_of
from fused_lora.bases.base import why_not_device, why_not_own_call, why_not_plain_tensor, why_not_plain_weight
from fused_lora.bases.bitsandbytes_4bit import is_repacked
from fused_lora.modules import patches, variants
from fused_lora.modules.activated import BEFORE, activated_forward, changed_rows, is_pefts, why_no_rows
from fused_lora.modules.changes import CHANGING, alone, wait_for_change
from fused_lora.modules.fusable import why_inference, why_not_here, why_not_plain, why_not_plain_dropout
from fused_lora.modules.merging import memory_of
from fused_lora.modules.mixin import BASE, FusedLoraBehaviour
from fused_lora.modules.offload import refuse_sharded
from fused_lora.ops.checks import is_known, is_scaling
from fused_lora.ops.guard import draws_masks

# PEFT's classes that have an accelerated one, by their modules in peft.tuners.lora
_STOCK = {
    "layer": ("Linear", "ParamWrapper", "Embedding", "Conv1d", "Conv2d", "Conv3d"),
    "bnb": ("Linear4bit", "Linear8bitLt"),  # exists where bitsandbytes does
    "torchao": ("TorchaoLoraLinear",),
    "gptq": ("GPTQLoraLinear",),
    "awq": ("AwqLoraLinear",),
}
FUSED, AROUND = "fused", "fused around the base: "
SEVERAL = "a batch of several adapters"
_OF_VARIANTS = ("adapter_names", "alora_offsets")  # arguments that PEFT keeps from the base layer
_WRAPPED = (
    "the model is wrapped by PEFT already. peft_model.load_adapter(path, adapter_name, is_trainable=True) loads a "
    "further adapter, peft_model.add_adapter(adapter_name, config) starts one, and peft_model.merge_and_unload() "
    "returns a plain model to start anew"
)
# what torch's own _has_any_global_hook asks, in a third of the time
_GLOBAL_HOOKS = tuple(getattr(_of_torch, name) for name in _of_torch._has_any_global_hook.__code__.co_names)
# FUSED, AROUND and the reason, or the reason why PEFT's own forward ran -> calls in this process
CALLS: Counter[str] = Counter()

_DORA: tuple[Any, ...] = ()  # its methods, as PEFT has them

_MERGED: WeakValueDictionary[int, Any] = WeakValueDictionary()  # memory of a weight -> the layer last merged into it


def _memory(layer: Any) -> int:
    weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)
    return memory_of(weight) if isinstance(weight, Tensor) else id(layer)


class AcceleratedLinear(FusedLoraBehaviour):
    """Forward, merge and unmerge of a ``lora.Linear``, for a class that has PEFT's as its next base."""

    _pefts_class: type[Any]
    _pefts_forward: Any  # its forward, when that was last found to be PEFT's; a staticmethod, which Dynamo can read

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward: base(x) + sum over active adapters of scaling * B(A(dropout(x))), in the dtype of base(x)."""
        if CHANGING:
            wait_for_change(self)
        own = self.__dict__  # past PEFT's properties and nn.Module's __getattr__, which slow every attribute down
        simple = (
            not (args or own["_disable_adapters"] or any(_GLOBAL_HOOKS))
            and own["cast_input_dtype_enabled"]
            and self._pefts_class.forward is self._pefts_forward
            and patches.of_torch() == patches.OF_TORCH
            and not (patches.MODES() and patches.why_followed())
        )
        if simple:
            names, rows = own["_active_adapter"], None
            names = (names,) if isinstance(names, str) else names
            if kwargs or own["lora_variant"]:
                simple = self._has_offsets(x, names, kwargs)
                rows = changed_rows(x, kwargs["alora_offsets"]) if simple else None
            call = FUSED if rows is None else AROUND + BEFORE
            try:
                y = self._remembered_forward(x, names, rows) if simple else None
            except BaseException:  # a call all the same: recomputing for a checkpoint stops inside the last layer
                _count(call)
                raise
            if y is not None:
                CALLS[call] += 1
                return y
        adapter_names = kwargs.get("adapter_names")
        names = self._present(self.active_adapters if adapter_names is None else list(dict.fromkeys(adapter_names)))
        reason = why_not_fused(self, names, adapter_names) or _why_not_call(self, names, x, kwargs)
        plain = not (args or self.lora_variant) and kwargs.keys() == {"adapter_names"}
        if (
            reason == SEVERAL
            and plain
            and isinstance(x, Tensor)
            and x.dim() > 1
            and not (why_not_here() or patches.why_replaced_in_torch())
            and all(_is_number(self.scaling[n]) for n in names)
        ):
            self._check_forward_args(x, **kwargs)
            _count(AROUND + SEVERAL)
            return self._mixed_forward(x, adapter_names, None)
        activated = self._activated(names)
        if activated and reason is None:
            reason = why_no_rows(x, kwargs.get("alora_offsets"))
        if reason:
            _count(reason)
            return super().forward(x, *args, **kwargs)
        further = {key: value for key, value in kwargs.items() if key not in _OF_VARIANTS}
        base = self._modules["base_layer"]
        kind = base_of(base)
        outputs = self._modules["lora_B"]._modules[names[0]]._parameters["weight"].shape[0]
        around = "further arguments" if args or further else None
        around = around or kind.why_not_fused(base) or kind.why_not_call(base, x, outputs)
        rows = changed_rows(x, kwargs.get("alora_offsets")) if activated else None
        if rows is not None:
            y, reason = activated_forward(self, x, names, dict.fromkeys(activated, rows), *args, **further)
            if reason is None and around is None:
                self._learn(x, names)
            _count(reason or AROUND + BEFORE)
            return y
        if variants.has_magnitude(self, names):
            _count(FUSED if around is None else AROUND + around)
            return variants.dora_forward(self, x, names, around is None, *args, **further)
        if around is None:
            _count(FUSED)
            return self._fused_forward(x, names)
        y, reason = self._around_forward(x, names, *args, **further)
        _count(reason or AROUND + around)
        return y

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By PEFT's class, of which ours is made anew: under its name a pickle finds PEFT's."""
        reduced = super().__reduce_ex__(protocol)
        return (_blank, (self._pefts_class,), *reduced[2:]) if type(self) is accelerated(self._pefts_class) else reduced

    def _has_offsets(self, x: Tensor, names: Sequence[str], kwargs: dict) -> bool:
        """Whether all of these are aLoRA, and a call brings offsets for x and nothing else."""
        if kwargs.keys() != {"alora_offsets"} or torch.compiler.is_compiling():
            return False
        return len(self._activated(names)) == len(names) and why_no_rows(x, kwargs["alora_offsets"]) is None

    def _activated(self, names: Sequence[str]) -> list[str]:
        """Those of the adapters that are aLoRA."""
        held = self.lora_variant
        return [name for name in names if name in held and is_pefts(held[name])] if held else []

    def _row_norms(self, name: str) -> Tensor:
        """As PEFT's, kept in inference while its DoraCaching is on."""
        from peft.tuners.lora import dora

        held: Any = self.lora_magnitude_vector[name]
        if not hasattr(dora, "ENABLE_DORA_CACHING"):  # PEFT before 0.19
            return super()._row_norms(name)
        if not dora.ENABLE_DORA_CACHING or held.training:
            held._cache_clear()
            return super()._row_norms(name)
        key = f"weight-norm-{name}"
        if held._cache_get(key, None) is None:
            held._cache_store(key, super()._row_norms(name))
        return held._cache_get(key, None)

    def _note_norms(self, name: str, norms: Tensor) -> None:
        """Where PEFT's own unmerge looks for it."""
        self._cache_store(f"{name}-weight_norm", norms.to(self.lora_magnitude_vector[name].weight.dtype))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """PEFT's: scaling * B A of one adapter, as the base weight is stored, in the adapter's dtype."""
        return super(FusedLoraBehaviour, self).get_delta_weight(adapter)

    @alone
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's merge with one rounding for all adapters; :meth:`unmerge` then restores the bits of before.

        PEFT's own method runs where the layer is no plain LoRA over a plain weight, on top of a merge that was not
        ours, where the result is not finite and ``safe_merge`` is off, and where the weight is not finite and it is on.

        Raises:
            TypeError, ValueError, RuntimeError: as PEFT's. RuntimeError: a 4-bit weight has been repacked for the CPU.
        """
        if not self.merged:
            self.merge_state = None  # someone emptied the list of merged adapters by hand
        if isinstance(adapter_names, Iterator):
            adapter_names = list(adapter_names)
        self._warn_of_a_shared_weight()
        if not self._merges_exactly(adapter_names) or (safe_merge and not self._is_finite()):
            return self._merge_by_peft(safe_merge, adapter_names)
        names = self._present(self._names_to_merge(adapter_names))
        if not names:
            return
        if type(self).__name__ in _STOCK["bnb"]:
            bits = self._merge_place()[1].bits
            warnings.warn(
                f"Merge lora module to {bits}-bit linear may get different generations due to rounding errors.",
                stacklevel=3,
            )
        try:
            self._merge_names(names)
        except ValueError:  # not finite
            if safe_merge:
                self._merge_one_by_one(names)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about what is merged already: said above
                    self._merge_by_peft(safe_merge, names)

    @alone
    def unmerge(self) -> None:
        """Take every merged adapter away; the base weight gets back the bits it had, whatever happened to A and B.

        A weight that was itself changed, cast or moved since the merge is unmerged by PEFT's subtraction, with a
        warning.
        """
        if self.merged:
            refuse_sharded(self, "unmerged")
        if self.merged and self.merge_state is not None and self._is_pefts("unmerge"):
            try:
                names = list(self.merged_adapters)
                super().unmerge()
                for name in names:
                    self._caches.pop(f"{name}-weight_norm", None)
                return
            except torch.OutOfMemoryError:  # says nothing of the weight
                raise
            except RuntimeError as error:
                warnings.warn(f"{error}; PEFT's unmerge subtracts the adapters instead", stacklevel=3)
        if self.merged:
            self._refuse_repacked("unmerged")
        self.merge_state = None
        super(FusedLoraBehaviour, self).unmerge()

    def _warn_of_a_shared_weight(self) -> None:
        """Where another layer is merged into the same weight, as under ``layer_replication``."""
        memory = _memory(self)
        other = _MERGED.get(memory)
        if other not in (None, self) and other.merged and _memory(other) == memory:
            warnings.warn(
                "base_layer.weight has another layer's adapters merged already, for the layers share it: from now on "
                "each computes with the adapters of both, as after PEFT's merge",
                stacklevel=4,
            )
        _MERGED[memory] = self

    def _refuse_repacked(self, what: str) -> None:
        if is_repacked(self.get_base_layer()):
            raise RuntimeError(
                f"base_layer: a call in eval() without gradients has repacked its 4-bit weight for the CPU; PEFT would "
                f"read it wrongly, so nothing was {what}. Load the model again and merge before such a call"
            )

    @alone
    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's way to add an adapter to an existing layer; warns where the model is being wrapped a second time.

        That overwrites an adapter of the same name, or gives every key of a checkpoint a second prefix.
        """
        target = kwargs.get("target_name") or ""  # only an injection says which module it is about
        if target and adapter_name in self.lora_A:
            warnings.warn(f"PEFT is about to overwrite the adapter {adapter_name!r}: {_WRAPPED}", stacklevel=3)
        elif target.startswith("base_model.model."):
            warnings.warn(f"checkpoints of {adapter_name!r} will have the prefix twice: {_WRAPPED}", stacklevel=3)
        super().update_layer(adapter_name, *args, **kwargs)

    @alone
    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's, alone with the layer."""
        super().set_adapter(*args, **kwargs)

    @alone
    def delete_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's, alone with the layer."""
        super().delete_adapter(*args, **kwargs)

    def _merges_exactly(self, adapter_names: list[str] | None) -> bool:
        names = self.active_adapters if adapter_names is None else adapter_names
        if isinstance(names, str) or (self.merged and self.merge_state is None):
            return False
        if not (self._is_pefts("merge") and self._is_pefts("unmerge") and self._delta_is_pefts()):
            return False
        if torch._C._len_torch_dispatch_stack():
            return False  # fake tensors have no numbers to check
        return self._fits_exactly(self._present(names))

    def _is_pefts(self, name: str) -> bool:
        """Whether PEFT's class has a method of PEFT, and not of someone who has replaced it for all layers."""
        method = getattr(self._pefts_class, name, None)  # layers over packed weights have no get_delta_weight
        return method is None or patches.is_own(method, "peft")

    def _delta_is_pefts(self) -> bool:
        """Whether what PEFT's merge would add is s B A, as far as the layer's methods and ModuleDicts tell."""
        if _why_other_parts(self):
            return False
        put = self.__dict__.get("get_delta_weight")
        own = getattr(put, "__func__", None)
        # the class's own is left by who has put it back; ms-swift's moves A and B to the base's device, and of several
        # devices PEFT's merge runs
        known = own is type(self).get_delta_weight or getattr(own, "__module__", "").startswith("swift.")
        return (put is None or known) and self._is_pefts("get_delta_weight")

    def why_class_replaced(self) -> str | None:
        """None while the forward of PEFT's class is PEFT's, for all its layers."""
        forward = self._pefts_class.forward
        if forward is not self._pefts_forward:
            if not patches.is_own(forward, "peft"):
                return "PEFT's class has its forward replaced"
            type(self)._pefts_forward = staticmethod(forward)
        return None

    def _fits_exactly(self, names: list[str]) -> bool:
        """Whether our merge covers these adapters over the base layer as it is."""
        if any(name in self.lora_variant and _why_not_dora(self, name) for name in names):
            return False
        base = self._modules["base_layer"]
        if variants.has_magnitude(self, names) and (base_of(base).bits or variants.why_not_dora(self, names)):
            return False
        kind, weight = base_of(base), base._parameters.get("weight")
        if kind.why_not_merged(base) or weight.is_meta or not _has_own_memory(weight):
            return False
        shape = kind.features(base)[::-1] if kind.bits else tuple(weight.shape)
        shape = shape[::-1] if self.fan_in_fan_out else shape
        pairs = ((name, self.lora_A[name].weight, self.lora_B[name].weight) for name in names)
        return all(self._fits(*pair, shape, weight.device) and self._bias_fits(pair[0]) for pair in pairs)

    def _fits(self, name: str, A: Tensor, B: Tensor, shape: tuple[int, ...], device: torch.device) -> bool:
        """Whether one adapter's delta is a plain product of this shape (N, K) and device, times a number."""
        if any(why_not_plain_weight(w) or w.device != device for w in (A, B)):
            return False
        return (B.shape[0], A.shape[1]) == shape and A.shape[0] == B.shape[1] and _is_number(self.scaling[name])

    def _bias_fits(self, name: str) -> bool:
        """Whether its lora_bias, if any, fits the base's bias."""
        B = self.lora_B[name].weight
        bias, base = getattr(self.lora_B[name], "bias", None), getattr(self.base_layer, "bias", None)
        if (bias is not None) != bool(self.lora_bias[name]):  # PEFT goes by what the config said
            return False
        own = base is self.base_layer._parameters.get("bias")
        return bias is None or base is None or (own and base.shape == bias.shape == (B.shape[0],))

    def _why_not_term(self, name: str) -> str | None:
        """None where an adapter is plain LoRA, and its scaling a number: of layers that compute nothing else."""
        if name in self.lora_variant:
            return type(self.lora_variant[name]).__name__
        if not _is_number(self.scaling[name]):
            return "the scaling is no number"
        return "the scaling wants a gradient" if getattr(self.scaling[name], "requires_grad", False) else None

    def _is_finite(self) -> bool:
        """Whether the weight as it is, if not quantised, has no NaN and no infinity: PEFT's safe merge asks the sum."""
        base, kind = self._merge_place()
        weight = base._parameters[getattr(self, "parameter_name", "weight")]
        return (
            kind.bits > 0 or weight.numel() == 0 or bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all())
        )

    def _merge_by_peft(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        self._refuse_repacked("merged")
        refuse_sharded(self, "merged")
        before = len(self.merged_adapters)
        try:
            super(FusedLoraBehaviour, self).merge(safe_merge, adapter_names)
        except NotImplementedError as error:
            why = base_of(self.base_layer).why_not_merged(self.base_layer)
            raise NotImplementedError(str(error) or f"base_layer: {why}, so nothing was merged into it") from error
        finally:
            if len(self.merged_adapters) > before:
                self.merge_state = None  # what PEFT has added, only PEFT can take away

    def _merge_one_by_one(self, names: list[str]) -> None:
        """Like PEFT's loop: the adapters before the broken one stay merged, and the error names it."""
        for name in names:
            try:
                self._merge_names([name])
            except ValueError:
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                ) from None


# of PEFT's classes that are no linear layers; the files that have them add them (``integrations/peft.py`` imports all)
BEHAVIOURS: dict[str, type[AcceleratedLinear]] = {}


def _has_own_memory(weight: Tensor) -> bool:
    """Whether the numbers of a matrix can be written one by one."""
    (inner, n), (outer, m) = sorted(zip(weight.stride(), weight.shape, strict=True))
    return (n <= 1 or inner > 0) and (m <= 1 or outer > inner * (n - 1))


def _none_yet() -> None:
    """In place of PEFT's forward, until it has been looked at."""


@functools.cache
def accelerated(stock: type[nn.Module]) -> type[nn.Module]:
    """The class of accelerated layers of PEFT's class ``stock``: a subclass of it that goes by the same name."""
    global _DORA
    from peft.tuners.lora import dora
    from peft.tuners.lora import variants as of_peft

    found = _of_dora(dora.DoraLinearLayer, of_peft.DoraLinearVariant)
    if all(patches.is_own(method, "peft") for method in found):
        _DORA = found
    own = BEHAVIOURS.get(stock.__name__, AcceleratedLinear)
    attributes = {"__module__": stock.__module__, "__doc__": own.__doc__}
    attributes |= {"_pefts_class": stock, "_pefts_forward": staticmethod(_none_yet)}
    return type(stock.__name__, (own, stock), attributes)


def stock_classes() -> tuple[type[nn.Module], ...]:
    """The classes of PEFT that have an accelerated one, of those modules that were imported."""
    import peft.tuners.lora

    package = peft.tuners.lora.__name__
    modules = {name: sys.modules.get(f"{package}.{name}") for name in _STOCK}
    return tuple(getattr(modules[name], own) for name in _STOCK if modules[name] is not None for own in _STOCK[name])


def _blank(stock: type[Any]) -> nn.Module:
    """An accelerated layer without attributes, for who copies one or reads it from a pickle."""
    ours = accelerated(stock)
    return ours.__new__(ours)


def _of_dora(magnitude: Any, variant: Any) -> tuple[Any, ...]:
    """The methods of PEFT's DoRA that our forward stands in for."""
    return magnitude.forward, magnitude.get_weight_norm, variant.forward


def _count(call: str) -> None:
    if not torch.compiler.is_compiling():  # a counter would be a guard, and every call a new compilation
        CALLS[call] += 1


def why_not_fused(layer: Any, names: list[str], adapter_names: list[str] | None = None) -> str | None:
    """Why the layer in its present state runs PEFT's own forward for these adapters.

    None when the adapters run fused: with the base layer, or around it where :func:`why_around` has a reason.
    """
    if hasattr(layer, "why_not_fused"):
        return layer.why_class_replaced() or layer.why_not_fused()
    if replaced := layer.why_class_replaced():
        return replaced
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "merged: the base layer alone"
    if adapter_names is not None and (len(names) != 1 or BASE in adapter_names or len(set(adapter_names)) != 1):
        return SEVERAL
    if not names:
        return "no active adapter in this layer"
    for name in names:
        if name in layer.lora_variant and not is_pefts(layer.lora_variant[name]):
            if reason := _why_not_dora(layer, name):
                return reason
    if reason := _why_other_parts(layer):
        return reason
    for name, A, B, dropout in _parts(layer, names):
        reason = why_not_plain(A) or why_not_plain(B) or why_not_plain_dropout(dropout)
        if reason:
            return reason
        if reason := why_not_device(A._parameters["weight"].device):
            return reason
        if A._parameters["bias"] is not None:
            return "lora_A has a bias"
        if A._parameters["weight"].dtype != B._parameters["weight"].dtype:
            return "lora_A and lora_B differ in dtype"
        if not _is_number(layer.scaling[name]):
            return "the scaling is no number"
        if dropout.training and getattr(dropout, "p", 0) and not draws_masks(A._parameters["weight"].device):
            return "no kernel draws dropout masks on this device"
    if not variants.has_magnitude(layer, names):
        return None
    if adapter_names is not None or layer._activated(names):
        return "DoRA in a mixed batch" if adapter_names is not None else "DoRA beside aLoRA"
    return variants.why_not_dora(layer, names)


def _why_not_dora(layer: Any, name: str) -> str | None:
    """None where this adapter is PEFT's own DoRA, and nobody follows the calls of its magnitude; else what it is."""
    held, variant = layer._modules["lora_magnitude_vector"]._modules, type(layer.lora_variant[name]).__name__
    if variant != "DoraLinearVariant" or name not in held:
        return variant
    kind = type(held[name]).__name__  # FSDP1 wraps it by PEFT's policy
    if kind != "DoraLinearLayer":
        return f"the magnitude of DoRA is inside a {kind}, which must see its call"
    if _of_dora(type(held[name]), type(layer.lora_variant[name])) != _DORA:
        return "PEFT's DoRA has a method replaced"
    return why_not_own_call(held[name], "the magnitude of DoRA")


def why_around(layer: Any) -> str | None:
    """Why the base layer of a layer that runs fused is called by itself; None when it is in the operator."""
    if hasattr(layer, "why_not_fused"):
        return None
    if layer._activated(layer._present(layer.active_adapters)):
        return BEFORE
    return base_of(layer.base_layer).why_not_fused(layer.base_layer)


def _is_number(scale: Any) -> bool:
    if isinstance(scale, Tensor):
        one = scale.numel() == 1 and scale.dim() <= 1 and not scale.is_complex()
        return one and (not is_known(scale) or is_scaling(float(scale.detach())))
    if isinstance(scale, (int, float)):
        return is_scaling(scale)
    return isinstance(scale, Real) and is_scaling(float(scale))  # numpy's: float32's range is none that float16 has


def _parts(layer: Any, names: list[str]) -> list[tuple[str, nn.Module, nn.Module, nn.Module]]:
    # past nn.Module's __getattr__, which takes longer than the checks: they run in every call
    A, B, dropout = (layer._modules[part]._modules for part in ("lora_A", "lora_B", "lora_dropout"))
    return [(name, A[name], B[name], dropout[name]) for name in names]


def _why_other_parts(layer: Any) -> str | None:
    """None where an adapter's modules are those that its name finds; a subclass of ModuleDict may give others."""
    for part in ("lora_A", "lora_B", "lora_dropout"):
        if (kind := type(layer._modules[part])) is not nn.ModuleDict:
            return f"{part} is a {kind.__name__}"
    return None


def _why_not_call(layer: Any, names: list[str], x: Tensor, kwargs: dict) -> str | None:
    """Why this one call runs PEFT's own forward, in a layer whose adapters can run fused."""
    if kwargs.get("adapter_names") is not None and len(kwargs["adapter_names"]) != len(x):
        return "as many adapter names as rows are needed"
    reason = why_not_plain_tensor(x) or why_not_here() or patches.why_replaced_in_torch()
    if reason:
        return reason
    device, K = x.device, x.shape[-1] if x.dim() else 0
    fits, here, dtypes, outputs = x.dim() > 0, True, set(), set()
    for _, A_layer, B_layer, _ in _parts(layer, names):
        A, B = A_layer._parameters["weight"], B_layer._parameters["weight"]
        here = here and A.device == device and B.device == device
        fits = fits and A.shape[1] == K and A.shape[0] == B.shape[1]
        dtypes.add(A.dtype)
        outputs.add(B.shape[0])
    if not here:
        return "devices differ"
    if not fits or len(outputs) != 1:
        return "shapes differ"
    if x.dim() == 1 and variants.has_magnitude(layer, names):
        return "DoRA of a single row"  # of which PEFT makes [1, out_features]
    if torch.float64 in (x.dtype, *dtypes) and torch.is_autocast_enabled(device.type):
        return "float64 under autocast"
    if dtypes != {x.dtype} and not getattr(layer, "cast_input_dtype_enabled", True):
        return "casting of the input is switched off"
    return why_inference(x, layer._parts(names), layer.get_base_layer())
