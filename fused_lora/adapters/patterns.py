"""Apply rank_pattern and alpha_pattern of an untrusted config without running the file's regular expressions.

PEFT takes the first key with ``re.match(rf"(.*\\.)?({key})$", name)``. This module decides keys made of
ordinary characters, ``.`` (any character), ``\\.``, one leading ``^``, one trailing ``$`` and ``|`` between such
parts. Each part has a fixed length and is compared character by character. Other keys stay undecided: an expression
from a file can take exponential time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

Value = TypeVar("Value")
_SPECIAL = set("\\.^$*+?{}[]|()")
_ANY = ""  # the token of an unescaped dot


class PatternTable(Generic[Value]):
    """PEFT's choice among the values of ``pattern``, or ``default`` where no key matches."""

    def __init__(self, pattern: Mapping[str, Value], default: Value):
        self._rows = [(_Key(key), value) for key, value in pattern.items()]
        self._default = default

    def possible(self, name: str) -> set[Value]:
        """The values PEFT's rule can give for ``name``: one unless an undecided key comes before the first match."""
        values = set()
        for key, value in self._rows:
            matched = key.matches(name)
            if matched is not False:
                values.add(value)
            if matched:
                return values
        return values | {self._default}


class _Key:
    def __init__(self, key: str):
        # cut at "|" first: a bracket around one leaves a special character on both sides
        parts = [(part.startswith("^"), _tokens(part.removeprefix("^").removesuffix("$"))) for part in key.split("|")]
        plain = [(anchored, tokens) for anchored, tokens in parts if tokens is not None]
        self._parts = plain if len(plain) == len(parts) else None

    def matches(self, name: str) -> bool | None:
        """Whether PEFT's ``re.match`` would succeed; None when only running it could tell."""
        return None if self._parts is None else any(_ends(tokens, anchored, name) for anchored, tokens in self._parts)


def _ends(tokens: list[str], anchored: bool, name: str) -> bool:
    start = len(name) - len(tokens)
    if start < 0 or (start > 0 and (anchored or name[start - 1] != ".")):
        return False
    return all(token in (_ANY, character) for token, character in zip(tokens, name[start:], strict=True))


def _tokens(text: str) -> list[str] | None:
    tokens, rest = [], iter(text)
    for character in rest:
        if character == ".":
            tokens.append(_ANY)
        elif character == "\\" and next(rest, None) == ".":
            tokens.append(".")
        elif character in _SPECIAL:
            return None
        else:
            tokens.append(character)
    return tokens
