"""Whether what a model returned is finite in the rows of a batch's adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# of the rows of a layer: how many sequences there are, and how many rows of one follow each other; None: not known
Order = tuple[int, int] | None


def bad_positions(output: Tensor) -> Tensor:
    """Bool [*output.shape[:-1]]: NaN or +inf somewhere in the last dimension, or -inf all over it (single tokens may be
    -inf)."""
    return torch.isfinite(output.amax(-1)).logical_not_()


def by_sequence(bad: Tensor, sequences: int, dim: int) -> Tensor:
    """``bad`` with the sequences first, of an output whose dimensions are those of the inputs, or one for all rows.

    dim: of the inputs that holds the sequences.
    """
    if bad.dim() == 1 and dim < 2 and sequences and len(bad) % sequences == 0:
        return bad.view(-1, sequences).t() if dim else bad.view(sequences, -1)
    return bad.movedim(dim, 0) if dim < bad.dim() and bad.shape[dim] == sequences else bad


def unless_padding(bad: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """``bad``, [B, T], without what the mask in the model's arguments says is padding."""
    decodes = any(kwargs.get(name) is not None for name in ("decoder_input_ids", "encoder_outputs"))
    mask = kwargs.get("decoder_attention_mask" if decodes else "attention_mask")
    if not (isinstance(mask, Tensor) and mask.dim() == 2 and bad.dim() == 2 and len(mask) == len(bad)):
        return bad
    unused = mask.shape[1] - bad.shape[1]  # the mask covers the keys in the cache, too
    return bad if unused < 0 else bad & mask[:, unused:].to(bad.device, torch.bool)
