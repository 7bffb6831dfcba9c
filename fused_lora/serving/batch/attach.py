"""Forward hooks that connect a store with a model. Layers, weights and keys do not change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fused_lora.modules.experts import form_of, positional, stacks_of
from fused_lora.modules.names import some
from fused_lora.modules.offload import execution_device
from fused_lora.modules.reads import Reads
from fused_lora.modules.targets import (
    adapter_dtype,
    candidates,
    in_out_features,
    is_lora_layer,
    is_supported,
    kinds_of,
    matrices_left,
)
from fused_lora.modules.tree import above, named_modules
from fused_lora.serving.batch.batch import running
from fused_lora.serving.residency.packing import Site, why_not_experts


def find_sites(model: nn.Module) -> dict[str, Site]:
    """What adapters of a plain model may target, by path: linear layers first, then embeddings and stacked experts.

    Raises:
        TypeError: model is not a module. ValueError: it has LoRA layers already, or nothing to target; parameters that
            are no linear layers are named.
        RuntimeError: a store is attached to it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    linear, others = [], []
    for path, module in candidates(model):
        if hasattr(module, "lora_A") or is_lora_layer(module):
            raise ValueError(f"model: expected a plain model, {path!r} has LoRA layers already; unload them first")
        if any(isinstance(hook, _Hook) and hook.attached for hook in module._forward_hooks.values()):
            raise RuntimeError("model: another store is attached to it; call its detach() first")
        if is_supported(module):
            embeds = isinstance(module, nn.Embedding)
            fields = (path, module, *in_out_features(module), "embedding" if embeds else "linear")
            (others if embeds else linear).append(fields)
        for stack in stacks_of(module, path):
            others.append((stack.path, module, stack.K, stack.N, "experts", stack.experts))
    sites = {fields[0]: Site(index, *fields) for index, fields in enumerate(linear + others)}
    if not sites:
        kind, left = type(model).__name__, kinds_of(matrices_left(model))
        text = f"the {kind} has no linear layer"
        if left:
            text = f"these parameters are of no layer that is served, and the {kind} has no other: {some(left)}"
        raise ValueError(f"model: {text}")
    return sites


def weight_of(site: Site) -> tuple[torch.device, torch.dtype]:
    """Where the weight of a site is while it runs, and the dtype of its adapters in the model."""
    if site.kind == "experts":
        weight: Any = site.module._parameters[site.path.rpartition(".")[2]]
        return weight.device, weight.dtype
    return execution_device(site.module), adapter_dtype(site.module)


