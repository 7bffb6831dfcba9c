"""What is worked out for the adapters of a batch and for its rows, and kept for batches that are alike."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import numpy as np
import torch

from fused_lora.kernels.grouped_tables import RowGroups
from fused_lora.ops.grouped.metadata import GroupLayout, build_metadata
from fused_lora.ops.grouped.op import Joint, RowLayout, Terms
from fused_lora.serving.residency.residency import Version

_LAYOUTS = 4  # most arrangements of rows that are kept

Group = Sequence[tuple[Version, float]]


class Prepared:
    """What has been worked out for batches of the same groups, kept from one to the next.

    Args:
        groups: of each the (version, weight) pairs.
    """

    def __init__(self, groups: Sequence[Group]):
        self._groups = groups
        self._terms: dict[int, Terms] = {}
        self._joints: dict[tuple[int, ...], Joint] = {}
        self._layouts: dict[tuple[bytes, torch.device], RowLayout] = {}
        self._lock = threading.Lock()

    def terms(self, site: int) -> Terms:
        """What the groups add at a layer."""
        found = self._terms.get(site)
        if found is None:
            members = (
                [(version.factors[site], weight) for version, weight in group if site in version.factors]
                for group in self._groups
            )
            found = {g: [(A_t, B_t, scale * w) for (A_t, B_t, scale), w in group] for g, group in enumerate(members)}
            found = self._terms[site] = Terms(found)
        return found

    def joint(self, sites: tuple[int, ...]) -> Joint:
        """What they add at layers that share an input, or at one."""
        found = self._joints.get(sites)
        if found is None:
            found = self._joints[sites] = Joint([self.terms(site) for site in sites])
        return found

    def drop_layouts(self) -> None:
        """Give back the buffers; they are made again when they are needed."""
        with self._lock:
            self._layouts.clear()

    def layout(self, group_of_row: np.ndarray, device: torch.device) -> RowLayout:
        """The rows as the eager path takes them."""
        key = group_of_row.tobytes(), device
        with self._lock:
            found = self._layouts.pop(key, None)
        if found is None:
            found = RowLayout(group_of_row, device)
        # on a GPU the buffers of a layout belong to the stream that they were made on
        if device.type == "cpu":
            with self._lock:
                self._layouts[key] = found
                if len(self._layouts) > _LAYOUTS:
                    del self._layouts[next(iter(self._layouts))]
        return found


class Rows:
    """The groups of a batch's rows, as the eager path and as the kernels take them; made when they are asked for."""

    def __init__(self, group_of_row: np.ndarray, groups: Sequence[Group], prepared: Prepared, device: torch.device):
        self._group_of_row, self._groups, self._device = group_of_row, groups, device
        self._prepared = prepared

    @functools.cached_property
    def layout(self) -> RowLayout:
        """For the eager path."""
        return self._prepared.layout(self._group_of_row, self._device)

    @functools.cached_property
    def groups(self) -> RowGroups:
        """For the kernels: one buffer, one copy that nothing waits for."""
        members = members_of(self._groups)
        layout = GroupLayout(len(self._group_of_row), len(members), max(map(len, members)))
        pinned = self._device.type == "cuda"
        host = torch.empty(layout.size, dtype=torch.int32, device="cpu", pin_memory=pinned)
        build_metadata(layout, self._group_of_row, members, host.numpy())
        return layout.views(host.to(self._device, non_blocking=True), tiles=int(host[0]))


def members_of(groups: Sequence[Group]) -> list[list[tuple[int, float]]]:
    """The (slot, weight) pairs of each group."""
    return [[(version.slot, weight) for version, weight in group] for group in groups]
