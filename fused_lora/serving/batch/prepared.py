"""What is prepared for the adapters and rows of a batch, and kept for similar batches."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_lora.kernels.grouped_tables import RowGroups
from fused_lora.modules.embedding import embed_scale
from fused_lora.modules.experts import StackedTerm, replace_rows
from fused_lora.ops.grouped.launch import prepare
from fused_lora.ops.grouped.metadata import GroupLayout, build_metadata
from fused_lora.ops.grouped.op import RowLayout, Terms, lora_grouped_
from fused_lora.serving.batch.static import RowBuffers
from fused_lora.serving.residency.packing import Site
from fused_lora.serving.residency.residency import Version
from fused_lora.serving.residency.tables import SlotTables, linear

_ROWS = 4  # most arrangements of rows that are kept

Group = Sequence[tuple[Version, float]]


class Step(NamedTuple):
    """What the kernels compute at layers that share an input, or at one.

    places: of each layer with terms, its number in what was formed. form: of x [rows, K], all of them; None where that
    cannot be. add: ``(formed, number, y)`` adds to y [rows, N]; False where it cannot.
    """

    places: dict[int, int]
    form: Callable[[Tensor], Any]
    add: Callable[[Any, int, Tensor], bool]


class Rows:
    """The rows of a batch, for the eager path and for the kernels. Made on demand.

    Attributes:
        steps: what was prepared for them, by layers and dtypes.
    """

    def __init__(self, group_of_row: np.ndarray, groups: Sequence[Group], device: torch.device):
        self._group_of_row, self._groups, self._device = group_of_row, groups, device
        self.steps: dict[tuple, Step | None] = {}
        self._alone: dict[int, RowLayout] = {}

    @functools.cached_property
    def layout(self) -> RowLayout:
        """For the eager path."""
        return RowLayout(self._group_of_row, self._device)

    def alone(self, g: int) -> RowLayout:
        """The same rows as if those of other groups were the base model's."""
        if g not in self._alone:
            self._alone[g] = RowLayout(np.where(self._group_of_row == g, g, -1), self._device)
        return self._alone[g]

    @functools.cached_property
    def groups(self) -> RowGroups:
        """For the kernels: one buffer, filled by one copy without synchronisation."""
        members = members_of(self._groups)
        layout = GroupLayout(len(self._group_of_row), len(members), max(map(len, members)))
        pinned = self._device.type == "cuda"
        host = torch.empty(layout.size, dtype=torch.int32, device="cpu", pin_memory=pinned)
        build_metadata(layout, self._group_of_row, members, host.numpy())
        return layout.views(host.to(self._device, non_blocking=True), tiles=int(host[0]))


