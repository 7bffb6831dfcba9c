"""Which sequence each row of a layer's input belongs to, for every layer of a model, found once for each kind of call.

The first call of a model with inputs of some sizes is followed (:mod:`fused_lora.rows.trace`). After two calls that
differ in their sizes alone and gave the same, it is known for all sizes. Then nothing is followed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fused_lora.rows.layout import Layout, layout_of
from fused_lora.rows.state import Owned, State, Unknown
from fused_lora.rows.trace import RowTrace

_KEPT = 256  # kinds of calls that are remembered
_CALL = nn.Module._call_impl.__code__
Key = tuple[str, int]  # a layer's path and the number of dimensions of its input


class Known:
    """What was found in calls of one kind.

    Attributes:
        layouts: of each layer, or the reason why its rows are not known. slots: the inputs' sizes (by position) that
            equal a layout's ``inner``. sizes: of the inputs, without the batch's dimension. general: whether it holds
            for all sizes. stale: a layer was called that is not in it, so the next call is followed.
    """

    def __init__(self, sizes: tuple[int, ...]):
        self.layouts: dict[Key, Layout | str] = {}
        self.slots: dict[Key, frozenset[int]] = {}
        self.sizes, self.general, self.stale = sizes, False, False

    def put(self, key: Key, layout: Layout | str) -> None:
        """Add what was found at one call of a layer."""
        old = self.layouts.get(key, layout)
        if old != layout and isinstance(old, Layout):
            layout = layout if isinstance(layout, str) else "its rows differ from one call to the next"
        self.layouts[key] = layout if isinstance(old, Layout) else old
        if isinstance(layout, Layout) and layout.inner > 1:
            self.slots[key] = frozenset(i for i, size in enumerate(self.sizes) if size == layout.inner)

    def over_sizes(self, other: Known) -> Known | None:
        """What holds for all sizes, if it held for these two; None if it does not."""
        both = Known(self.sizes)
        both.general = True
        for key in {**self.layouts, **other.layouts}:
            one, two = self.layouts.get(key), other.layouts.get(key)
            if isinstance(one, Layout) and isinstance(two, Layout):
                if (one.dim, one.outer, one.inner == 1) != (two.dim, two.outer, two.inner == 1):
                    return None
                if one.inner > 1:
                    both.slots[key] = self.slots[key] & other.slots[key]
                    if not both.slots[key]:
                        return None
                both.layouts[key] = one
            else:
                # refused once, or called in one of them only
                known, layout = (self, one) if isinstance(one, str) or two is None else (other, two)
                both.layouts[key] = layout  # type: ignore[assignment]
                if isinstance(layout, Layout) and layout.inner > 1:
                    both.slots[key] = known.slots[key]
                    if not both.slots[key]:
                        return None
        return both


class Entries(NamedTuple):
    """How a batch's entries and the model's inputs belong together.

    count: of the entries; of the token rows in a packed batch. dim: dimension of the inputs that holds the sequences.
    packed: rows are the tokens of several requests. uniform: all entries have the same adapters.
    """

    count: int
    dim: int = 0
    packed: bool = False
    uniform: bool = False

    def marks(self, module: nn.Module, inputs: Sequence[tuple[str, Tensor]]) -> tuple[int, list[int | None]]:
        """How many sequences (or rows) there are, and the dimension of each input that tells them, or None.

        Raises:
            ValueError: their number is not a multiple of the entries.
        """
        if self.packed:
            return self.count, [self._rows_of(tensor) for _, tensor in inputs]
        wide = [(name, t) for name, t in inputs if t.dim() > max(self.dim, 1) and not _is_aside(name)]
        named = wide or [(name, t) for name, t in inputs if t.dim() > self.dim]
        sizes = {t.shape[self.dim] for _, t in named} - {1}
        if len(sizes) <= 1:  # a 1 is spread over the batch
            count = next(iter(sizes), 1)
        else:
            main = getattr(module, "main_input_name", None)
            count = next((t for name, t in named if name == main), named[0][1]).shape[self.dim]
        if named and count % self.count:
            raise ValueError(
                f"batch: {self.count} entries for a model batch of {count} sequences; expected as many, or a multiple "
                "(beams and return sequences repeat each entry)"
            )
        others = {s for _, t in wide for d, s in enumerate(t.shape) if d != self.dim}
        found: list[int | None] = []
        for name, t in inputs:
            fits = t.dim() > self.dim and t.shape[self.dim] == count and not _is_aside(name)
            # a vector may be one number per sequence or one per position
            fits = fits and (t.dim() > 1 or not wide or count not in others)
            found.append(self.dim if fits else None)
        return count, found

    def _rows_of(self, tensor: Tensor) -> int | None:
        dim = next((d for d, size in enumerate(tensor.shape) if size != 1), tensor.dim() - 1)
        if self.count == 1 and dim > 0 and dim == tensor.dim() - 1 and tensor.shape[dim] != 1:
            dim -= 1  # one row of features
        return dim if dim >= 0 and tensor.shape[dim] == self.count else None


def checked_dim(dim: int) -> int:
    """``dim`` of a batch, if it is a dimension; else ValueError."""
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0:
        raise ValueError(f"dim: expected a dimension of the model's inputs, 0 or more, got {dim!r}")
    return dim


class Call:
    """One call of a model inside a batch, between the hooks of the outermost module that was called.

    Attributes:
        module: that one. sequences: of the call; rows of a packed batch. uniform: all entries have the same adapters.
        case: equal for calls whose layers get rows in the same layouts. followed: what follows the operators, or None.
        lasts: whether what is found holds for the next call, too.
    """

    def __init__(
        self,
        module: nn.Module,
        sequences: int,
        entries: Entries,
        known: Known | None = None,
        sizes: tuple[int, ...] = (),
    ):
        self.module, self.sequences, self.depth, self.uniform = module, sequences, 1, entries.uniform
        self._packed, self._known, self._sizes = entries.packed, known, sizes
        self.followed: RowTrace | None = None
        self.lasts = True
        self._acted = ""  # the first layer whose rows were asked for while the call was followed
        self._misplaced = False
        used = () if known is None else tuple(sizes[i] for slots in known.slots.values() for i in sorted(slots)[:1])
        self.case = sequences, known, used

    def note(self, path: str, x: Tensor, y: Tensor | None = None) -> None:
        """While the call is followed: a layer was called with x. y: what it gave, with the rows of x."""
        trace, known = self.followed, self._known
        if trace is None or known is None or not x.numel():
            return
        self.check_places()
        trace.paused = True  # what finds a state is no part of the model
        state = trace.state(x)
        if state is None:
            state = self._spread(x)
            if state is not None:
                trace.mark(x, state)
        trace.paused = False
        known.put((path, x.dim()), layout_of(state, x.shape, self.sequences))
        self.lasts = self.lasts and not (isinstance(state, Owned) and state.assembled)
        if y is not None and not (isinstance(state, Owned) and state.dim == x.dim() - 1):
            trace.mark(y, state)

    def _spread(self, x: Tensor) -> State:
        """Of a constant [sequences, ..., K] that is the same for each sequence, as learned queries: row i is for i."""
        n = self.sequences
        alike = [d for d in range(x.dim() - 1) if x.shape[d] == n and torch.equal(x, x.narrow(d, 0, 1).expand_as(x))]
        return Owned(0, np.arange(n)) if alike == [0] and x.dim() > 2 and not self._packed else None

    def layout(self, path: str, x: Tensor) -> Layout | None:
        """Of the input of a layer; None if any rows may come, or none came.

        Raises:
            ValueError: the rows are not known, or are not the batch's.
        """
        if self.uniform or not x.numel():
            return None
        known, key = self._known, (path, x.dim())
        found = None if known is None else known.layouts.get(key)
        if isinstance(found, Layout) and known is not None and known.general and found.inner > 1:
            inner = self._sizes[min(known.slots[key])]
            found = found._replace(inner=inner) if all(self._sizes[i] == inner for i in known.slots[key]) else None
        count = self.sequences
        if isinstance(found, Layout) and x.shape[found.dim] == found.outer * count * found.inner:
            if self.followed is not None:
                self._acted = self._acted or path
            return found
        if isinstance(found, str):
            why = found
        else:
            why = "that was not so when the rows of this kind of call were followed; the next one is followed again"
            if known is not None:
                known.stale = True
        what = f"{count} rows" if self._packed else f"the rows of {count} sequences"
        raise ValueError(
            f"batch: {path!r} got an input of shape {tuple(x.shape)}; expected {what}, in order: {why}. "
            "In a batch of one adapter alone any rows may come"
        )

    def follow(self, trace: RowTrace) -> None:
        """Follow the operators of this call by ``trace``."""
        self.followed, trace.misplaced = trace, self._note_misplaced

    def _note_misplaced(self) -> None:
        self.lasts = False
        self._misplaced = self._misplaced or bool(self._acted)

    def check_places(self) -> None:
        """Raise ValueError if rows were written to places of other sequences, after layers took them for their own."""
        if self._misplaced:
            raise ValueError(
                f"batch: {self._acted!r} and layers after it took the rows of their inputs for those of the "
                f"{self.sequences} sequences in order, and the model then put rows among those of other sequences, as "
                "with several images of one sequence and none of another. Let the adapters leave these layers out, or "
                "put each adapter's sequences into a batch of their own"
            )

    def pause(self, paused: bool) -> None:
        """Do not follow what runs between: it is not the model's."""
        if self.followed is not None:
            self.followed.paused = paused


