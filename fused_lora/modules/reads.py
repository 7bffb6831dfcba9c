"""Layers whose weight a model reads without calling them: an adapter there changes nothing until it is merged.

torch's own attention does so, and Mamba's dt_proj, fused kernels over several layers, or F.linear(x, layer.weight).
"""

from __future__ import annotations

import dis
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from types import CodeType, FrameType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fused_lora.modules.changes import runs
from fused_lora.modules.names import some
from fused_lora.modules.tree import named_modules, watchers

_READ = "has its weight read by a forward that does not call it, so an adapter does nothing there"
_GETATTR = nn.Module.__getattr__.__code__
# what puts parameters of layers, called or not, in their places in a forward: offload, FSDP, register_parameter
_MOVERS = ("accelerate.", "torch.distributed.", "torch.nn.modules.module.")
_GETS = ("LOAD_ATTR", "LOAD_METHOD")
# what a model asks a weight for before it calls the layer, or a block of it: nobody computes with that
_FACTS = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "is_cuda", "is_meta", "requires_grad", "layout"}
_FACTS |= {"is_floating_point", "itemsize", "element_size"}
# layers that a first forward has found so -> the mode, training or not, that they were in
_found: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_looks = 1  # how often models are to be looked at


def why_read(layer: nn.Module) -> str | None:
    """Why an adapter of this layer does nothing in its mode, as the model's first forward has told."""
    return _READ if _found.get(layer) is layer.training else None


def look_again() -> None:
    """A layer comes to a model that may have told already: the next forward of each model tells once more."""
    global _looks
    _looks += 1


def why_never_called(parent: nn.Module) -> str | None:
    """Why modules directly inside of ``parent`` are never called; None if they may be."""
    if isinstance(parent, nn.MultiheadAttention):
        return "is never called, nn.MultiheadAttention reads its weight"
    return None


def why_not_called_in_eval(parent: Any) -> str | None:
    """The same of calls in eval mode, as torch is set now. Hooks on a module inside make torch call them after all."""
    if not isinstance(parent, nn.TransformerEncoderLayer) or not torch.backends.mha.get_fastpath_enabled():
        return None
    attention = parent.self_attn
    fast = parent.activation_relu_or_gelu and getattr(attention, "batch_first", True)
    fast = fast and not getattr(attention, "num_heads", 0) % 2 and getattr(attention, "in_proj_bias", True) is not None
    return "is not called in eval mode, nn.TransformerEncoderLayer reads its weight" if fast else None


class _Parameters(dict):
    """The parameters of a module; who asks for the weight is noted. Copies are plain."""

    def __init__(self, plain: dict[str, Any], note: Callable[[FrameType], None]):
        super().__init__(plain)
        self._plain, self._note = plain, note

    def plain(self) -> dict[str, Any]:
        """The dict that was there before, with what is in this one."""
        self._plain.clear()
        self._plain.update(self)
        return self._plain

    def __getitem__(self, name: str) -> Any:
        if name == "weight" and not torch.compiler.is_compiling():
            self._note(sys._getframe(1))
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        if name == "weight" and not torch.compiler.is_compiling():
            self._note(sys._getframe(1))
        return super().get(name, default)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class Reads:
    """Watches layers until each has been called once. What a forward of the model reads and has never called is found.

    A call is known by its frame, in which the weight is read: a hook would miss ``layer.forward(x)``, and stay with
    copies. A weight that another module shares may be read there. Who reads lora_A, too, computes the adapter itself,
    as trainers' own kernels do. Compiled parts of a model are not watched.

    Args:
        model: whose forward :meth:`start` and :meth:`finish` enclose. layers: path -> the module that is called.
        weight_of: the module whose weight such a layer computes with.

    Attributes:
        found: path -> why an adapter does nothing there.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        weight_of: Callable[[nn.Module], nn.Module] = lambda layer: layer,
    ):
        modules = dict(named_modules(model))
        reasons = {path: why_never_called(modules[path.rpartition(".")[0]]) for path in layers}
        self.found = {path: why for path, why in reasons.items() if why is not None}
        self._model, self._layers, self._weight_of = model, layers, weight_of
        self._lock, self._armed = threading.Lock(), False
        self._noted: dict[int, set[str]] = {}  # by thread: several may run the model at once
        self._watched: dict[str, list[nn.Module]] = {}  # the base layer, and its lora_As

    def start(self) -> None:
        """The model's forward begins, in this thread."""
        if not self._armed:
            with self._lock:
                if not self._armed:
                    self._arm()
                    self._armed = True
        if self._watched:
            self._noted[threading.get_ident()] = set()

    def _arm(self) -> None:
        compiled = _compiled(self._model)
        for path, layer in self._layers.items():
            base = self._weight_of(layer)
            if base in compiled:
                continue
            # DeepSpeed has a dict of its own, that gathers; a quantised layer may have no weight
            if path not in self.found and type(base._parameters) is dict and "weight" in base._parameters:
                self._watched[path] = [base, *layer._modules.get("lora_A", nn.Module()).children()]
                for module in self._watched[path]:
                    note = functools.partial(self._note, path, module is not base)
                    vars(module)["_parameters"] = _Parameters(module._parameters, note)

    def finish(self) -> None:
        """The forward has ended: what it read and nobody has called so far is found."""
        noted = self._noted.pop(threading.get_ident(), ())
        for path in [path for path in list(self._watched) if path in noted]:
            self.found[path] = _READ
            self._release(path)

    def _note(self, path: str, of_adapter: bool, frame: FrameType) -> None:
        noted = self._noted.get(threading.get_ident())
        if path in self._watched and _is_called(self._layers[path], frame):
            self._release(path)
        elif noted is not None and _is_read(frame):
            self._release(path) if of_adapter else noted.add(path)

    def _release(self, path: str) -> None:
        for module in self._watched.pop(path, ()):
            if isinstance(module._parameters, _Parameters):
                vars(module)["_parameters"] = module._parameters.plain()

    def stop(self) -> None:
        """Watch nothing any longer."""
        self._armed = True
        for path in list(self._watched):
            self._release(path)


