"""The modules of a model under its own paths: without the names that torch's wrappers put in between."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

_T = TypeVar("_T")
CONFIGS = "_fused_lora_configs"  # plain attribute of an injected model: adapter name -> LoraConfig
_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # torch.compile, checkpoint_wrapper, FSDP1
_BEFORE = re.compile(r"^((module|base_model\.model)\.)+")  # DDP, PEFT
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def own_path(path: str) -> str:
    """``path`` without the names that torch.compile, checkpoint_wrapper and FSDP1 give to what they wrap."""
    return ".".join(part for part in path.split(".") if part not in _INNER) if "._" in f".{path}" else path


def bare_path(path: str) -> str:
    """:func:`own_path` without what DDP and PEFT put before it."""
    return _BEFORE.sub("", own_path(path))


def bare_module(path: str) -> str:
    """The module that one of PEFT's wrappers of its parameters is around: they are nested, one for each parameter."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def above(path: str) -> list[str]:
    """The paths that lead to ``path``: "a" and "a.b" for "a.b.c"."""
    return [path[:i] for i, letter in enumerate(path) if letter == "."]


def watchers(module: nn.Module, kind: type[_T]) -> list[_T]:
    """The objects of a class that watch a module's forwards by a pre-hook."""
    owners: list[Any] = [getattr(hook, "__self__", hook) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, kind)]


def unwrapped(module: nn.Module) -> nn.Module:
    """What torch's wrappers around ``module`` hold: compile, checkpoint_wrapper, FSDP1, (D)DP, DeepSpeed's engine."""
    while True:
        children = module._modules
        if "module" in children and (isinstance(module, _PARALLEL) or type(module).__name__ == "DeepSpeedEngine"):
            inner = children["module"]
        else:
            inner = next((children[name] for name in _INNER if name in children), None) if children else None
        if inner is None:
            return module
        module = inner


def named_modules(model: nn.Module, closed: type[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` under the model's own paths, each wrapper passed over for what it holds.

    What modules of the class ``closed`` hold is left out.
    """
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        module = unwrapped(module)
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module
            if closed is not None and isinstance(module, closed):
                continue
            children = [(f"{path}.{name}" if path else name, c) for name, c in module._modules.items() if c is not None]
            waiting += reversed(children)


def places(model: nn.Module, closed: type[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path, parent, module) of everything that ``model`` holds: a module that has several parents comes several times.

    Parents are those of :func:`named_modules`, and wrappers are passed over as there. What modules of the class
    ``closed`` hold is left out.
    """
    for path, parent in named_modules(model, closed):
        if closed is not None and isinstance(parent, closed):
            continue
        for name, child in parent._modules.items():
            if child is not None:
                yield f"{path}.{name}" if path else name, parent, unwrapped(child)


def parent_of(modules: Mapping[str, nn.Module], path: str) -> tuple[nn.Module, str]:
    """(module, attribute) that hold the module at ``path``; ``modules`` is ``dict(named_modules(model))``.

    Raises RuntimeError when one of torch's wrappers holds it: what it compiled or registered would stay with the old
    module.
    """
    parent, _, name = path.rpartition(".")
    holder = modules[parent]
    held = holder._modules[name]
    if held is not modules[path]:
        raise RuntimeError(f"{path!r} is wrapped by a {type(held).__name__} of its own, which must be taken off first")
    return holder, name


def held_parts(module: Any) -> tuple[Any, Any]:
    """lora_A and lora_B by adapter name: of an embedding those that it has as parameters."""
    parts = module._modules
    if parts.get("lora_embedding_A"):
        return parts["lora_embedding_A"], parts["lora_embedding_B"]
    return parts.get("lora_A", {}), parts.get("lora_B", {})
