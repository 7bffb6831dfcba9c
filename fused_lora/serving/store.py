"""AdapterStore: many adapters over one model, on the device within a budget, each request under its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fused_lora.adapters.read import check_adapter_name
from fused_lora.modules.inject import AdapterNotFound
from fused_lora.ops.grouped import Terms
from fused_lora.serving.attach import Attachment, find_sites
from fused_lora.serving.batch import Batch, Group, parse_entry, rows_to_entries
from fused_lora.serving.device import open_transfer
from fused_lora.serving.lease import Lease
from fused_lora.serving.packing import Packed, from_folder, from_model, from_tensors
from fused_lora.serving.residency import Residency, Version

_TERMS = 8  # batches of other adapters whose factors are kept in order

Source = str | os.PathLike | Mapping[str, tuple[Tensor, Tensor, float]] | nn.Module


class _Changed(Exception):
    """The files of a version that was dropped are not those it was loaded from."""

    def __init__(self, packed: Packed, files: Any):
        self.packed, self.files = packed, files


class AdapterStore:
    """Adapters of any rank over one plain model, chosen per sequence or per token row.

    ::

        store = AdapterStore(model, capacity_bytes=2 << 30)
        store.load("sql", "adapters/sql")
        with store.batch(["sql", None, {"sql": 0.5, "poet": 0.5}]):
            model.generate(**inputs)

    A layer's output becomes y[row] += sum_i weight_i * scaling_i * B_i A_i x[row] for the rows with adapters, in place,
    summed in fp32 and rounded once; base rows keep the bits that the layer gave them. The model itself, its weights and
    its state dict stay as they are. All methods may be called from several threads.

    Adapters lie at their exact rank in one arena on the device. Those used least recently make room for others; an
    adapter in a running batch, or a pinned one, never does. Adapters without files move to host memory then, others
    are read again when they are needed.

    Args:
        model: a model without LoRA layers.
        capacity_bytes: what adapters may take on the device; None: no limit.
        host_bytes: what copies of adapters may take in host memory; None: no limit.
        device: of the arena and of the model's linear layers; by default that of the first.
        grow: take the memory from the device in steps of so many bytes instead of at once.
        dtype: of the adapters on the device; by default float32 on a CPU (float64 for such a model), the model's own
            dtype on a GPU.
        max_resident: most adapters on the device at a time.

    Raises:
        TypeError, ValueError: an argument is not what it must be, or the model has LoRA layers or no linear ones.
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
        sizes = dict(capacity_bytes=capacity_bytes, host_bytes=host_bytes, grow=grow, max_resident=max_resident)
        for name, value in sizes.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name}: expected an int or None, got {value!r}")
            if value is not None and value < (name != "host_bytes"):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        self._sites = find_sites(model)
        self.model = model
        first = next(iter(self._sites.values())).module.weight
        self.device = first.device if device is None else torch.device(device)
        self._transfer = open_transfer(self.device, first.dtype, dtype, self._sites, max_resident)
        self._versions: dict[str, Version] = {}
        self._counts: dict[str, int] = {}
        self._pinned: set[str] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._terms: dict[Any, dict[int, Terms]] = {}
        self._hits = self._misses = 0
        self._detached = False
        self._residency = Residency(
            self._transfer, capacity_bytes, grow, host_bytes, max_resident, self._pinned.__contains__
        )
        self._lock = self._residency.changed
        self._attachment = Attachment(model, self._sites, self)

    def load(self, name: str, source: Source) -> int:
        """Bring an adapter onto the device under ``name``; of a known name it becomes the next version.

        The change is made at once and last: batches that run keep the version they started with, those that start
        afterwards have the new one, and on any error everything is as before.

        Args:
            name: 1 to 64 letters, digits, "_" or "-".
            source: a folder with a PEFT checkpoint; ``{path of a layer: (A [r, K], B [N, r], scaling)}``, copied; or a
                model with LoRA layers, whose adapter ``name``, or its only one, is copied.

        Returns:
            The version: 1 for the first load of a name, and one more for each that follows, unloaded or not.

        Raises:
            AdapterError: a file is not what it must be. ValueError: the adapter does not fit the model.
            StoreFull: no room beside what is pinned or in use. TypeError: ``source`` is none of the above.
        """
        check_adapter_name(name)
        self._check_attached()
        if isinstance(source, (str, os.PathLike)):
            folder = os.path.abspath(os.fsdecode(source))
            packed, files = from_folder(self.model, self._sites, folder, self._transfer.dtype)
            return self._publish(name, packed, folder, files).number
        if isinstance(source, nn.Module):
            packed = from_model(self._sites, source, name, self._transfer.dtype)
        elif isinstance(source, Mapping):
            packed = from_tensors(self._sites, source, self._transfer.dtype)
        else:
            raise TypeError(f"source: expected a folder, a mapping or a model, got {type(source).__name__}")
        return self._publish(name, packed, None, None).number

    def load_async(self, name: str, source: Source) -> Future:
        """:meth:`load` in another thread; the future's result is the version. Tensors must not change meanwhile."""
        self._check_attached()
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(4, thread_name_prefix="fused_lora_load")
            return self._pool.submit(self.load, name, source)

    def register(self, name: str, source: str | os.PathLike) -> int:
        """Make the checkpoint in a folder known without reading it; the first batch that uses it does.

        Returns:
            The version, as for :meth:`load`.
        """
        check_adapter_name(name)
        self._check_attached()
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"source: expected a folder, got {type(source).__name__}")
        return self._name(name, Version(name, 0, os.path.abspath(os.fsdecode(source)))).number

    def unload(self, name: str) -> None:
        """Forget an adapter; its memory is free once no batch uses it. Raises AdapterNotFound."""
        with self._lock:
            version = self._find(name)
            del self._versions[name]
            self._pinned.discard(name)
            self._residency.retire(version)

    def pin(self, name: str) -> None:
        """Keep ``name`` on the device, through reloads too, until :meth:`unpin` or :meth:`unload`.

        Raises:
            AdapterNotFound, StoreFull, AdapterError: as a batch that uses it.
        """
        with self.lease(name), self._lock:
            self._find(name)
            self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Let ``name`` make room for others again. Raises AdapterNotFound."""
        with self._lock:
            self._find(name)
            self._pinned.discard(name)

    def names(self) -> list[str]:
        """The adapters that may be used, on the device or not."""
        with self._lock:
            return sorted(self._versions)

    def versions(self) -> dict[str, int]:
        """The version of each name."""
        with self._lock:
            return {name: version.number for name, version in sorted(self._versions.items())}

    def identity(self, name: str) -> str:
        """``"name@version"``: another string after every load, for caches of what an adapter computed.

        Raises AdapterNotFound. ``with store.batch(...) as b`` has what the batch is served with in ``b.identities``.
        """
        with self._lock:
            return self._find(name).identity

    def stats(self) -> dict[str, int | None]:
        """Counters since the start (hits, misses, loads, evictions) and the state now, bytes and adapters."""
        place = self._residency
        with self._lock:
            return {
                "adapters": len(self._versions),
                "resident": len(place.resident),
                "in_use": sum(version.held > 0 for version in place.resident),
                "pinned": len(self._pinned),
                "hits": self._hits,
                "misses": self._misses,
                "loads": place.loads,
                "evictions": place.evictions,
                "bytes_used": place.arena.used,
                "bytes_reserved": place.arena.reserved,
                "capacity": place.arena.capacity,
                "host_bytes_used": place.host_used,
                "host_capacity": place.host_capacity,
            }

    def lease(self, name: str) -> Lease:
        """Hold the present version of ``name`` on the device, across batches and reloads, until it is released.

        Raises:
            AdapterNotFound: unknown name. StoreFull: no room. AdapterError: its files are not what they must be.
        """
        return Lease(self._hold(name), self._residency)

    def batch(self, names: Sequence[Any]) -> AbstractContextManager[Batch]:
        """A context in which sequence i of every model batch runs under ``names[i]``, in this thread.

        Around any forward and around ``model.generate``, padded left or right. A model batch of k times as many
        sequences (beams, return sequences) repeats each entry k times. Gradients are off inside.

        Args:
            names: for each sequence a name, a :class:`Lease`, None (the base model), or a dict of names and weights
                whose terms are added up.

        Raises:
            AdapterNotFound: unknown name. StoreFull: they do not fit together. AdapterError: files of an adapter that
            has to be read. TypeError, ValueError: ``names`` is not such a sequence, or it is empty.
        """
        return self._open(names, None)

    def batch_rows(
        self, names: Sequence[Any], rows: Sequence[int] | Tensor | np.ndarray
    ) -> AbstractContextManager[Batch]:
        """As :meth:`batch`, for token rows of several requests packed into one: every layer sees exactly these rows.

        Args:
            names: entries as for :meth:`batch`.
            rows: a list with the number of rows of each entry, in order, or an integer tensor with the entry of each
                row (-1: the base model).
        """
        return self._open(names, rows)

    def detach(self) -> None:
        """Take the hooks off the model and free all memory; the store is of no use afterwards.

        Raises:
            RuntimeError: a batch is running or a lease is held.
        """
        pool = self._pool
        if pool is not None:
            pool.shutdown(wait=True)
        with self._lock:
            if any(version.held for version in self._residency.resident):
                raise RuntimeError("detach: adapters are in use; end the batches and release the leases first")
            self._attachment.remove()
            self._detached = True
            for version in self._versions.values():
                self._residency.retire(version)
            self._versions.clear()
            self._terms.clear()
            self._transfer.close()
            self._residency.arena.clear()

    @contextmanager
    def _open(self, names: Sequence[Any], rows: Any) -> Iterator[Batch]:
        self._check_attached()
        if isinstance(names, (str, Mapping)) or not isinstance(names, Sequence):
            raise TypeError(f"names: expected a list with one entry per sequence, got {names!r}")
        if not names:
            raise ValueError("names: expected one entry per sequence, got none")
        entries = [parse_entry(entry, i, (str, Lease)) for i, entry in enumerate(names)]
        entry_of_row = None if rows is None else rows_to_entries(len(entries), rows)
        held: dict[Any, Version] = {}
        try:
            for key in dict.fromkeys(key for entry in entries for key, _ in entry):
                held[key] = self._hold(key)
            wanted = [tuple((held[key], weight) for key, weight in entry if weight) for entry in entries]
            # adapters of one shape that lie side by side in the arena are computed together
            groups = sorted({group for group in wanted if group}, key=lambda group: (len(group), group[0][0].place))
            numbers = {group: i for i, group in enumerate(groups)}
            group_of_entry = np.array([numbers.get(group, -1) for group in wanted], np.int64)
            with Batch(self, self._transfer, groups, group_of_entry, entry_of_row, self._terms_of(groups)) as batch:
                yield batch
        finally:
            self._residency.release(held.values())

    def _terms_of(self, groups: Sequence[Group]) -> dict[int, Terms]:
        """Where the terms of these groups are kept: engines open a batch for every step, mostly with the same ones."""
        key = tuple(tuple((version, version.block, weight) for version, weight in group) for group in groups)
        with self._lock:
            found = self._terms.pop(key, {})
            self._terms[key] = found
            if len(self._terms) > _TERMS:
                del self._terms[next(iter(self._terms))]
            return found

    def _hold(self, key: str | Lease) -> Version:
        """The version of a name (or of a lease), held and on the device."""
        while True:
            with self._lock:
                version = self._find(key) if isinstance(key, str) else key.held
                if version is None:
                    raise RuntimeError(f"names: the lease of {key.identity!r} has been released")
                version.held += 1
            try:
                found = self._residency.bring(version, lambda version=version: self._read_again(version))
                with self._lock:
                    self._hits, self._misses = self._hits + found, self._misses + (not found)
                return version
            except _Changed as change:
                self._residency.release([version])
                if self._versions.get(version.name) is version:
                    self._publish(version.name, change.packed, version.folder, change.files)
            except BaseException:
                self._residency.release([version])
                raise

    def _read_again(self, version: Version) -> Packed:
        packed, files = from_folder(self.model, self._sites, version.folder, self._transfer.dtype)
        if version.files not in (None, files):
            raise _Changed(packed, files)  # other bytes under the same identity would poison every cache
        version.files = files
        return packed

    def _publish(self, name: str, packed: Packed, folder: str | None, files: Any) -> Version:
        version = Version(name, 0, folder, files=files, held=1)
        try:
            self._residency.bring(version, lambda: packed)
            return self._name(name, version)
        finally:
            self._residency.release([version])

    def _name(self, name: str, version: Version) -> Version:
        """From here on ``name`` is this version."""
        with self._lock:
            version.number = self._counts[name] = self._counts.get(name, 0) + 1
            old = self._versions.get(name)
            self._versions[name] = version
            if old is not None:
                self._residency.retire(old)
            return version

    def _find(self, name: str) -> Version:
        version = self._versions.get(name)
        if version is None:
            raise AdapterNotFound(f"adapter {name!r} not found; adapters of the store: {sorted(self._versions)}")
        return version

    def _check_attached(self) -> None:
        if self._detached:
            raise RuntimeError("the store has been detached from its model")
