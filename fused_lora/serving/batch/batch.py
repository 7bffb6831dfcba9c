"""Which rows of the running batch have which adapters. The state belongs to the thread (or task) that runs the model,
never to the layers: several threads may run one model under different adapters at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_lora.ops.grouped.launch import expand_by_address_, lora_grouped_by_address_, shrink_by_address
from fused_lora.ops.grouped.op import form_terms, lora_grouped_
from fused_lora.serving.batch.finite import bad_positions, main_output, unless_padding
from fused_lora.serving.batch.prepared import Group, Prepared, Rows, members_of
from fused_lora.serving.batch.siblings import Shared, Siblings, Trace, state_of
from fused_lora.serving.batch.static import RowBuffers
from fused_lora.serving.residency.packing import Site
from fused_lora.serving.residency.refusal import NonFiniteOutput, named
from fused_lora.serving.residency.transfer import Transfer

_running: ContextVar[Batch | None] = ContextVar("fused_lora_batch", default=None)
_ROWS = 4  # row counts whose groups are kept: the prompt's and the decode step's, for two models at most


def running(store: Any) -> Batch | None:
    """The innermost batch of this store that this thread is in."""
    batch = _running.get()
    while batch is not None and batch.store is not store:
        batch = batch.outer
    return batch


class Batch:
    """One entered ``store.batch(...)``.

    Args:
        store: whose batch this is. transfer: how its adapters got where they are.
        groups: of each group the (version, weight) pairs. group_of_entry: integers, -1 for the base model.
        entry_of_row: the entry of each token row; None: the rows of the model's batch, in equal shares.
        prepared: for these groups. siblings: layers of the store's model that share an input.
        buffers: for a step in a CUDA graph; ``entry_of_row`` is given then.

    Attributes:
        identities: of each entry the identity of its adapter (None for the base model; joined by "+" with weights for
            a combination): what a cache of prefixes may tell requests apart by.
        check_outputs: whether rows of adapters that the model returns must be finite, True unless set otherwise.
    """

    def __init__(
        self,
        store: Any,
        transfer: Transfer,
        groups: Sequence[Group],
        group_of_entry: np.ndarray,
        entry_of_row: np.ndarray | None,
        prepared: Prepared,
        siblings: Siblings,
        buffers: RowBuffers | None,
    ):
        self.store, self.groups, self.outer = store, groups, None
        self._group_of_entry, self._entry_of_row = group_of_entry, entry_of_row
        self._tables = transfer.tables
        self._rows_of: dict[int, Rows] = {}
        self._prepared, self._siblings = prepared, siblings
        # by thread: asyncio.to_thread hands a batch on
        self._sizes: dict[int, tuple[int, frozenset[int]]] = {}
        self._traces: dict[int, Trace] = {}
        arrivals = {version.arrival for group in groups for version, _ in group} - {None}
        self._arriving = [arrival for arrival in arrivals if not arrival.done()]
        self.check_outputs = True
        self._unread: list[tuple[Tensor, np.ndarray | None]] = []
        self._sums: dict[tuple[int, int], Tensor] = {}  # of each thread and number of rows
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
        buffers.fill(self._group_of_row(buffers.rows), members_of(self.groups))
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
        for trace in list(self._traces.values()):
            self._siblings.close(trace)
        self._rows_of, self._traces = {}, {}
        if exception[0] is None and self.check_outputs:
            self._unread += map(self._with_groups, self._bad_sums())  # of layers that were called without the model
            self._read_checks()

    def called(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The model is called with these arguments: remember how many sequences and tokens they are."""
        trace = self._traces.get(threading.get_ident())
        if trace is not None:
            trace.shared = None  # of a step that was broken off
            self._siblings.close(trace)
        self._read_checks()
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() >= 2]
        if tensors and self._entry_of_row is None:
            B = len(tensors[0])
            if B % max(len(self._group_of_entry), 1):
                raise ValueError(
                    f"batch: {len(self._group_of_entry)} entries for a model batch of {B} sequences; expected as many, "
                    "or a multiple (beams and return sequences repeat each entry)"
                )
            self._sizes[threading.get_ident()] = B, frozenset((B, *(len(t) * t.shape[1] for t in tensors)))

    def returned(self, kwargs: Mapping[str, Any], output: Any) -> None:
        """The model returned ``output``: raise NonFiniteOutput for rows under adapters that are not finite.

        On a GPU the check is queued and read at the model's next call or at the end of the batch, where its result is
        there already. A graph that is captured is not checked.
        """
        if not (self.check_outputs and self.groups):
            return
        for bad in self._bad_sums():
            self._unread.append(self._with_groups(unless_padding(bad, kwargs, self._sequences())))
        found = main_output(output)
        if found is not None and not (found.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._unread.append(self._with_groups(unless_padding(bad_positions(found), kwargs, self._sequences())))
        if found is None or not found.is_cuda:
            self._read_checks()

    def bad_rows(self) -> list[int]:
        """The rows of :meth:`batch_rows` in which a layer's output with its terms was not finite, on a CPU; once."""
        return sorted({row for bad in self._bad_sums() for row in bad.nonzero().view(-1).tolist()})

    def _bad_sums(self) -> list[Tensor]:
        thread = threading.get_ident()
        keys = [key for key in self._sums if key[0] == thread]
        return [torch.isfinite(self._sums.pop(key)).logical_not_() for key in keys]

    def _sequences(self) -> int | None:
        """How many sequences the model was called with, where that is known."""
        sizes = self._sizes.get(threading.get_ident())
        return None if sizes is None else sizes[0]

    def _with_groups(self, bad: Tensor) -> tuple[Tensor, np.ndarray | None]:
        """Bool [n] and the group of each; None where it is not known, for a model that returns other rows than its
        own, a slice of them for instance."""
        count = len(self._group_of_entry)
        if self._entry_of_row is None and len(bad) % count == 0:
            return bad.view(len(bad), -1).any(-1), np.repeat(self._group_of_entry, len(bad) // count)
        if self._entry_of_row is not None and bad.numel() == len(self._entry_of_row):
            return bad.view(-1), self._group_of_row(bad.numel())
        return bad.view(-1), None

    def _read_checks(self) -> None:
        hit: set[int] = set()
        for bad, groups in self._unread:
            if groups is not None:
                hit |= set(groups[bad.cpu().numpy()].tolist())
            elif bad.any():
                hit |= set(range(len(self.groups)))
        self._unread = []
        identities = dict.fromkeys(version.identity for g in sorted(hit - {-1}) for version, _ in self.groups[g])
        if identities:
            raise NonFiniteOutput(
                f"batch: the output has values that are not finite in the rows of {named([*identities])}: their terms "
                "overflow, or the model does on these inputs",
                [*identities],
            )

    def add(self, site: Site, x: Tensor, y: Tensor) -> None:
        """y += the LoRA terms of x at this site, in place."""
        thread = threading.get_ident()
        trace = self._traces.get(thread)
        if trace is None:
            trace = self._traces[thread] = Trace()
        self._siblings.watch(trace, site, x)
        if not self._prepared.terms(site.index).groups and self._buffers is None:
            return
        self._add(site, x, y, trace)
        if not y.is_cuda:
            self._look(y.view(-1, site.N), thread)

    def _look(self, y: Tensor, thread: int) -> None:
        """Keep what tells whether the rows have been finite: one sum a row, added up over the layers."""
        sums = y.sum(-1, dtype=torch.promote_types(y.dtype, torch.float32))
        key = thread, len(sums)
        self._sums[key] = sums.add_(self._sums[key]) if key in self._sums else sums

    def _add(self, site: Site, x: Tensor, y: Tensor, trace: Trace) -> None:
        if y.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("batch: a store serves, it does not train: gradients were enabled inside the batch")
        y, shared = y.view(-1, site.N), trace.shared
        if shared is not None:
            if site.index in shared.waiting and shared.is_of(x) and shared.add(site.index, y):
                shared.waiting.discard(site.index)
                if not shared.waiting:
                    trace.shared = None
                return
            trace.shared = None
            self._siblings.forget(shared.first)
        rows = self._rows(site, x)
        trace.shared = self._together(site, x, y, rows)
        if trace.shared is None:
            self._alone(site, x, y, rows)

    def _together(self, site: Site, x: Tensor, y: Tensor, rows: Rows) -> Shared | None:
        """Compute the layers that share this input, as far as they can be, and add the terms of this one."""
        state = state_of(x)
        sites = (site,) if state is None else self._siblings.of(site)
        if self._buffers is None:
            sites = [s for s in sites if self._prepared.terms(s.index).groups]
        if len(sites) < 2:
            return None
        self._wait_for(sites)
        add = (self._form if self._tables is None else self._shrink)(x.reshape(-1, site.K), rows, sites)
        if add is None or not add(site.index, y):
            return None
        return Shared(x, state, site.index, {s.index for s in sites} - {site.index}, add)

    def _form(self, x: Tensor, rows: Rows, sites: Sequence[Site]) -> Callable[[int, Tensor], bool] | None:
        """The terms of all sites; ``add`` says whether they were still there."""
        _refuse_capture(x)
        indices = tuple(s.index for s in sites)
        terms = form_terms(x, rows.layout, self._prepared.joint(indices))
        if terms is None:
            return None
        turn = terms.turn

        def add(index: int, y: Tensor) -> bool:
            if not terms.hold(turn):
                return False
            terms.add(indices.index(index), y)
            return True

        return add

    def _shrink(self, x: Tensor, rows: Rows, sites: Sequence[Site]) -> Callable[[int, Tensor], bool] | None:
        """One launch that reads x once; each layer's expand follows when there is an output to add to."""
        first, last = min(s.index for s in sites), max(s.index for s in sites)
        if not {s.index for s in self._siblings.of(sites[0])}.issuperset(range(first, last + 1)):
            return None  # layers of other inputs lie between them in the tables
        tables = {s.index: self._tables.site(s.index) for s in sites}
        groups = rows.groups if self._buffers is None else self._buffers.groups
        S = shrink_by_address(x, self._tables.sites(first, last), groups)
        if S is None:
            return None

        def add(index: int, y: Tensor) -> bool:
            g = index - first
            expand_by_address_(y, S[:, g : g + 1], tables[index], groups, self._eager(index, x, y, rows))
            return True

        return add

    def _alone(self, site: Site, x: Tensor, y: Tensor, rows: Rows) -> None:
        self._wait_for([site])
        eager = self._eager(site.index, x.reshape(-1, site.K), y, rows)
        if self._tables is None:
            eager()
        else:
            groups = rows.groups if self._buffers is None else self._buffers.groups
            lora_grouped_by_address_(y, x.reshape(-1, site.K), self._tables.site(site.index), groups, eager)

    def _eager(self, site: int, x: Tensor, y: Tensor, rows: Rows) -> Callable[[], Tensor]:
        def eager() -> Tensor:
            _refuse_capture(x)
            return lora_grouped_(y, x, rows.layout, self._prepared.joint((site,)))

        return eager

    def _wait_for(self, sites: Sequence[Site]) -> None:
        for arrival in self._arriving:
            for site in sites:
                arrival.wait(site.index)

    def _rows(self, site: Site, x: Tensor) -> Rows:
        rows = x.shape[:-1].numel()
        self._check_rows(site, x, rows)
        found = self._rows_of.get(rows)
        if found is None:
            if len(self._rows_of) >= _ROWS:
                self._rows_of = {}
            found = self._rows_of[rows] = Rows(self._group_of_row(rows), self.groups, self._prepared, x.device)
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


def _refuse_capture(x: Tensor) -> None:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("batch: a graph would keep these adapters for ever; run a step before capture")
