"""Who may change a model's LoRA layers now: one thread at a time, and never in the middle of another thread's forward.

``with changing(model):`` holds the model, all of its modules at once or none. Other threads that want one of them wait.
A forward of the model that another thread has begun is finished first; one that it begins meanwhile waits. So a call of
a watched module (:func:`watch`) sees all of a change or nothing.

The state is the process's, not the model's: copies and pickles of a model know nothing of it. A forward is known by the
frame that runs it, which tells by itself when it has ended, also by an interrupt. docs/decisions/0037-changes.md tells
more.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from fused_lora.ops import native

P = ParamSpec("P")
R = TypeVar("R")

_PAUSE = 0.0005  # seconds between two looks at a forward that is awaited

_mutex = threading.Lock()  # for changes of the next three; held for moments
CHANGING: dict[int, _Change] = {}  # id of a module -> the change that holds it
_waiting: set[int] = set()  # threads that wait to change something: nobody waits for their forwards
_admitted: set[int] = set()  # threads whose forward waited for a change that has ended: they go first
FORWARDS: dict[tuple[int, int], tuple[nn.Module, FrameType]] = {}  # (watched module's id, thread): its outermost call


def _ids(module: nn.Module) -> set[int]:
    """Of a module and all that it holds; a merge of many small layers would notice the time of ``modules()``."""
    found, waiting = {id(module)}, [module]
    for one in waiting:  # which grows meanwhile
        for child in list(one._modules.values()):  # at once: another thread may add some
            if child is not None and id(child) not in found:
                found.add(id(child))
                if child._modules:
                    waiting.append(child)
    return found


class _Change:
    """One change and what it holds."""

    def __init__(self, forwards: bool):
        self.thread, self.forwards = threading.get_ident(), forwards
        self.claimed = False
        self.modules: set[int] = set()
        self.held: set[int] = set()  # those that this change has claimed, and not one around it
        self.waiters: set[int] = set()  # threads whose forward waits for the end
        self.ended = threading.Lock()
        self.ended.acquire()
        self._release = map(operator.methodcaller("release"), [self.ended])  # once, which no interrupt divides

    def claim(self, module: nn.Module) -> _Change | None:
        """Take all modules or none; returns the change that has one of them."""
        with _mutex:
            self.modules = _ids(module)
            other, self.held = None, self.modules
            if CHANGING:
                theirs = (CHANGING[m] for m in self.modules & CHANGING.keys())
                other = next((c for c in theirs if c.thread != self.thread), None)
                self.held = self.modules - CHANGING.keys()
            if other is None and not _admitted:
                CHANGING.update(dict.fromkeys(self.held, self))
                self.claimed = True
            return other

    def awaits(self) -> bool:
        """Whether a forward of another thread is under way."""
        others = {thread for _, thread in list(FORWARDS)} - {self.thread} - _waiting
        return any(self.awaits_thread(thread) for thread in others)

    def awaits_thread(self, thread: int, besides: tuple[int, int] | None = None) -> bool:
        """Whether this thread is in a forward of something that has a module of this change."""
        return self.forwards and any(
            key[1] == thread and key != besides and runs(frame) and self.concerns(module)
            for key, (module, frame) in list(FORWARDS.items())
        )

    def concerns(self, module: nn.Module) -> bool:
        """Whether it has a module of this one."""
        return not self.modules.isdisjoint(_ids(module))

    def end(self) -> None:
        """Does nothing the second time."""
        with _mutex:
            _waiting.discard(self.thread)
            for module in self.held:
                if CHANGING.get(module) is self:
                    del CHANGING[module]
            self.held = set()
            _admitted.update(self.waiters)
            self.waiters = set()
            next(self._release, None)


@contextmanager
def changing(module: nn.Module, forwards: bool = True) -> Iterator[None]:
    """Alone with a model or a layer: no other thread changes it, or any part of it, and none is in a forward of it.

    A thread may do this again inside. One that does it in the middle of a forward of its own does not wait for that,
    and while it waits, nobody waits for that forward either: it sees both states.

    Args:
        module: the model, or one layer. forwards: False only keeps other changes away, for who wants to read.
    """
    held = CHANGING.get(id(module))
    if held is not None and held.thread == threading.get_ident():
        yield
        return
    change = _Change(forwards)
    try:
        _waiting.add(change.thread)
        while not change.claimed:
            other = change.claim(module)
            if other is not None:
                with other.ended:
                    pass
            elif not change.claimed:
                time.sleep(_PAUSE)
        while FORWARDS and change.awaits():
            time.sleep(_PAUSE)
        _waiting.discard(change.thread)
        yield
    finally:
        try:
            change.end()
        finally:  # an interrupt may have stopped the first
            change.end()


@contextmanager
def undone_on_error(
    model: nn.Module, values: Iterable[Tensor] = (), changed: Iterable[nn.Module] | None = None
) -> Iterator[None]:
    """If the body raises, all modules of ``model`` have their classes, children, hooks and other attributes again, and
    the parameters their ``requires_grad``. Nobody's code is called for that. Of tensors only ``values`` are kept.

    changed: the modules whose attributes the body changes, where these are few.
    """
    modules = list(model.modules())
    flags = [(p, p.requires_grad) for module in modules for p in module._parameters.values() if p is not None]
    kept = [(tensor, tensor.detach().clone()) for tensor in values]
    before = []
    for holder in (holder for module in changed or modules for holder in holders_of_methods(module)):
        attributes = dict(vars(holder))
        containers = [held for held in attributes.values() if type(held) in (dict, OrderedDict, list, set)]
        contents = [(held, held.copy()) for held in containers if held]  # a dozen are empty in each module
        before.append((holder, type(holder), attributes, containers, contents))
    try:
        yield
    except BaseException:
        for holder, kind, attributes, containers, contents in before:
            if type(holder) is not kind:
                object.__setattr__(holder, "__class__", kind)
            for held in containers:
                held.clear()
            for held, content in contents:
                (held.extend if isinstance(held, list) else held.update)(content)
            vars(holder).clear()
            vars(holder).update(attributes)
        for parameter, flag in flags:
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        raise


def holders_of_methods(module: nn.Module) -> tuple[Any, ...]:
    """The module, and what else keeps bound methods of it: hooks of diffusers."""
    return module, *getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ())


def alone(function: Callable[P, R]) -> Callable[P, R]:
    """A function or method that runs alone with its first argument, a module; see :func:`changing`."""

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        module = args[0] if args else kwargs.get("model")
        if not isinstance(module, nn.Module):
            return function(*args, **kwargs)  # which says so
        with changing(module), native.in_a_child():  # what ends that follows the last note of a merge
            return function(*args, **kwargs)

    return inner


def wait_for_change(module: nn.Module, besides: tuple[int, int] | None = None) -> bool:
    """Before a forward, while ``CHANGING`` holds something: wait until another thread's change of it has ended.

    Returns False where nothing is to be waited for: a change may wait itself, for a forward of this thread that is
    around this one (``besides``: the key of this one, which is taken out while it waits).
    """
    if torch.compiler.is_compiling():
        return False
    me, change, waited = threading.get_ident(), None, False
    try:
        while True:
            with _mutex:
                _admitted.discard(me)
                others = (c for c in set(CHANGING.values()) if c.thread != me and c.forwards and c.concerns(module))
                change = next((c for c in others if not c.awaits_thread(me, besides)), None)
                if change is None:
                    return waited
                change.waiters.add(me)
                FORWARDS.pop(besides or (0, 0), None)
            with change.ended:
                waited = True
    except BaseException:
        with _mutex:
            _admitted.discard(me)
            if change is not None:
                change.waiters.discard(me)
        raise


def watch(model: nn.Module) -> None:
    """Let changes wait for calls of this module; twice is once."""
    if _begin not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin)
        model.register_forward_hook(_end, always_call=True)


def unwatch(model: nn.Module) -> None:
    """Undo :func:`watch`."""
    for hooks, ours in ((model._forward_pre_hooks, _begin), (model._forward_hooks, _end)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def _begin(module: nn.Module, args: object) -> None:
    if torch.compiler.is_compiling():
        return
    key = id(module), threading.get_ident()
    before = FORWARDS.get(key)
    if before is not None and runs(before[1]):
        return  # a module in itself
    FORWARDS[key] = module, sys._getframe(1)  # before the look: a change looks here after it has said that it comes
    while CHANGING and wait_for_change(module, key):
        FORWARDS[key] = module, sys._getframe(1)


def _end(module: nn.Module, args: object, output: object) -> None:
    if torch.compiler.is_compiling():
        return
    key = id(module), threading.get_ident()
    if key in FORWARDS and (FORWARDS[key][1] is sys._getframe(1) or not runs(FORWARDS[key][1])):
        del FORWARDS[key]


def runs(frame: FrameType) -> bool:
    """Whether a frame runs, in any thread."""
    try:
        frame.clear()
    except RuntimeError:  # only of a frame that runs, in any thread
        return True
    return False


def _after_fork() -> None:
    """The child has none of the other threads: what they held is free."""
    global _mutex
    _mutex = threading.Lock()
    for module, change in list(CHANGING.items()):
        if change.thread != threading.get_ident():
            del CHANGING[module]
    for key in [key for key in FORWARDS if key[1] != threading.get_ident()]:
        del FORWARDS[key]
    _waiting.clear()
    _admitted.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
