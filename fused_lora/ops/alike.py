"""Tensors that are like those of an earlier call: what was found for them stands, and nothing is asked again.

"Like" is what torch.compile's guard compares, in the time that Python needs to read two or three attributes: class,
dtype, device, sizes, strides, requires_grad, and whoever else takes part in a call (dispatch modes, autocast,
torch.func, conjugate and negative views); not whether gradients are recorded. Where a torch lacks that guard, nothing
is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_Guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_Guards = getattr(_Guards, "TensorGuards", None)
modes = torch._C._len_torch_dispatch_stack
_KEPT = 8  # sets of tensors: in training and not, of two and of three dimensions, some shapes


class Alike:
    """Answers by tensors, the newest first. It holds no tensor."""

    __slots__ = ("entries",)

    def __init__(self):
        self.entries: tuple = ()  # (whether tensors are like those, the answer)

    def find(self, *tensors: Tensor) -> Any:
        """The answer for tensors like these; None where there is none, and where one of them comes twice."""
        for same, answer in self.entries:
            if same(*tensors) and not modes():  # some modes of torch's own show in no tensor
                return answer
        return None

    def keep(self, answer: Any, tensors: Sequence[Tensor], any_rows: bool = False) -> None:
        """``answer`` for tensors like these; any_rows: whatever the leading sizes and the strides of the first are."""
        if _Guards is None:
            return
        sizes: list[list[int | None]] = [[*t.shape] for t in tensors]
        strides: list[list[int | None]] = [[*t.stride()] for t in tensors]
        if any_rows:
            sizes[0][:-1], strides[0] = [None] * (len(sizes[0]) - 1), [None] * len(sizes[0])
        same = _Guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        self.entries = (same, answer), *self.entries[: _KEPT - 1]
