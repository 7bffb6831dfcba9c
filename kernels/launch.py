"""A launch of which only the tensors change: what Triton binds, specialises and looks up at every call is kept.

``kernel[grid](...)`` takes 14 to 26 microseconds of Python, most of it to find out which binary fits the arguments. A
launcher makes one ``Launch`` for each combination of shapes, strides, dtypes and constants and keeps it under them
(``lru_cache``). Its first run is Triton's own; later ones call the compiled kernel, in about 4 microseconds.

Triton's own way stays where a kept binary would be wrong or unseen: for a pointer that is not a multiple of 16 bytes
(Triton compiles for those apart), while a launch hook or another of Triton's debugging aids is set, in the interpreter,
and with a Triton or a backend whose calls are not known here.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from functools import reduce
from operator import is_, itemgetter, or_
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .descriptors import descriptor_memory

_loading = threading.RLock()  # Triton publishes a binary before it has loaded it: another thread would launch nothing
DEFAULTS = {"enable_fp_fusion": True}  # Triton's own changes with 3.10, of which 3.9 warns: an error where warnings are
KEPT = 4096  # launches of one kernel, the least recently used of which is forgotten for a new one
_data_ptr = torch.Tensor.data_ptr
_KNOWN = (3, 4) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)


class _Ready(NamedTuple):
    """What the launch of a compiled kernel needs."""

    present: Callable  # of the launch's tensors those that are there, one after the other
    order: Callable  # of their addresses and a None what the kernel takes
    run: Callable  # of the head, the stream, the middle, and what the kernel takes
    head: tuple
    middle: tuple
    arguments: tuple  # all of the kernel's after the tensors, constants included
    nested: bool  # whether ``run`` wants the kernel's arguments in one tuple
    scratch: bool  # whether it wants memory, for descriptors
    device: int
    current_device: Callable
    current_stream: Callable
    binary: object  # whose end would unload the function


class Launch:
    """One launch with everything but its kernel's first parameters, the tensors.

    grid: up to three numbers of programs; arguments: the kernel's, after the tensors; fixed: its constexprs and
    Triton's options. Whoever keeps a Launch keeps it for tensors of the same dtypes on the same device, None in the
    same places. Where a microsecond counts, keep its ``__call__``: Python takes a detour through C to call an object.
    """

    __slots__ = ("_arguments", "_fixed", "_grid", "_ready")

    def __init__(self, grid: Sequence[int], *arguments, **fixed):
        self._grid, self._arguments, self._fixed = (*grid, 1, 1)[:3], arguments, DEFAULTS | fixed
        self._ready = None

    def __call__(self, kernel: JITFunction, *tensors: torch.Tensor | None | tuple[torch.Tensor, ...]) -> None:
        """Launch ``kernel``, always the same one, on the current stream of the first tensor's device.

        tensors: of each parameter a tensor, None, or the tensors of a tuple.
        """
        ready = self._ready
        if ready is None:
            return self._by_triton(kernel, tensors)
        present, order, run, head, middle, arguments, nested, scratch, device, current_device, current_stream, _ = ready
        found = [*map(_data_ptr, present(tensors))]
        if reduce(or_, found) % 16 or current_device() != device or _watched(kernel):
            return self._by_triton(kernel, tensors)
        found.append(None)
        pointers = order(found)
        stream = current_stream(device)
        if nested:
            run(*head, stream, *middle, (*pointers, *arguments))
        elif scratch:
            with descriptor_memory():
                run(*head, stream, *middle, *pointers, *arguments)
        else:
            run(*head, stream, *middle, *pointers, *arguments)

    def _by_triton(self, kernel, tensors) -> None:
        flat = _present(tensors)
        with _loading, torch.cuda.device_of(flat[0]), descriptor_memory():
            binary = kernel[self._grid](*tensors, *self._arguments, **self._fixed)
            if self._ready is None and _KNOWN and type(kernel) is JITFunction and not _watched(kernel):
                if all(t.data_ptr() % 16 == 0 for t in flat):
                    self._ready = self._prepare(kernel, tensors, binary)

    def _prepare(self, kernel, tensors, binary) -> _Ready | None:
        if binary is None or binary.metadata.target.backend != "cuda":
            return None
        count = len(tensors)
        names = kernel.arg_names[count + len(self._arguments) :]
        arguments = *self._arguments, *(self._fixed[name] for name in names)
        active, scratch = driver.active, binary.metadata.global_scratch_size > 0
        run, head, nested = binary.run, self._grid, False
        middle = binary.function, binary.packed_metadata, None, None, None
        if not scratch and not getattr(binary.metadata, "profile_scratch_size", 0):
            run, head, middle, nested = _inner(run, head, middle, (*[None] * count, *arguments))
        device = active.get_current_device, active.get_current_stream
        return _Ready(*_ordering(tensors), run, head, middle, arguments, nested, scratch, device[0](), *device, binary)


def _inner(run, head: tuple, middle: tuple, arguments: tuple) -> tuple[Callable, tuple, tuple, bool]:
    """(launch, head, middle, nested): what ``run``, Triton's launcher, calls in the end, and how, for this kernel.

    Learnt from a call that launches nothing. ``run`` itself where it does more than hand its arguments on.
    """
    stream, passed, probe = object(), [], copy.copy(run)
    probe.launch = lambda *given: passed.append(given)
    probe(*head, stream, *middle, *arguments)
    if len(passed) == 1 and stream in passed[0][:8]:
        (given,), n = passed, len(arguments)
        at = given.index(stream)
        for nested, tail in ((False, given[-n:]), (True, given[-1])):
            if tail is arguments or (type(tail) is tuple and len(tail) == n and all(map(is_, tail, arguments))):
                return run.launch, given[:at], given[at + 1 : -1 if nested else -n], nested
    return run, head, middle, False


def _present(tensors) -> list[torch.Tensor]:
    return [t for group in tensors for t in (group if type(group) is tuple else (group,)) if t is not None]


def _ordering(tensors) -> tuple[Callable, Callable]:
    """(present, order) of :class:`_Ready`, without a loop of Python's where no tuple is among the tensors."""
    count = len(_present(tensors))
    rest = iter(range(count))
    shape = [[next(rest) for _ in t] if type(t) is tuple else -1 if t is None else next(rest) for t in tensors]
    if count > 1 and not any(type(at) is list for at in shape):  # of one an itemgetter gives no tuple
        return itemgetter(*[i for i, t in enumerate(tensors) if t is not None]), itemgetter(*shape)
    return _present, lambda found: [tuple([found[i] for i in at]) if type(at) is list else found[at] for at in shape]


def _watched(kernel: JITFunction) -> bool:
    """Whether someone wants to see a launch, or to change what is launched: profilers, debuggers."""
    runtime = knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        kernel.pre_run_hooks
        or getattr(before, "calls", before)  # a chain of hooks, since triton 3.5
        or getattr(after, "calls", after)
        or getattr(runtime, "add_stages_inspection_hook", None)
        or getattr(knobs.compilation, "instrumentation_mode", None)
    )
