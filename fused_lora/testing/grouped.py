"""A batch over many adapters with its exact answer and eager PEFT's: what tests of the grouped kernels compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fused_lora.kernels.grouped_tables import AdapterTables, RowGroups
from fused_lora.ops.grouped.metadata import GroupLayout, build_metadata
from fused_lora.testing.guards import GuardedBuffers


@dataclass
class GroupedCase:
    """One site: x [T, K], base outputs y_g [T, N_g], and for each slot s and output g A [r, K], B [N_g, r], a scaling.

    ``guards`` keeps every adapter between bands of NaN, B transposed, as the kernels take it.
    """

    x: torch.Tensor
    base: list[torch.Tensor]
    lora_A: list[list[torch.Tensor]]
    lora_B: list[list[torch.Tensor]]
    scaling: torch.Tensor
    group_of_row: list[int]
    groups: list[list[tuple[int, float]]]
    layout: GroupLayout
    guards: GuardedBuffers

    @classmethod
    def make(
        cls,
        group_of_row: Sequence[int],
        groups: Sequence[Sequence[tuple[int, float]]],
        ranks: Sequence[Sequence[int]],
        N: Sequence[int],
        K: int,
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> GroupedCase:
        """Random values of the sizes that occur in serving. ranks: for each slot, that of each output, or 0."""
        guards, T, adapter_dtype = GuardedBuffers(), len(group_of_row), adapter_dtype or dtype

        def adapter(*shape):
            return guards.copy((torch.randn(shape) * 0.1).to(adapter_dtype).to(device), f"adapter {shape}")

        size = max(map(len, groups), default=1)
        return cls(
            x=torch.randn(T, K).to(dtype).to(device),
            base=[torch.randn(T, n).to(dtype).to(device) for n in N],
            lora_A=[[adapter(r, K) for r in of_slot] for of_slot in ranks],
            lora_B=[[adapter(r, n).t() for r, n in zip(of_slot, N, strict=True)] for of_slot in ranks],
            scaling=torch.tensor([[2.0 - 0.3 * s + 0.1 * g for s in range(len(ranks))] for g in range(len(N))]),
            group_of_row=list(group_of_row),
            groups=[list(g) for g in groups],
            layout=GroupLayout(max(T, 1), max(len(groups), 1), size, slots=len(ranks)),
            guards=guards,
        )

    @property
    def adapters(self) -> list[torch.Tensor]:
        """The tensors that kernels reach by address."""
        return [t for slot in (*self.lora_A, *self.lora_B) for t in slot if t.numel()]

    def tables(self) -> AdapterTables:
        """The tables that tell the kernels where the adapters are."""

        def table(values, dtype):
            return torch.tensor([list(of_output) for of_output in zip(*values, strict=True)], dtype=dtype).to(
                self.x.device
            )

        ranks = [[A.shape[0] for A in slot] for slot in self.lora_A]
        return AdapterTables(
            A_ptr=table([[A.data_ptr() for A in slot] for slot in self.lora_A], torch.int64),
            B_ptr=table([[B.data_ptr() for B in slot] for slot in self.lora_B], torch.int64),
            rank=table(ranks, torch.int32),
            scaling=self.scaling.to(self.x.device),
            dtype=self.lora_A[0][0].dtype,
            max_rank=max(map(max, ranks)),
        )

    def row_groups(self) -> RowGroups:
        """The metadata of this batch. The unused part of its buffer holds values that must never be read."""
        host = np.full(self.layout.size, 2**30, np.int32)
        build_metadata(self.layout, self.group_of_row, self.groups, host)
        return self.layout.views(torch.from_numpy(host).to(self.x.device))

    def run(self, shrink=None, expand=None, tables: AdapterTables | None = None, groups: RowGroups | None = None):
        """The kernels' outputs, in guarded copies of the base outputs with their strides, and those guards."""
        from fused_lora.kernels.grouped_expand import grouped_expand
        from fused_lora.kernels.grouped_shrink import grouped_shrink

        guards = GuardedBuffers()
        outputs = [guards.copy(y, f"y[{g}]") for g, y in enumerate(self.base)]
        tables, groups = tables or self.tables(), groups or self.row_groups()
        grouped_expand(grouped_shrink(self.x, tables, groups, shrink), outputs, tables, groups, expand)
        return outputs, guards

    def rows(self, index: Sequence[int]) -> GroupedCase:
        """Some of the rows, in any order, as a batch of its own."""
        taken = dict(x=self.x[index], base=[y[index] for y in self.base])
        return replace(self, **taken, group_of_row=[self.group_of_row[i] for i in index])

    def exact(self) -> list[torch.Tensor]:
        """The outputs in float64."""
        return self._combine([y.double() for y in self.base], self.x.double(), lambda t: t.double())

    def fp32_bounds(self) -> list[torch.Tensor]:
        """How far sums formed in fp32 may be from :meth:`exact`: n eps / 2 times the sum of magnitudes of n terms.

        Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1; first order, with room for the scales.
        """
        sizes = replace(self, groups=[[(s, abs(w)) for s, w in group] for group in self.groups])
        sizes.scaling = self.scaling.abs()
        size = sizes._combine([y.double().abs() for y in self.base], self.x.double().abs(), lambda t: t.double().abs())
        ranks = max((A.shape[0] for slot in self.lora_A for A in slot), default=0) * self.layout.group_size
        return [(self.x.shape[1] + ranks + 8) * 2.0**-24 * y for y in size]

    def eager(self) -> list[torch.Tensor]:
        """The outputs as PEFT's mixed batch computes them: each adapter or weighted sum is added to its rows."""
        y = self._combine(self.base, self.x.to(self.lora_A[0][0].dtype), lambda t: t)
        return [t.to(self.x.dtype) for t in y]

    def _combine(self, base, x, convert) -> list[torch.Tensor]:
        outputs = [y.clone() for y in base]
        index = torch.tensor(self.group_of_row, dtype=torch.int64, device=self.x.device)
        for g, y in enumerate(outputs):
            for i, group in enumerate(self.groups):
                rows = (index == i).nonzero().flatten()
                for slot, weight in group:
                    A, B = convert(self.lora_A[slot][g]), convert(self.lora_B[slot][g])
                    factor = float(np.float32(weight)) * self.scaling[g, slot].item()
                    if A.shape[0] and len(rows):
                        y[rows] = (y[rows] + (x[rows] @ A.t()) @ B.t() * factor).to(y.dtype)
        return outputs
