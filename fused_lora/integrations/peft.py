"""PEFT models made fast in place: their own modules, parameters and checkpoints, with a fused forward underneath.

accelerate / restore     one model, there and back
install / uninstall      every LoRA Linear that PEFT builds from now on, in this process
register                 every LoRA Linear that PEFT builds for one LoraConfig
layer_report             which layers run fused, and why the others do not
"""

from __future__ import annotations

import functools
import logging
import sys
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fused_lora.bases import base_of
from fused_lora.bases.base import why_replaced
from fused_lora.bases.dense import Dense
from fused_lora.integrations import peft_experts, peft_others  # noqa: F401 - they add their classes
from fused_lora.integrations.peft_linear import (
    AROUND,
    CALLS,
    FUSED,
    AcceleratedLinear,
    accelerated,
    stock_classes,
    why_around,
    why_not_fused,
)
from fused_lora.modules.changes import alone, holders_of_methods, undone_on_error, unwatch, watch
from fused_lora.modules.fusable import why_not_here
from fused_lora.modules.inject import check_module
from fused_lora.modules.layer import LoraLayer
from fused_lora.modules.names import some
from fused_lora.modules.patches import why_replaced_in_torch
from fused_lora.modules.reads import FirstForward, look_again, why_never_called, why_not_called_in_eval, why_read
from fused_lora.modules.tree import named_modules

_log = logging.getLogger("fused_lora")
ACCELERATED = "accelerated"
_EACH_CALL = "merged for each call of the attention"
BUILT: Counter[str] = Counter()  # under install(): ACCELERATED, or why a layer that PEFT built is not -> how many

_create = "_create_new_module"  # LoraModel's static method: where PEFT builds the layer around a target
_unload = "_unload_and_optionally_merge"  # a tuner's method: what merge_and_unload and unload call
_inject = "inject_adapter"  # of all tuners (PeftMixedModel's is no LoraModel): where PEFT adds an adapter to a model
_installed: dict[str, tuple[type, Any, Any]] = {}  # methods that install() has replaced: (their class, its own, ours)


@alone
def accelerate(model: nn.Module) -> nn.Module:
    """Make the LoRA linears of a PEFT model fast, in place. :func:`restore` takes it back.

    Every exact ``peft.tuners.lora.Linear`` gets a subclass of itself, and so do PEFT's classes over layers of
    bitsandbytes, torchao, GPTQ and AWQ; the model gets two hooks that note its calls, and two that warn in the first
    of layers that it reads without calling them. Parameters, buffers, other hooks, state-dict keys, checkpoints and
    PEFT's own methods stay. At every call the layer decides: plain LoRA over a plain, 4-bit or torchao linear layer
    runs in one operator; over any other base layer (hooked, offloaded, sharded, of an unknown class) the base runs as
    it is, and the adapters in one operator around it; anything else (merged, disabled, hooks on lora_A, ...) runs
    PEFT's own forward. Merging rounds once, and unmerging gives back the exact bits.

    Layers that PEFT adds to a PeftModel later are accelerated too. After an injection into a bare model (a second
    ``inject_adapter_in_model``) call it again; calling it twice does no harm. Call it before ``fully_shard``.

    The logger ``fused_lora`` gets one line: how many layers run fused, and why the others do not. Where none does,
    Python's warnings get it.

    Args:
        model: a PeftModel, or any module that contains PEFT LoRA layers.

    Returns:
        ``model``.

    Raises:
        TypeError: model is not a module. ValueError: it has no PEFT LoRA layer.
    """
    layers = _lora_layers(model)
    if not layers:
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            raise ValueError("model: its LoRA layers are fused_lora's own, they need no accelerate")
        raise ValueError(
            "model: expected PEFT LoRA layers, found none. Wrap it first (peft.get_peft_model; in diffusers "
            "add_adapter, or load_lora_weights of the pipeline), or use fused_lora.inject(model, config), which "
            "needs no PEFT"
        )
    module: Any
    called = [model]
    with undone_on_error(model):
        for module in layers.values():
            _adopt(module)
        for module in model.modules():
            if _is_tuner(module):
                called += [module, module.model]  # generate calls the latter
            if _builds_lora_layers(module):
                setattr(module, _create, _create_accelerated)
        _follow("accelerate", layers, *called)
    rows = layer_report(model)
    if all(row.why_not for row in rows):
        warnings.warn(f"accelerate: {summary(rows)}", stacklevel=3)
    else:
        _log.log(logging.WARNING if any(row.why_not for row in rows) else logging.INFO, "accelerate: %s", summary(rows))
    return model


