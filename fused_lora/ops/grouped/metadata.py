"""Which rows of a batch belong to which adapters, as the grouped kernels read it: built by numpy, copied once a step.

A row's group is its list of (slot, weight): nearly always one adapter with weight 1, more where a request mixes
several. Rows of one group become tiles of at most ``block_m`` rows; rows of the base model (-1) are in no tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fused_lora.kernels.grouped_tables import RowGroups, rows_per_tile
from fused_lora.ops import guard


def _padded(n: int) -> int:
    return max(4, -(-n // 4) * 4)  # each table starts at a multiple of 16 bytes


@dataclass(frozen=True)
class GroupLayout:
    """Where each table lies in one int32 buffer that holds any batch up to the given capacities.

    max_rows: rows of x. max_groups: different lists of adapters in one batch. group_size: adapters of one list. slots:
    of the adapter tables.
    """

    max_rows: int
    max_groups: int
    group_size: int = 1
    slots: int = 2**31 - 1

    def __post_init__(self):
        for name in ("max_rows", "max_groups", "group_size", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return rows_per_tile(self.max_rows, self.max_groups)

    @property
    def max_tiles(self) -> int:
        """No batch within the capacities has more tiles: all but one row of every group fill tiles of ``block_m``."""
        groups = min(self.max_groups, self.max_rows)
        return groups + (self.max_rows - groups) // self.block_m

    @cached_property
    def sections(self) -> dict[str, slice]:
        """Name of each table and its part of the buffer."""
        members = self.max_groups * self.group_size
        sizes = dict(
            num_tiles=1, tiles=4 * self.max_tiles, order=self.max_rows, member_slot=members, member_weight=members
        )
        starts = np.cumsum([0, *map(_padded, sizes.values())]).tolist()
        return {name: slice(start, start + n) for (name, n), start in zip(sizes.items(), starts, strict=False)}

    @property
    def size(self) -> int:
        """Elements of the buffer."""
        return self.sections["member_weight"].stop

    def views(self, buffer: torch.Tensor, tiles: int | None = None) -> RowGroups:
        """The tables in an int32 buffer of ``size`` elements, for the kernels.

        tiles: how many tiles a launch provides for; by default ``max_tiles``, as a captured graph must.
        """
        if buffer.dtype != torch.int32 or buffer.numel() != self.size or not buffer.is_contiguous():
            raise ValueError(f"buffer: expected int32 [{self.size}], got {buffer.dtype} {list(buffer.shape)}")
        part = {name: buffer.view(-1)[where] for name, where in self.sections.items()}
        part["tiles"] = part["tiles"].view(-1, 4)
        part["member_weight"] = part["member_weight"].view(torch.float32)
        return RowGroups(
            **part,
            block_m=self.block_m,
            group_size=self.group_size,
            grid_tiles=self.max_tiles if tiles is None else tiles,
        )


class RowTables:
    """The tables of a step's rows on the device, at addresses that never change: what a captured CUDA graph reads.

    Args:
        layout: the largest step. device: of the rows.

    Attributes:
        layout: the same. groups: the tables, with room for the largest step.
    """

    @torch.inference_mode(False)  # filled in any mode later
    def __init__(self, layout: GroupLayout, device: torch.device):
        self.layout = layout
        self._buffer = torch.zeros(layout.size, dtype=torch.int32, device=device)
        self.groups = layout.views(self._buffer)
        # two, so that one can be filled while the copy of the other may still be under way
        self._staging = [torch.zeros_like(self._buffer, device="cpu", pin_memory=device.type == "cuda") for _ in "ab"]
        self._copied: list[torch.Event | None] = [None, None]
        self._turn = 0

    def fill(self, group_of_row: np.ndarray, groups: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Describe the next step, as :func:`build_metadata` does: one copy on the current stream, and nothing waits.

        Raises:
            RuntimeError: a CUDA graph is being captured, whose replays would undo what is filled in before them.
        """
        if guard.capturing(self._buffer.device):
            raise RuntimeError("row tables: expected to be filled before the capture of a CUDA graph, not inside it")
        self._turn ^= 1
        staging, copied = self._staging[self._turn], self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        build_metadata(self.layout, group_of_row, groups, staging.numpy())
        self._buffer.copy_(staging, non_blocking=True)
        if self._buffer.is_cuda:
            self._copied[self._turn] = torch.cuda.current_stream(self._buffer.device).record_event()


