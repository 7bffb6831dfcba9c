"""What a LoRA layer asks of the module that it wraps, and the registry of the answers by module type.

A new kind of base is one file: a subclass of :class:`Base` that is registered under the names of its module classes,
and imported by ``bases/__init__.py``. Names, not classes, so that nothing is imported before somebody uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.ops.checks import FLOAT_DTYPES
from fused_lora.ops.dora import op as dora
from fused_lora.ops.linear.packed import Packed
from fused_lora.ops.merge import op as merging

_TENSORS = (nn.Parameter, Tensor)  # exact types: subclasses (quantised, sharded, fake) bring their own arithmetic


class Factors(NamedTuple):
    """What a merge adds, one entry an adapter, what it multiplies the rows [N] of the weight by before (DoRA), and the
    seed of a rounding at random."""

    lora_A: list[Tensor]
    lora_B: list[Tensor]
    scaling: list[float]
    row_scale: Tensor | None = None
    seed: int | None = None


class Adapters(NamedTuple):
    """The active adapters of one call: one entry each, ``bias`` the sum of scaling_i * lora_bias_i [N], or None.

    base_bias: whether the base layer's own bias is added, too.
    """

    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    scaling: Sequence[float]
    dropout: Sequence[float]
    bias: Tensor | None = None
    base_bias: bool = True

    def bias_with(self, bias: Tensor | None) -> Tensor | None:
        """The bias of the base and these together; of a 16-bit and an fp32 one in fp32."""
        bias = bias if self.base_bias else None
        if self.bias is None:
            return bias
        return self.bias if bias is None else bias + self.bias


class Grid(NamedTuple):
    """A quantised weight: codes times a scale for each ``blocksize`` values of a row.

    name: such as "nf4". code: [16]. dtype: what its values are rounded to before a merge adds to them. nested: code and
    block size of the scales where they are quantised, too. repacked: a call has rounded the scales since. rounding:
    absolute, of a block's largest magnitude, by scales that may be subnormal.
    """

    name: str
    code: Tensor
    blocksize: int
    dtype: torch.dtype
    nested: tuple[Tensor, int] | None
    repacked: bool
    rounding: float = 0.0

    def __str__(self) -> str:
        return f"{self.name} in blocks of {self.blocksize}" + ", double quantised" * (self.nested is not None)


class Base:
    """One kind of base layer. The methods take the module; a Base has no state of its own."""

    bits = 0  # of a quantised weight, which has dense_weight, become_linear and copy_weight
    in_one_pass = True  # whether it has switch_, and merges beside other layers
    name = "weight"  # of the parameter that a merge changes

    def why_not_fused(self, module: nn.Module) -> str | None:
        """None when :meth:`forward` may stand in for a call of ``module``, else the reason in a few words.

        With a reason the module itself is called, hooks and all, and the terms are added to its output.
        """
        raise NotImplementedError

    def why_not_call(self, module: nn.Module, x: Tensor, outputs: int) -> str | None:
        """The same for one input, and adapters of ``outputs`` rows of lora_B: dtype, shape, device."""
        raise NotImplementedError

    def forward(self, module: nn.Module, x: Tensor, adapters: Adapters) -> Tensor:
        """Product and terms in one operator: x [..., K] -> [..., N]. Only where both answers above are None."""
        raise NotImplementedError

    def operand(self, module: nn.Module, x: Tensor) -> Packed | None:
        """What :meth:`forward` would multiply with, for a call whose tensors are like those of an earlier one.

        With it neither question above is asked, so it asks what they do, besides hooks and whether tensors fit.
        None: the call takes its usual way.
        """
        return None

    def features(self, module: nn.Module) -> tuple[int, int]:
        """(K, N): in_features and out_features."""
        raise NotImplementedError

    def matrix(self, module: nn.Module) -> Tensor:
        """What a merge writes: the weight; of one made in inference mode, to which torch lets nobody write, a twin."""
        weight: Any = module._parameters[self.name]
        if not weight.is_inference():
            return weight
        twin = torch.empty(0, dtype=weight.dtype, device=weight.device)
        return twin.set_(weight.untyped_storage(), weight.storage_offset(), weight.shape, weight.stride())

    def why_not_merged(self, module: nn.Module) -> str | None:
        """None where :meth:`merge_` can write, else what the weight is instead."""
        # parametrized: computed anew at each use; a subclass: packed or sharded, written to by its library alone
        return why_not_plain_weight(module._parameters.get("weight"))

    def why_not_dense(self, module: nn.Module) -> str | None:
        """None where :meth:`dense_weight` and :meth:`become_linear` work, else what the weight is instead."""
        return self.why_not_merged(module)

    def merge_(self, module: nn.Module, factors: Factors, fan_in_fan_out: bool) -> Any:
        """Add the adapters to the weight; returns the record that the three below take.

        Raises:
            ValueError: a finite number would become NaN or infinite. Nothing is changed.
        """
        A, B, scaling, row_scale, seed = factors  # one by one: see native.safe_in_a_child
        return merging.merge_(self.matrix(module), A, B, scaling, row_scale, seed, fan_in_fan_out=fan_in_fan_out)

    def switch_(self, module: nn.Module, record: Any, factors: Factors, fan_in_fan_out: bool) -> Any:
        """:meth:`unmerge_` and :meth:`merge_`; what either raises, with the weight and ``record`` as they were."""
        weight, (A, B, scaling, row_scale, seed) = self.matrix(module), factors
        return merging.switch_(weight, record, A, B, scaling, row_scale, seed, fan_in_fan_out=fan_in_fan_out)

    def merge_later(
        self, module: nn.Module, factors: Factors, fan_in_fan_out: bool, old: Any = None
    ) -> tuple[Any, Any] | None:
        """What :meth:`merge_`, or with an ``old`` record :meth:`switch_`, would do as (record, sweep), to run with
        other layers; None where it must do it."""
        if not self.in_one_pass:
            return None
        return merging.merge_later(self.matrix(module), factors, fan_in_fan_out, old)

    def unmerge_later(self, module: nn.Module, record: Any) -> Any:
        """What :meth:`unmerge_` would do as a sweep, or None."""
        if not self.in_one_pass or self.why_not_merged(module):
            return None
        return merging.unmerge_later(self.matrix(module), record)

    def unmerge_(self, module: nn.Module, record: Any) -> None:
        """Give the weight the bits of before. Raises RuntimeError, and changes nothing, where it was changed since."""
        merging.unmerge_(self.matrix(module), record)

    def factors(self, record: Any, fan_in_fan_out: bool) -> Factors:
        """The adapters that were merged, frozen."""
        return Factors(*merging.factors(record, fan_in_fan_out))

    def delta_fidelity(self, module: nn.Module, record: Any) -> float:
        """Share of the merged delta that rounding lost, ||(Wm - W) - D|| / ||D||."""
        return merging.delta_fidelity(self.matrix(module), record)

    def dense_weight(self, module: nn.Module, factors: Factors, dtype: torch.dtype) -> Tensor:
        """dequant(W) + D as a dense [N, K] of ``dtype``: a sum in fp32, rounded once. Nothing is changed.

        Raises:
            ValueError: the sum would not be finite.
        """
        raise NotImplementedError

    def become_linear(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        """Make ``module`` itself an nn.Linear with these tensors; its hooks, mode and places in the model stay."""
        raise NotImplementedError

    def row_norms(
        self, module: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, fan_in_fan_out: bool
    ) -> Tensor:
        """||W_j + scaling (B A)_j|| for each output j, [N], without a gradient. Where :meth:`why_not_dense` is None."""
        return dora.row_norms(self._rows(module, fan_in_fan_out), lora_A, lora_B, scaling)

    def product(self, module: nn.Module, x: Tensor, fan_in_fan_out: bool) -> Tensor:
        """x W^T in x's dtype, differentiable in x; W is frozen. Where :meth:`why_not_dense` is None."""
        weight = self._rows(module, fan_in_fan_out)
        if weight.dtype is x.dtype:
            with torch.autocast(x.device.type, enabled=False):
                return nn.functional.linear(x, weight)
        return dora.product(x, lambda: dora.row_blocks(weight), len(weight))

    def _rows(self, module: nn.Module, fan_in_fan_out: bool) -> Tensor:
        """The weight as [N, K]: where an export or torch.func has put another tensor in its place, that one."""
        # read so that DeepSpeed ZeRO-3 sees it, and gathers the weight for the time of the layer's call
        weight: Any = module._parameters["weight"] if "weight" in module._parameters else module.weight
        weight = weight.detach() if weight.requires_grad else weight  # itself, whose memory ZeRO-3 takes away between
        return weight.t() if fan_in_fan_out else weight

    def copy_weight(self, module: nn.Module) -> None:
        """Put a copy of the numbers in place of the weight's: calls and merges may change it, and it is put back."""
        weight: Any = module._parameters["weight"]
        weight.data = weight.data.clone()

    def grid(self, module: nn.Module) -> Grid | None:
        """How the weight is quantised; None where it is not."""
        return None

    def settings(self, module: nn.Module) -> dict[str, str]:
        """How the weight is quantised and computed with, in words by topic; empty where it is not quantised.

        A topic that is not known now is left out: a call may set the compute dtype, and repack the scales.
        """
        grid = self.grid(module)
        if grid is None:
            return {}
        found = {"weight": f"{grid.name} in blocks of {grid.blocksize}"}
        if self.bits == 4 and not grid.repacked:
            found["scales"] = "single quantised" if grid.nested is None else "double quantised"
        compute = getattr(module, "compute_dtype", None)
        return found if compute is None else found | {"product": f"computed in {compute}".replace("torch.", "")}

    def operand_dtype(self, module: nn.Module, x: Tensor) -> torch.dtype | None:
        """What a call with ``x`` rounds x and the weight's values to; None: nothing is rounded."""
        return None

    def input_step(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """[rows, 1]: how far a call moves an element of x [rows, K] at most to quantise it; None: it does not."""
        return None

    def adapter_dtype(self, module: nn.Module) -> torch.dtype | None:
        """What PEFT rounds new adapters to, before it may hold them in fp32; None: as they were drawn."""
        weight: Any = module.weight
        return weight.dtype

    def why_not_adapted(self, module: nn.Module) -> str | None:
        """None when a LoRA layer may be built around ``module``, else the reason: the field and what it holds."""
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            return f"its weight is a {type(weight).__name__}"
        if weight.dim() == 2 and weight.dtype in FLOAT_DTYPES and not hasattr(weight, "quant_state"):
            return None
        if weight.shape != getattr(weight, "ds_shape", weight.shape):
            return "its weight is sharded by DeepSpeed ZeRO-3 (wrap the model with PEFT and call fused_lora.accelerate)"
        return f"its weight is a {type(weight).__name__} of {weight.dtype} {tuple(weight.shape)}"


_OF_CLASS: dict[type, Base] = {}  # of the registered names, those that have been met
_KINDS: dict[tuple[str, str] | None, Base] = {}  # (module, qualified name) of a class, None for all others


def register(base: Base, *names: str) -> Base:
    """Let ``base`` answer for modules of exactly these classes ("package.module.Class"); without names for all others.

    A class of tensors stands for nn.Linear with such a weight. A class that two files claim goes to the later one.
    Subclasses are classes of their own.

    Returns:
        ``base``.
    """
    _OF_CLASS.clear()
    for name in names:
        package, _, own = name.rpartition(".")
        _KINDS[package, own] = base
    if not names:
        _KINDS[None] = base
    return base


def base_of(module: nn.Module) -> Base:
    """What answers for ``module``."""
    if not torch.compiler.is_compiling():
        return base_in_eager(module)
    # what is kept below would be a guard, and a class that is met a new compilation
    kind = type(module)
    return _of_weight(module, kind, _KINDS.get((kind.__module__, kind.__qualname__), _KINDS[None]))


def base_in_eager(module: nn.Module) -> Base:
    """:func:`base_of` for whoever has asked whether torch compiles."""
    kind = type(module)  # written out: this runs several times in every call
    found = _OF_CLASS.get(kind) or _registered(kind) or _KINDS[None]
    if kind is not nn.Linear or type(module._parameters.get("weight")) in _TENSORS:
        return found
    return _of_weight(module, kind, found)


def _of_weight(module: nn.Module, kind: type, found: Base) -> Base:
    if kind is not nn.Linear or (weight := type(module._parameters.get("weight"))) in _TENSORS:
        return found
    return _registered(weight) or found


def _registered(kind: type) -> Base | None:
    """What is registered for a class."""
    found = _KINDS.get((kind.__module__, kind.__qualname__))
    if found is not None and not torch.compiler.is_compiling():
        _OF_CLASS[kind] = found
    return found


def why_not_own_call(module: nn.Module, what: str) -> str | None:
    """None when calling ``module`` runs its class's forward and nothing else; ``what`` names it in the reason."""
    # written out: this runs for every part of a layer in every call
    own = module.__dict__  # past nn.Module's __getattr__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return f"a hook on {what}"
    return why_replaced(module, what)


def why_replaced(module: nn.Module, what: str) -> str | None:
    """None where a module's forward is its class's."""
    own = module.__dict__
    return f"{what} has its forward replaced" if "forward" in own and not keeps_forward(own) else None


def keeps_forward(own: dict[str, Any]) -> bool:
    """Whether the forward in a module's ``__dict__`` computes what its class's does."""
    forward = own["forward"]
    module, function = getattr(forward, "__self__", None), getattr(forward, "__func__", None)
    if getattr(module, "__dict__", None) is not own:
        return False
    if getattr(function, "__name__", None) == "keep_device_forward" and function.__module__ == "swift.tuners.peft":
        # ms-swift's, on every lora_A and lora_B: x goes to the weight's device first. Nothing fuses over two devices
        function = getattr(own.get("forward_origin"), "__func__", None)
    return function is type(module).forward  # accelerate leaves that there when it takes a hook away


def only_moves(module: nn.Module) -> bool:
    """Whether a module's forward was replaced by accelerate, for hooks that move what it gets and returns, no more."""
    own = module.__dict__
    forward, hook, old = (own.get(name) for name in ("forward", "_hf_hook", "_old_forward"))
    hooks = getattr(hook, "hooks", (hook,))
    return (
        isinstance(forward, partial)
        and forward.func.__module__ == "accelerate.hooks"
        and all(type(h).__name__ == "AlignDevicesHook" and not h.offload for h in hooks)
        and old == MethodType(type(module).forward, module)
    )


def why_not_plain_weight(weight: object) -> str | None:
    """None for an ordinary dense two-dimensional floating tensor, else what it is instead."""
    if (
        type(weight) in _TENSORS
        and weight.dim() == 2
        and weight.dtype in FLOAT_DTYPES
        and weight.layout is torch.strided
    ):
        return None
    if weight is None:
        return "a weight is not a parameter of its own"
    if type(weight) not in _TENSORS:
        return f"a weight is a {type(weight).__name__}"
    if weight.dim() != 2:
        return "a weight is not a matrix (sharded?)"
    return f"a weight is {weight.dtype if weight.layout is torch.strided else weight.layout}"


def why_not_plain_bias(parameters: Mapping[str, object], N: int) -> str | None:
    """None where a module's parameters have None or an ordinary floating vector [N] for a bias, else what it is."""
    if "bias" not in parameters:
        return "a bias is not a parameter of its own"
    bias = parameters["bias"]
    if bias is None:
        return None
    if type(bias) not in _TENSORS:
        return f"a bias is a {type(bias).__name__}"
    if bias.dim() != 1 or bias.shape[0] != N:
        return "a bias is not a vector of out_features"
    return None if bias.dtype in FLOAT_DTYPES else f"a bias is {bias.dtype}"


def why_not_fits(parameters: Mapping[str, Any], x: Tensor, K: int, N: int, outputs: int) -> str | None:
    """None where weight and bias are on x's device, x is [..., K], and ``outputs``, the rows of lora_B, are N."""
    weight, bias = parameters["weight"], parameters["bias"]
    if weight.device != x.device or (bias is not None and bias.device != x.device):
        return "the base layer is on another device"
    return "shapes differ" if x.dim() == 0 or x.shape[-1] != K or outputs != N else None


def why_not_device(device: torch.device) -> str | None:
    """None on a CPU or CUDA device, and on the meta device; on others PEFT's own forward runs."""
    return None if device.type in ("cpu", "cuda", "meta") else f"device {device.type}"


def why_not_plain_tensor(tensor: object, what: str = "the input") -> str | None:
    """None for an ordinary dense floating tensor on a CPU or CUDA device, else what it is instead."""
    if type(tensor) not in _TENSORS:
        return f"{what} is a {type(tensor).__name__}"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return f"{what} is not dense"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"device {tensor.device.type}"
    return None if tensor.dtype in FLOAT_DTYPES else f"{what} is {tensor.dtype}"
