"""Forward hooks that connect a store with a model. Layers, weights and keys do not change."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_lora.modules.targets import candidates, in_out_features, is_supported
from fused_lora.serving.batch.batch import running
from fused_lora.serving.residency.packing import Site


def find_sites(model: nn.Module) -> dict[str, Site]:
    """The linear layers of a plain model by path.

    Raises:
        TypeError: model is not a module. ValueError: it has LoRA layers already, or no linear layer.
        RuntimeError: a store is attached to it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    sites: dict[str, Site] = {}
    for path, module in candidates(model):
        if hasattr(module, "lora_A"):
            raise ValueError(f"model: expected a plain model, {path!r} has LoRA layers already; unload them first")
        if any(isinstance(hook, _Hook) and hook.attached for hook in module._forward_hooks.values()):
            raise RuntimeError("model: another store is attached to it; call its detach() first")
        if is_supported(module):
            sites[path] = Site(len(sites), path, module, *in_out_features(module))
    if not sites:
        raise ValueError(f"model: the {type(model).__name__} has no linear layer")
    return sites


class Attachment:
    """The hooks of one store on one model, and on its copies."""

    def __init__(self, model: nn.Module, sites: dict[str, Site], store: Any):
        for module in model.modules():
            _drop_ended(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
            _drop_ended(module._forward_hooks, module._forward_hooks_with_kwargs)
        before, after = _ModelHook(store), _OutputHook(store)
        self._hooks: list[_Shared] = [before, after]
        self._handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]
        for site in sites.values():
            hook = _Hook(store, site)
            self._hooks.append(hook)
            self._handles.append(site.module.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks. Those of copies do nothing from now on, and let go of the store."""
        for handle in self._handles:
            handle.remove()
        for hook in self._hooks:
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


class _ModelHook(_Shared):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        batch = running(self._store)
        if batch is not None:
            batch.called(args, kwargs)


class _OutputHook(_Shared):
    """After the model: rows of adapters that are not finite are an error."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        batch = running(self._store)
        if batch is not None:
            batch.returned(kwargs, output)


class _Hook(_Shared):
    """After a linear layer: add the LoRA terms of the running batch to its output."""

    def __init__(self, store: Any, site: Site | None = None):
        super().__init__(store)
        self._site = site

    def end(self) -> None:
        super().end()
        self._site = None  # it holds the layer of the first model

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        batch, site = running(self._store), self._site
        if batch is not None and batch.acts and site is not None:
            batch.add(site, args[0] if args else next(iter(kwargs.values())), output)
