"""The calls of this package on a model that PEFT has wrapped, accelerated or not: PEFT's own calls do them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from fused_lora.modules.changes import undone_on_error
from fused_lora.modules.dense import become_dense, dense_parts, forget_quantisation, warn_of_other_dtypes
from fused_lora.modules.linear import go_back, snapshot
from fused_lora.modules.mixin import FusedLoraBehaviour
from fused_lora.modules.tree import CONFIGS, named_modules, unwrapped

P = ParamSpec("P")
R = TypeVar("R")


def peft_layer(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The first LoRA layer of PEFT's in a model: path and layer. A model of ours has none."""
    if CONFIGS in vars(unwrapped(model)):
        return None
    for path, module in named_modules(model):
        parts = module._modules
        if "base_layer" in parts and "lora_A" in parts and not hasattr(module, "mixed_batch"):
            return path, module
    return None


def refuse(model: nn.Module, call: str, instead: str) -> None:
    """Raise RuntimeError if the LoRA layers of a model are PEFT's: ``call`` would find none."""
    if isinstance(model, nn.Module) and peft_layer(model) is not None:
        raise RuntimeError(f"{call} is for models of fused_lora.inject, this one is PEFT's: {instead}")


def wrapper_of(model: nn.Module, call: str) -> Any:
    """PEFT's object that has merge_adapter and the like: a PeftModel, or a tuner; None if the layers are not PEFT's.

    Raises RuntimeError where PEFT's layers stand without one.
    """
    if not isinstance(model, nn.Module) or peft_layer(model) is None:
        return None
    for module in model.modules():
        if hasattr(module, "merge_adapter") and hasattr(module, "peft_config"):
            return module
    raise RuntimeError(
        f"{call}: the model's LoRA layers are PEFT's, injected without a PeftModel around them: call merge, unmerge or "
        "set_adapter of the layers, or the functions of peft.functional"
    )


def by_peft(do: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a call of ours: ``do(wrapper, *arguments)`` does it where the model's LoRA layers are PEFT's."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def inner(*args: P.args, **kwargs: P.kwargs) -> R:
            model: Any = args[0] if args else kwargs.get("model")
            wrapper = wrapper_of(model, getattr(function, "__name__", ""))
            if wrapper is None:
                return function(*args, **kwargs)
            return do(wrapper, *args[1:], **{name: value for name, value in kwargs.items() if name != "model"})

        return inner

    return decorate


def merge(
    wrapper: Any,
    adapter_names: Sequence[str] | None = None,
    safe_merge: bool = False,
    weights: Sequence[float] | None = None,
    stochastic: int | None = None,
) -> None:
    """merge_adapter, which passes over unknown names."""
    if stochastic is not None:
        raise ValueError(
            f"stochastic: expected None for a PEFT model, whose merges have no seed, got {stochastic!r:.100}"
        )
    if weights is not None:  # PEFT's unmerge would subtract the unweighted delta
        raise ValueError(f"weights: expected None for a PEFT model, got {weights!r:.200}; call set_scale of its layers")
    for name in adapter_names or ():
        if not isinstance(adapter_names, str) and name not in wrapper.peft_config:
            raise ValueError(f"Adapter {name} not found.")
    wrapper.merge_adapter(adapter_names, safe_merge)


def unmerge(wrapper: Any) -> None:
    """unmerge_adapter."""
    wrapper.unmerge_adapter()


def unload(wrapper: Any, merge_adapters: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """merge_and_unload, or unload; with ``dtype`` quantised layers become dense first. Returns the base model."""
    dense = dense_parts(wrapper, merge_adapters, dtype)
    if dtype is None:
        return wrapper.merge_and_unload() if merge_adapters else wrapper.unload()
    before = snapshot(module for _, module in named_modules(wrapper) if isinstance(module, FusedLoraBehaviour))
    with undone_on_error(wrapper):
        try:
            become_dense(wrapper, dense)
            plain = wrapper.merge_and_unload()  # all others
            warn_of_other_dtypes(plain, dtype)
        except BaseException:
            go_back(before)  # the weights, before the layers forget what was merged
            raise
    forget_quantisation(plain)
    return plain


def active_adapters(wrapper: Any) -> list[str]:
    """Names of the active adapters."""
    return list(wrapper.active_adapters)


def set_adapter(wrapper: Any, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
    """set_adapter; of the tuner for several names, which a PeftModel does not take."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    frozen = {"inference_mode": True} if inference_mode else {}  # which PEFT before 0.19 does not take
    merged = [m for m in wrapper.modules() if getattr(m, "merged_adapters", None)]
    before = snapshot(module for module in merged if isinstance(module, FusedLoraBehaviour))
    try:
        if merged and all(name in wrapper.peft_config for name in names):  # PEFT would unmerge inside
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=5)
            for module in merged:
                module.unmerge()
        with undone_on_error(wrapper):
            if len(names) == 1:
                wrapper.set_adapter(names[0], **frozen)
            else:
                getattr(wrapper, "base_model", wrapper).set_adapter(names, **frozen)
    except BaseException:
        go_back(before)
        raise


def delete_adapter(wrapper: Any, adapter_name: str) -> None:
    """delete_adapter."""
    with undone_on_error(wrapper):
        wrapper.delete_adapter(adapter_name)


@contextmanager
def disable_adapters(wrapper: Any) -> Iterator[None]:
    """disable_adapter of a PeftModel; the two switches of a tuner."""
    if hasattr(wrapper, "disable_adapter"):
        with wrapper.disable_adapter():
            yield
        return
    wrapper.disable_adapter_layers()
    try:
        yield
    finally:
        wrapper.enable_adapter_layers()


def delta_fidelity(wrapper: Any) -> dict[str, float]:
    """Of the layers that an accelerated model has merged exactly."""
    merged = {path: m for path, m in wrapper.named_modules() if getattr(m, "merge_state", None) is not None}
    if not merged:
        raise RuntimeError("delta_fidelity: no layer has an exact merge: accelerate the model, then merge it")
    return {path: layer.delta_fidelity() for path, layer in merged.items()}
