"""The tensor that counts in what a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def main_output(output: Any, dims: int = 0) -> Tensor | None:
    """The logits or last hidden states of a transformers output, or the first floating tensor of at least ``dims``
    dimensions; None if there is none."""
    read = output.get if isinstance(output, Mapping) else lambda name: getattr(output, name, None)
    found = [part for part in map(read, ("logits", "last_hidden_state")) if isinstance(part, Tensor)]
    if not found:
        values = output.values() if isinstance(output, Mapping) else output
        found = list(values) if isinstance(output, (Mapping, tuple, list)) else [output]
    return next((t for t in found if isinstance(t, Tensor) and t.is_floating_point() and t.dim() >= dims), None)
