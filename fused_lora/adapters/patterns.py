"""Apply rank_pattern and alpha_pattern of an untrusted config: PEFT's choice, in a bounded number of steps.

PEFT takes the first key with ``re.match(rf"(.*\\.)?({key})$", name)``. Python's ``re`` goes back and tries again, which
can take exponential time. Here a step of the expression maps all positions in the name where the text before it can end
to those where it can end itself, so that nothing is tried twice. What follows is understood; a key with anything else
stays undecided: characters, ``.``, classes, ``\\d \\w \\s``, groups, ``|``, repetitions, ``^`` and ``$``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

Value = TypeVar("Value")
Step = Callable[[str, set[int]], set[int]]  # name, positions before -> positions after

_MAX_STEPS = 2_000_000  # positions that are followed for one table
_REPETITION = 4  # what one more repetition costs of these
_STARTS = 8  # positions of which one more costs one of these, though none leads on: a usual name has no more
_READ, _CLASS = 10, 50  # what a step of a key costs to read, and a class to compile
_MAX_DEPTH = 50  # of groups in groups
# one or more characters that stand for themselves, the last of them not repeated
_TEXT = re.compile(r"(?:\\[\W_]|[^\\.^$*+?{}\[\]()|])+(?![*+?{])")
# one character of a kind; a class has no "[" and no doubled sign inside, which later versions of Python may read anew
_ONE = re.compile(r"\.|\\[dDwWsS\W_]|[^\\.^$*+?{}\[\]()|]|\[\^?\]?(?:\\[dDwWsS\W_]|(?!([-&|~])\1)[^\\\[\]])*\]")
_GROUP = re.compile(r"\((?!\?)|\(\?:")
_REPEATED = re.compile(r"(?:([*+?])|\{([0-9]{1,3})\}|\{([0-9]{1,3}),([0-9]{0,3})\})\??(?![*+?{])")
_RANGES = {"*": (0, -1), "+": (1, -1), "?": (0, 1)}  # least and most, -1: any number


class PatternTable(Generic[Value]):
    """PEFT's choice among the values of ``pattern``, or ``default`` where no key matches."""

    def __init__(self, pattern: Mapping[str, Value], default: Value):
        self._left = [_MAX_STEPS]
        self._rows = [(_expression(key, self._left), value) for key, value in pattern.items()]
        self._default = default

    def possible(self, name: str) -> set[Value]:
        """The values PEFT's rule can give for ``name``: one unless an undecided key comes before the first match."""
        starts = {0, *(i for i, letter in enumerate(name, 1) if letter == ".")}
        values = set()
        for expression, value in self._rows:
            matched = self._matches(expression, name, starts)
            if matched is not False:
                values.add(value)
            if matched:
                return values
        return values | {self._default}

    def _matches(self, expression: Step | None, name: str, starts: set[int]) -> bool | None:
        if expression is None or "\n" in name:  # before which "$" matches, too
            return None
        try:
            return len(name) in expression(name, starts)
        except _UndecidedError:
            return None


class _UndecidedError(Exception):
    """Only running the expression could tell."""


def _spend(left: list[int], cost: int) -> None:
    left[0] -= cost
    if left[0] < 0:
        raise _UndecidedError


def _expression(key: str, left: list[int]) -> Step | None:
    try:
        step, end = _alternatives(key, 0, 0, left)
    except (_UndecidedError, re.error):
        return None
    return step if end == len(key) else None


def _alternatives(key: str, at: int, depth: int, left: list[int]) -> tuple[Step, int]:
    """The step of ``key`` from ``at`` to its end or an unmatched bracket, and where that is."""
    if depth > _MAX_DEPTH:
        raise _UndecidedError
    sequences: list[list[Step]] = [[]]
    while at < len(key) and key[at] != ")":
        if key[at] == "|":
            sequences.append([])
            at += 1
        else:
            step, at = _one_step(key, at, depth, left)
            sequences[-1].append(step)

    def run(name: str, before: set[int]) -> set[int]:
        after = set()
        for steps in sequences:
            here = before
            for step in steps:
                _spend(left, len(here) // _STARTS)
                here = step(name, here)
                _spend(left, len(here))
                if not here:
                    break
            _spend(left, 1)
            after |= here
        return after

    return run, at


def _one_step(key: str, at: int, depth: int, left: list[int]) -> tuple[Step, int]:
    """The step that begins at ``key[at]``, with its repetition, and where it ends."""
    _spend(left, _CLASS if key[at] == "[" else _READ)
    if found := _TEXT.match(key, at):
        text = re.sub(r"\\(.)", r"\1", found[0], flags=re.DOTALL)
        return lambda name, before: {i + len(text) for i in before if name.startswith(text, i)}, found.end()
    if key[at] == "^":
        return lambda name, before: before & {0}, _not_repeated(key, at + 1)
    if key[at] == "$":
        return lambda name, before: before & {len(name)}, _not_repeated(key, at + 1)
    if found := _GROUP.match(key, at):
        step, at = _alternatives(key, found.end(), depth + 1, left)
        if key[at : at + 1] != ")":
            raise _UndecidedError
        at += 1
    elif found := _ONE.match(key, at):
        one = re.compile(found[0])  # one character: there is nothing to try again
        step, at = lambda name, before: {i + 1 for i in before if one.match(name, i)}, found.end()
    else:
        raise _UndecidedError
    if found := _REPEATED.match(key, at):
        sign, exactly, least, most = found.groups()
        low, high = _RANGES[sign] if sign else (int(exactly or least), int(exactly or most or -1))
        if -1 < high < low:
            raise _UndecidedError
        return _repeat(step, low, high, left), found.end()
    return step, _not_repeated(key, at)


def _not_repeated(key: str, at: int) -> int:
    if key[at : at + 1] in ("*", "+", "?", "{"):
        raise _UndecidedError
    return at


def _repeat(step: Step, low: int, high: int, left: list[int]) -> Step:
    def run(name: str, before: set[int]) -> set[int]:
        for _ in range(low):
            left[0] -= _REPETITION
            before = step(name, before)
            if not before:
                break
        found, new, further = set(before), before, 0
        while new and (high < 0 or further < high - low):
            left[0] -= _REPETITION
            new = step(name, new) - found
            found |= new
            further += 1
        return found

    return run