def _is_called(module: nn.Module, frame: FrameType | None) -> bool:
    """Whether the frame is in a call of the module or of its forward."""
    while frame is not None:
        if frame.f_code.co_name in ("_call_impl", "forward") and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def _is_read(frame: FrameType) -> bool:
    """Whether the frame gets a weight for a model, and not its dtype alone. Others have ``_parameters`` itself."""
    reader = frame.f_back
    while reader is not None and reader.f_code.co_name == "weight":  # the property of a LoRA layer
        reader = reader.f_back
    if frame.f_code is not _GETATTR or reader is None:
        return False
    if f"{reader.f_globals.get('__name__')}.".startswith(_MOVERS):
        return False
    return _next_attribute(reader.f_code, reader.f_lasti) not in _FACTS


@functools.lru_cache  # a store watches a layer that is never called in each of its steps
def _next_attribute(code: CodeType, last: int) -> str | None:
    """What an expression asks of the value that its instruction at ``last`` gets: "dtype" of layer.weight.dtype."""
    following = (i for i in dis.get_instructions(code) if i.offset > last)
    instruction = next((i for i in following if i.opname != "EXTENDED_ARG"), None)
    return instruction.argval if instruction is not None and instruction.opname in _GETS else None


def _compiled(model: nn.Module) -> set[nn.Module]:
    """Modules that Dynamo runs, or a method of, and all inside; by names, for to import Dynamo takes a second."""

    @functools.cache
    def is_compiled(kind: type) -> bool:
        return kind.__name__ == "OptimizedModule" or _has_compiled(kind)

    found: set[nn.Module] = set()
    for module in model.modules():
        if module not in found and (
            module._compiled_call_impl or _has_compiled(module) or any(map(is_compiled, type(module).__mro__))
        ):
            found.update(module.modules())
    return found


def _has_compiled(holder: nn.Module | type) -> bool:
    held = list(vars(holder).values())  # a thread may add to them
    functions = [vars(value) for value in held if isinstance(value, FunctionType)]
    return any("_torchdynamo_orig_callable" in own and "_torchdynamo_disable" not in own for own in functions)


class FirstForward:
    """Hooks of a model with adapters: its first forward tells which of its layers are read and not called.

    They stay: a graph that has been compiled with them would be compiled anew without.

    Args:
        layers: of a model, path -> the module to be called. models: whose forwards are looked at, until one has told.
            Whoever looks at them so far has no more to tell.
    """

    def __init__(self, layers: Callable[[nn.Module], Mapping[str, nn.Module]], *models: nn.Module):
        self._layers, self._look, self._told = layers, 0, 0  # the present look, and the last that has told
        self._reads: Reads | None = None
        self._frames: dict[str, FrameType] = {}  # the one that runs the forward that is looked at
        for model in models:  # no handles: a copy of one model would take along the hooks of the others
            self.leave(model)
            model.register_forward_pre_hook(self)
            model.register_forward_hook(self._ended, always_call=True)

    @staticmethod
    def leave(model: nn.Module) -> None:
        """Look at a model no longer: it has no adapters any more, or others."""
        for watcher in watchers(model, FirstForward):
            watcher._stop()
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", hook), FirstForward)]:
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)

    def _stop(self) -> None:
        if self._reads is not None:
            self._reads.stop()
        self._reads = None
        self._frames.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reads": None, "_frames": {}}

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or self._told == _looks:
            return
        me = sys._getframe(1)
        first = self._frames.setdefault("first", me)
        if first is not me:
            if runs(first):  # the model in itself, or in another thread
                return
            self._stop()  # an interrupt ended it, of which torch tells no hook
            self._frames["first"] = me
        self._look, self._reads = _looks, Reads(module, self._layers(module), _base_layer)
        self._reads.start()

    def _ended(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        reads, first = self._reads, self._frames.get("first")
        if reads is None or first is None:  # no first one, or another thread was quicker
            return
        failed = first is not sys._getframe(1)  # torch calls hooks from another one then
        if failed and runs(first):
            return
        if not failed:  # perhaps between the read and the call: the next forward tells
            self._told = self._look
        reads.finish()
        self._stop()
        if not failed and reads.found:
            modules = dict(named_modules(module))
            _found.update((modules[path], modules[path].training) for path in reads.found)
            warnings.warn(
                f"the model reads the weights of {some(reads.found)} without calling these layers, so in "
                f"{'training' if module.training else 'eval'} mode their adapters are neither computed nor trained; "
                "leave them out with exclude_modules",
                stacklevel=3,
            )


def _base_layer(layer: nn.Module) -> nn.Module:
    while "base_layer" in layer._modules:
        layer = layer.get_submodule("base_layer")
    return layer
