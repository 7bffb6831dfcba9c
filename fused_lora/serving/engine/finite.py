"""Which requests of a step have rows that are not finite, seen where all rows pass: before and after the output layer.

A row under an adapter whose term overflows is NaN from that layer on, and so are all later rows of its request. The
reductions run on the device behind the forward; they are read once, when the engine waits for the step anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class StepCheck:
    """Watches one step; ``with check: model(...)`` in the thread that computes it, then :meth:`bad_rows`.

    Args:
        model: a transformers model with an output layer.

    Attributes:
        keep_logits: whether ``logits`` are those of the step, [1, rows, V], until the next one.
    """

    def __init__(self, model: Any):
        self._model, self._decoder = model, model.get_decoder()
        self._handles: list[Any] = []
        self._thread = 0
        self._hidden: Tensor | None = None
        self._logits: Any = None  # a tensor from the first call on
        self.keep_logits = False
        self.logits: Tensor | None = None

    @property
    def sees_all_rows(self) -> bool:
        """Whether rows that no token is taken from are seen: the model has a decoder apart from its output layer."""
        return self._decoder is not self._model

    def __enter__(self) -> StepCheck:
        self._thread = threading.get_ident()
        self._hidden = self._logits = self.logits = None
        if self.sees_all_rows:
            self._handles.append(self._decoder.register_forward_hook(self._see_hidden))
        self._handles.append(self._model.register_forward_hook(self._see_logits))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _see_hidden(self, module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() == self._thread:
            wide = torch.promote_types(output[0].dtype, torch.float32)
            self._hidden = torch.isfinite(output[0].sum(-1, dtype=wide)).view(-1)

    def _see_logits(self, module: nn.Module, args: tuple, output: Any) -> None:
        # the largest is NaN if one is, and infinite if one is or all are: some may be -inf, tokens that are never taken
        if threading.get_ident() == self._thread:
            self._logits = torch.isfinite(output.logits.amax(-1)).view(-1)
            self.logits = output.logits if self.keep_logits else None

    def bad_rows(self, rows: int, ends: Sequence[int] | None) -> set[int]:
        """The rows of the step, 0 to ``rows`` - 1, that are not finite.

        Args:
            ends: the rows that the first logits belong to, where the model computed those alone; None: all rows.
        """
        ends = range(rows) if ends is None else ends
        seen: list[tuple[Sequence[int], Tensor]]
        seen = [] if self._hidden is None else [(range(rows), self._hidden)]
        seen.append((ends, self._logits[: len(ends)]))
        return {row for index, finite in seen for row, good in zip(index, finite.tolist(), strict=True) if not good}
