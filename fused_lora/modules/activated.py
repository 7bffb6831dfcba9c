"""Activated LoRA (aLoRA, arXiv:2504.12397): of each sequence an adapter changes the rows from its invocation on.

The rows before are the base model's. An offset says how many rows at the end of a sequence are changed: it counts from
the first token of the adapter's invocation tokens. None: the sequence has no invocation, and all of it is the base's.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora.bases.foreign import why_not_added
from fused_lora.modules import variants
from fused_lora.ops.term.op import lora_term
from fused_lora.ops.term.rows import lora_term_on_rows

BEFORE = "rows before an aLoRA's invocation are the base's"
_KEPT = 16  # offsets whose rows are kept: all layers of a call have the same


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
    kept = tuple(max(0, min(int(n or 0), tokens)) for n in ([None] * len(x) if offsets is None else offsets))
    if all(n == tokens for n in kept):
        return None
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _numbers(kept, tokens, x.device)
    stream = None
    if x.is_cuda:
        if torch.cuda.is_current_stream_capturing():  # nothing is written before the replay
            return _numbers(kept, tokens, x.device)
        stream = torch.cuda.current_stream(x.device).cuda_stream
    return _kept_numbers(kept, tokens, x.device, stream)


def _numbers(kept: Sequence[int], tokens: int, device: torch.device) -> Tensor:
    parts = [torch.arange((i + 1) * tokens - n, (i + 1) * tokens, device=device) for i, n in enumerate(kept)]
    return torch.cat(parts)


@functools.lru_cache(_KEPT)
def _kept_numbers(kept: tuple[int, ...], tokens: int, device: torch.device, stream: int | None) -> Tensor:
    with torch.inference_mode(False):  # of use in training, too
        return _numbers(kept, tokens, device)


def activated_forward(
    layer: Any, x: Tensor, names: list[str], activated: Container[str], rows: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, str | None]:
    """(base(x, ...) and the adapters, those in ``activated`` on these rows; why the adapters' modules were called)."""
    y = layer._modules["base_layer"](x, *args, **kwargs)
    everywhere, some = ([n for n in names if (n in activated) is there] for there in (False, True))
    if not (everywhere or len(rows) or torch.is_grad_enabled()):
        return y, None
    reason = why_not_added(y, x, layer._adapters(names))
    if reason:
        return variants.composed_forward(layer, y, x, names, activated, rows), reason
    dtype = y.dtype
    if everywhere:  # rounded once, at the end
        y = _add(lora_term, y.to(torch.promote_types(dtype, torch.float32)), x, layer._adapters(everywhere))
    return _add(functools.partial(lora_term_on_rows, rows=rows), y, x, layer._adapters(some)).to(dtype), None


def _add(term: Any, y: Tensor, x: Tensor, adapters: Any) -> Tensor:
    lora_A, lora_B, scaling, dropout, bias, _ = adapters
    return term(y, x, lora_A=lora_A, lora_B=lora_B, scaling=scaling, dropout=dropout, bias=bias)
