"""What adapters make of a weight [N, K], in float64: what a merge is compared with, a model's or a file's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def in_double(tensor: Tensor) -> Tensor:
    """In float64 on its device, or on a CPU: other devices than CUDA's may have no float64."""
    return (tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()).double()


class Adapter(NamedTuple):
    """One adapter of a weight [N, K] in float64. With a magnitude it is DoRA: W <- c (W + s B A), and so the output.

    lora_A: [r, K]. lora_B: [N, r]. bias: lora_bias [N]. magnitude: [N].
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    def rows(self, part: slice) -> Adapter:
        """Of these rows of the weight."""
        bias, magnitude = (None if t is None else t[part] for t in (self.bias, self.magnitude))
        return self._replace(lora_B=self.lora_B[part], bias=bias, magnitude=magnitude)

    def turned(self) -> Adapter:
        """Of W^T; one of LoRA alone."""
        return Adapter(self.lora_B.t(), self.lora_A.t(), self.scaling)


class Column(NamedTuple):
    """What a DoRA adapter multiplies outputs by: c = m / ||W + s B A|| [N], by rows, and how much worse it is known.

    doubt: ||(|W| + |s| |B| |A|)|| / ||W + s B A|| [N], 1 where nothing cancels.
    """

    scale: Tensor
    doubt: Tensor


def columns(weight: Tensor, adapters: Sequence[Adapter]) -> list[Column | None]:
    """The scale of each adapter for rows [n, K] of the unmerged weight, in float64; None for one without."""
    found: list[Column | None] = []
    for a in adapters:
        if a.magnitude is None:
            found.append(None)
            continue
        norm = (weight + a.scaling * (a.lora_B @ a.lora_A)).norm(dim=1)
        size = (weight.abs() + abs(a.scaling) * (a.lora_B.abs() @ a.lora_A.abs())).norm(dim=1)
        found.append(Column(a.magnitude / norm, size / norm))
    return found


def scale_error(K: int, doubt: Tensor, form: float, accumulate: float) -> Tensor:
    """Bound on the relative error of c: rounded parts of the sum, a norm of K positive terms, two roundings.

    form, accumulate: unit roundoffs of s B A and of sums.
    """
    return (4 * form + math.sqrt(K) * accumulate) * doubt


class Change(NamedTuple):
    """What adapters make of rows W [n, K]: ``scale`` W + ``part``, ``part`` in sums of size ``low``; D by how much.

    doubt: of the scales, [n, 1] as in :class:`Column`, summed over the adapters; None without DoRA, as scale.
    """

    part: Tensor
    low: Tensor
    scale: Tensor | None
    doubt: Tensor | None

    def delta(self, weight: Tensor) -> Tensor:
        """D = ``scale`` W + ``part`` - W."""
        return self.part if self.scale is None else self.part + (self.scale - 1) * weight

    def size(self, weight: Tensor) -> Tensor:
        """The magnitude of the sum."""
        return (weight if self.scale is None else self.scale * weight).abs() + self.low


def change(weight: Tensor, adapters: Sequence[Adapter]) -> Change:
    """Of rows of the unmerged weight, in float64; the adapters' rows are those of the weight."""
    part, low, scale, doubt = torch.zeros_like(weight), torch.zeros_like(weight), None, None
    for a, column in zip(adapters, columns(weight, adapters), strict=True):
        part = part + (a.lora_B * a.scaling) @ a.lora_A
        low = low + (a.lora_B * a.scaling).abs() @ a.lora_A.abs()
        if column is not None:
            c, worse = column.scale[:, None], column.doubt[:, None]
            part, low = c * part, c.abs() * low
            scale, doubt = (c, worse) if scale is None or doubt is None else (c * scale, doubt + worse)
    return Change(part, low, scale, doubt)
