"""Which accesses of a launch's programs happen before others, given the barriers and atomics between them."""

from __future__ import annotations

import bisect

import numpy as np

SEVERAL = -1  # in place of an interval: programs that nothing orders


class HappensBefore:
    """What the running program may rely on: stores of others before an atomic at an address where it did one, too.

    A program is a sequence of intervals that its barriers end, numbered through the whole launch (programs run one
    after the other). An atomic tells of the intervals before the last barrier: one thread does it, the others' stores
    are ordered by the barrier alone. What it learns counts from the next barrier on, for the same reason.
    """

    def __init__(self):
        self.interval = 0
        self._first = 1  # the running program's first interval
        self._starts: list[int] = []  # the first interval of each program
        self._known: dict[int, int] = {}  # program -> the last of its intervals that has happened before
        self._pending: dict[int, int] = {}
        self._told: dict[int, dict[int, int]] = {}  # address -> what an atomic there learns

    def start_program(self) -> None:
        self.interval += 1
        self._first = self.interval
        self._starts.append(self.interval)
        self._known, self._pending = {}, {}

    def barrier(self) -> None:
        self.interval += 1
        self._learn(self._known, self._pending)

    def atomic(self, address: np.ndarray) -> None:
        """One that acquires and releases."""
        for place in np.unique(address).tolist():
            told = self._told.setdefault(place, {})
            self._learn(self._pending, told)
            self._learn(told, {len(self._starts) - 1: self.interval - 1})

    @staticmethod
    def _learn(into: dict[int, int], news: dict[int, int]) -> None:
        for program, interval in news.items():
            into[program] = max(into.get(program, 0), interval)

    def own(self, intervals: np.ndarray) -> np.ndarray:
        return intervals >= self._first

    def conflicts(self, intervals: np.ndarray) -> bool:
        """Whether one of these accesses (0 = none) is another program's and not known to have happened before."""
        foreign = intervals[(intervals != 0) & ~self.own(intervals)]
        for interval in np.unique(foreign).tolist():
            program = bisect.bisect_right(self._starts, interval) - 1
            if interval == SEVERAL or self._known.get(program, 0) < interval:
                return True
        return False
