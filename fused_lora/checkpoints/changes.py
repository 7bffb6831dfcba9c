"""What a merge makes of each tensor of a checkpoint, as pieces of the file it is read from.

A weight becomes round(W + sum_i s_i B_i A_i): a sum in fp32 in the order of the adapters, one rounding, the bits of a
merge in the model. A DoRA adapter scales the rows of W and of all terms so far by m / ||W + s B A||, m its magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.adapters.tensorfile import TensorEntry
from fused_lora.checkpoints.adapter_file import AdapterFile
from fused_lora.checkpoints.quantised import Packed
from fused_lora.checkpoints.stream import PIECE_BYTES, Piece
from fused_lora.ops.dora.op import row_norms
from fused_lora.ops.merge.blocks import Dither
from fused_lora.ops.merge.op import Factors, add_rows_, delta_factors, dither_of

_MERGED = ("lora_A", "lora_B", "lora_magnitude")
CAST = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what a dtype for all tensors applies to


class Term(NamedTuple):
    """Rows ``skip`` on of one layer's s B A; of one ``expert`` where the layer is a stack of them."""

    adapter: AdapterFile
    path: str
    skip: int
    expert: int | None = None

    def part(self, name: str) -> Tensor:
        """One tensor of the layer, "lora_A" for example."""
        if self.expert is not None:
            return self.adapter.experts(self.path, name)[self.expert]
        return self.adapter.tensor(self.adapter.plan.slots[self.path][name])

    @property
    def dora(self) -> bool:
        """Whether it has a magnitude."""
        return "lora_magnitude" in self.adapter.plan.slots[self.path]


@dataclass
class Segment:
    """Rows [first, stop) of a weight as it is stored, and the terms that they get."""

    first: int
    stop: int
    terms: list[Term]

    def rows(self, term: Term, name: str) -> Tensor:
        """The rows of a tensor of the layer, lora_B or lora_magnitude, that belong to the segment."""
        return term.part(name)[term.skip : term.skip + self.stop - self.first]


