"""Which accesses of the programs of one launch happen one before the other: by barriers, releases and acquires."""

from __future__ import annotations

import bisect

import numpy as np

SEVERAL = -1  # in place of an interval: programs that nothing orders


class HappensBefore:
    """What the running program may rely on: what others stored before a release that it has acquired.

    A program is a sequence of intervals that its barriers end, numbered through the whole launch (programs run one
    after the other). A release publishes the intervals before the last barrier: one thread releases, the others' stores
    are ordered by the barrier alone. An acquire counts from the next barrier on, for the same reason. What a program
    has acquired it passes on with its own releases.
    """

    def __init__(self):
        self.interval = 0
        self._first = 1  # the running program's first interval
        self._starts: list[int] = []  # the first interval of each program
        self._known: dict[int, int] = {}  # program -> the last of its intervals that has happened before
        self._pending: dict[int, int] = {}
        self._released: dict[int, dict[int, int]] = {}  # address -> what an acquire there learns

    def start_program(self) -> None:
        self.interval += 1
        self._first = self.interval
        self._starts.append(self.interval)
        self._known, self._pending = {}, {}

    def barrier(self) -> None:
        self.interval += 1
        self._learn(self._known, self._pending)

    def atomic(self, address: np.ndarray, acquires: bool, releases: bool) -> None:
        for place in np.unique(address).tolist():
            if acquires:
                self._learn(self._pending, self._released.get(place, {}))
            if releases:
                mine = {len(self._starts) - 1: self.interval - 1} | self._known
                self._learn(self._released.setdefault(place, {}), mine)

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
