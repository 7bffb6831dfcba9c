"""A dispatch mode that follows the rows of a batch through every operator of a forward."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_lora.rows.rules import Applied, rows_after
from fused_lora.rows.state import Owned, State, Unknown, reshaped

NESTED = (
    "a nested tensor, which nn.TransformerEncoder makes of a padding mask in eval mode: set its use_nested_tensor to "
    "False"
)
_numbers = itertools.count()
_current: ContextVar[RowTrace | None] = ContextVar("fused_lora_rows", default=None)
_READS = {getattr(Tensor, name) for name in ("tolist", "numpy", "__array__", "data_ptr")} | {Tensor.data.__get__}


def same_rows(result: Tensor, source: Tensor, dim: int) -> Tensor:
    """Say that the rows of ``source`` are those along ``dim`` of ``result``, put together from parts. Returns it."""
    trace = _current.get()
    if trace is not None:
        paused, trace.paused = trace.paused, True
        state = trace.state(source)
        if isinstance(state, Owned) and len(state.owners) == result.shape[dim]:
            trace.mark(result, state._replace(dim=dim))
        trace.paused = paused
    return result


def why_rows_meet(call: Callable[[], Iterable[Tensor]], x: Tensor, dim: int) -> str | None:
    """None where each index along ``dim`` of x is alone, and in its place, in all that ``call`` gives for the rows of x
    [..., K]; else what made them meet."""
    trace, shape = _Alone(packed=False), x.shape[:-1]
    mark = Owned(dim, np.arange(x.shape[dim]))
    trace.mark(x, mark)
    trace.misplaced = lambda: trace.know("a row written to the place of another")
    with torch.no_grad(), trace, _Read(trace):
        results = [*call()]
    found = [(t, trace.state(t)) for t in results]
    trace.forget()
    for t, state in found:
        flat = t.dim() and t.shape[0] == shape.numel()
        place = reshaped(mark, shape, (shape.numel(),)) if flat else mark
        if isinstance(state, Unknown):
            trace.know(state.reason)
        elif isinstance(state, Owned) and not (isinstance(place, Owned) and state.equals(place)):
            trace.know("rows in another order")
    return trace.reason


class RowTrace(TorchDispatchMode):
    """Follows the states of tensors while it is entered. Results do not change.

    Args:
        packed: rows are the tokens of several requests, which attention keeps apart.

    Attributes:
        paused: operators are not followed, because they are not the model's.
        misplaced: what is called where a row is written to a place of another sequence.
    """

    def __init__(self, packed: bool):
        super().__init__()
        self._packed, self.paused = packed, False
        self.misplaced: Callable[[], None] = lambda: None
        # on the tensors, for a dict by id would take a new tensor for a freed one; other threads follow the same ones
        self._key = f"_fused_lora_rows_{next(_numbers)}"
        self._marked: list[ReferenceType[Tensor]] = []

    def state(self, tensor: Tensor) -> State:
        """What is known of a tensor. That of a view follows from its base, which may have been written to."""
        note = self._note(tensor)
        if note is None:
            return None
        if note[1] is None:
            return note[0]
        base, func, args, kwargs, out, position = note[1]
        call = Applied(func, (base, *args), kwargs, out, self.state, self._packed)
        return rows_after(call)[position]

    def mark(self, tensor: Tensor, state: State, view: tuple | None = None, length: int | None = None) -> None:
        """Note a tensor's state; view: how it was made from its base; length: it is arange(length)."""
        vars(tensor)[self._key] = state, view, length
        self._marked.append(ref(tensor))

    def known_range(self, tensor: Tensor) -> int | None:
        """n if the tensor is arange(n) in any shape, else None."""
        note = self._note(tensor)
        while note is not None and note[1] is not None and note[1][0].numel() == tensor.numel():
            note = self._note(note[1][0])
        return None if note is None else note[2]

    def __enter__(self) -> RowTrace:
        self._outer = _current.set(self)
        alone = not torch._C._len_torch_dispatch_stack()
        super().__enter__()
        # torch notes in globals that a mode is entered, and leaving restores what they were: with another thread's mode
        # in them they would stay set, and Dynamo of torch 2.8 would compile nothing any more
        try:
            for flags in vars(self).values():
                if alone and isinstance(flags, deque):
                    flags[-1] = False
            return self
        except BaseException:  # an interrupt: nobody else would leave it
            self.__exit__(None, None, None)
            raise

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _current.reset(self._outer)

    def forget(self) -> None:
        """Leave nothing on the tensors that were followed: inputs may live on."""
        for reference in self._marked:
            tensor = reference()
            if tensor is not None:
                vars(tensor).pop(self._key, None)
        self._marked.clear()

    def _note(self, tensor: Tensor) -> tuple | None:
        return vars(tensor).get(self._key)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if not types and _is_composite(func) and not _are_nested((args, kwargs)):
            super().__enter__()
            try:
                return func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        if torch.Tag.inplace_view in func.tags:
            return self._turn(func, args, kwargs)
        before = self._written(func, args, kwargs)
        states = [self.state(t) for t in before]
        out = func(*args, **kwargs)
        self._follow(func, args, kwargs, out, before, states)
        return out

    def _turn(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A call that changes the shape of its tensor, such as transpose_. Its rule is asked about the old shape."""
        tensor, note = args[0], self._note(args[0])
        old, state = torch.empty_like(tensor, device="meta"), self.state(tensor)
        out = func(*args, **kwargs)
        if note is not None:
            call = Applied(
                func, (old, *args[1:]), kwargs, out, lambda t: state if t is old else self.state(t), self._packed
            )
            # a view that is written to later could not be traced back to its base
            found = call.unknown("a view that was turned in place") if note[1] is not None else rows_after(call)[0]
            self.mark(tensor, found)
        return out

    @staticmethod
    def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
        found = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                found += [t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, Tensor)]
        return found

    def _follow(
        self, func: Any, args: tuple, kwargs: dict, out: Any, written: list[Tensor], before: list[State]
    ) -> None:
        call = Applied(func, args, kwargs, out, self.state, self._packed, self.known_range, self.misplaced)
        results = call.results
        if _are_nested((args, kwargs, out)):  # which have no shape
            for result in (*results, *written):
                if isinstance(result, Tensor):
                    self.mark(result, call.unknown(NESTED))
            return
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if is_view and args and isinstance(args[0], Tensor):
            # their shapes alone: a tensor that holds itself would live until a collection
            shapes = [torch.empty(r.shape, dtype=r.dtype, device="meta") for r in results]
            for i, result in enumerate(results):
                if isinstance(result, Tensor) and result is not args[0]:
                    self.mark(result, None, (args[0], func, args[1:], kwargs, shapes, i))
            return
        states = rows_after(call)
        if call.name == "arange":
            start = args[0] if len(args) > 1 else 0
            step = args[2] if len(args) > 2 else 1
            self.mark(out, None, None, out.numel() if (start, step) == (0, 1) else None)
            return
        for result, state in zip(results, states, strict=True):
            if isinstance(result, Tensor) and not any(result is t for t in written):
                self.mark(result, state)
        unreturned = call.unknown(f"the operator {func._schema.name} may put rows anywhere")
        for tensor, old in zip(written, before, strict=True):
            now = next((s for r, s in zip(results, states, strict=True) if r is tensor), unreturned)
            if now is not old:
                self._write(tensor, now)

    def _write(self, tensor: Tensor, state: State) -> None:
        """Note the state of a tensor that was written to, and what follows for the base of a view."""
        note = self._note(tensor)
        if note is None or note[1] is None:
            self.mark(tensor, state, None)
            return
        base, func, args, kwargs, out, position = note[1]
        old = self.state(base)
        known = isinstance(old, Owned) and not old.template
        if isinstance(state, Owned):
            if not known:
                self._write(base, self._base_of(state, note[1], tensor))
        elif state is not None and (not known or tensor.numel() == base.numel()):
            self._write(base, state)

    def _base_of(self, state: Owned, view: tuple, tensor: Tensor) -> State:
        """The state of a base from that of the view of it that was written to."""
        base, func, args, kwargs, out, position = view
        for dim, size in enumerate(base.shape):
            if size != len(state.owners):
                continue
            guess = Owned(dim, state.owners)
            call = Applied(func, (base, *args), kwargs, out, lambda t, g=guess: g if t is base else None, self._packed)
            found = rows_after(call)[position]
            if isinstance(found, Owned) and found.equals(state):
                return guess
        return Unknown("a buffer that is filled piece by piece")


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether torch takes an operator apart before it comes here, but for inference mode and tensors made in it."""
    has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
    return has("CompositeImplicitAutograd") and not (has("CPU") or has("CUDA"))


def _are_nested(values: Any) -> bool:
    return any(isinstance(t, Tensor) and t.is_nested for t in tree_leaves(values))


class _Alone(RowTrace):
    """What meets a part that is not known is not known either, be it a mask or a place that other rows have made.

    Attributes:
        reason: why a number that Python was given is not known.
    """

    reason: str | None = None

    def know(self, reason: str) -> None:
        """What follows depends on several rows."""
        self.reason = self.reason or reason

    def _follow(
        self, func: Any, args: tuple, kwargs: dict, out: Any, written: list[Tensor], before: list[State]
    ) -> None:
        super()._follow(func, args, kwargs, out, written, before)
        states = (self.state(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        found = next((state for state in states if isinstance(state, Unknown)), None)
        for result in tree_leaves((out, written)) if found is not None else ():
            if isinstance(result, Tensor):
                self.mark(result, found)
            elif result is not None:
                self.know(found.reason)
        if torch.Tag.dynamic_output_shape in func.tags:
            for state in map(self.state, tree_leaves(out)):
                if isinstance(state, Unknown):
                    self.know(f"a size, of {state.reason}")


class _Read(TorchFunctionMode):
    """What operators do not show: values that Python, numpy or a kernel of its own gets. one_hot only checks those that
    it reads."""

    def __init__(self, trace: _Alone):
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _READS and self._trace.state(args[0]) is not None:
            self._trace.know("values that are read past torch's operators")
        before, found = self._trace.reason, func(*args, **(kwargs or {}))
        if func is one_hot:
            self._trace.reason = before
        return found