@dataclass
class Change:
    """What happens to one tensor.

    Attributes:
        name: of the tensor in the output. source: of the tensor of the base that it begins as.
        kind: "merge", "bias", "replace", "rows", or "copy" of a tensor that is added as the source is.
        segments: of a merge, in order; of a stack of experts [experts, ...] one for each of its matrices.
        transposed: what a segment gets is A^T B^T, of whole terms: the weight, or each expert's, is stored as [K, N].
        terms: of a bias. held: (adapter, key) of what replaces it. rows: which rows are replaced.
        added: the base has no tensor of that name.
    """

    name: str
    source: str
    kind: str
    segments: list[Segment] = field(default_factory=list)
    transposed: bool = False
    terms: list[Term] = field(default_factory=list)
    held: tuple[AdapterFile, str] | None = None
    rows: list[int] = field(default_factory=list)
    added: bool = False

    def used(self) -> Iterator[tuple[AdapterFile, str]]:
        """(adapter, key) of every tensor that goes into it."""
        for term in (t for segment in self.segments for t in segment.terms):
            slots = term.adapter.plan.slots[term.path]
            yield from ((term.adapter, slots[part]) for part in _MERGED if part in slots)
        for term in self.terms:
            yield term.adapter, term.adapter.plan.slots[term.path]["lora_bias"]
        if self.held is not None:
            yield self.held

    def embedded(self) -> tuple[AdapterFile, str] | None:
        """(adapter, key) of a term that is of LoRA on an embedding; None where no term is."""
        terms = (term for segment in self.segments for term in segment.terms)
        found = next((term for term in terms if term.path in term.adapter.plan.embeddings), None)
        return None if found is None else (found.adapter, found.adapter.plan.slots[found.path]["lora_A"])

    def describe(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
        """For a report."""
        terms = [t for segment in self.segments for t in segment.terms]
        rank = max((sum(t.adapter.plan.ranks[t.path][0] for t in s.terms) for s in self.segments), default=None)
        adapters = dict.fromkeys(adapter.folder for adapter, _ in self.used())
        paths = dict.fromkeys(t.path for t in (*terms, *self.terms))
        found = {
            "tensor": self.name,
            "kind": self.kind,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
        }
        return {**found, "rank": rank, "adapters": list(adapters), "layers": list(paths), "added": self.added}


class Item(NamedTuple):
    """One tensor of the output: its name, what happens to it, the entry that it begins as, its dtype, how the entry is
    dequantised, and the seed of a merge that rounds at random."""

    name: str
    change: Change | None
    entry: TensorEntry
    dtype: torch.dtype
    packed: Packed | None = None
    seed: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output's tensor."""
        return self.entry.shape if self.packed is None else self.packed.shape

    @property
    def nbytes(self) -> int:
        """Of the output's tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def read_bytes(self) -> int:
        """Of the base's."""
        return self.entry.end - self.entry.begin


class Rows(NamedTuple):
    """A tensor of the base as a matrix: a stack of matrices below each other, a vector as one column.

    values: from the bytes of whole rows and the first of them to [rows, columns] in ``dtype``.
    """

    height: int
    columns: int
    row_bytes: int
    dtype: torch.dtype
    values: Callable[[Tensor, int], Tensor]

    @property
    def step(self) -> int:
        """How many rows are a piece."""
        return max(1, PIECE_BYTES // (self.columns * self.dtype.itemsize))


def rows_of(item: Item) -> Rows:
    """The tensor that ``item`` begins as. Of a quantised one the tensors beside it are read."""
    entry, packed = item.entry, item.packed
    if packed is not None:
        return Rows(*packed.shape, packed.row_bytes, torch.float32, packed.reader())
    columns = max(1, entry.shape[-1]) if len(entry.shape) > 1 else 1
    height, row_bytes = math.prod(entry.shape) // columns, columns * entry.dtype.itemsize
    return Rows(height, columns, row_bytes, entry.dtype, lambda data, _: data.view(entry.dtype).view(-1, columns))


class Sum:
    """What a segment of a weight gets, read once: the tensors of its terms on ``device``.

    dtype: of the sum, fp32 or fp64, or that of a weight whose merge rounds once.
    """

    def __init__(self, change: Change, segment: Segment, dtype: torch.dtype, device: torch.device):
        terms = segment.terms
        self._A = [t.part("lora_A").to(device) for t in terms]
        self._B = [(t.part("lora_B") if change.transposed else segment.rows(t, "lora_B")).to(device) for t in terms]
        self._scaling = [t.adapter.scaling(t.path) for t in terms]
        self._magnitudes = [segment.rows(t, "lora_magnitude").to(device) if t.dora else None for t in terms]
        self._factors = delta_factors(dtype, device, self._A, self._B, self._scaling, change.transposed)

    def factors(self, W: Tensor, rows: slice) -> Factors:
        """The delta of these stored rows, which are ``W`` now: left [rows, R] times right [R, columns]."""
        if not any(m is not None for m in self._magnitudes):
            return Factors(self._factors.left[rows], self._factors.right)
        B, scale = [], None
        for A, whole, s, m in zip(self._A, self._B, self._scaling, self._magnitudes, strict=True):
            B.append(whole[rows])
            if m is not None:  # as fused_lora.modules.variants.factors
                norms = row_norms(W, A, whole[rows], s)
                c = m[rows].to(norms.dtype) / norms
                B, scale = [c[:, None] * part for part in B], c if scale is None else c * scale
        parts = delta_factors(W.dtype, W.device, self._A, B, self._scaling, row_scale=scale)
        return parts._replace(right=self._factors.right)  # one for all pieces


def sum_dtype(dtype: torch.dtype, out: torch.dtype) -> torch.dtype:
    """What a weight has while it is merged: its own dtype, whose merge rounds once, or one that holds both."""
    if dtype == out:
        return dtype
    return torch.float64 if torch.float64 in (dtype, out) else torch.float32


def change_pieces(item: Item, begin: int, device: torch.device, note: Any = None) -> Iterator[Piece]:
    """The pieces that give one tensor of the output. What is added to the base is never noted.

    Args:
        begin: where the data of the source file begins.
        note: called with (name, first row, factors, units) of each merged piece, and with (name, None, None, old bytes)
            of a tensor that is replaced, in order; None keeps nothing.
    """
    name, change, entry, out, packed, seed = item
    change = None if change is not None and change.kind == "copy" else change
    at, size = begin + entry.begin, entry.end - entry.begin
    note = None if change is not None and change.added else note
    if change is None and entry.dtype == out and packed is None:
        yield Piece(at, size)
    elif change is None:
        rows = rows_of(item)
        yield from _cast_rows(name, rows, at, 0, rows.height, out)
    elif change.kind == "merge":
        yield from _merge_pieces(change, rows_of(item), at, out, device, note, packed is None, dither_of(seed))
    else:

        def work(data: Tensor) -> tuple[Tensor, Any]:
            new = _bytes(small_change(change, data.view(entry.dtype), entry.shape, out))
            return new, None if note is None else (change.name, None, None, data.clone())

        read = 0 if change.kind == "replace" and note is None else size
        yield Piece(at, read, work, size // entry.dtype.itemsize * out.itemsize, note)


def small_change(change: Change, old: Tensor, shape: tuple[int, ...], out: torch.dtype) -> Tensor:
    """A bias, a tensor or some rows after the change, in the dtype ``out``. Of a replaced one ``old`` may be empty."""
    if change.kind == "bias":
        new = old.to(torch.promote_types(old.dtype, torch.float32))
        for term in change.terms:
            bias = term.part("lora_bias")
            new = new + bias.to(torch.promote_types(bias.dtype, torch.float32)) * term.adapter.scaling(term.path)
    else:
        adapter, key = change.held  # type: ignore[misc]
        new = adapter.tensor(key)
        if change.kind == "rows":
            rows = torch.tensor(change.rows, device="cpu")
            new = old.view(shape).index_copy(0, rows, _finite(change.name, new, old.dtype))
        old = new
    return _finite(change.name, new, out, old)


def _merge_pieces(
    change: Change,
    rows: Rows,
    at: int,
    out: torch.dtype,
    device: torch.device,
    note: Any,
    plain: bool,
    dither: Dither | None,
) -> Iterator[Piece]:
    wide, done = sum_dtype(rows.dtype, out), 0

    def kept(first: int, stop: int) -> Iterator[Piece]:
        if plain and rows.dtype == out:
            return iter([Piece(at + first * rows.row_bytes, (stop - first) * rows.row_bytes)])
        return _cast_rows(change.name, rows, at, first, stop, out)

    for segment in change.segments:
        first, stop = segment.first, segment.stop
        if first > done:
            yield from kept(done, first)
        total = Sum(change, segment, wide, device)
        for row in range(first, stop, rows.step):
            part = slice(row - first, min(row + rows.step, stop) - first)

            def work(data: Tensor, part: slice = part, row: int = row, total: Sum = total) -> tuple:
                W = rows.values(data, row).to(device, wide)
                factors = total.factors(W, part)
                if dither is not None:
                    factors = factors._replace(dither=dither._replace(row=row))
                try:
                    units = add_rows_(W, factors, keep=note is not None)
                except ValueError as error:
                    raise ValueError(f"{change.name}: {error}") from None
                return _bytes(_finite(change.name, W, out, W).cpu()), (change.name, row, factors, units)

            count = part.stop - part.start
            out_size = count * rows.columns * out.itemsize
            yield Piece(at + row * rows.row_bytes, count * rows.row_bytes, work, out_size, note)
        done = stop
    if done < rows.height:
        yield from kept(done, rows.height)


def _cast_rows(name: str, rows: Rows, at: int, first: int, stop: int, out: torch.dtype) -> Iterator[Piece]:
    for row in range(first, stop, rows.step):

        def work(data: Tensor, row: int = row) -> tuple[Tensor, None]:
            old = rows.values(data, row)
            return _bytes(_finite(name, old, out, old)), None

        count = min(rows.step, stop - row)
        yield Piece(at + row * rows.row_bytes, count * rows.row_bytes, work, count * rows.columns * out.itemsize)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _finite(name: str, tensor: Tensor, dtype: torch.dtype, before: Tensor | None = None) -> Tensor:
    """The tensor in another dtype; ValueError where a number that was finite, or was so ``before``, is not any more."""
    if tensor.dtype == dtype and before is tensor:
        return tensor
    cast = tensor.to(dtype)
    finite = tensor.isfinite() if before is None else before.isfinite()
    if bool((finite & ~cast.isfinite()).any()):
        raise ValueError(f"{name}: expected values within the range of {dtype}, got larger ones")
    return cast
