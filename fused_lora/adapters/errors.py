"""The exception that the adapter reader raises."""

from __future__ import annotations

import reprlib
from typing import Any

_LONGEST, _LONGEST_FOUND = 300, 1000  # a hostile file must not fill the log


class AdapterError(ValueError):
    """A file of an adapter, or of a model's checkpoint, is malformed or does not fit. Nothing has been changed.

    Attributes:
        file: path of the file.
        key: tensor, config entry or part of the file at fault, or None for the file as a whole.
        expected, found: what the key had to be and what it is, as text.
    """

    def __init__(self, file: str, key: str | None, expected: Any, found: Any):
        self.file, self.expected, self.found = file, short(expected), short(found, _LONGEST_FOUND)
        self.key = None if key is None else short(key)
        where = file if key is None else f"{file}: {self.key}"
        super().__init__(f"{where}: expected {self.expected}, found {self.found}")


def short(value: Any, longest: int = _LONGEST) -> str:
    """``value`` as printable text of bounded length."""
    text = value if isinstance(value, str) and value else reprlib.repr(value)
    text = text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"
    return text if text.isprintable() else repr(text)[1:-1]