class Attachment:
    """The hooks of one store on one model, and on its copies; and which of its layers they never reach."""

    def __init__(self, callers: Mapping[str, nn.Module], sites: dict[str, Site], store: Any):
        for module in store.model.modules():
            _drop_ended(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
            _drop_ended(module._forward_hooks, module._forward_hooks_with_kwargs)
        self._hooks: list[tuple[Callable[..., Any], _Shared, dict[str, bool]]] = []  # what registers it, with options
        self._handles = []
        self._experts = {path: site for path, site in sites.items() if site.kind == "experts"}
        called = {path: s.module for path, s in sites.items() if s.kind != "experts"}
        # of a module that is a linear layer, too, one watch is enough
        others = {
            path: s.module for path, s in self._experts.items() if s.place not in called and form_of(s.module).dim == 2
        }
        self._reads = Reads(store.model, {**called, **others})
        for path, module in callers.items():
            reads = None if path else self._reads
            self._hooks.append((module.register_forward_pre_hook, _CallHook(store, path, reads), {}))
            self._hooks.append((module.register_forward_hook, _ReturnHook(store, path, reads), dict(always_call=True)))
        at: dict[tuple, list[Site]] = {}  # by kind, too: a router may be a linear layer
        for site in sites.values():
            at.setdefault((site.place, site.kind), []).append(site)
        self._odd: dict[str, str] = {}  # layer -> what it gets or gives, where that is no tensor
        for held in at.values():
            experts = held[0].kind == "experts"
            hook = (_ExpertsHook if experts else _Hook)(store, tuple(held), self._odd)
            # hooks of others get the rows of adapters, too: what they change is not computed again
            self._hooks.append((held[0].module.register_forward_hook, hook, dict(prepend=experts)))
        modules = dict(named_modules(store.model))
        paths = sorted({part for site in sites.values() for part in (*above(site.place), site.place)})
        self._places = []  # path, the parent's modules, the name there, what was there
        for path in paths:
            parent, _, name = path.rpartition(".")
            held = modules[parent]._modules
            self._places.append((path, held, name, held[name]))

    def attach(self) -> None:
        """Register the hooks. After an interrupt there are none: nobody would have the store, to detach it."""
        try:
            for register, hook, options in self._hooks:
                self._handles.append(register(hook, with_kwargs=True, **options))
        except BaseException:
            self.remove()
            raise

    def unreached(self, paths: Iterable[str]) -> str | None:
        """Why the hook of one of these layers is not reached, or cannot act: the model reads its weight instead of
        calling it, or has another module in its place, or its experts run in a way that is not known."""
        if self._experts:  # of other models nothing is asked, for a batch comes here at its end
            paths = list(paths)
            for site in (self._experts[path] for path in paths if path in self._experts):
                if why := why_not_experts(site):
                    return f"the parameter {site.path!r}: {why}"
        replaced = [path for path, held, name, module in self._places if held.get(name) is not module]
        if not (replaced or self._odd or self._reads.found):
            return None
        for path in paths:
            if path in self._odd:
                return f"the layer {path!r} {self._odd[path]}, to which nothing can be added"
            if path in self._reads.found:
                return f"the layer {path!r} {self._reads.found[path]}"
            if any(f"{path}.".startswith(f"{other}.") for other in replaced):
                return f"the layer {path!r} was replaced since the store was made"
        return None

    def remove(self) -> None:
        """Remove the hooks. Those of copies do nothing from now on, and let go of the store."""
        self._reads.stop()
        for handle in self._handles:
            handle.remove()
        for _, hook, _ in self._hooks:
            hook.end()
        self._handles, self._hooks = [], []


def _drop_ended(hooks: dict[int, Any], with_kwargs: dict[int, bool]) -> None:
    """Remove what a detached store has left on a copy of its model."""
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Shared) and not hook.attached]:
        del hooks[key]
        with_kwargs.pop(key, None)


class _Shared:
    """Copies of the model share the store, because arenas and locks cannot be copied."""

    def __init__(self, store: Any):
        self._store = store

    @property
    def attached(self) -> bool:
        """Whether the store has not been detached."""
        return self._store is not None

    def end(self) -> None:
        """Do nothing from now on."""
        self._store = None

    def __deepcopy__(self, memo: dict) -> _Shared:
        return self

    def __reduce__(self) -> tuple:
        if self.attached:
            raise TypeError(
                "a model with an AdapterStore cannot be pickled or saved whole: call store.detach() first, or save "
                "model.state_dict()"
            )
        return type(self), (None,)


class _AroundHook(_Shared):
    """Of the model, or of a module in it that is called by itself, as ``generate`` calls an encoder.

    reads: of the model: which of its layers it reads without calling them.
    """

    def __init__(self, store: Any, path: str = "", reads: Reads | None = None):
        super().__init__(store)
        self._path, self._reads = path, reads

    def end(self) -> None:
        super().end()
        self._reads = None


class _CallHook(_AroundHook):
    """Before it."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling():  # what runs then is not seen operator by operator
            return
        batch = running(self._store)
        if batch is not None:
            batch.called(self._path, module, args, kwargs)
        elif self._store is not None:
            self._store.calls_outside += 1
        if self._reads is not None:
            self._reads.start()


class _ReturnHook(_AroundHook):
    """After it, after an exception, too: rows of adapters that are not finite are an error, and so is an adapter whose
    layers were not all reached."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        batch = running(self._store)
        if batch is not None:
            batch.returned(module, kwargs, output)
        if self._reads is not None and output is not None:  # None after an exception
            self._reads.finish()
            if batch is not None:
                self._store.check_called(batch.groups)


