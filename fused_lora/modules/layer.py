"""What all LoRA layers of this package share: one weight, its adapters by name, and which of them are active."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fused_lora.modules.activated import Activation
from fused_lora.modules.changes import alone
from fused_lora.modules.config import (
    LayerTensors,
    check_alpha,
    check_bool,
    check_dropout,
    check_init,
    check_rank,
    scaling,
)
from fused_lora.modules.merged_state import MergedState
from fused_lora.modules.mixed import Context, MixedBatch
from fused_lora.modules.mixin import BASE, FusedLoraBehaviour
from fused_lora.modules.targets import drawn_dtype

T = TypeVar("T", Tensor, nn.Module)


class LoraLayer(FusedLoraBehaviour, MergedState, nn.Module):
    """One weight of a model and the adapters on it, by name.

    A kind of layer says in ``kinds_of_parts`` which of its dicts hold trained parts, the first of them of every
    adapter, and brings ``base_layer``, ``add_adapter`` and ``file_tensors``.
    """

    kinds_of_parts: tuple[str, ...]
    parameter_name = "weight"  # of ``base_layer``: what a merge changes
    base_layer: Any
    fan_in_fan_out: bool
    add_adapter: Any
    file_tensors: Any
    lora_A: Any  # by adapter name
    lora_B: Any

    def _start(self) -> None:
        """No adapter yet."""
        self.lora_dropout, self.lora_magnitude_vector = nn.ModuleDict(), nn.ModuleDict()
        self.r, self.lora_alpha, self.scaling, self.use_rslora = {}, {}, {}, {}
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self.context: Context | None = None  # set for the duration of fused_lora.disable_adapters
        self.mixed_batch: MixedBatch | None = None  # set for the duration of fused_lora.adapter_batch
        self.activated: dict[str, Activation] = {}  # aLoRA adapters: what knows where they begin to act

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that have something here."""
        return list(getattr(self, self.kinds_of_parts[0]))

    def parts_of(self, name: str) -> list[Any]:
        """The trained parts of one adapter: modules or parameters."""
        held = (getattr(self, kind) for kind in self.kinds_of_parts)
        return [parts[name] for parts in held if name in parts]

    def _check_new(self, name: str) -> None:
        """Raise unless an adapter can be added under this name."""
        if not isinstance(name, str):
            raise TypeError(f"adapter_name must be a str, got {name!r}")
        if not name or "." in name or name == BASE:
            raise ValueError(f"adapter_name: expected a non-empty str without a dot and not {BASE!r}, got {name!r}")
        held = getattr(self, self.kinds_of_parts[0])
        if name in held:
            raise ValueError(f"adapter_name: {name!r} already exists in this layer")
        if hasattr(held, name):
            kind = type(held).__name__
            raise ValueError(f"adapter_name: {name!r} is an attribute of nn.{kind}, choose another name")

    def _placed(self, part: T, device: torch.device, dtype: torch.dtype, autocast: bool, drawn: bool) -> T:
        """A new part on its device; one that was ``drawn`` also in the dtype that PEFT gives it."""
        if not drawn:
            return part.to(device)
        # PEFT draws in fp32 and casts to the base's dtype before it goes back to fp32: the same bits here
        part = part.to(device, self._drawn_dtype()).to(dtype)
        return part.float() if autocast and dtype in (torch.bfloat16, torch.float16) else part

    def _drawn_dtype(self) -> torch.dtype:
        return drawn_dtype(self.base_layer)

    def _note(self, name: str, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> None:
        """The numbers of a new adapter."""
        self.lora_dropout[name] = nn.Dropout(lora_dropout) if lora_dropout > 0.0 else nn.Identity()
        self.lora_dropout[name].train(self.training)
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self.use_rslora[name] = use_rslora
        self.scaling[name] = scaling(r, lora_alpha, use_rslora)

    def _activated(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.activated] if self.activated else []

    def _changed_rows(self, x: Tensor, names: list[str]) -> dict[str, Tensor]:
        names = self._activated(names)
        return self.activated[names[0]].rows(self, x, names) if names else {}

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    @alone
    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters active and trainable (unless ``inference_mode``), freeze all others."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in self.adapters:
            for part in self.parts_of(name):
                part.requires_grad_(name in names and not inference_mode)
        self.active_adapters = names

    @alone
    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the others that are stay so; if none is, the first by name becomes it.

        Raises:
            ValueError: the adapter is merged.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        numbers = (self.r, self.lora_alpha, self.scaling, self.use_rslora, self.activated)
        parts = (getattr(self, kind) for kind in (*self.kinds_of_parts, "lora_dropout"))
        for part in (*parts, *numbers):
            if adapter_name in part:
                del part[adapter_name]
        if adapter_name in self.active_adapters:
            rest = [name for name in self.active_adapters if name != adapter_name]
            if not rest and self.adapters:
                rest = [min(self.adapters)]
                warnings.warn(deleted_active(adapter_name, rest[0]), stacklevel=3)
            self.set_adapter(rest)

    def set_scale(self, adapter: str, scale: float) -> None:
        """scaling[adapter] = ``scale`` times its initial value; ignored when the layer lacks the adapter."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._initial_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of all active adapters."""
        for name in self._present(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of all active adapters by ``scale``; None resets it to its initial value."""
        for name in self._present(self.active_adapters):
            self.scaling[name] = self._initial_scaling(name) if scale is None else self.scaling[name] / scale

    def _initial_scaling(self, name: str) -> float:
        return scaling(self.r[name], self.lora_alpha[name], self.use_rslora[name])


def deleted_active(name: str, now: str) -> str:
    """What is said when the only active adapter was deleted."""
    return f"Adapter {name} was active which is now deleted. Setting active adapter to {now}."


def check_options(r: Any, lora_alpha: Any, lora_dropout: Any, init_lora_weights: Any, **flags: Any) -> None:
    """Raise TypeError or ValueError unless the numbers of a new adapter are in range, and the flags bool."""
    check_rank("r", r)
    check_alpha("lora_alpha", lora_alpha)
    check_dropout("lora_dropout", lora_dropout)
    check_init(init_lora_weights)
    for name, value in flags.items():
        check_bool(name, value)


def check_tensors(tensors: Any, *wanted: tuple[int, ...] | None) -> None:
    """Raise TypeError or ValueError unless ``tensors`` are LayerTensors of these shapes, and floating.

    wanted: of lora_A, lora_B, lora_bias and lora_magnitude; None where there must be none.
    """
    if not isinstance(tensors, LayerTensors):
        raise TypeError(f"tensors: expected LayerTensors, got {type(tensors).__name__}")
    parts = tensors.lora_A, tensors.lora_B, tensors.lora_bias, tensors.lora_magnitude
    got = tuple(None if t is None else tuple(t.shape) for t in parts)
    if got != wanted:
        names = "lora_A, lora_B, lora_bias, lora_magnitude"
        raise ValueError(f"tensors: expected shapes of {names} {wanted}, got {got}")
    kinds = [t.dtype for t in parts if t is not None]
    if not all(dtype.is_floating_point for dtype in kinds):
        raise TypeError(f"tensors: expected floating tensors, got {kinds}")
