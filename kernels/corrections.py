"""What a merge leaves behind so that its unmerge gives back the exact bits: data only, the kernels are in merge.py."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

SHIFT = 40  # of the lost units, above the corrections
COLUMNS = 6  # of the table: begin + 1 (0: not merged), corrections, three sums, 1 where the last unmerge got through


class Form(NamedTuple):
    """How the elements of a weight are counted: ``unit`` and ``transposed`` of :class:`Corrections`."""

    unit: tuple[int, int]
    transposed: bool


@dataclass(frozen=True)
class Corrections:
    """The bits that ``round(Wm - D)`` gets wrong, unit by unit, and the sums by which an unmerge knows its weight.

    A unit is a rectangle of ``unit`` = (rows, columns) elements that one program merges, its words (32 bits: 1 element
    or 2) numbered by rows from 1 on. table: int64 [units + 1, COLUMNS], one row a unit; the last row is about all
    units: corrections and, shifted, units where finite elements would become infinite or NaN; in the last column units
    that the last unmerge refused.
    places (uint16) and values (int32): numbers and contents of the words that the corrections restore. Those of a unit
    lie together in the order of their numbers; which unit's come first is chance, and the table says where they are.
    seed: int64 [2], the seed and the first row's number of a merge that rounded at random.
    transposed: whether units and words are those of W^T, whose rows were contiguous at the merge.
    """

    table: torch.Tensor
    places: torch.Tensor
    values: torch.Tensor
    unit: tuple[int, int]
    seed: torch.Tensor | None = None
    transposed: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "places": self.places.view(torch.int16)}  # pickle reads no storage of uint16

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, places=state["places"].view(torch.uint16))

    @property
    def form(self) -> Form:
        return Form(self.unit, self.transposed)

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in (self.table, self.places, self.values))

    def totals(self) -> tuple[int, int]:
        """How many corrections the merge found, and units that would lose finite elements. Waits for the merge."""
        return totals_of([self])[0][:2]

    @property
    def refused(self) -> torch.Tensor:
        """int64 [1], on W's device: units that the last unmerge left as they were, because they had been changed."""
        return self.table[-1, 5:]

    def is_back(self) -> bool:
        """Whether the last unmerge got through in all units that the merge wrote. Waits for both."""
        table = self.table[:-1]
        return not bool(((table[:, 0] != 0) & (table[:, 5] == 0)).any())

    def trimmed(self, corrections: int, slack: int) -> "Corrections":
        """The same with memory for ``corrections``, or for up to ``slack`` more where that saves a copy."""
        places, values = self.places[:corrections], self.values[:corrections]
        if len(self.values) - corrections > slack:
            places, values = places.clone(), values.clone()
        return replace(self, places=places, values=values)


def totals_of(records: Sequence[Corrections]) -> list[tuple[int, int, int]]:
    """Of each merge the :meth:`Corrections.totals`, and what its last unmerge ``refused``. One wait for all."""
    last = [record.table[-1] for record in records]
    rows = torch.stack(last).tolist() if len(last) > 1 else [last[0].tolist()]
    return [(packed & ((1 << SHIFT) - 1), packed >> SHIFT, refused) for packed, *_, refused in rows]
