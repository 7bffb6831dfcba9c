"""What ``verify`` does: read a merged shard again and compare it with its source and a sum in fp64."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_lora.adapters.errors import AdapterError
from fused_lora.checkpoints.changes import Change, Item, Rows, Segment, rows_of, small_change
from fused_lora.checkpoints.files import Shard, read_shard
from fused_lora.checkpoints.stream import read_bytes, read_tensor
from fused_lora.ops.merge import exact
from fused_lora.ops.merge.exact import Adapter

_ROWS = 16  # of each merged segment
_UNIT = 2.0**-24  # unit roundoff of sums


@dataclass
class Checked:
    """What was compared: bytes that had to stay, and rows of merged weights. Of these rows the largest error of an
    element in units of the last place, of W or the largest term; and the share of the adapters that rounding took,
    ||(Wm - W) - D|| / ||D||."""

    same_bytes: int = 0
    rows: int = 0
    worst_ulps: float = 0.0
    wanted: float = 0.0
    lost: float = 0.0

    @property
    def lost_share(self) -> float:
        """0: nothing, 1: all of the adapters."""
        return (self.lost / self.wanted) ** 0.5 if self.wanted else 0.0

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        found = {"same_bytes": self.same_bytes, "rows": self.rows, "worst_ulps": self.worst_ulps}
        return {**found, "lost_share": self.lost_share}


def check_shard(source: Shard, path: str, items: Sequence[Item], checked: Checked) -> None:
    """Compare the file at ``path`` with what ``items`` make of ``source``; the counts go to ``checked``.

    Raises AdapterError at the first tensor that is not what it must be.
    """
    merged = read_shard(*os.path.split(path))
    found = {name: (entry.dtype, entry.shape) for name, entry in merged.header.entries.items()}
    wanted = {item.name: (item.dtype, item.shape) for item in items}
    if found != wanted:
        raise AdapterError(merged.path, None, "the tensors that were written", "others")
    with open(source.path, "rb", buffering=0) as old, open(merged.path, "rb", buffering=0) as new:
        for item in items:
            files = _Pair(source, old.fileno(), merged, new.fileno(), item)
            change = item.change
            if change is None or change.kind == "copy":
                checked.same_bytes += files.compare(0, files.old.height)
            elif change.kind == "merge":
                _check_merge(files, change, checked)
            else:
                was = read_tensor(source.path, old.fileno(), source.data, item.entry)
                files.expect(small_change(change, was, item.entry.shape, item.dtype))


class _Pair:
    """One tensor in both files, as a matrix."""

    def __init__(self, source: Shard, old: int, merged: Shard, new: int, item: Item):
        self._source, self._file, self._merged, self._merged_file = source, old, merged, new
        self.item, self._at = item, source.data + item.entry.begin
        self._entry = merged.header.entries[item.name]
        self.old = rows_of(item)
        self.new = rows_of(Item(item.name, None, self._entry, item.dtype))

    def rows(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows as they were and as they are, [stop - first, columns]."""
        begin = self._merged.data + self._entry.begin
        return (
            read_rows(self._source.path, self._file, self._at, self.old, first, stop),
            read_rows(self._merged.path, self._merged_file, begin, self.new, first, stop),
        )

    def compare(self, first: int, stop: int) -> int:
        """These rows must be as they were, cast to the output's dtype; their bytes."""
        for row in range(first, stop, self.old.step):
            old, new = self.rows(row, min(row + self.old.step, stop))
            self._same(old.to(new.dtype), new)
        return (stop - first) * self.new.row_bytes

    def expect(self, wanted: Tensor) -> None:
        """All of it must be as given."""
        self._same(wanted, self.rows(0, self.new.height)[1])

    def _same(self, wanted: Tensor, found: Tensor) -> None:
        if not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (wanted, found))):
            self.fail("the bytes that it had to get", "others")

    def fail(self, expected: str, found: str) -> None:
        """Raise the error of this tensor."""
        raise AdapterError(self._merged.path, self.item.name, expected, found)


def read_rows(path: str, file: int, at: int, rows: Rows, first: int, stop: int) -> Tensor:
    """Rows of a tensor of an open file whose bytes begin ``at``."""
    data = read_bytes(path, file, at + first * rows.row_bytes, (stop - first) * rows.row_bytes)
    return rows.values(data, first)


def _check_merge(files: _Pair, change: Change, checked: Checked) -> None:
    height, done = files.old.height, 0
    for segment in change.segments:
        first, stop = segment.first, segment.stop
        checked.same_bytes += files.compare(done, first)
        for row in range(first, stop, max(1, (stop - first) // _ROWS)):
            old, new = files.rows(row, row + 1)
            W, adapters = old.double(), adapters_of_rows(change, segment, row, row + 1)
            made = exact.change(W, adapters)
            delta, size = made.delta(W), made.size(W)
            error = new.double() - W - delta
            largest = torch.maximum(W.abs(), made.low if made.scale is None else size)
            ulp = _ulp(torch.maximum((W + delta).abs(), largest), new.dtype)
            roundings = sum(len(a.lora_A) + 4 * (a.magnitude is not None) for a in adapters) + 3
            bound = ulp + roundings * _UNIT * size
            if made.doubt is not None:
                bound = bound + exact.scale_error(W.shape[1], made.doubt, _UNIT, _UNIT) * size
            if not bool(((error.abs() <= bound) | ~old.isfinite()).all()):
                what = "W + s B A" if made.doubt is None else "W + s B A, scaled to the magnitude,"
                found = f"an error of {(error / ulp).abs().max():.3g} of them"
                files.fail(f"{what} in row {row} to the last place", found)
            checked.rows += 1
            checked.worst_ulps = max(checked.worst_ulps, (error / ulp).abs().nan_to_num().max().item())
            checked.wanted += delta.square().sum().item()
            checked.lost += error.nan_to_num().square().sum().item()
        done = stop
    checked.same_bytes += files.compare(done, height)


def adapters_of_rows(change: Change, segment: Segment, first: int, stop: int) -> list[Adapter]:
    """What stored rows of a segment get, as adapters of a weight of these rows alone."""
    found = []
    for term in segment.terms:
        A, B, at = term.part("lora_A"), term.part("lora_B"), first - segment.first + term.skip
        left, right = (A.t(), B.t()) if change.transposed else (B, A)
        rows, scaling = slice(at, at + stop - first), term.adapter.scaling(term.path)
        magnitude = term.part("lora_magnitude")[rows].double() if term.dora else None
        found.append(Adapter(right.double(), left[rows].double(), scaling, magnitude=magnitude))
    return found


def _ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of ``dtype`` there."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full_like(exact, info.eps), exponent - 1)
