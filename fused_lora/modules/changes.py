"""Who may change a model's LoRA layers now: one thread at a time, and never in the middle of another thread's forward.

``with changing(model):`` holds the model, all of its modules at once or none. Other threads that want one of them wait.
A forward that another thread has begun is finished first; one that it begins meanwhile waits at its first LoRA layer.
So a call of the model, or of any module in it, sees all of a change or nothing.

The state is the process's, not the model's: copies and pickles of a model know nothing of it. Nothing marks a forward:
whoever changes a model looks for forwards on the stacks of the other threads, so a forward pays for one look at an
empty dict, and one that ends by an interrupt leaves nothing behind. docs/decisions/0037-changes.md tells more.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")

_CALL = nn.Module._call_impl.__code__
_PAUSE = 0.0005  # seconds between two looks at a forward that is awaited

_mutex = threading.Lock()  # for the four below; held for moments
CHANGING: dict[int, _Change] = {}  # id of a module -> the change that holds it
_waiting: set[int] = set()  # threads that wait to change something: for their forwards nobody waits
_admitted: set[int] = set()  # threads whose forward waited for a change that has ended: they go first


class _Change:
    """One change: what it holds, and the forwards of other threads that it has to let end."""

    def __init__(self, forwards: bool):
        self.thread, self.forwards = threading.get_ident(), forwards
        self.claimed = False
        self.held: set[int] = set()  # what this change has claimed, and not one around it
        self.begun: dict[int, FrameType] = {}  # thread -> its outermost call of a module that is held
        self.waiters: set[int] = set()  # threads whose forward waits for the end
        self.ended = threading.Lock()
        self.ended.acquire()

    def claim(self, module: nn.Module) -> _Change | None:
        """Take all modules or none; returns the change that has one of them."""
        with _mutex:
            modules = {id(m) for m in module.modules()}
            theirs = (CHANGING[m] for m in modules & CHANGING.keys())
            other = next((c for c in theirs if c.thread != self.thread), None)
            if other is None and not _admitted:
                self.held = modules - CHANGING.keys()
                CHANGING.update(dict.fromkeys(self.held, self))
                self.begun = _calls(modules) if self.forwards else {}
                self.claimed = True
            return other

    def awaits(self) -> bool:
        """Whether a forward that had begun before is still under way."""
        with _mutex:
            stacks = sys._current_frames()
            begun = {thread: call for thread, call in self.begun.items() if thread not in _waiting}
            return any(call is frame for thread, call in begun.items() for frame in _stack(stacks.get(thread)))

    def end(self) -> None:
        """Does nothing the second time."""
        with _mutex:
            _waiting.discard(self.thread)
            for module in self.held:
                if CHANGING.get(module) is self:
                    del CHANGING[module]
            self.held, self.begun = set(), {}
            _admitted.update(self.waiters)
            self.waiters = set()
            if self.ended.locked():
                self.ended.release()


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
        while change.begun and change.awaits():
            time.sleep(_PAUSE)
        _waiting.discard(change.thread)
        yield
    finally:
        try:
            change.end()
        finally:  # an interrupt may have stopped the first
            change.end()


def alone(function: Callable[P, R]) -> Callable[P, R]:
    """A function or method that runs alone with its first argument, a module; see :func:`changing`."""

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        module = args[0] if args else kwargs.get("model")
        if not isinstance(module, nn.Module):
            return function(*args, **kwargs)  # which says so
        with changing(module):
            return function(*args, **kwargs)

    return inner


def wait_for_change(layer: nn.Module) -> None:
    """Before a forward of a layer, while ``CHANGING`` holds something: wait until another thread's change has ended."""
    if torch.compiler.is_compiling():
        return
    me, change = threading.get_ident(), None
    try:
        while True:
            with _mutex:
                _admitted.discard(me)
                change = CHANGING.get(id(layer))
                if change is None or change.thread == me or not change.forwards:
                    return
                if me in change.begun and any(frame is change.begun[me] for frame in _stack(sys._getframe())):
                    return  # the change waits for this very forward
                change.waiters.add(me)
            with change.ended:
                pass
    except BaseException:
        with _mutex:
            _admitted.discard(me)
            if change is not None:
                change.waiters.discard(me)
        raise


def _calls(modules: set[int]) -> dict[int, FrameType]:
    """The outermost call of one of these modules in every other thread that is in one."""
    found = {}
    for thread, innermost in sys._current_frames().items():
        for frame in _stack(innermost):
            if frame.f_code is _CALL and id(frame.f_locals.get("self")) in modules:
                found[thread] = frame
    found.pop(threading.get_ident(), None)
    return found


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _after_fork() -> None:
    """The child has none of the other threads: what they held is free."""
    global _mutex
    _mutex = threading.Lock()
    for module, change in list(CHANGING.items()):
        if change.thread != threading.get_ident():
            del CHANGING[module]
    _waiting.clear()
    _admitted.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