class RowFinder:
    """The rows of a model's linear layers.

    Args:
        model: whose calls are followed. layers: the linear layers by path.

    Attributes:
        layers: those. callers: the model and the modules around the layers that are in no list, by path: what may be
            called from outside.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]):
        # weak: finders are kept by model, and must not keep it
        self.layers = WeakValueDictionary(layers)
        modules = dict(model.named_modules(remove_duplicate=False))
        around = {path[:i] for path in layers for i, letter in enumerate(path) if letter == "."} | {""}
        self._around = {id(modules[path]): path for path in sorted(around) if path in modules}
        # a hook in each of the blocks of a list would cost every step of the model
        callers = [p for p in sorted(around) if p in modules and not re.search(r"(^|\.)\d+(\.|$)", p)]
        self.callers = WeakValueDictionary({p: modules[p] for p in callers})
        self._exact: dict[tuple, Known] = {}
        self._general: dict[tuple, Known | None] = {}
        self._found: dict[Key, Layout | str] = {}  # of all calls that were followed

    def begin(
        self, path: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], entries: Entries
    ) -> tuple[Call, tuple]:
        """The start of a call from outside. Returns it and what :meth:`end` takes.

        Raises:
            ValueError: the number of sequences is not a multiple of the entries, or a library has changed their order.
        """
        if not entries.uniform:
            _check_order()
        inputs, further = [], []
        for name, value in _flat(module, args, kwargs):
            (inputs if isinstance(value, Tensor) else further).append((name, value))
        count, marks = entries.marks(module, inputs)
        if entries.uniform:
            return Call(module, count, entries), ()
        shapes = [
            (n, *("b" if d == m else 1 if s == 1 else "n" for d, s in enumerate(t.shape)))
            for (n, t), m in zip(inputs, marks, strict=True)
        ]
        sizes = tuple(s for (_, t), m in zip(inputs, marks, strict=True) for d, s in enumerate(t.shape) if d != m)
        kind = path, entries.packed, *shapes, *further
        known = self._exact.get((kind, sizes)) or self._general.get(kind)
        if known is not None and known.stale:
            known = None
        if known is not None and (known.general or known.sizes == sizes):
            return Call(module, count, entries, known, sizes), ()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("batch: the rows of a graph must be known before its capture; run a step of it first")
        call = Call(module, count, entries, Known(sizes), sizes)
        trace = RowTrace(entries.packed)
        call.follow(trace)
        for (_, tensor), dim in zip(inputs, marks, strict=True):
            trace.mark(tensor, _of_input(tensor, dim))
        trace.__enter__()
        return call, (kind, sizes)

    def calls_under_way(self) -> dict[int, str]:
        """The modules around the layers whose calls this thread is in: path by the id of the call's frame."""
        paths = {id(frame): self._around.get(id(module)) for frame, module in _calls()}
        return {frame: path for frame, path in paths.items() if path is not None}

    def begin_at_layer(
        self,
        path: str,
        layer: nn.Module,
        x: Tensor,
        entries: Entries,
        before: Iterable[int],
        why_not: str | None = None,
    ) -> tuple[Call, tuple]:
        """The start of a call of a layer by itself. before: calls that were under way before the batch.

        why_not: why the rows of its input are not the batch's in their order, if they are not.

        Raises:
            ValueError: as :meth:`begin`; or a module around the layer was called from outside that is none of
            ``callers``; or ``why_not``.
        """
        calls = {} if entries.uniform else self.calls_under_way()
        around = [found for frame, found in calls.items() if frame not in before and found != path]
        if around:
            why_not = f"{around[-1]!r} was called by itself, and what led to its input was not seen"
        if why_not and not entries.uniform:
            text = f"batch: {path!r} got an input of shape {tuple(x.shape)}; expected a call of the model"
            raise ValueError(f"{text}: {why_not}")
        return self.begin(path, layer, (x,), {}, entries)

    def sequences_of(self, path: str, x: Tensor) -> int | None:
        """How many sequences the input [sequences, tokens, K] of a layer shows; None if it does not."""
        found = self._found.get((path, x.dim()))
        shows = isinstance(found, Layout) and (found.outer, found.inner) == (1, 1) and x.dim() > 2
        return x.shape[found.dim] if isinstance(found, Layout) and shows else None

    def in_compiled_code(
        self, path: str, layer: nn.Module, x: Tensor, entries: Entries, sequences: int | None = None
    ) -> Call:
        """The call of a layer whose surroundings run compiled, so that nothing about them is seen.

        sequences: that this layer shows, or one before it.

        Raises:
            ValueError: no call of the layer was followed before, or its layout depends on more than the shape of x and
                the sequences.
        """
        if entries.uniform or not x.numel():
            return Call(layer, entries.count, entries)
        key = path, x.dim()
        found = self._found.get(key, "no call of it was followed yet")
        why = found if isinstance(found, str) else "its layout depends on the sizes of the model's inputs"
        if isinstance(found, Layout) and found.outer == 1 and (sequences or found.inner == 1):
            along = x.shape[found.dim]
            count = sequences or along
            why = f"it has {along} rows or sequences for {entries.count} entries"
            fits = count == entries.count or not entries.packed and count % entries.count == 0
            if fits and along % count == 0:
                known = Known(())
                known.layouts[key] = found._replace(inner=along // count)
                return Call(layer, count, entries, known)
        raise ValueError(
            f"batch: {path!r} got an input of shape {tuple(x.shape)}; expected a layer whose rows are known from its "
            f"shape in compiled code: {why}. Call the model once in such a batch without torch.compile"
        )

    def end(self, call: Call, kind: tuple, complete: bool) -> None:
        """The end of a call; complete: it returned."""
        trace, found = call.followed, call._known
        if trace is None or found is None:
            return
        trace.__exit__(None, None, None)
        trace.forget()
        call.followed = None
        if complete:
            call.check_places()
        if not (complete and call.lasts and found.layouts):  # none: the layers were disabled
            return
        for key, layout in found.layouts.items():
            old = self._found.setdefault(key, layout)
            if isinstance(old, Layout) and isinstance(layout, Layout) and old != layout:
                alike = (old.dim, old.outer) == (layout.dim, layout.outer)
                self._found[key] = old._replace(inner=0, outer=old.outer if alike else 0)  # it depends on sizes
            elif isinstance(layout, str):
                self._found[key] = layout
        before = self._exact.get(kind)
        if before is not None:
            for key, layout in before.layouts.items():
                found.put(key, layout)
        self._exact[kind] = found
        if len(self._exact) > _KEPT:
            del self._exact[next(iter(self._exact))]
        general = self._general.get(kind[0], found)
        if general is not None:  # None: it depends on the sizes
            differ = general.general or general.sizes != found.sizes
            self._general[kind[0]] = general.over_sizes(found) if differ else found


class Running:
    """The call from outside that one thread is in, inside one batch. before: calls that were under way before it.

    Attributes:
        call: that one, or None.
    """

    def __init__(self, finder: RowFinder, entries: Entries, before: Iterable[int] = ()):
        self._finder, self._entries, self._ending = finder, entries, ()
        self._before: Iterable[int] = before
        self.call: Call | None = None

    def enter(self, path: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
        """Before a module: the call, if this one is from outside. Raises ValueError as :meth:`RowFinder.begin`."""
        if self.call is not None and self.call.module is module:
            if 0 < sum(called is module for _, called in _calls()) <= self.call.depth:
                self.close()
        if self.call is not None:
            self.call.depth += self.call.module is module
            return None
        self.call, self._ending = self._finder.begin(path, module, args, kwargs, self._entries)
        return self.call

    def enter_layer(self, path: str, layer: nn.Module, x: Tensor, why_not: str | None = None) -> Call:
        """Before a layer that is called by itself. Raises ValueError as :meth:`RowFinder.begin_at_layer`."""
        self.call, self._ending = self._finder.begin_at_layer(path, layer, x, self._entries, self._before, why_not)
        return self.call

    def leave(self, module: nn.Module, complete: bool) -> Call | None:
        """After it: the call, if it has ended. complete: it returned."""
        call = self.call
        if call is None or call.module is not module:
            return None
        call.depth -= 1
        if call.depth:
            return None
        self.call = None
        self._finder.end(call, self._ending, complete)
        return call

    def close(self) -> None:
        """End a call of this thread that an interrupt has broken off, after which torch calls no hook."""
        call, self.call = self.call, None
        if call is not None:
            self._finder.end(call, self._ending, False)


def _calls() -> list[tuple[FrameType, Any]]:
    """The calls of modules that this thread is in, the innermost first: the frame and the module of each."""
    found, frame = [], sys._getframe()
    while frame is not None:
        if frame.f_code is _CALL:
            found.append((frame, frame.f_locals.get("self")))
        frame = frame.f_back
    return found


def _check_order() -> None:
    """Raise ValueError inside of what sorts its texts before it calls the model: encode of sentence-transformers, and
    of FlagEmbedding, which both call the order so."""
    frame, name = sys._getframe(), "length_sorted_idx"
    while frame is not None:
        code = frame.f_code
        opens = "batch" in code.co_names or "adapter_batch" in code.co_names  # whoever does knows the order
        if (name in code.co_varnames or name in code.co_cellvars) and not opens:
            order = list(frame.f_locals.get(name, ()))
            if order != list(range(len(order))):
                raise ValueError(
                    f"batch: {frame.f_globals.get('__name__')} has sorted its texts by length, so entries are those "
                    "of other texts; expected a call of the model itself, as model(model.preprocess(texts)) of "
                    "sentence-transformers, or texts in this order"
                )
        frame = frame.f_back


def _flat(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The arguments of a call by name, in the order of the signature: tensors, and what else may change the path."""
    names = _parameters(type(module))
    given = dict(zip(names, args, strict=False)) | {f"*{i}": value for i, value in enumerate(args[len(names) :])}
    given.update(kwargs)
    order = {name: i for i, name in enumerate(names)}
    found: list[tuple[str, Any]] = []
    for name in sorted(given, key=lambda n: (order.get(n, len(order)), n)):
        found += _leaves(name, given[name], 4)
    return found


def _leaves(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor) or value is None or isinstance(value, (bool, str)):
        yield name, value
    elif depth and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _leaves(f"{name}.{i}", item, depth - 1)
    elif depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(f"{name}.{field.name}", getattr(value, field.name), depth - 1)
    else:
        yield name, type(value).__name__


@functools.cache
def _parameters(kind: type[nn.Module]) -> list[str]:
    """The names of forward's positional parameters."""
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [p.name for p in inspect.signature(kind.forward).parameters.values() if p.kind in positional][1:]


def _is_aside(name: str) -> bool:
    """Whether an input of this name is about positions, which may come in any shape and are no row's values."""
    return any(word in name.rpartition(".")[2] for word in ("mask", "position", "bias"))


def _of_input(tensor: Tensor, dim: int | None) -> State:
    if dim is None:
        return Unknown("an input of the model that does not have the batch's dimension")
    return Owned(dim, np.arange(tensor.shape[dim]))