class _Hook(_Shared):
    """After a linear layer or an embedding: add the LoRA terms of the running batch to its output.

    odd: is told what the layer gets or gives, where that is no tensor, as of Llama-4's routers.
    """

    def __init__(self, store: Any, sites: tuple[Site, ...] = (), odd: dict[str, str] | None = None):
        super().__init__(store)
        self._odd = odd
        self._sites, self._number = sites, next(_numbers)
        _hooks[self._number] = self

    def end(self) -> None:
        super().end()
        self._sites = ()  # they hold the layer of the first model

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not (isinstance(x, Tensor) and isinstance(output, Tensor)):  # adapters of the layer are refused
            does, what = ("returns", output) if isinstance(x, Tensor) else ("gets", x)
            if self._sites and self._odd is not None and not torch.compiler.is_compiling():
                self._odd[self._sites[0].path] = f"{does} a {type(what).__name__}"
            tensors = [t for t in (x, output) if isinstance(t, Tensor)]
            x = tensors[0] if tensors else torch.empty(0, device="cpu")
            output = x.new_empty(0)
        if torch.compiler.is_compiling():
            _store_terms(output, [x], self._number)
            return
        batch = running(self._store)
        if batch is not None and batch.acts and self._sites:
            site = self._sites[0]
            batch.add(site, x.unsqueeze(-1) if site.kind == "embedding" else x, output)

    def add_compiled(self, inputs: Sequence[Tensor], y: Tensor) -> None:
        """What a call adds, from compiled code."""
        batch = running(self._store)
        if batch is not None and batch.acts and self._sites:
            site = self._sites[0]
            x = inputs[0].unsqueeze(-1) if site.kind == "embedding" else inputs[0]
            batch.compiled(self._sites, x, lambda: batch.add(site, x, y))


class _ExpertsHook(_Hook):
    """After experts, or a module with a matrix: put results under the adapters of the running batch into its output."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        call = positional(module, args, kwargs)
        if torch.compiler.is_compiling():
            outputs = [*output] if isinstance(output, (tuple, list)) else [output]
            if not all(isinstance(t, Tensor) for t in (*call, *outputs)):
                # adapters are refused, when it is known whether there are any; a graph drops what nobody reads
                held = output.values() if isinstance(output, Mapping) else outputs
                outputs, call = [t for t in (*held, *call) if isinstance(t, Tensor)][:1], ()
            _store_rows(outputs, call, self._number)
            return
        batch = running(self._store)
        if batch is not None and batch.acts and self._sites:
            batch.add_experts(self._sites, call, output)

    def add_rows(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """What a call puts in, from compiled code."""
        batch = running(self._store)
        if batch is not None and batch.acts and self._sites:
            sites, y = self._sites, outputs[0] if len(outputs) == 1 else tuple(outputs)
            x = (*inputs, *outputs, torch.empty(0, device="cpu"))[0]
            batch.compiled(sites, x, lambda: batch.add_experts(sites, inputs, y))


_numbers = itertools.count()
_hooks: WeakValueDictionary[int, _Hook] = WeakValueDictionary()


@torch.library.custom_op("fused_lora::store_terms_", mutates_args=("y",))
def _store_terms(y: Tensor, inputs: Sequence[Tensor], number: int) -> None:
    """y += the terms of the batch that runs then, which a graph knows nothing of. number: of the layer's hook."""
    _hooks[number].add_compiled(inputs, y)


@_store_terms.register_fake
def _(y: Tensor, inputs: Sequence[Tensor], number: int) -> None:
    return None


@torch.library.custom_op("fused_lora::store_rows_", mutates_args=("outputs",))
def _store_rows(outputs: Sequence[Tensor], inputs: Sequence[Tensor], number: int) -> None:
    """The same of experts: rows of what they gave."""
    hook: Any = _hooks[number]
    hook.add_rows(inputs, outputs)


@_store_rows.register_fake
def _(outputs: Sequence[Tensor], inputs: Sequence[Tensor], number: int) -> None:
    return None