def build_metadata(
    layout: GroupLayout,
    group_of_row: np.ndarray | Sequence[int],
    groups: Sequence[Sequence[tuple[int, float]]],
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Fill the buffer of one step: int32 [layout.size], ``out`` if given (the numpy view of a pinned tensor, say).

    Args:
        group_of_row: for each row of x an index into ``groups``, or -1 for the base model.
        groups: the (slot, weight) pairs of each group, added up in this order; groups without rows cost nothing.

    Returns:
        the buffer; its first element is the number of tiles. Elements past what the step needs keep what they held.

    Raises:
        ValueError: more rows, groups or members than the layout holds, a group without members, an index or a slot out
            of range, or an ``out`` of another kind. ``out`` is not changed then.
    """
    group_of_row = np.asarray(group_of_row, dtype=np.int32).reshape(-1)
    _check(layout, group_of_row, groups, out)
    rows_of_group = np.bincount(group_of_row + 1, minlength=len(groups) + 1)
    based, rows_of_group = rows_of_group[0], rows_of_group[1:]
    # stable: rows of a group keep their order, base rows (-1) come first and are dropped
    order = np.argsort(group_of_row, kind="stable")[based:]
    ends = np.cumsum(rows_of_group)
    tiles_of_group = -(-rows_of_group // layout.block_m)
    group = np.repeat(np.arange(len(groups)), tiles_of_group)
    within = np.arange(len(group)) - np.repeat(np.cumsum(tiles_of_group) - tiles_of_group, tiles_of_group)
    first = (ends - rows_of_group)[group] + within * layout.block_m
    member_ends = np.cumsum([len(g) for g in groups], dtype=np.int64)
    member_starts = np.concatenate(([0], member_ends[:-1])) if len(groups) else member_ends
    rows = np.minimum(ends[group] - first, layout.block_m)
    members = [pair for g in groups for pair in g]

    out = np.zeros(layout.size, np.int32) if out is None else out
    at = layout.sections
    out[at["num_tiles"]] = len(group)
    tiles = out[at["tiles"]].reshape(-1, 4)
    tiles[: len(group)] = np.stack((first, rows, member_starts[group], member_ends[group]), axis=1)
    out[at["order"]][: len(order)] = order
    out[at["member_slot"]][: len(members)] = [slot for slot, _ in members]
    out[at["member_weight"]].view(np.float32)[: len(members)] = [weight for _, weight in members]
    return out


def _check(layout: GroupLayout, group_of_row: np.ndarray, groups, out) -> None:
    if len(group_of_row) > layout.max_rows:
        raise ValueError(f"group_of_row: {len(group_of_row)} rows, the layout holds {layout.max_rows}")
    if len(groups) > layout.max_groups:
        raise ValueError(f"groups: {len(groups)}, the layout holds {layout.max_groups}")
    if len(group_of_row) and not -1 <= group_of_row.min() <= group_of_row.max() < len(groups):
        raise ValueError(
            f"group_of_row: expected -1 to {len(groups) - 1}, got {group_of_row.min()} to {group_of_row.max()}"
        )
    for i, group in enumerate(groups):
        if not 1 <= len(group) <= layout.group_size:
            raise ValueError(f"groups[{i}]: expected 1 to {layout.group_size} members, got {len(group)}")
        if not all(0 <= slot < layout.slots for slot, _ in group):
            raise ValueError(f"groups[{i}]: expected slots of 0 to {layout.slots - 1}, got {list(group)}")
    if out is not None and (out.dtype != np.int32 or out.shape != (layout.size,)):
        raise ValueError(f"out: expected int32 [{layout.size}], got {out.dtype} {list(out.shape)}")
