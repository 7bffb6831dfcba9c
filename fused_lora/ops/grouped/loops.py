"""LoRA terms of rows under many adapters by the loops in C. Rows are read and written where they lie, A and B once for
a few rows."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_lora.ops import native
from fused_lora.ops.grouped import tiles
from fused_lora.ops.grouped.terms import RowLayout, Terms
from fused_lora.ops.linear.op import PLAIN


def add_terms_(y: Tensor, x: Tensor, layout: RowLayout, terms: Terms) -> bool:
    """y [rows, N of all outputs or more] += the terms of x [rows, K], rounded once; False: not done, for the loops do
    not run, or cannot read something."""
    if torch._C._is_tracing():  # as torch.jit.trace, which sees no loop
        return False
    for t in (y, x):
        if type(t) not in PLAIN or t.dtype not in native.TYPES or not t.is_cpu or t.is_neg():
            return False
    rows_lie = (y.stride(1) == 1 or y.shape[1] < 2) and y.stride(0) >= y.shape[1]
    if terms.table is None or not (rows_lie and native.usable() and _agree()):
        return False
    _run(y, x, layout, terms)
    torch.autograd.graph.increment_version(y)  # a backward that has kept y raises
    return True


def _run(y: Tensor, x: Tensor, layout: RowLayout, terms: Terms) -> None:
    table: Any = terms.table
    held, *addresses = layout.blocks
    blocks = len(held)
    if layout.groups[-1] >= table.groups:
        blocks = int(np.searchsorted(held[:, 0], table.groups))
    x = x.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    S = x.new_empty(len(layout.order) * len(terms.outputs) * table.pitch)
    native.add_terms(
        x.data_ptr(), x.stride(0), terms.K, native.TYPES[y.dtype], native.TYPES[terms.dtype],
        *table.fields, blocks, *addresses, S.data_ptr(), table.pitch,
        native.threads(blocks * table.elements), native.variant(), y.data_ptr(), y.stride(0) * y.element_size(),
    )  # fmt: skip


@functools.cache
def _agree() -> bool:
    """Compares C with torch on small whole numbers, whose sums are exact, once in a process."""
    rng = np.random.default_rng(0)

    def whole(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(-4, 5, shape).astype(np.float32))

    widths = 150, 19
    ranks = {0: (5,), 1: (8, 3), 2: (1,)}, {0: (3,), 2: (8, 1)}
    layout = RowLayout(np.repeat(np.array([0, -1, 1, 2, 3], np.int32), (1, 2, 37, 6, 1)), torch.device("cpu"))
    drawn = [
        {g: [(whole(r, 37).t(), whole(r, n), 2.0 - i) for i, r in enumerate(own)] for g, own in of_groups.items()}
        for of_groups, n in zip(ranks, widths, strict=True)
    ]
    x, y = whole(layout.rows, 37), whole(layout.rows, sum(widths)) / 8
    exact = y.clone()
    tiles.add_terms_(exact, x, layout, Terms(*drawn, columns=widths))
    for dtype, kept in itertools.product(native.TYPES, repeat=2):
        found = y.to(dtype, copy=True)
        held = [{g: [(A.to(kept), B.to(kept), s) for A, B, s in m] for g, m in o.items()} for o in drawn]
        _run(found, x.to(dtype), layout, Terms(*held, columns=widths))
        if not torch.equal(found, exact.to(dtype)):
            native.reject(f"a LoRA term in {dtype} differs")
            return False
    return True
