"""Many adapters in one batch by the Triton kernels, where they may run and have passed their first-use check."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fused_lora.kernels.grouped_tables import AdapterTables, RowGroups
from fused_lora.ops import kernel
from fused_lora.ops.grouped import RowLayout, Terms, lora_grouped_
from fused_lora.ops.grouped_metadata import GroupLayout, build_metadata

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
    possible = x.dtype == y.dtype and {x.dtype, tables.dtype} <= set(DTYPES) and tables.max_rank <= MAX_RANK
    if not (kernel.usable(x.device) and possible):
        return eager()
    key = ("grouped", x.dtype, tables.dtype, -(-tables.max_rank // 64), rows.block_m, rows.group_size, x.device.index)

    def run() -> Tensor:
        from fused_lora.kernels.lora_grouped import lora_grouped

        lora_grouped(x, [y], tables, rows)
        return y

    return kernel.guarded(key, run, eager, lambda: _check(x, tables, rows))()


def _check(x: Tensor, tables: AdapterTables, rows: RowGroups) -> str | None:
    """A small batch of three adapters, a combination and base rows, by the kernels and without."""
    from fused_lora.kernels.lora_grouped import lora_grouped

    device, dtype = x.device, tables.dtype
    K, N, ranks = 144, 80, (min(tables.max_rank, 64), 3, tables.max_rank)

    def numbers(*shape: int, kind: torch.dtype) -> Tensor:
        line = torch.arange(int(np.prod(shape)), dtype=torch.float32)
        return torch.sin(line * 12.9898 + len(shape)).mul_(0.2).reshape(shape).to(device, kind)

    A, B_t = [numbers(r, K, kind=dtype) for r in ranks], [numbers(r, N, kind=dtype) for r in ranks]
    members = [[(0, 1.0)], [(1, 1.0)], [(2, 1.0)]] + [[(0, 0.5), (1, -1.0)]] * (rows.group_size > 1)
    group_of_row = np.arange(50) % (len(members) + 1) - 1
    layout = GroupLayout(max_rows=50 * (1 if rows.block_m == 16 else 4), max_groups=len(members), group_size=2)
    buffer = torch.from_numpy(build_metadata(layout, group_of_row, members)).to(device)
    scaling = torch.tensor([[0.5, 1.5, -0.7]], device=device)
    small = AdapterTables(
        *(torch.tensor([[t.data_ptr() for t in side]], dtype=torch.int64, device=device) for side in (A, B_t)),
        torch.tensor([ranks], dtype=torch.int32, device=device),
        scaling,
        dtype,
        tables.max_rank,
    )
    inputs, ours, theirs = (numbers(50, n, kind=x.dtype) for n in (K, N, N))
    lora_grouped(inputs, [ours], small, layout.views(buffer))
    values = scaling[0].tolist()
    factors = {
        g: [(A[slot].t(), B_t[slot], values[slot] * weight) for slot, weight in group]
        for g, group in enumerate(members)
    }
    lora_grouped_(theirs, inputs, RowLayout(group_of_row, device), Terms(factors))
    return kernel.compare([ours], [theirs], x.dtype)
