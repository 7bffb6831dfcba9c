"""Attention of a packed step, request by request.

transformers' ``sdpa`` and ``eager`` paths attend over the keys of all requests of a step at once, under an additive
mask. That does not keep requests apart: 0 * NaN is NaN, and a score near the largest float lifts a masked key back up.
Here every request attends over its own keys alone, so nothing in one request's rows can reach another's, and its
attention has the same bits whatever is batched with it. Flash attention has this by its layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.eager_paged import eager_paged_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fused_lora.rows import same_rows

_running: ContextVar[Spans | None] = ContextVar("fused_lora_spans", default=None)


@dataclass
class Spans:
    """Where the rows of a step's requests lie.

    Attributes:
        queries: query rows of each request, in the order of the step. keys: of each attention type, keys of each.
        windows: of each attention type, how many keys a row sees at most; None: all before it.
        types: the attention type of each layer, by its number.
    """

    queries: Sequence[int]
    keys: dict[str, Sequence[int]]
    windows: dict[str, int | None]
    types: dict[int, str]
    _masks: dict[tuple, Tensor | None] = field(default_factory=dict)

    def mask(self, layer_type: str, rows: int, keys: int, device: torch.device) -> Tensor | None:
        """[rows, keys] in bool, the rows being the last positions; None where plain causal or full attention does."""
        window = self.windows[layer_type]
        if rows in (1, keys) and (window is None or keys <= window):
            return None
        key = rows, keys, window, device
        if key not in self._masks:
            at = torch.arange(keys - rows, keys, device=device)[:, None]
            other = torch.arange(keys, device=device)
            seen = other <= at
            self._masks[key] = seen if window is None else seen & (other > at - window)
        return self._masks[key]


@contextmanager
def spans_of(futures: Sequence[Any], cache: Any) -> Iterator[None]:
    """Inside, this thread's attention is that of a step of these ``FutureRequestState``, its inputs prepared."""
    queries = [future.query_length for future in futures]
    keys, windows = {}, {}
    for layer_type, allocator in cache.cache_allocators.items():
        keys[layer_type] = [
            allocator.get_seqlen_k(future.state.position_offset - future.query_length, future.query_length)
            for future in futures
        ]
        windows[layer_type] = getattr(allocator, "sliding_window", None)
    types = {layer: allocator.layer_type for layer, allocator in cache.layer_to_allocator.items()}
    token = _running.set(Spans(queries, keys, windows, types))
    try:
        yield
    finally:
        _running.reset(token)


_paged_eager: Any = eager_paged_attention_forward  # transformers' decorator hides its type


class _Given:
    """Stands for the cache where keys and values are complete already."""

    def update(self, key_states: Tensor, value_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def _sdpa(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    return sdpa_attention_forward(module, q, k, v, mask, **options)[0]


def _eager(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    rows, keys = q.shape[2], k.shape[2]
    if mask is None and rows > 1 and options.pop("is_causal", True):
        mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril_(keys - rows)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    return _paged_eager(module, q, k, v, mask, cache=_Given(), **options)[0]


def _by_request(attend: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """transformers' attention interface: query [1, H, rows, D], key and value [1, H_kv, rows, D]."""
        cache, spans = options.pop("cache", None), _running.get()
        if spans is None:
            return attend(module, query, key, value, attention_mask, **options), None
        layer: Any = module.layer_idx
        layer_type = spans.types[layer]
        if cache is not None:  # from transformers 5.24 on the model has done it
            key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=options)
        options = {name: value for name, value in options.items() if name in ("dropout", "scaling", "softcap")}
        lengths = spans.queries, spans.keys[layer_type]
        parts = zip(query.split(lengths[0], 2), key.split(lengths[1], 2), value.split(lengths[1], 2), strict=True)
        found = []
        for q, k, v in parts:
            mask = spans.mask(layer_type, q.shape[2], k.shape[2], q.device)
            found.append(attend(module, q, k, v, mask, is_causal=mask is None, **options))
        return same_rows(torch.cat(found, dim=1), query, 1), None

    return forward


def _mask(usual: Callable[..., Any]) -> Callable[..., Any]:
    def mask(*arguments: Any, **options: Any) -> Any:
        return usual(*arguments, **options) if _running.get() is None else None

    return mask


_OURS = {"sdpa": ("fused_lora_sdpa", _sdpa, sdpa_mask), "paged|eager": ("fused_lora_eager", _eager, eager_mask)}
for _name, _attend, _usual_mask in _OURS.values():
    ALL_ATTENTION_FUNCTIONS.register(_name, _by_request(_attend))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, _mask(_usual_mask))


def by_request(implementation: str) -> str:
    """The implementation that attends request by request in the place of this one; flash attention's stay."""
    return _OURS[implementation][0] if implementation in _OURS else implementation


def is_by_request(implementation: str) -> bool:
    """Whether it is one of those."""
    return implementation in (name for name, *_ in _OURS.values())
