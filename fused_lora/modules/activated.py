"""Activated LoRA (aLoRA, arXiv:2504.12397): of each sequence an adapter changes the rows from its invocation on.

The rows before are the base model's. An offset says how many rows at the end of a sequence are changed: it counts from
the first token of the adapter's invocation tokens. None: the sequence has no invocation, and all of it is the base's.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.bases.foreign import why_not_added
from fused_lora.modules import variants
from fused_lora.modules.mixed import made_once
from fused_lora.modules.names import some
from fused_lora.modules.tree import CONFIGS
from fused_lora.ops.term.op import lora_term
from fused_lora.ops.term.rows import lora_term_on_rows

BEFORE = "rows before an aLoRA's invocation are the base's"
Rows = Mapping[str, Tensor]  # of adapters that do not change all rows: the numbers of those that they do
_STARTED = "_fused_lora_started"  # attribute of a model's cache: adapter -> which sequences have its invocation


def is_pefts(variant: Any) -> bool:
    """Whether a layer's variant is PEFT's own aLoRA."""
    return type(variant).__name__ == "ALoraLinearVariant"


def why_no_rows(x: Tensor, offsets: Sequence[int | None] | None) -> str | None:
    """None where these are offsets for x: [sequences, tokens, K], or [sequences, K] with one token each."""
    if x.dim() not in (2, 3) or (offsets is not None and len(offsets) != len(x)):
        return "as many aLoRA offsets as sequences are needed"
    return None


def changed_rows(x: Tensor, offsets: Sequence[int | None] | None) -> Tensor | None:
    """The numbers of the rows that the offsets leave to the adapter, int64; None: all of them.

    x: as :func:`why_no_rows` has it, at least one row. offsets: None where none of the sequences has one.
    """
    tokens = x.shape[1] if x.dim() == 3 else 1
    kept = tuple([max(0, min(int(n or 0), tokens)) for n in ([None] * len(x) if offsets is None else offsets)])
    if kept == (tokens,) * len(kept):
        return None
    return made_once(_numbers, x.device, kept, tokens)


def _numbers(device: torch.device, kept: Sequence[int], tokens: int) -> Tensor:
    parts = [torch.arange((i + 1) * tokens - n, (i + 1) * tokens, device=device) for i, n in enumerate(kept)]
    return torch.cat(parts)


def activated_forward(
    layer: Any, x: Tensor, names: list[str], rows: Rows, *args: Any, **kwargs: Any
) -> tuple[Tensor, str | None]:
    """(base(x, ...) and the adapters, those in ``rows`` on these; why the adapters' own modules were called)."""
    y = layer._modules["base_layer"](x, *args, **kwargs)
    if not torch.is_grad_enabled():  # else the adapters' gradients are zeros, not None
        names = [name for name in names if name not in rows or len(rows[name])]
    if not names:
        return y, None
    reason = "DoRA beside aLoRA" if variants.has_magnitude(layer, names) else None
    reason = reason or why_not_added(y, x, layer._adapters(names))
    if reason:
        return variants.composed_forward(layer, y, x, names, rows), reason
    dtype, everywhere = y.dtype, [name for name in names if name not in rows]
    alike: list[list[str]] = []  # names with one tensor of rows; no dict by id, which torch.compile would guard
    for name in (name for name in names if name in rows):
        known = next((each for each in alike if rows[each[0]] is rows[name]), None)
        if known is None:
            alike.append([name])
        else:
            known.append(name)
    if len(alike) + bool(everywhere) > 1:  # rounded once, at the end
        y = y.to(torch.promote_types(dtype, torch.float32))
    if everywhere:
        y = _add(lora_term, y, x, layer._adapters(everywhere))
    for each in alike:
        y = _add(functools.partial(lora_term_on_rows, rows=rows[each[0]]), y, x, layer._adapters(each))
    return y.to(dtype), None


def _add(term: Any, y: Tensor, x: Tensor, adapters: Any) -> Tensor:
    lora_A, lora_B, scaling, dropout, bias, _ = adapters
    return term(y, x, lora_A=lora_A, lora_B=lora_B, scaling=scaling, dropout=dropout, bias=bias)


def starts_of(ids: Tensor, invocation: Sequence[int]) -> list[int | None]:
    """Where the last occurrence of these tokens begins in each sequence of ids [sequences, tokens]; None: nowhere."""
    n = len(invocation)
    if ids.shape[1] < n or not len(ids):
        return [None] * len(ids)
    found = (ids.unfold(1, n, 1) == torch.tensor(invocation, device=ids.device)).all(-1)
    places = torch.where(found, torch.arange(found.shape[1], device=ids.device), -1).amax(1)
    return [place if place >= 0 else None for place in places.tolist()]


def token_ids(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The token ids [sequences, tokens] of a call of a model: ``input_ids`` or its first argument."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    fits = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
    return ids if fits else None


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache of a call of a model, or None; transformers 5.24 renamed it."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def _checked(offsets: Any) -> list[int | None]:
    try:
        return [None if n is None else operator.index(n) for n in offsets]
    except TypeError:
        raise TypeError(f"alora_offsets: expected an int or None for each sequence, got {offsets!r:.100}") from None


def offsets_of(ids: Tensor, held: Mapping[str, Sequence[int]], cache: Any) -> dict[str, list[int | None]]:
    """The offsets of each adapter in a call of a model. held: its invocation tokens. cache: of the call, or None.

    Raises:
        ValueError: the cache is of another number of sequences.
    """
    tokens, found = ids.shape[1], {}
    started = getattr(cache, _STARTED, None)
    for name, invocation in held.items():
        before = (started or {}).get(name, [False] * len(ids))
        if len(before) != len(ids):
            raise ValueError(f"past_key_values: expected the cache of {len(ids)} sequences, got one of {len(before)}")
        # a lone token after others was drawn: PEFT looks at the prompt only
        starts = [None] * len(ids) if started is not None and tokens == 1 else starts_of(ids, invocation)
        found[name] = [
            tokens if old else None if start is None else tokens - start
            for start, old in zip(starts, before, strict=True)
        ]
    return found


def note_offsets(kwargs: Mapping[str, Any], output: Any, offsets: Mapping[str, Sequence[int | None]]) -> None:
    """After a call: note at its cache which sequences have an invocation by now."""
    cache = cache_of(kwargs)
    for name in ("cache", "past_key_values"):
        cache = getattr(output, name, None) if cache is None else cache
    if cache is not None:
        found = {name: [n is not None for n in each] for name, each in offsets.items()}
        setattr(cache, _STARTED, {**getattr(cache, _STARTED, {}), **found})


class _Call(NamedTuple):
    """One forward of a model: its sequences and tokens, and the offsets of each aLoRA adapter. tokens: 0, not known."""

    sequences: int
    tokens: int
    offsets: Mapping[str, Sequence[int | None]]


class Activation:
    """Hooks of a model whose own layers have aLoRA adapters: where in its sequences each of them begins to act.

    The invocation is looked for in the token ids of every forward, as PEFT does in ``forward``. What a forward with a
    cache has found is noted at the cache. In a later one with the same cache, as in ``generate``, the adapter acts on
    all tokens of such a sequence; a lone token there is not looked at. ``alora_offsets=`` gives the offsets instead.

    One instance belongs to one model, and copies with it. What it knows of a forward with gradients stays until the
    next: checkpointing calls layers again in the backward.
    """

    def __init__(self, model: nn.Module):
        self._calls: dict[int, _Call | str] = {}  # by thread; a str: why nothing is known
        self._last: _Call | str | None = None  # for the threads of a backward
        self._trained = 0  # forwards with gradients since the last backward that called layers again
        self.handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_calls": {}, "_last": None, "_trained": 0}

    def remove(self) -> None:
        """End the watch."""
        for handle in self.handles:
            handle.remove()

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        given = kwargs.get("alora_offsets")
        kwargs = {name: value for name, value in kwargs.items() if name != "alora_offsets"}
        configs: Mapping[str, Any] = getattr(model, CONFIGS, {})
        held = {n: c.alora_invocation_tokens for n, c in configs.items() if c.alora_invocation_tokens}
        ids = token_ids(args, kwargs)
        if given is not None:
            offsets, tokens = _checked(given), 0 if ids is None else ids.shape[1]
            call: _Call | str = _Call(len(offsets), tokens, dict.fromkeys(held, offsets))
        elif ids is None:
            call = "expected token ids [sequences, tokens] as input_ids or the first argument, or alora_offsets="
        else:
            call = _Call(len(ids), ids.shape[1], offsets_of(ids, held, cache_of(kwargs)))
        self._calls[threading.get_ident()] = self._last = call
        self._trained += torch.is_grad_enabled() and model.training
        return args, kwargs

    def _after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        call = self._calls.pop(threading.get_ident(), None)
        if isinstance(call, _Call):
            note_offsets(kwargs, output, call.offsets)
        if not torch.is_grad_enabled():
            self._last = None

    def rows(self, layer: Any, x: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Of those of the adapters that are aLoRA and do not change all rows of x: the numbers of those that they do.

        Raises:
            RuntimeError: no forward of the model is under way, or checkpointing calls a layer of an earlier one.
            ValueError: the offsets are not known, or are not those of x.
        """
        call = self._calls.get(threading.get_ident())
        if call is None and torch._C._current_graph_task_id() != -1:  # checkpointing
            call, (pending, self._trained) = self._last, (self._trained, 0)
            if pending > 1:
                raise RuntimeError("aLoRA with checkpointing: call backward after each forward of the model")
        if call is None:
            raise RuntimeError(f"aLoRA {some(names)}: call the model itself, it knows where the invocations are")
        if isinstance(call, str):
            raise ValueError(f"aLoRA {some(names)}: {call}")
        if x.dim() == 2 and len(x) == call.sequences * call.tokens:
            x = x.view(call.sequences, call.tokens, -1)
        found = {}
        for name in layer._activated(names):
            offsets = call.offsets[name]
            if why_no_rows(x, offsets):
                wanted = f"[{call.sequences}, tokens, features]"
                raise ValueError(f"aLoRA {name!r}: expected an input of shape {wanted}, got {tuple(x.shape)}")
            numbers = changed_rows(x, offsets)
            if numbers is not None:
                found[name] = numbers
        return found
