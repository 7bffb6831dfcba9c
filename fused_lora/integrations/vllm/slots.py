"""A and B of one LoRA layer of vLLM, by slot: the memory that vLLM's layer writes and the grouped operators read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora.kernels.grouped_tables import AdapterTables
from fused_lora.ops.grouped.op import Terms


class Slots:
    """The adapters of one layer.

    vLLM pads each adapter to the largest rank that it allows. Here a slot has a rank of its own, and B lies as B^T, so
    that its first r rows are the B^T of rank r.

    Args:
        A: of each output [slots, 1, r, K], floating; none for an embedding. B: of each output [slots, 1, N, r].
        dtype: to keep both in.

    Attributes:
        A, B: what vLLM's layer writes from now on, of the same shapes. N: columns of each output; columns: of all.
        max_rank: of B. local_rank: of A, less where tensor parallelism shards the ranks.
        encodes: whether the layer's rows are those of an encoder, where the model has one beside its decoder.
        launches: of the kernels, kept by whoever makes them.
    """

    def __init__(self, A: Sequence[Tensor], B: Sequence[Tensor], dtype: torch.dtype):
        self._A, self._B_t = [_laid_out(a, dtype) for a in A], [_laid_out(b.transpose(2, 3), dtype) for b in B]
        self.A, self.B = self._A, [b.transpose(2, 3) for b in self._B_t]
        self.N, self.max_rank = [b.shape[2] for b in B], B[0].shape[3]
        self.columns = sum(self.N)
        self.local_rank = A[0].shape[2] if A else self.max_rank
        self.encodes = False
        self.launches: dict[tuple, Any] = {}
        self._terms: dict[tuple, Terms] = {}
        self._tables: dict[str, AdapterTables] = {}
        self._alive: list[Tensor] = []  # whose addresses are in the tables
        # what is there already is of the full rank, for all we know
        taken = [b.flatten(1).ne(0).any(1).tolist() for b in B]
        self.ranks = [[self.max_rank * there for there in of_output] for of_output in taken]

    def set_ranks(self, slot: int, ranks: Sequence[int]) -> None:
        """Say that the adapter in ``slot`` has this rank at each output; 0 where it has no term."""
        for of_output, rank in zip(self.ranks, ranks, strict=True):
            of_output[slot] = min(rank, self.max_rank)
        self._terms.clear()
        for tables in self._tables.values():
            for of_output, rank in zip(tables.rank, ranks, strict=True):  # by a kernel: nothing waits for the device
                of_output[slot].fill_(min(rank, tables.max_rank))

    def split(self, y: Tensor) -> Sequence[Tensor]:
        """The outputs in y [rows, columns or more]."""
        return y[:, : self.columns].split(self.N, dim=1)

    def terms(self, kind: str, output: int | None = None) -> Terms:
        """The factors of each slot for the eager operator; output: of this one alone.

        kind: "linear": A and B. "shrink": A alone. "expand": B alone. An identity is in the place of the other, and
        the product with it is exact.
        """
        found = self._terms.get((kind, output))
        if found is None:
            outputs, most, each, columns = range(len(self.N)) if output is None else (output,), self._most(kind), [], []
            for g in outputs:
                A, B_t = self._factors(kind, g)
                ranks = [min(rank, most) for rank in self.ranks[g]]
                each.append({slot: [(A[slot, :r].t(), B_t[slot, :r], 1.0)] for slot, r in enumerate(ranks) if r})
                columns.append(B_t.shape[2])
            found = self._terms[kind, output] = Terms(*each, columns=columns)
        return found

    def _most(self, kind: str) -> int:
        return self.max_rank if kind == "expand" else self.local_rank

    def _factors(self, kind: str, g: int) -> tuple[Tensor, Tensor]:
        """A [slots, r, K] and B^T [slots, r, N] at output g."""
        like = self._B_t[g]
        one = torch.eye(self._most(kind), dtype=like.dtype, device=like.device).expand(len(like), -1, -1)
        return one if kind == "expand" else self._A[g][:, 0], one if kind == "shrink" else like[:, 0]

    @torch.inference_mode(False)  # made in a step of vLLM, which has it, and written by loads between steps
    def tables(self, kind: str) -> AdapterTables:
        """The same for the kernels, at addresses that never change."""
        found = self._tables.get(kind)
        if found is None:
            outputs, slots, most = len(self.N), len(self._B_t[0]), self._most(kind)
            # each output's tables start at a multiple of 16 bytes
            numbers = torch.zeros(3, outputs, -(-slots // 16) * 16, dtype=torch.int64, device="cpu")
            for g in range(outputs):
                self._alive += (factors := self._factors(kind, g))
                sides = [[matrix.data_ptr() for matrix in side] for side in factors]
                sides.append([min(rank, most) for rank in self.ranks[g]])
                numbers[:, g, :slots] = torch.tensor(sides, device="cpu")
            A_ptr, B_ptr, rank = numbers.to(self._B_t[0].device)
            scaling = torch.ones_like(rank, dtype=torch.float32)
            found = AdapterTables(A_ptr, B_ptr, rank.int(), scaling, self._B_t[0].dtype, most)
            self._tables[kind] = found
        return found


def _laid_out(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of [slots, 1, rows, columns], of which each slot's matrix starts at a multiple of 16 elements."""
    slots, size = len(matrices), matrices[0].numel()
    memory = torch.empty((slots, -(-size // 16) * 16), dtype=dtype, device=matrices.device)
    return memory[:, :size].unflatten(1, matrices.shape[1:]).copy_(matrices)
