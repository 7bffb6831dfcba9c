"""Decode tokens while they come: only whole characters, and nothing that may be the start of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character


class TextStream:
    """Text of one answer.

    ``add`` takes new tokens and returns the text that is now certain. If a stop string was found, ``stopped`` is True
    and the text ends before it. ``flush`` returns the rest.

    Attributes:
        offsets: for each token, how long the text before it is, in characters. Those after a stop string have none.
        released: length of the text that was returned.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.stopped = False
        self.offsets: list[int] = []
        self.released = 0
        self._tokens: list[int] = []
        self._start = self._read = 0  # text of tokens [start, read) is already in ``_pending`` or given out
        self._pending = ""

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make certain."""
        for token in tokens:
            if self.stopped:
                break
            self._tokens.append(token)
            self.offsets.append(self.released + len(self._pending))
            self._take(self._decoded(unfinished=False))
        return self._release(len(self._pending) - self._held_back())

    def flush(self) -> str:
        """All text that is left; an incomplete character comes out as U+FFFD."""
        if not self.stopped:
            self._take(self._decoded(unfinished=True))
        return self._release(len(self._pending))

    def _decoded(self, unfinished: bool) -> str:
        """New text: what the last tokens add to those before them, whose text they may change (spaces, bytes)."""
        before = self._text(self._start, self._read)
        now = self._text(self._start, len(self._tokens))
        if len(now) <= len(before) or (now.endswith(_UNFINISHED) and not unfinished):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return now[len(before) :]

    def _text(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)

    def _take(self, text: str) -> None:
        self._pending += text
        found = [at for at in map(self._pending.find, self.stops) if at >= 0]
        if found:
            self._pending, self.stopped = self._pending[: min(found)], True

    def _held_back(self) -> int:
        """Length of the longest end of the pending text that begins a stop string."""
        if self.stopped:
            return 0
        longest = max(map(len, self.stops), default=1) - 1
        for length in range(min(longest, len(self._pending)), 0, -1):
            if any(stop.startswith(self._pending[-length:]) for stop in self.stops):
                return length
        return 0

    def _release(self, length: int) -> str:
        text, self._pending = self._pending[:length], self._pending[length:]
        self.released += len(text)
        return text
