"""Layers whose weight a model reads without calling them: an adapter there changes nothing until it is merged.

torch's own attention does so, and Mamba's dt_proj, fused kernels over several layers, or F.linear(x, layer.weight).
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fused_lora.modules.names import some
from fused_lora.modules.tree import named_modules

_READ = "has its weight read by a forward that does not call it, so an adapter does nothing there"
# layers that a first forward has found so -> the mode, training or not, that they were in
_found: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def why_read(layer: nn.Module) -> str | None:
    """Why an adapter of this layer does nothing in its mode, as the model's first forward has told."""
    return _READ if _found.get(layer) is layer.training else None


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
    """The parameters of a module; asking for the weight is noted. Copies are plain."""

    def __init__(self, parameters: Mapping[str, Any], note: Callable[[], None]):
        super().__init__(parameters)
        self._note = note

    def __getitem__(self, name: str) -> Any:
        if name == "weight":
            self._note()
        return super().__getitem__(name)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class Reads:
    """Watches layers until each has been called once. What a forward of the model reads and has never called is found.

    A weight that another module shares may be read there. A model with compiled parts is not watched.

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
        self._watched: dict[str, tuple[nn.Module, RemovableHandle]] = {}

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
        # by name: to import dynamo takes a second
        if any(m._compiled_call_impl or type(m).__name__ == "OptimizedModule" for m in self._model.modules()):
            return
        for path, layer in self._layers.items():
            base = self._weight_of(layer)
            if path not in self.found:
                vars(base)["_parameters"] = _Parameters(base._parameters, _Note(self, path))
                self._watched[path] = base, layer.register_forward_hook(_Called(self, path))

    def finish(self) -> None:
        """The forward has ended: what it read and nobody has called so far is found."""
        for path in self._noted.pop(threading.get_ident(), ()):
            if path in self._watched:
                self.found[path] = _READ
                self.release(path)

    def note(self, path: str) -> None:
        """The weight of ``path`` is read."""
        noted = self._noted.get(threading.get_ident())
        if noted is not None:
            noted.add(path)

    def release(self, path: str) -> None:
        """Watch ``path`` no longer."""
        base, handle = self._watched.pop(path, (None, None))
        if base is not None and handle is not None:
            handle.remove()
            if type(base._parameters) is _Parameters:
                vars(base)["_parameters"] = dict(base._parameters)

    def stop(self) -> None:
        """Watch nothing any longer."""
        self._armed = True
        for path in list(self._watched):
            self.release(path)


class _Note:
    """What :class:`_Parameters` calls."""

    def __init__(self, reads: Reads, path: str):
        self._reads, self._path = reads, path

    def __call__(self) -> None:
        self._reads.note(self._path)


class _Called:
    """Hook of a watched layer. Copies of the model share it."""

    def __init__(self, reads: Reads, path: str):
        self._reads, self._path = reads, path

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._reads.release(self._path)

    def __deepcopy__(self, memo: dict) -> _Called:
        return self


class FirstForward:
    """Pre-hook of a model with adapters: its first forward tells which of its layers are read and not called.

    Args:
        models: whose forwards are looked at, until one has told. layers: of that one, path -> the module to be called.
        stays: whether the hooks do; a graph that has been compiled with them would be compiled anew without.
    """

    def __init__(self, layers: Callable[[nn.Module], Mapping[str, nn.Module]], *models: nn.Module, stays: bool = False):
        self._layers, self.stays, self._told = layers, stays, False
        self._handles = [model.register_forward_pre_hook(self) for model in models]
        self._reads: Reads | None = None
        self._end: RemovableHandle | None = None
        self._handled: BaseException | None = None  # what the caller was handling

    def remove(self) -> None:
        """Watch nothing: the model has no adapters any longer, or others."""
        for handle in self._handles:
            handle.remove()

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or self._reads is not None or self._told:
            return
        if not self.stays:
            self.remove()
        self._reads = Reads(module, self._layers(module), _base_layer)
        self._end = module.register_forward_hook(self._ended, always_call=True)
        self._handled = sys.exc_info()[1]
        self._reads.start()

    def _ended(self, module: nn.Module, args: tuple, output: Any) -> None:
        reads, end, failed = self._reads, self._end, sys.exc_info()[1] is not self._handled
        if reads is None or end is None:
            return
        end.remove()
        reads.finish()
        reads.stop()
        self._reads = self._end = self._handled = None
        if failed:  # perhaps between the read and the call: the next forward tells
            if not self.stays:
                self._handles = [module.register_forward_pre_hook(self)]
            return
        self._told = True
        if reads.found:
            modules = dict(named_modules(module))
            _found.update((modules[path], modules[path].training) for path in reads.found)
            warnings.warn(
                f"the model reads the weights of {some(reads.found)} without calling these layers, so their adapters "
                "are neither computed nor trained; leave them out with exclude_modules",
                stacklevel=3,
            )


def _base_layer(layer: nn.Module) -> nn.Module:
    while "base_layer" in layer._modules:
        layer = layer.get_submodule("base_layer")
    return layer
