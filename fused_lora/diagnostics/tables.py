"""What the reports have in common: equal layers in one row, and aligned columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
K = TypeVar("K")


def pattern(path: str) -> str:
    """The path of a layer with * for its numbers, which tell equal blocks apart."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items by their keys, in the order found."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def table(rows: Sequence[Sequence[str]], numbers: bool = False) -> list[str]:
    """A line for each row; ``numbers``: all columns but the first are aligned at their right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [str.ljust, *[str.rjust if numbers else str.ljust] * (len(widths) - 1)]
    return ["  ".join(a(c, w) for a, c, w in zip(aligned, row, widths, strict=True)).rstrip() for row in rows]


def dtype_name(dtype: torch.dtype | str) -> str:
    """Such as "bfloat16"; a name stays as it is."""
    return str(dtype).removeprefix("torch.")
