"""Checks of arguments that several packages take."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def check_int(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """``value`` as an int. Raises TypeError for another type or a bool, ValueError outside ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {value!r:.100}")
    number = int(value)
    if least is not None and number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    if most is not None and number > most:
        raise ValueError(f"{name}: expected at most {most}, got {number!s:.100}")
    return number
