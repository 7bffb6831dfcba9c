"""Many adapters in one batch by the Triton kernels, where they may run and have passed their first-use check."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fused_lora.kernels.grouped_tables import AdapterTables, RowGroups
from fused_lora.ops import guard
from fused_lora.ops.grouped.metadata import GroupLayout, build_metadata
from fused_lora.ops.grouped.op import RowLayout, Terms, lora_grouped_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 512


def prepare(
    joint: AdapterTables, each: Sequence[AdapterTables], rows: RowGroups, x_dtype: torch.dtype, device: torch.device
) -> (
    tuple[
        Callable[[Tensor], Sequence[Tensor] | None],
        Callable[[Sequence[Tensor], int, Tensor | tuple[Tensor, ...]], bool],
    ]
    | None
):
    """y_g[m] += sum_i weight_i scaling_gi * B_gi (A_gi x[m]) over the members of the row's group, in place, as two
    functions for any x [M, K] and y_g [M, N_g] of one dtype.

    Args:
        joint: tables of the G layers that read x, together. each: of each layer alone; or ``joint`` alone, for one
            expand of all. rows: their groups.

    Returns:
        None for dtypes and ranks that the kernels do not have; else
        ``shrink(x)``: for each output g its S, by one launch that reads x once; None where the kernels failed;
        ``expand(S, g, y)``: adds to y, a tuple where ``each[g]`` has several outputs; False, and nothing done, for a y
        of another dtype and where the kernels failed.
        What an adapter computes for a row depends on no other row. Nothing waits for the device.
    """
    if not ({x_dtype, joint.dtype} <= set(DTYPES) and joint.max_rank <= MAX_RANK and guard.usable(device)):
        return None
    from fused_lora.kernels.grouped_expand import grouped_expand
    from fused_lora.kernels.grouped_shrink import grouped_shrink

    def shrink(x: Tensor) -> Sequence[Tensor]:
        return grouped_shrink(x, joint, rows).chunk(len(each), dim=1)

    def expand(S: Sequence[Tensor], g: int, y: Tensor | tuple[Tensor, ...]) -> bool:
        outputs = (y,) if isinstance(y, Tensor) else y
        fits = outputs[0].dtype == x_dtype
        if fits:
            grouped_expand(S[g], outputs, each[g], rows)
        return fits

    shared = ("shared",) if len(joint.rank) > 1 else ()
    key = ("grouped", *shared, x_dtype, joint.dtype, -(-joint.max_rank // 64), *rows.form[1:3], device.index)

    def check() -> str | None:
        return _check(joint, rows, x_dtype, device)

    def check_expand() -> str | None:  # the same, for an expand may come without its shrink
        return None if guard.passes(key, check) else "the check of both failed"

    # a key for each, so that only one thread loads it
    return (
        guard.guarded(key, shrink, lambda x: None, check),
        guard.guarded((*key, "expand"), expand, lambda S, g, y: False, check_expand),
    )


def _check(tables: AdapterTables, rows: RowGroups, x_dtype: torch.dtype, device: torch.device) -> str | None:
    """A small batch of three adapters, a combination and base rows, by the kernels and in float64."""
    from fused_lora.kernels.grouped_expand import grouped_expand
    from fused_lora.kernels.grouped_shrink import grouped_shrink

    outputs, dtype = len(tables.rank), tables.dtype
    K, N, ranks = 144, 80, (min(tables.max_rank, 64), 3, tables.max_rank)

    def numbers(*shape: int, kind: torch.dtype) -> Tensor:
        line = torch.arange(int(np.prod(shape)), dtype=torch.float32, device="cpu")
        return torch.sin(line * 12.9898 + len(shape)).mul_(0.2).reshape(shape).to(device, kind)

    A, B_t = [numbers(r, K, kind=dtype) for r in ranks], [numbers(r, N, kind=dtype) for r in ranks]
    members = [[(0, 1.0)], [(1, 1.0)], [(2, 1.0)]] + [[(0, 0.5), (1, -1.0)]] * (rows.group_size > 1)
    group_of_row = np.arange(50) % (len(members) + 1) - 1
    layout = GroupLayout(max_rows=50 * (1 if rows.block_m == 16 else 4), max_groups=len(members), group_size=2)
    groups = layout.views(torch.from_numpy(build_metadata(layout, group_of_row, members)).to(device))
    scaling = torch.tensor([[0.5, 1.5, -0.7]], dtype=torch.float32, device=device)
    small = AdapterTables(
        *(torch.tensor([[t.data_ptr() for t in side]], dtype=torch.int64, device=device) for side in (A, B_t)),
        torch.tensor([ranks], dtype=torch.int32, device=device),
        scaling,
        dtype,
        tables.max_rank,
    )
    inputs, before = numbers(50, K, kind=x_dtype), numbers(50, N, kind=x_dtype)
    results = [before.clone() for _ in range(outputs)]  # the same adapters at each output
    columns = (table.repeat(outputs, 1) for table in (small.A_ptr, small.B_ptr, small.rank, small.scaling))
    S = grouped_shrink(inputs, AdapterTables(*columns, dtype, tables.max_rank), groups)
    for g, result in enumerate(results):
        grouped_expand(S[:, g : g + 1], (result,), small, groups)
    values = scaling[0].tolist()
    factors = {
        g: [(A[slot].double().t(), B_t[slot].double(), values[slot] * weight) for slot, weight in group]
        for g, group in enumerate(members)
    }
    # float64, which no setting of torch computes in less
    exact = lora_grouped_(before.double(), inputs.double(), RowLayout(group_of_row, device), Terms(factors))
    return guard.compare(results, [exact] * outputs, x_dtype)
