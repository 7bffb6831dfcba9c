"""What groups of adapters add at a layer, and which of their products may be one: those of one shape whose factors lie
at equal distances in one memory, so that a strided view over them is no copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

Factors = tuple[Tensor, Tensor, float]  # A^T [K, r], B^T [r, N], scale


class Terms:
    """What each group adds at one layer.

    Args:
        factors: A^T [K, r], B^T [r, N] and the scale of each adapter, by group; all of one floating dtype, starting at
            multiples of 64 bytes. They are added up in this order. Groups that add nothing are left out, or have an
            empty list.

    Attributes:
        groups: their numbers, ascending. runs: the groups again, neighbours together that may share a product.
        places: of each group, where its factors lie.
    """

    def __init__(self, factors: Mapping[int, Sequence[Factors]]):
        self.factors = {g: factors[g] for g in sorted(factors) if factors[g]}
        self.groups = tuple(self.factors)
        self.ranks = {g: tuple(A_t.shape[1] for A_t, _, _ in self.factors[g]) for g in self.groups}
        self.places = {g: _place(self.factors[g]) for g in self.groups}
        self.runs = _runs(self.groups, self.places.values())


class Joint:
    """Layers that read the same input, so that their terms are formed together.

    Args:
        terms: of each layer, all with the same K.

    Attributes:
        groups: of all layers, ascending. across: of each group, the numbers of its layers, neighbours together that
            may share a product. signature: what decides how the products are cut, sizes apart.
    """

    def __init__(self, terms: Sequence[Terms]):
        self.terms = tuple(terms)
        self.groups = tuple(sorted({g for t in terms for g in t.groups}))
        self.across: dict[int, tuple[tuple[int, ...], ...]] = {}
        if len(terms) > 1:
            for g in self.groups:
                layers = [i for i, t in enumerate(terms) if g in t.factors]
                self.across[g] = _runs(layers, [terms[i].places[g] for i in layers])
        factors = [f for t in terms for g in t.groups[:1] for f in t.factors[g][:1]]
        self.dtype: Any = factors[0][0].dtype if factors else None
        self.K = factors[0][0].shape[0] if factors else 0
        self.N = tuple(next((f[0][1].shape[1] for f in t.factors.values()), 0) for t in terms)
        self.signature = self.N, tuple((t.runs, *t.ranks.items()) for t in terms), tuple(self.across.items())


def stacked(factors: Sequence[Factors]) -> Factors:
    """A^T [n, K, r], B^T [n, r, N] and the scale of a run: views of the same memory."""
    (A_t, B_t, scale), (next_A, next_B, _) = factors[:2]
    A, B = (
        t.as_strided((len(factors), *t.shape), (u.storage_offset() - t.storage_offset(), *t.stride()))
        for t, u in ((A_t, next_A), (B_t, next_B))
    )
    return A, B, scale


def _place(factors: Sequence[Factors]) -> tuple | None:
    """What neighbours in a product must have in common, and where A^T and B^T lie; None for several adapters."""
    if len(factors) > 1:
        return None
    A_t, B_t, scale = factors[0]
    memory = A_t.untyped_storage().data_ptr(), B_t.untyped_storage().data_ptr()
    alike = scale, A_t.shape, B_t.shape, A_t.stride(), B_t.stride(), memory
    return alike, A_t.storage_offset(), B_t.storage_offset()


def _runs(keys: Iterable[int], places: Iterable[tuple | None]) -> tuple[tuple[int, ...], ...]:
    """The keys in their order, neighbours together as long as they are alike and at equal distances."""
    runs: list[list[int]] = []
    before, distance = None, None
    for key, place in zip(keys, places, strict=True):
        apart = None
        if before is not None and place is not None and place[0] == before[0]:
            apart = place[1] - before[1], place[2] - before[2]
        if apart is not None and min(apart) > 0 and distance in (None, apart):
            runs[-1].append(key)
            distance = apart
        else:
            runs.append([key])
            distance = None
        before = place
    return tuple(tuple(run) for run in runs)
