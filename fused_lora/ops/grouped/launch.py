"""Many adapters in one batch by the Triton kernels, where they may run and have passed their first-use check."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fused_lora.kernels.grouped_tables import AdapterTables, RowGroups
from fused_lora.ops import guard
from fused_lora.ops.grouped.metadata import GroupLayout, build_metadata
from fused_lora.ops.grouped.op import RowLayout, Terms, lora_grouped_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 512


def lora_grouped_by_address_(
    y: Tensor, x: Tensor, tables: AdapterTables, rows: RowGroups, eager: Callable[[], Tensor]
) -> Tensor:
    """y[m] += sum_i weight_i scaling_i * B_i (A_i x[m]) over the members of the row's group, in place.

    Args:
        y: [M, N]; x: [M, K], of one dtype. tables: the site's adapters. rows: their groups.
        eager: does the same without kernels; it takes over for dtypes and ranks that they do not have, and from then on
            where their first use fails.

    Returns:
        y. What an adapter computes for a row depends on no other row. Nothing waits for the device.
    """
    if not _possible(x.dtype, y.dtype, x.device, tables):
        return eager()

    def run() -> Tensor:
        from fused_lora.kernels.grouped_expand import lora_grouped

        lora_grouped(x, [y], tables, rows)
        return y

    return guard.guarded(_key(1, x, tables, rows), run, eager, lambda: _check(x, tables, rows, 1))()


def shrink_by_address(x: Tensor, tables: AdapterTables, rows: RowGroups) -> Tensor | None:
    """A_gi x[m] for all outputs g of the tables, in one launch that reads x once; None where the kernels do not.

    Args:
        x: [M, K]. tables: of G sites that read x. rows: their groups.

    Returns:
        S [P, G, rows, columns], of which ``S[:, g : g + 1]`` is what :func:`expand_by_address_` takes for output g.
    """
    if not _possible(x.dtype, x.dtype, x.device, tables):
        return None

    def run() -> Tensor:
        from fused_lora.kernels.grouped_shrink import grouped_shrink

        return grouped_shrink(x, tables, rows)

    key = _key(len(tables.rank), x, tables, rows)
    return guard.guarded(key, run, lambda: None, lambda: _check(x, tables, rows, len(tables.rank)))()


def expand_by_address_(
    y: Tensor, S: Tensor, tables: AdapterTables, rows: RowGroups, eager: Callable[[], Tensor]
) -> Tensor:
    """y[m] += sum_i weight_i scaling_i * B_i S_i[m], in place, from one output's S of :func:`shrink_by_address`.

    Args:
        y: [M, N], of the x that S was computed from. tables: of this site alone. eager: does all of it, from x.
    """

    def run() -> Tensor:
        from fused_lora.kernels.grouped_expand import grouped_expand

        grouped_expand(S, [y], tables, rows)
        return y

    if not _possible(y.dtype, y.dtype, y.device, tables):
        return eager()
    return guard.guarded(_key(1, y, tables, rows), run, eager, lambda: _check(y, tables, rows, 1))()


def _possible(x_dtype: torch.dtype, y_dtype: torch.dtype, device: torch.device, tables: AdapterTables) -> bool:
    dtypes = x_dtype == y_dtype and {x_dtype, tables.dtype} <= set(DTYPES)
    return dtypes and tables.max_rank <= MAX_RANK and guard.usable(device)


def _key(outputs: int, x: Tensor, tables: AdapterTables, rows: RowGroups) -> tuple:
    sizes = -(-tables.max_rank // 64), rows.block_m, rows.group_size
    return ("grouped", *(("shared",) if outputs > 1 else ()), x.dtype, tables.dtype, *sizes, x.device.index)


def _check(x: Tensor, tables: AdapterTables, rows: RowGroups, outputs: int) -> str | None:
    """A small batch of three adapters, a combination and base rows, by the kernels and in float64."""
    from fused_lora.kernels.grouped_expand import grouped_expand, lora_grouped
    from fused_lora.kernels.grouped_shrink import grouped_shrink

    device, dtype = x.device, tables.dtype
    K, N, ranks = 144, 80, (min(tables.max_rank, 64), 3, tables.max_rank)

    def numbers(*shape: int, kind: torch.dtype) -> Tensor:
        line = torch.arange(int(np.prod(shape)), dtype=torch.float32)
        return torch.sin(line * 12.9898 + len(shape)).mul_(0.2).reshape(shape).to(device, kind)

    A, B_t = [numbers(r, K, kind=dtype) for r in ranks], [numbers(r, N, kind=dtype) for r in ranks]
    members = [[(0, 1.0)], [(1, 1.0)], [(2, 1.0)]] + [[(0, 0.5), (1, -1.0)]] * (rows.group_size > 1)
    group_of_row = np.arange(50) % (len(members) + 1) - 1
    layout = GroupLayout(max_rows=50 * (1 if rows.block_m == 16 else 4), max_groups=len(members), group_size=2)
    groups = layout.views(torch.from_numpy(build_metadata(layout, group_of_row, members)).to(device))
    scaling = torch.tensor([[0.5, 1.5, -0.7]], device=device)
    small = AdapterTables(
        *(torch.tensor([[t.data_ptr() for t in side]], dtype=torch.int64, device=device) for side in (A, B_t)),
        torch.tensor([ranks], dtype=torch.int32, device=device),
        scaling,
        dtype,
        tables.max_rank,
    )
    inputs, ours, before = (numbers(50, n, kind=x.dtype) for n in (K, N, N))
    results = [ours]
    if outputs == 1:
        lora_grouped(inputs, results, small, groups)
    else:  # the same adapters at each output
        results = [ours.clone() for _ in range(outputs)]
        columns = (table.repeat(outputs, 1) for table in (small.A_ptr, small.B_ptr, small.rank, small.scaling))
        S = grouped_shrink(inputs, AdapterTables(*columns, dtype, tables.max_rank), groups)
        for g, result in enumerate(results):
            grouped_expand(S[:, g : g + 1], [result], small, groups)
    values = scaling[0].tolist()
    factors = {
        g: [(A[slot].double().t(), B_t[slot].double(), values[slot] * weight) for slot, weight in group]
        for g, group in enumerate(members)
    }
    # float64, which no setting of torch computes in less
    exact = lora_grouped_(before.double(), inputs.double(), RowLayout(group_of_row, device), Terms(factors))
    return guard.compare(results, [exact] * outputs, x.dtype)
