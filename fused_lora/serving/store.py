"""AdapterStore: many adapters over one model, in a memory budget on the device, one for each request."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_lora.modules.arguments import check_int
from fused_lora.rows import RowFinder, checked_dim
from fused_lora.serving.batch.attach import Attachment, find_sites, weight_of
from fused_lora.serving.batch.batch import Batch
from fused_lora.serving.batch.entries import parse_entry, rows_to_entries
from fused_lora.serving.batch.prepared import Group, Prepared
from fused_lora.serving.batch.siblings import Siblings
from fused_lora.serving.batch.static import RowBuffers
from fused_lora.serving.residency.packing import largest_scale
from fused_lora.serving.residency.registry import Registry
from fused_lora.serving.residency.residency import Residency, Version
from fused_lora.serving.residency.transfer import open_transfer

_MOST_RESIDENT = 1 << 20
_MOST_BYTES = (1 << 63) - 1  # that a tensor's size can say
_PREPARED = 16  # batches of other adapters for which things are kept in order
_WITH_BUFFERS = 2  # of these, how many keep buffers for their rows


class AdapterStore(Registry):
    """Adapters of any rank over one plain model, chosen per sequence or per token row.

    ::

        store = AdapterStore(model, capacity_bytes=2 << 30)
        store.load("sql", "adapters/sql")
        with store.batch(["sql", None, {"sql": 0.5, "poet": 0.5}]):
            model.generate(**inputs)

    For rows with adapters a layer's output becomes y[row] += sum_i weight_i * scaling_i * B_i A_i x[row], in place,
    summed in fp32 and rounded once. Base rows keep their bits. The model, its weights and its state dict do not change.
    So it is for embeddings. Rows with adapters of stacked experts go through these experts a second time, with their
    terms inside, and take that result.
    All methods may be called from several threads.

    Adapters lie at their exact rank in one arena on the device. The least recently used ones make room for others.
    An adapter in a running batch, or a pinned one, never does. Adapters from tensors then move to host memory.
    Adapters from files are read again when they are needed.

    Args:
        model: a model without LoRA layers.
        capacity_bytes: bytes that adapters may take on the device. None: no limit.
        host_bytes: bytes that copies of adapters may take in host memory. None: no limit.
        device: of the arena and of the model's layers that take LoRA. Default: that of the first layer.
        grow: allocate the memory in steps of so many bytes instead of at once.
        dtype: of the adapters on the device. Default: float32 on a CPU (float64 for a float64 model), the model's
            dtype on a GPU.
        max_resident: most adapters on the device at the same time.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model has LoRA layers or no linear layers.
        RuntimeError: another store is attached to the model.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity_bytes: int | None = None,
        host_bytes: int | None = None,
        device: torch.device | str | None = None,
        *,
        grow: int | None = None,
        dtype: torch.dtype | None = None,
        max_resident: int = 1024,
    ):
        check_int("max_resident", max_resident, 1, _MOST_RESIDENT)
        for name, value in (("capacity_bytes", capacity_bytes), ("host_bytes", host_bytes), ("grow", grow)):
            if value is not None:
                check_int(name, value, int(name != "host_bytes"), _MOST_BYTES)
        sites = find_sites(model)
        here, model_dtype = weight_of(next(iter(sites.values())))
        self.device = _device(here if device is None else device)
        transfer = open_transfer(self.device, model_dtype, dtype, sites, max_resident)
        super().__init__(model, sites, Residency(transfer, capacity_bytes, grow, host_bytes, max_resident))
        self._prepared: dict[Any, Prepared] = {}
        self._siblings = Siblings()
        self._open_batches: set[int] = set()
        self.calls_outside = 0  # of the model, in no batch
        self._rows = RowFinder(model, {site.place: site.module for site in sites.values()})
        self._attachment = Attachment(self._rows.callers, sites, self)
        self._attachment.attach()

    def batch(self, names: Sequence[Any], *, dim: int = 0) -> AbstractContextManager[Batch]:
        """A context in which sequence i of every model batch uses ``names[i]``, in this thread.

        It works around any forward and around ``model.generate``, with padding left or right. A model batch of k
        times as many sequences (beams, return sequences) repeats each entry k times. Gradients are off inside.

        The sequences are followed from the model's inputs to each layer, in the first calls of each kind. A layer whose
        rows are not known is refused, as an expert is that gets some tokens only. Where all entries are the same, any
        rows may come.

        Of a sequence under an aLoRA adapter the rows before its invocation are the base's. The tokens are looked for in
        the model's ``input_ids``, and what has been found is noted at the call's cache.

        Args:
            names: for each sequence a name, a :class:`Lease`, None (the base model), or a dict of names and weights
                whose terms are added up.
            dim: dimension of the model's inputs that holds the sequences; 1 for inputs [T, B, ...].

        Raises, in the model's forward too:
            AdapterNotFound: unknown name. StoreFull: the adapters do not fit together. AdapterError: an adapter must be
            read and its files are damaged. TypeError, ValueError: ``names`` is not such a sequence, or it is empty, or
            the rows of a layer are not known.
        """
        return self._open(names, None, dim=checked_dim(dim))

    def batch_rows(
        self, names: Sequence[Any], rows: Sequence[int] | Tensor | np.ndarray, buffers: RowBuffers | None = None
    ) -> AbstractContextManager[Batch]:
        """As :meth:`batch`, for token rows of several requests packed into one sequence.

        Args:
            names: entries as for :meth:`batch`.
            rows: a list with the number of rows of each entry, in order, or an integer tensor with the entry of each
                row (-1: the base model). The rows of an aLoRA adapter are those from its invocation on: a tensor.
            buffers: of :meth:`row_buffers`, for a step in a CUDA graph. Run two steps, capture one, and replay the
                graph inside other batches with the same buffers. Layers get ``max_rows`` rows, base rows last.
        """
        if rows is None:
            raise TypeError("rows: expected a list of row counts, or a tensor with the entry of each row, got None")
        if buffers is not None and not isinstance(buffers, RowBuffers):
            raise TypeError(f"buffers: expected what row_buffers() gave, got {type(buffers).__name__}")
        if buffers is not None and buffers.tables is not self._transfer.tables:
            raise ValueError("buffers: they are those of another store")
        return self._open(names, rows, buffers)

    def row_buffers(self, max_rows: int, max_groups: int, max_rank: int, group_size: int = 1) -> RowBuffers:
        """Tables at fixed addresses for :meth:`batch_rows`. A graph that reads them can be replayed with any mix.

        A mix has at most ``max_groups`` different adapters, or combinations of ``group_size`` adapters. From now on
        adapters of a rank above ``max_rank`` are refused.

        Raises:
            RuntimeError: the kernels do not run on this device. ValueError: a size is not positive, or an adapter of a
            larger rank, of an embedding or of experts is loaded.
        """
        self._check_attached()
        sizes = dict(max_rows=max_rows, max_groups=max_groups, max_rank=max_rank, group_size=group_size)
        for name, value in sizes.items():
            check_int(name, value, 1)
        if self._transfer.tables is None:
            raise RuntimeError(f"row_buffers: the grouped kernels do not run on {self.device}")
        with self._lock:
            for version in self._residency.resident:
                if other := [part.site.path for part in version.parts if part.site.kind != "linear"]:
                    raise ValueError(f"row_buffers: {version.identity!r} has {other[0]!r}, which is no linear layer")
            buffers = RowBuffers(max_rows, max_groups, max_rank, group_size, self._transfer.tables)
            self._transfer.tables.limit(max_rank)
            return buffers

    def grow(self, nbytes: int) -> None:
        """Raise the device budget of the adapters by ``nbytes``. Loaded adapters stay where they are.

        Raises:
            TypeError, ValueError: not a positive int. RuntimeError: the store has no limit.
        """
        check_int("nbytes", nbytes, 1)
        with self._lock:
            if self._residency.arena.capacity is None:
                raise RuntimeError("grow: the store has no limit to raise")
            if self._residency.arena.capacity + nbytes > _MOST_BYTES:
                raise ValueError(f"nbytes: expected a capacity of at most {_MOST_BYTES} with it, got {nbytes}")
            self._residency.arena.capacity += nbytes

    def detach(self) -> None:
        """Remove the hooks from the model and free all memory. The store cannot be used afterwards.

        Raises:
            RuntimeError: a batch is running, a lease is held, or an adapter is being loaded.
        """
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)
        with self._lock:
            if self._open_batches or self._residency.busy:
                raise RuntimeError("detach: the store is in use; end the batches and release the leases first")
            try:
                self._end()
            except BaseException:  # an interrupt
                self._end()
                raise

    def _end(self) -> None:
        """Does nothing the second time."""
        self._detached = self._residency.closed = True
        self._attachment.remove()
        for version in self._versions.values():
            self._residency.retire(version)
        self._versions.clear()
        self._prepared.clear()
        self._transfer.close()
        self._residency.arena.clear()

    @contextmanager
    def _open(
        self, names: Sequence[Any], rows: Any, buffers: RowBuffers | None = None, dim: int = 0
    ) -> Iterator[Batch]:
        if isinstance(names, (str, Mapping)) or not isinstance(names, Sequence):
            raise TypeError(f"names: expected a list with one entry per sequence, got {names!r}")
        if not names:
            raise ValueError("names: expected one entry per sequence, got none")
        entries = [parse_entry(entry, i) for i, entry in enumerate(names)]
        entry_of_row = None if rows is None else rows_to_entries(len(entries), rows)
        batch: Batch | None = None
        holds: list[Version] = []
        try:
            with self._lock:
                self._check_attached()
                self._open_batches.add(id(holds))  # of the base model alone, too: they run through the hooks
            held = self._hold_all(list(dict.fromkeys(key for entry in entries for key, _ in entry)), holds)
            wanted = [tuple((held[key], weight) for key, weight in entry if weight) for entry in entries]
            self._check_weights(wanted)
            _check_activated(wanted, rows)
            # in one order, so that what was prepared for a mix is found again
            groups = sorted({group for group in wanted if group}, key=lambda group: [(v.slot, w) for v, w in group])
            numbers = {group: i for i, group in enumerate(groups)}
            group_of_entry = np.array([numbers.get(group, -1) for group in wanted], np.int64)
            more = self._prepared_for(groups), self._siblings, self._rows, buffers, dim
            before = self.calls_outside
            batch = Batch(self, groups, group_of_entry, entry_of_row, *more)
            with batch:
                yield batch
                if groups and buffers is None and not batch.has_run and self.calls_outside != before:
                    warnings.warn(
                        "batch: the model was called meanwhile, but not in this batch, so its outputs are the base "
                        "model's. Threads that are started inside, as by generate_batch or nn.DataParallel, are not "
                        "in it",
                        stacklevel=3,
                    )
        finally:
            try:
                self._close(batch, holds)
            except BaseException:  # an interrupt
                self._close(batch, holds)
                raise

    def _close(self, batch: Batch | None, holds: list[Version]) -> None:
        """Does nothing the second time."""
        if batch is not None:
            batch.leave()
        self._residency.release(holds)
        with self._lock:
            self._open_batches.discard(id(holds))

    def _check_weights(self, wanted: Sequence[Group]) -> None:
        most = largest_scale(self._transfer.dtype)
        for i, group in enumerate(wanted):
            for version, weight in group:
                if weight != 1.0 and not abs(weight) * max(abs(part.scaling) for part in version.parts) <= most:
                    raise ValueError(f"names[{i}]: weight {weight} times the scaling of {version.name!r} is no number")

    def _prepared_for(self, groups: Sequence[Group]) -> Prepared:
        """What was prepared for these groups. Engines open a batch for every step, mostly with the same groups."""
        key = tuple(tuple((version, version.block, weight) for version, weight in group) for group in groups)
        with self._lock:
            found = self._prepared.pop(key, None) or Prepared(groups, self._transfer.tables)
            self._prepared[key] = found
            if len(self._prepared) > _PREPARED:
                del self._prepared[next(iter(self._prepared))]
            for older in list(self._prepared.values())[:-_WITH_BUFFERS]:
                older.drop_rows()
            return found


def _check_activated(wanted: Sequence[Group], rows: Any) -> None:
    """Raise ValueError for an aLoRA adapter in a sum, or in packed rows that it would have all of."""
    for i, group in enumerate(wanted):
        for version, _ in group:
            if version.invocation and len(group) > 1:
                raise ValueError(f"names[{i}]: {version.name!r} is an aLoRA adapter, which is not added to others")
            if version.invocation and isinstance(rows, list | tuple):
                expected = "a tensor with the entry of each row, -1 before the invocation"
                raise ValueError(f"rows: expected {expected}, for {version.name!r}, an aLoRA adapter")


def _device(device: torch.device | str) -> torch.device:
    """The device as torch knows it. Raises TypeError, ValueError, or RuntimeError where it is not there."""
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: expected a torch.device or its name, got {device!r}")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: {device!r} is none that torch knows") from error
    if found.type == "meta":
        raise ValueError("device: expected one with memory, got meta")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device: {found} was asked for, CUDA is not available")
    return torch.empty(0, device=found).device  # with its number: another thread has another current device