@alone
def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`: every layer is PEFT's own again, and nothing of ours is left in the model.

    Merged adapters stay merged. PEFT's unmerge then subtracts them, as it does for its own merges, so unmerge before
    the restore where the exact bits matter. A model that is not accelerated is left alone.

    Raises:
        TypeError: model is not a module. RuntimeError: the class of an accelerated layer was changed by someone else
            (``fully_shard`` on the layer itself). Nothing is changed.
    """
    ours = _our_classes() if _lora_layers(model) else ()
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, ours)]
    changed = [path for path, module in layers if type(module) not in ours]
    if changed:
        raise RuntimeError(f"model: the classes of {changed} were changed after accelerate; undo that first")
    with undone_on_error(model):
        for _, module in layers:
            _release(module)
        for module in model.modules():
            _leave(module)
            if vars(module).get(_create) is _create_accelerated:
                delattr(module, _create)
            if isinstance(vars(module).get(_unload), _Unload):
                delattr(module, _unload)
    return model


def install() -> Callable[[], dict[str, Any]]:
    """From now on every LoRA Linear that PEFT builds in this process is accelerated. :func:`uninstall` ends it.

    The models get the hooks that they get from :func:`accelerate`, when PEFT has added an adapter.

    Models that exist already are not touched, models built meanwhile stay accelerated. Installing twice is no error.

    Returns:
        A function that reports the calls of all accelerated layers since this install():
        ``{"fused": int, "around": {reason: int}, "fallback": {reason: int}}``: base and adapters in one operator, the
        adapters in one around a base layer that was called by itself, PEFT's own forward. Calls inside compiled code
        are not counted.

    Raises:
        ImportError: PEFT is not installed.
    """
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    if not _installed:
        build, inject = getattr(LoraModel, _create), getattr(BaseTuner, _inject)

        def create(*args: Any, **kwargs: Any) -> nn.Module:
            module = build(*args, **kwargs)
            if not _installed:
                return module
            reason = None if type(_adopt(module)) in _our_classes() else _of_peft(module)[0]
            BUILT[ACCELERATED if reason is None else reason] += 1
            return module

        @functools.wraps(inject)
        def inject_and_follow(self: Any, *args: Any, **kwargs: Any) -> None:
            inject(self, *args, **kwargs)
            kinds = _our_classes()
            if _installed and any(isinstance(module, kinds) for module in self.modules()):
                _follow("install", _lora_layers(self), self, self.model)

        for owner, name, ours in (
            (LoraModel, _create, staticmethod(create)),
            (BaseTuner, _inject, inject_and_follow),
        ):
            _installed[name] = owner, vars(owner)[name], ours
            setattr(owner, name, ours)
    before = Counter(CALLS)

    def report() -> dict[str, Any]:
        calls = CALLS - before
        fused, around, fallback = calls.pop(FUSED, 0), {}, {}
        for reason, count in calls.most_common():
            (around if reason.startswith(AROUND) else fallback)[reason.removeprefix(AROUND)] = count
        return {"fused": fused, "around": around, "fallback": fallback}

    return report


def uninstall() -> None:
    """End :func:`install`; accelerated models stay as they are. Does nothing when it is not in force."""
    for name, (owner, original, ours) in _installed.items():
        # a method that someone else put over ours stays, and ours, underneath, passes on what it gets
        if vars(owner)[name] is ours:
            setattr(owner, name, original)
    _installed.clear()


def register(config: Any) -> Any:
    """Let PEFT build accelerated layers for one ``peft.LoraConfig``: the form without any process-wide switch.

    Uses ``LoraConfig._register_custom_module``, for nn.Linear and transformers' Conv1D over ordinary weights. PEFT does
    not save the registration with the config: register again after loading.

    Returns:
        ``config``.

    Raises:
        TypeError: config is not a peft.LoraConfig.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected peft.LoraConfig, got {type(config).__name__}")
    build = functools.partial(_build_accelerated, config)
    builders: Any = {nn.Linear: build, Conv1D: build}  # PEFT's type says classes
    config._register_custom_module(builders)
    return config


@dataclass(frozen=True)
class LayerRow:
    """One LoRA layer of a model: where it is, what it is, and how a plain call of it, as it is now, runs.

    why_not: why base and adapters are not fused: their own modules compute, in PEFT's way; None when they are.
    around: why the base layer is called by itself, with the adapters fused around it; None when it is fused too.
    """

    path: str
    kind: str
    why_not: str | None
    around: str | None = None

    @property
    def fused(self) -> bool:
        """Whether base and adapters run in one operator."""
        return self.why_not is None and self.around is None

    def __str__(self) -> str:
        """ "fused", "fused around the base: why", or "no: why"."""
        if self.why_not is not None:
            return f"no: {self.why_not}"
        return FUSED if self.around is None else AROUND + self.around


def layer_report(model: nn.Module) -> list[LayerRow]:
    """Every LoRA layer of a model, PEFT's or fused_lora's own, in ``named_modules()`` order.

    It describes the layers as they are now: merging, disabling or a hook changes it. Reasons of a call (dtype,
    device, gradients, several adapters) show in the counts of :func:`install` only. What FSDP shards between calls is
    described as a call finds it. Raises TypeError for a non-module.
    """
    peft_layers = _lora_layers(model)
    attention = _inside_attention(peft_layers)
    rows = []
    with _gathered(model):
        for path, module in model.named_modules():
            ours = isinstance(module, LoraLayer)
            if not (ours or path in peft_layers):
                continue
            why = _why_not_reached(model, path, module.training)
            if path.startswith(attention):
                why = _EACH_CALL
            reasons = (why, None) if why else _of_ours(module) if ours else _of_peft(module)
            kind = type(module).__name__ if ours else f"peft {repr(module).partition('(')[0]}"
            rows.append(LayerRow(path, kind, *reasons))
    return rows


def _inside_attention(layers: dict[str, nn.Module]) -> tuple[str, ...]:
    """How the paths of modules start that PEFT's layer for nn.MultiheadAttention merges for each call."""
    return tuple(f"{path}." for path, m in layers.items() if type(m).__name__ == "MultiheadAttention")


def _why_not_reached(model: nn.Module, path: str, training: bool = False) -> str | None:
    """Why the module at this path is not called by the one that it is in."""
    place, _, name = path.rpartition(".")
    parent = model.get_submodule(place)
    module: Any = parent._modules[name] if name else parent  # an attribute may hide it: routers have a weight
    if why := why_read(module):
        return why
    why = None if training else why_not_called_in_eval(parent)
    hooked = why and any(m._forward_hooks or m._forward_pre_hooks for m in parent.modules())
    return why_never_called(parent) or (None if hooked else why)


def _called_layers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's layers that are to be called: of wrappers in each other the outermost; none that is known not to be."""
    layers = _lora_layers(model).items()
    called = {m for path, m in layers if not (path.endswith(".base_layer") or _why_not_reached(model, path))}
    return {path: module for path, module in named_modules(model) if module in called}


@contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """Inside, a parameter that FSDP or DeepSpeed makes whole for each call has its shape, but no memory of its own."""
    before = []
    try:
        for module in model.modules():
            for parameters, name, shape, dtype in _sharded(module):
                held = parameters[name]
                before.append((parameters, name, held))
                whole = torch.empty((), dtype=dtype or held.dtype, device=held.device).expand(shape)
                parameters[name] = nn.Parameter(whole, requires_grad=held.requires_grad)
        yield
    finally:
        for parameters, name, held in before:
            parameters[name] = held


def _sharded(module: Any) -> Iterator[tuple[dict, str, torch.Size, torch.dtype | None]]:
    """(its parameters, name, whole shape, dtype in a call) of what ``fully_shard``, FSDP1 or ZeRO-3 gathers for it."""
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
    groups: Any = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    for held in (param for group in groups if group is not None for param in group.fsdp_params):
        place = held._module_info
        parameters = place.module._parameters
        sharded = parameters[place.param_name]
        # one that was a DTensor before (tensor parallel) stays one; a whole one is in use now
        if not held.is_dtensor and isinstance(sharded, torch.distributed.tensor.DTensor):
            dtype = getattr(held, "param_dtype", None)  # which it has from the first call on
            yield parameters, place.param_name, sharded.shape, dtype
    for name, held in module._parameters.items():
        if held is not None and held.shape != (shape := getattr(held, "ds_shape", held.shape)):  # DeepSpeed's
            yield module._parameters, name, shape, None
    handle = vars(module).get("_handle")  # FSDP1's; with use_orig_params the modules have parts of parameters, flat
    flat = getattr(handle, "flat_param", None)
    for place, shape in () if flat is None else zip(flat._param_infos, flat._shapes, strict=True):
        if place.module._parameters.get(place.param_name) is not None:
            yield place.module._parameters, place.param_name, shape, handle._fwd_bwd_param_dtype


def summary(rows: list[LayerRow] | tuple[LayerRow, ...]) -> str:
    """How many layers run fused, and why the others do not: one line."""
    fused = sum(row.fused for row in rows)
    around = sum(row.why_not is None for row in rows) - fused
    line = f"{fused} of {len(rows)} layers run fused" + f", {around} around their base" * (around > 0)
    reasons = Counter(row.why_not for row in rows if row.why_not is not None)
    return line + "".join(f"; {count} do not: {reason}" for reason, count in reasons.most_common())


def _lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's LoRA layers of any kind: path -> layer. None where PEFT was never imported: then nobody can have any."""
    check_module(model)
    lora = sys.modules.get("peft.tuners.lora")
    return {} if lora is None else {p: m for p, m in model.named_modules() if isinstance(m, lora.LoraLayer)}


def _is_tuner(module: nn.Module) -> Any:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTuner)


def _our_classes() -> tuple[type[Any], ...]:
    return tuple(accelerated(stock) for stock in stock_classes())


def _follow(who: str, layers: dict[str, nn.Module], model: nn.Module, *inner: nn.Module) -> None:
    """Let changes wait for calls of these, name layers that are read and not called, and look for more in a call."""
    for module in (model, *inner):
        watch(module)
        if _is_tuner(module) and hasattr(module, _unload) and _unload not in vars(module):
            setattr(module, _unload, _Unload(module))
    FirstForward(_called_layers, model, *inner)
    attention = _inside_attention(layers)
    lost = {p: why for p in layers if not p.startswith(attention) and (why := _why_not_reached(model, p))}
    if lost:
        why = next(iter(lost.values()))
        how = "; torch.backends.mha.set_fastpath_enabled(False) ends that" * ("eval" in why)
        warnings.warn(f"{who}: adapters of {some(lost)} do nothing, as in PEFT: each {why}{how}", stacklevel=4)


def _leave(module: nn.Module) -> None:
    unwatch(module)
    FirstForward.leave(module)


class _Unload:
    """A tuner's method that returns the plain model: with no hook of ours, which TorchScript and pickles would meet.

    It does not hold the tuner, so that a model's memory is free when nobody has the model any more.
    """

    def __init__(self, tuner: nn.Module):
        self._tuner: Any = weakref.ref(tuner)

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        tuner = self._tuner()
        plain = getattr(type(tuner), _unload)(tuner, *args, **kwargs)
        _leave(plain)
        return plain

    def __reduce__(self) -> tuple[Any, ...]:
        return _Unload, (self._tuner(),)


def _adopt(module: nn.Module) -> nn.Module:
    """Give an exact layer of one of the stock classes the accelerated class; anything else is left alone."""
    stock = type(module)
    if stock in stock_classes():
        _change_class(module, stock, accelerated(stock))
    return module


def _release(module: nn.Module) -> None:
    ours = type(module)
    _change_class(module, ours, next(stock for stock in stock_classes() if accelerated(stock) is ours))
    for own in ("merge_state", "_memory"):
        vars(module).pop(own, None)


def _change_class(module: Any, old: type[nn.Module], new: type[nn.Module]) -> None:
    module.__class__ = new
    # hooks and patches keep bound methods of the class that the module had when they were made
    for holder in holders_of_methods(module):
        for name, kept in list(vars(holder).items()):
            if isinstance(kept, types.MethodType) and kept.__self__ is module:
                method = kept.__name__
                if getattr(old, method, None) is kept.__func__:
                    setattr(holder, name, types.MethodType(getattr(new, method), module))


def _builds_lora_layers(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraModel

    # a subclass with a method of its own (AdaLoRA) builds other layers
    return isinstance(module, LoraModel) and getattr(type(module), _create) is getattr(LoraModel, _create)


def _create_accelerated(*args: Any, **kwargs: Any) -> nn.Module:
    """LoraModel._create_new_module of an accelerated model."""
    from peft.tuners.lora import LoraModel

    look_again()
    return _adopt(getattr(LoraModel, _create)(*args, **kwargs))


def _build_accelerated(
    registered: Any, target: nn.Module, adapter_name: str, config: Any = None, **kwargs: Any
) -> nn.Module | None:
    """PEFT's default layer around a plain linear target, accelerated; None (PEFT looks further) around any other.

    PEFT before 0.19 does not pass the config, which is the ``registered`` one.
    """
    from peft.tuners.lora.layer import dispatch_default

    kind = base_of(target)
    plain = isinstance(kind, Dense) and kind.why_not_merged(target) is None
    if not plain or kwargs.get("parameter_name") is not None:
        return None
    built = dispatch_default(target, adapter_name, registered if config is None else config, **kwargs)
    return None if built is None else _adopt(built)


def _of_ours(layer: Any) -> tuple[str | None, str | None]:
    """(why not fused, why around the base)."""
    if layer.disable_adapters:
        return "adapters are disabled", None
    if layer.merged:
        return "merged: the base layer alone", None
    names = layer._present(layer.active_adapters)
    if not names:
        return "no active adapter in this layer", None
    own = hasattr(layer, "why_not_fused")
    reason = layer.why_not_fused() if own else layer._why_not_plain(names)
    return _why_not_called(layer) or reason, why_around(layer)


def _why_not_called(layer: nn.Module) -> str | None:
    """Why a call may not come to the layer's class. Hooks of accelerate and diffusers call it."""
    if "forward" in vars(type(layer)) and isinstance(layer, AcceleratedLinear):
        return "the class of the layer has its forward replaced"  # of ours: the layers' classes have none of their own
    hooked = vars(layer).keys() & {"_hf_hook", "_diffusers_hook"}
    return None if hooked else why_replaced(layer, "the layer")


def _of_peft(layer: Any) -> tuple[str | None, str | None]:
    if isinstance(layer, _our_classes()):
        reason = why_not_fused(layer, layer._present(layer.active_adapters))
        reason = _why_not_called(layer) or reason or why_not_here() or why_replaced_in_torch()
        return reason, why_around(layer)
    if type(layer) in stock_classes():
        return "not accelerated: call fused_lora.accelerate(model)", None
    return f"{type(layer).__name__} has no fused form", None
