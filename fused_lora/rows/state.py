"""What is known about the rows of one tensor while a model is followed.

A tensor has one of three states. None: a constant, which belongs to no sequence. :class:`Owned`: the index along one
dimension tells the sequence. :class:`Unknown`: it holds values of the inputs, and nobody knows of which sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Owned(NamedTuple):
    """The sequence of each index along ``dim``: ``owners``, int64 [shape[dim]].

    template: made in the shape of an owned tensor (zeros_like), without its values. assembled: put together from parts
    of the batch, in an order that Python may have taken from values; so it holds for this call alone.
    """

    dim: int
    owners: np.ndarray
    template: bool = False
    assembled: bool = False

    @property
    def single(self) -> int | None:
        """The one sequence that all of it belongs to, or None."""
        return int(self.owners[0]) if len(self.owners) and (self.owners == self.owners[0]).all() else None

    def equals(self, other: Owned) -> bool:
        """Whether both say the same of tensors of one shape."""
        if self.single is not None or other.single is not None:
            return self.single == other.single
        return self.dim == other.dim and np.array_equal(self.owners, other.owners)


class Unknown(NamedTuple):
    """Values of the inputs whose sequence is not known.

    reason: why, for a message. mixed: values of several sequences were combined. What they meet is then Unknown, too.
    """

    reason: str
    mixed: bool = False


State = Owned | Unknown | None


def meet(states: Iterable[State], packed: bool, mixes: bool) -> State:
    """The state of a result whose elements are each made of one element of every operand.

    Owned wins over Unknown: an element that is added to a row is meant for this row. Mixed values win over all.

    Args:
        states: of the operands, in terms of the result's dimensions. packed: rows are tokens, and tokens of one
            sequence meet in attention; the first operand's rows count. mixes: two different owners make it mixed.
    """
    found, unknown, assembled = None, None, False
    for state in states:
        if isinstance(state, Unknown):
            if state.mixed:
                return state
            unknown = unknown or state
        elif state is not None:
            assembled = assembled or state.assembled
            if found is None or (found.template and not state.template):
                found = state
            elif not state.template and not found.equals(state) and not packed:
                return Unknown("values of different sequences meet", mixes)
    if found is not None and found.template and unknown is not None:
        return unknown
    return found._replace(assembled=assembled) if found is not None else unknown


def broadcast(state: State, shape: Sequence[int], result: Sequence[int]) -> State:
    """The state of an operand of ``shape`` after it was broadcast to ``result``."""
    if not isinstance(state, Owned):
        return state
    dim = state.dim + len(result) - len(shape)
    owners = state.owners
    if not 0 <= dim < len(result):
        return Unknown("a result without the dimension of the sequences")
    if len(owners) != result[dim]:
        owners = np.full(result[dim], owners[0]) if len(owners) == 1 else owners
        if len(owners) != result[dim]:
            return Unknown("a result without the dimension of the sequences")
    return state._replace(dim=dim, owners=owners)


def along(state: Owned, size: int, dim: int) -> np.ndarray | None:
    """The owners along ``dim``, which has ``size`` indices; None where it is another dimension that tells them."""
    if state.dim == dim:
        return state.owners
    return None if state.single is None else np.full(size, state.single)


def reshaped(state: Owned, old: Sequence[int], new: Sequence[int]) -> State:
    """The state after a reshape, which keeps the order of the elements."""
    total = int(np.prod(old))
    if state.single is not None:
        dim = next((d for d, size in enumerate(new) if size == old[state.dim]), 0)
        if not new:
            return Unknown("a scalar of one row")
        return state._replace(dim=dim, owners=np.full(new[dim], state.single))
    if not total:
        return Unknown("a view of a tensor without elements")
    stride, count = int(np.prod(old[state.dim + 1 :])), len(state.owners)
    for dim, size in enumerate(new):
        step = int(np.prod(new[dim + 1 :]))
        owners = state.owners[np.arange(size) * step // stride % count]
        # both sides are constant between multiples of the common divisor, and repeat with the common multiple
        at = np.arange(0, min(total, int(np.lcm(stride * count, step * size))), int(np.gcd(stride, step)))
        if np.array_equal(state.owners[at // stride % count], owners[at // step % size]):
            return state._replace(dim=dim, owners=owners)
    return Unknown("a view that cuts the sequences' dimension")