class Prepared:
    """What is prepared for batches with the same groups, and kept from one to the next.

    Args:
        groups: the (version, weight) pairs of each. tables: for the kernels, where they can run.

    Attributes:
        sites: the layers that the groups change. by_kernels: whether there are tables.
    """

    def __init__(self, groups: Sequence[Group], tables: SlotTables | None):
        self._groups, self._tables, self.by_kernels = groups, tables, tables is not None
        self._versions = {version for group in groups for version, _ in group}
        self.sites = frozenset().union(*(version.factors for version in self._versions))
        self._terms: dict[int, Terms] = {}
        self._of_columns: dict[tuple[int, int], Terms] = {}
        self._rows: dict[tuple, Rows] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def max_rank(self) -> int:
        """Of the adapters; 0 if there are none."""
        return max((part.r for version in self._versions for part in linear(version.parts)), default=0)

    def rows(self, group_of_row: np.ndarray, device: torch.device) -> Rows:
        """Rows with these groups (-1: the base model). On a GPU they belong to the stream that they were made on."""
        stream = None
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device).cuda_stream
        key = group_of_row.tobytes(), device, stream
        with self._lock:
            found = self._rows.pop(key, None) or Rows(group_of_row, self._groups, device)
            self._rows[key] = found
            if len(self._rows) > _ROWS:
                del self._rows[next(iter(self._rows))]
        return found

    def drop_rows(self) -> None:
        """Free the buffers. They are made again when needed."""
        with self._lock:
            self._rows.clear()

    def step(self, rows: Rows, buffers: RowBuffers | None, sites: tuple[int, ...], x: Tensor, y: Tensor) -> Step | None:
        """For layers that share the input x; y: the output of the first. None: not together, or not by the kernels."""
        # what is launched for buffers reads the same addresses in every batch
        steps, key = rows.steps if buffers is None else buffers.steps, (sites, x.dtype, y.dtype)
        if key not in steps:
            steps[key] = self._new_step(rows, buffers, sites, x, y)
        return steps[key]

    def _new_step(
        self, rows: Rows, buffers: RowBuffers | None, sites: tuple[int, ...], x: Tensor, y: Tensor
    ) -> Step | None:
        # a graph of base rows is replayed with others
        acting = sites if buffers is not None else tuple(site for site in sites if site in self.sites)
        span = range(min(acting), max(acting) + 1)
        if x.dtype != y.dtype or not set(span) <= set(sites):
            return None  # not by the kernels, or layers of other inputs lie between them in the tables
        groups = rows.groups if buffers is None else buffers.groups
        tables: Any = self._tables
        joint, each = tables.sites(span[0], span[-1]), [tables.sites(i, i) for i in span]
        launches = prepare(joint, each, groups, x.dtype, x.device)
        return launches and Step({site: site - span[0] for site in acting}, *launches)

    def eager_(self, rows: Rows, site: int, x: Tensor, y: Tensor) -> None:
        """y += the terms of x at the layer, for any number of rows and any dtypes."""
        if x.is_cuda:
            _refuse_capture(x)
        lora_grouped_(y, x, rows.layout, self._terms.get(site) or self._terms_of(site))

    def embed_(self, rows: Rows, site: Site, tokens: Tensor, y: Tensor) -> None:
        """y [n, dim] += the terms of an embedding's tokens [n]: their columns of each A, then one product with B."""
        _refuse_capture(y)
        terms, scale = self._terms_of(site.index), embed_scale(site.module)
        for g, members in terms.outputs[0].items():
            here = rows.layout.numbers.get(g)
            if here is None:
                continue
            columns = [A_t[tokens[here]] for A_t, _, _ in members]
            x = y.new_zeros((len(y), sum(c.shape[1] for c in columns)), dtype=columns[0].dtype)
            x[here] = torch.cat(columns, 1) if scale is None else torch.cat(columns, 1) * scale.to(x.dtype)
            lora_grouped_(y, x, rows.alone(g), self._columns(site.index, g, members))

    def _columns(self, site: int, g: int, members: Sequence[tuple]) -> Terms:
        """The factors of a group at an embedding whose columns of A stand in x beside each other."""
        if (site, g) not in self._of_columns:
            ranks = [B_t.shape[0] for _, B_t, _ in members]
            parts = torch.eye(sum(ranks), dtype=members[0][1].dtype, device=members[0][1].device).split(ranks)
            found = [(part.t(), B_t, s) for part, (_, B_t, s) in zip(parts, members, strict=True)]
            self._of_columns[site, g] = Terms({g: found})
        return self._of_columns[site, g]

    def experts_(self, rows: Rows, sites: Sequence[Site], inputs: Sequence[Any], y: Any) -> None:
        """The results of experts under adapters in place of those in y [rows, K]."""
        _refuse_capture(inputs[0])
        found = []
        for g, group in enumerate(self._groups):
            here = rows.layout.numbers.get(g)
            if here is None:
                continue
            terms = {site.path.rpartition(".")[2]: _stacked_terms(site, group) for site in sites}
            if any(terms.values()):
                found.append((here, terms))
        replace_rows(sites[0].module, y, inputs, found)

    def _terms_of(self, site: int) -> Terms:
        found = self._terms.get(site)
        if found is None:
            members = (
                [(version.factors[site], weight) for version, weight in group if site in version.factors]
                for group in self._groups
            )
            found = {g: [(A_t, B_t, scale * w) for (A_t, B_t, scale), w in group] for g, group in enumerate(members)}
            found = self._terms[site] = Terms(found)
        return found


def _stacked_terms(site: Site, group: Group) -> list[StackedTerm]:
    """What a group adds at one stacked parameter."""
    found = []
    for version, weight in group:
        if site.index in version.factors:
            A_t, B_t, scale = version.factors[site.index]
            A, B = A_t.t().unflatten(0, (site.experts, -1)), B_t.unflatten(0, (site.experts, -1)).transpose(1, 2)
            found.append(StackedTerm(A, B, scale * weight))
    return found


def _refuse_capture(x: Tensor) -> None:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("batch: a graph would keep these adapters for ever; run a step before capture")


def members_of(groups: Sequence[Group]) -> list[list[tuple[int, float]]]:
    """The (slot, weight) pairs of each group."""
    return [[(version.slot, weight) for version, weight in group] for group in groups]
