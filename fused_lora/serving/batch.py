"""Which rows of the running batch have which adapters. The state belongs to the thread (or task) that runs the model,
never to the layers: several threads may run one model under different adapters at once."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_lora.kernels.grouped_tables import RowGroups
from fused_lora.ops.grouped import RowLayout, Terms, lora_grouped_
from fused_lora.ops.grouped_kernel import lora_grouped_by_address_
from fused_lora.ops.grouped_metadata import GroupLayout, build_metadata
from fused_lora.serving.device import Transfer
from fused_lora.serving.packing import Site
from fused_lora.serving.residency import Version
from fused_lora.serving.static import RowBuffers

_running: ContextVar[Batch | None] = ContextVar("fused_lora_batch", default=None)
_LAYOUTS = 4  # row counts whose layouts are kept: the prompt's and the decode step's, for two models at most

Group = Sequence[tuple[Version, float]]
Entry = tuple[tuple[Any, float], ...]  # (name or lease, weight) of each adapter; empty for the base model


def running(store: Any) -> Batch | None:
    """The innermost batch of this store that this thread is in."""
    batch = _running.get()
    while batch is not None and batch.store is not store:
        batch = batch.outer
    return batch


def parse_entry(entry: Any, position: int, kinds: tuple[type, ...]) -> Entry:
    """An element of ``store.batch([...])`` as ((name, weight), ...): None, a name, or a dict of names and weights.

    A sum is taken in the order of the names, so that equal requests get equal bits. ``kinds``: what stands for a name.

    Raises:
        TypeError: another type. ValueError: a weight that is not finite.
    """
    if entry is None:
        return ()
    if isinstance(entry, kinds):
        return ((entry, 1.0),)
    if not isinstance(entry, Mapping):
        raise TypeError(f"names[{position}]: expected a name, None or a dict of names and weights, got {entry!r}")
    for name, weight in entry.items():
        if not isinstance(name, kinds):
            raise TypeError(f"names[{position}]: expected adapter names as keys, got {name!r}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"names[{position}][{name!r}]: expected a number, got {weight!r}")
        if not math.isfinite(weight):
            raise ValueError(f"names[{position}][{name!r}]: expected a finite weight, got {weight}")
    return tuple(sorted(((name, float(w)) for name, w in entry.items()), key=lambda pair: str(pair[0])))


def rows_to_entries(entries: int, rows: Sequence[int] | Tensor | np.ndarray) -> np.ndarray:
    """The entry of each token row: from a tensor or array that says so, or from a list of row counts.

    Raises:
        TypeError: no integers. ValueError: a count is negative, their number is not that of the entries, or an index
            is out of range (-1 means the base model).
    """
    if isinstance(rows, (Tensor, np.ndarray)):
        index = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else rows
        if index.dtype.kind not in "iu":
            raise TypeError(f"rows: expected integers, got {index.dtype}")
        index = index.reshape(-1).astype(np.int64)
        if len(index) and not -1 <= index.min() <= index.max() < entries:
            raise ValueError(f"rows: expected indices of -1 to {entries - 1}, got {index.min()} to {index.max()}")
        return index
    counts = list(rows)
    if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in counts):
        raise TypeError("rows: expected a list of row counts, or a tensor with the entry of each row")
    if len(counts) != entries or min(counts, default=0) < 0:
        raise ValueError(f"rows: expected {entries} counts of 0 or more, got {counts[:20]}")
    return np.repeat(np.arange(entries), counts)


class _Rows:
    """The groups of a batch's rows, as the eager path and as the kernels take them; made when they are asked for."""

    def __init__(self, group_of_row: np.ndarray, groups: Sequence[Group], device: torch.device):
        self._group_of_row, self._groups, self._device = group_of_row, groups, device

    @functools.cached_property
    def layout(self) -> RowLayout:
        """For the eager path."""
        return RowLayout(self._group_of_row, self._device)

    @functools.cached_property
    def groups(self) -> RowGroups:
        """For the kernels: one buffer, one copy that nothing waits for."""
        members = _members(self._groups)
        layout = GroupLayout(len(self._group_of_row), len(members), max(map(len, members)))
        host = torch.empty(layout.size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        build_metadata(layout, self._group_of_row, members, host.numpy())
        return layout.views(host.to(self._device, non_blocking=True), tiles=int(host[0]))


def _members(groups: Sequence[Group]) -> list[list[tuple[int, float]]]:
    return [[(version.slot, weight) for version, weight in group] for group in groups]


class Batch:
    """One entered ``store.batch(...)``.

    Args:
        store: whose batch this is. transfer: how its adapters got where they are.
        groups: of each group the (version, weight) pairs. group_of_entry: integers, -1 for the base model.
        entry_of_row: the entry of each token row; None: the rows of the model's batch, in equal shares.
        terms: of these groups by site, filled as they are needed.
        buffers: for a step in a CUDA graph; ``entry_of_row`` is given then.

    Attributes:
        identities: of each entry the identity of its adapter (None for the base model; joined by "+" with weights for
            a combination): what a cache of prefixes may tell requests apart by.
    """

    def __init__(
        self,
        store: Any,
        transfer: Transfer,
        groups: Sequence[Group],
        group_of_entry: np.ndarray,
        entry_of_row: np.ndarray | None,
        terms: dict[int, Terms],
        buffers: RowBuffers | None,
    ):
        self.store, self.groups, self.outer = store, groups, None
        self._group_of_entry, self._entry_of_row = group_of_entry, entry_of_row
        self._tables = transfer.tables
        self._layouts: dict[int, _Rows] = {}
        self._terms = terms
        self._sizes: dict[int, tuple[int, frozenset[int]]] = {}  # by thread: asyncio.to_thread hands a batch on
        arrivals = {version.arrival for group in groups for version, _ in group} - {None}
        self._arriving = [arrival for arrival in arrivals if not arrival.done()]
        self._gradients = torch.no_grad()
        self._token, self._buffers = None, buffers
        self.acts = bool(groups) or buffers is not None  # a graph of base rows is replayed with others
        if buffers is not None:
            self._fill(buffers)

    def _fill(self, buffers: RowBuffers) -> None:
        """All that a replay reads is in place, or on its way on this stream, when this returns."""
        spare = buffers.rows - len(self._entry_of_row)
        if spare < 0:
            raise ValueError(f"rows: {len(self._entry_of_row)}, the buffers hold {buffers.rows}")
        self._entry_of_row = np.pad(self._entry_of_row, (0, spare), constant_values=-1)
        buffers.fill(self._group_of_row(buffers.rows), _members(self.groups))
        for arrival in self._arriving:
            arrival.wait_for_all()
        self._arriving = []

    @property
    def identities(self) -> list[str | None]:
        """The identity that each entry is served with."""
        labels = [
            "+".join(v.identity if w == 1.0 and len(group) == 1 else f"{w!r}*{v.identity}" for v, w in group)
            for group in self.groups
        ]
        return [None if g < 0 else labels[g] for g in self._group_of_entry]

    def __enter__(self) -> Batch:
        self.outer = _running.get()
        self._token = _running.set(self)
        self._gradients.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._gradients.__exit__(*exception)
        _running.reset(self._token)
        self._layouts = {}

    def called(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The model is called with these arguments: remember how many sequences and tokens they are."""
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() >= 2]
        if tensors and self._entry_of_row is None:
            B = len(tensors[0])
            if B % max(len(self._group_of_entry), 1):
                raise ValueError(
                    f"batch: {len(self._group_of_entry)} entries for a model batch of {B} sequences; expected as many, "
                    "or a multiple (beams and return sequences repeat each entry)"
                )
            self._sizes[threading.get_ident()] = B, frozenset((B, *(len(t) * t.shape[1] for t in tensors)))

    def add(self, site: Site, x: Tensor, y: Tensor) -> None:
        """y += the LoRA terms of x at this site, in place."""
        terms = self._terms.get(site.index)
        if terms is None:
            terms = self._terms[site.index] = self._terms_at(site.index)
        if not terms.groups and self._buffers is None:
            return
        for arrival in self._arriving:
            arrival.wait(site.index)
        if y.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("batch: a store serves, it does not train: gradients were enabled inside the batch")
        rows, x, y = self._rows(site, x), x.reshape(-1, site.K), y.view(-1, site.N)

        def eager() -> Tensor:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("batch: a graph would keep these adapters for ever; run a step before capture")
            return lora_grouped_(y, x, rows.layout, terms)

        if self._tables is None:
            eager()
        else:
            groups = rows.groups if self._buffers is None else self._buffers.groups
            lora_grouped_by_address_(y, x, self._tables.site(site.index), groups, eager)

    def _terms_at(self, site: int) -> Terms:
        found = {}
        for g, group in enumerate(self.groups):
            members = []
            for version, weight in group:
                if site in version.factors:
                    A_t, B_t, scale = version.factors[site]
                    members.append((A_t, B_t, scale * weight))
            found[g] = members
        return Terms(found)

    def _rows(self, site: Site, x: Tensor) -> _Rows:
        rows = x.shape[:-1].numel()
        self._check_rows(site, x, rows)
        found = self._layouts.get(rows)
        if found is None:
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.pop(next(iter(self._layouts)), None)
            found = self._layouts[rows] = _Rows(self._group_of_row(rows), self.groups, x.device)
        return found

    def _group_of_row(self, rows: int) -> np.ndarray:
        if self._entry_of_row is None:
            return np.repeat(self._group_of_entry, rows // len(self._group_of_entry))
        return np.append(self._group_of_entry, -1)[self._entry_of_row]

    def _check_rows(self, site: Site, x: Tensor, rows: int) -> None:
        """Rows that are not the batch's own, in order (experts that see some tokens), must not pass for it."""
        entries, sizes = len(self._group_of_entry), self._sizes.get(threading.get_ident())
        if self._entry_of_row is not None:
            expected, fits = str(len(self._entry_of_row)), rows == len(self._entry_of_row)
        elif sizes is None:
            expected, fits = f"a multiple of {entries}", (len(x) if x.dim() > 2 else rows) % entries == 0
        elif x.dim() > 2:
            expected, fits = f"{sizes[0]} sequences", len(x) == sizes[0]
        else:
            expected, fits = " or ".join(map(str, sorted(sizes[1]))), rows in sizes[1]
        if not fits:
            raise ValueError(f"batch: {site.path!r} got an input of shape {tuple(x.shape)}; expected {expected} rows")
