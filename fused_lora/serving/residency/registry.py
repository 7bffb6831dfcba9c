"""Names and versions: which adapters a store knows, where they come from, and who holds them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn

from fused_lora.adapters.checkpoint import of_another_base, path_text
from fused_lora.modules.config import check_bool
from fused_lora.modules.inject import AdapterNotFound
from fused_lora.modules.names import some
from fused_lora.serving.residency.lease import Lease
from fused_lora.serving.residency.live import live_adapter
from fused_lora.serving.residency.naming import check_served_name
from fused_lora.serving.residency.packing import Packed, Site, check_folder, from_folder, from_tensors, signature
from fused_lora.serving.residency.refusal import Refusal
from fused_lora.serving.residency.residency import Residency, StoreFull, Version

Source = str | os.PathLike | Mapping[str, tuple[Tensor, Tensor, float]] | nn.Module


_REMEMBERED = 4096  # unloaded names whose versions are counted on


class _Changed(Exception):
    """The files of a version have changed since it was loaded, and it must be read again."""

    def __init__(self, packed: Packed, files: Any):
        self.packed, self.files = packed, files


def _absolute(folder: str | os.PathLike, name: str = "source") -> str:
    path = path_text(name, folder)
    if not path or "\0" in path:
        raise ValueError(f"{name}: expected the path of a folder, got {path!r}")
    return os.path.abspath(path)


class Registry:
    """The part of an AdapterStore that loads, names and holds adapters.

    Args:
        model, sites: what adapters are checked against. residency: where they go.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], residency: Residency):
        self.model, self._sites = model, sites
        self._residency, self._transfer, self._lock = residency, residency.transfer, residency.changed
        self._versions: dict[str, Version] = {}
        self._unloaded: dict[str, int] = {}  # the last versions of names that have none now, latest last
        self._forgotten = 0  # no version of a name that is in neither is above it
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0  # that has made it
        self._hits = self._misses = 0
        self._detached = False
        self._attachment: Any = None  # says which layers an adapter would not reach

    def load(
        self, name: str, source: Source, *, inside: str | os.PathLike | None = None, allow_partial: bool = False
    ) -> int:
        """Load an adapter onto the device under ``name``. Each load of a name increments its version.

        The new version replaces the old one in one step at the end. Running batches keep the version they started
        with. On any error nothing has changed. Every tensor of the source is used, or the source is refused with a list
        of what does not fit.

        Args:
            name: ``adapter`` or ``org/adapter``, of letters, digits, "_", "-" and ".", at most 256 characters.
            source: a folder with a PEFT checkpoint; or ``{path of a layer: (A [r, K], B [N, r], scaling)}``, copied; or
                a model with LoRA layers, whose adapter ``name`` (or its only adapter) is copied.
            inside: a folder. Files outside it are refused at every read, with all links followed.
            allow_partial: leave out, with a warning, layers of a folder or mapping that the model does not have, and
                tensors that are not of LoRA layers. At least one layer must fit, and each layer must be whole.

        Returns:
            The version: 1 for the first load of a name. Each load increments it, even after an unload. Beyond 4,096
            unloaded names the oldest are forgotten, and a new name begins above their versions.

        Raises:
            AdapterError: a file is damaged. ValueError: the adapter does not fit the model. StoreFull: no room beside
            what is pinned or in use. TypeError: ``source`` is none of the above.
        """
        check_served_name(name)
        check_bool("allow_partial", allow_partial)
        self._check_attached()
        if isinstance(source, (str, os.PathLike)):
            folder, root = _absolute(source), None if inside is None else _absolute(inside, "inside")
            packed, files = from_folder(self.model, self._sites, folder, self._transfer.dtype, root, allow_partial)
            version = Version(name, 0, folder, files=files, inside=root, allow_partial=allow_partial)
            return self._load_packed(version, packed).number
        invocation: tuple[int, ...] = ()
        if isinstance(source, nn.Module):
            source, invocation = live_adapter(source, name, self.model)
        if not isinstance(source, Mapping):
            raise TypeError(f"source: expected a folder, a mapping or a model, got {type(source).__name__}")
        packed = from_tensors(self._sites, source, self._transfer.dtype, allow_partial)._replace(invocation=invocation)
        return self._load_packed(Version(name, 0, None), packed).number

    def lease_async(self, name: str) -> Future[Lease]:
        """:meth:`lease` in another thread. Release the lease even if it is not needed any more."""
        return self._in_thread(self.lease, name)

    def lease_if_ready(self, name: str) -> Lease | None:
        """:meth:`lease` if the adapter is on the device, else None. Raises AdapterNotFound, or the :meth:`refusal`."""
        with self._lock:
            version = self._find(name)
            refused = self._refused(version)
            if refused is not None:
                raise refused
            if version.block is None or version.moving is not None or version.quarantined:
                return None
            return self.lease(name)

    def load_async(self, name: str, source: Source, **options: Any) -> Future:
        """:meth:`load` in another thread; the future's result is the version. Tensors must not change meanwhile."""
        return self._in_thread(self.load, name, source, **options)

    def _in_thread(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Future:
        self._check_attached()
        work = self._transfer.on_this_stream(work)
        with self._lock:
            if self._pool is None or self._process != os.getpid():  # a forked child has none of its threads
                self._pool, self._process = ThreadPoolExecutor(4, thread_name_prefix="fused_lora_load"), os.getpid()
            return self._pool.submit(work, *arguments, **options)

    def register(
        self,
        name: str,
        source: str | os.PathLike,
        *,
        inside: str | os.PathLike | None = None,
        allow_partial: bool = False,
    ) -> int:
        """Register a checkpoint folder without reading it. The first batch that uses it reads it, or :meth:`probe`.

        Args:
            inside, allow_partial: as for :meth:`load`.

        Returns:
            The version, as for :meth:`load`.
        """
        check_served_name(name)
        self._check_attached()
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"source: expected a folder, got {type(source).__name__}")
        root = None if inside is None else _absolute(inside, "inside")
        check_bool("allow_partial", allow_partial)
        version = Version(name, 0, _absolute(source), inside=root, allow_partial=allow_partial)
        return self._name(version).number

    def probe(self, name: str) -> Exception | None:
        """Check the config and the header of an adapter's files, and no tensor.

        Returns:
            What is wrong with them, or None. Batches that use the adapter raise it until the files change, for 30
            seconds where the file system had an error, as too many open files.

        Raises:
            AdapterNotFound: unknown name.
        """
        with self._lock:
            version = self._find(name)
        if version.folder is None:
            return None
        before = signature(version.folder)
        try:
            plan = check_folder(self.model, version.folder, version.inside, version.allow_partial)
            version.trained_on = plan.config.base_model_name_or_path
            self._check_reached(plan.slots)
        except (OSError, ValueError) as error:
            of_files = isinstance(error, OSError) or isinstance(error.__context__, OSError)
            lasting = version.quarantined or not of_files
            version.refusal = Refusal(error.with_traceback(None), version.folder, before, lasting)
            return error
        return None

    def folder(self, name: str) -> str | None:
        """Where the files of an adapter are; None if it came from tensors. Raises AdapterNotFound."""
        with self._lock:
            return self._find(name).folder

    def other_base(self, name: str, model: str) -> str | None:
        """The base model that the adapter's config names, if it is another than ``model``, a folder or a hub name.

        :meth:`probe` has read it; None before that. Raises AdapterNotFound.
        """
        with self._lock:
            found = self._find(name).trained_on
        return found if of_another_base(found, model) else None

    def unload(self, name: str) -> None:
        """Remove an adapter. Its memory is freed when no batch uses it any more. Raises AdapterNotFound."""
        with self._lock:
            version, place = self._find(name), self._residency
            pinned = place.pinned - {name}
            self._unloaded[name], place.pinned, version.retired = version.number, pinned, True
            del self._versions[name]  # Python handles no signal between these
            self._residency.retire(version)
            if len(self._unloaded) > _REMEMBERED:
                oldest = next(iter(self._unloaded))
                self._forgotten = max(self._forgotten, self._unloaded[oldest])
                del self._unloaded[oldest]

    def pin(self, name: str) -> None:
        """Keep ``name`` on the device, also after further loads, until :meth:`unpin` or :meth:`unload`.

        Raises:
            AdapterNotFound, StoreFull, AdapterError: as for a batch that uses it.
        """
        lease = self.lease(name)
        try:
            with self._lock:
                self._find(name)
                self._residency.pinned.add(name)
        finally:
            try:
                lease.release()
            except BaseException:  # an interrupt
                lease.release()
                raise

    def unpin(self, name: str) -> None:
        """Allow ``name`` to be evicted again. Raises AdapterNotFound."""
        with self._lock:
            self._find(name)
            self._residency.pinned.discard(name)

    def names(self) -> list[str]:
        """The adapters that may be used, on the device or not."""
        with self._lock:
            return sorted(self._versions)

    def __contains__(self, name: object) -> bool:
        return name in self._versions

    def versions(self) -> dict[str, int]:
        """The version of each name."""
        with self._lock:
            return {name: version.number for name, version in sorted(self._versions.items())}

    def identity(self, name: str) -> str:
        """``"name@version"``, another string after each load: a key for caches of an adapter's outputs.

        Raises AdapterNotFound. For a running batch, ``with store.batch(...) as b``, see ``b.identities``.
        """
        with self._lock:
            return self._find(name).identity

    def quarantine(self, lease: Lease, error: Exception) -> None:
        """Refuse the leased version with ``error``, until its name is loaded anew or its files change.

        Batches and leases that hold it go on.

        Raises:
            RuntimeError: the lease has been released.
        """
        with self._lock:
            version = lease.held
            if version is None:
                raise RuntimeError(f"quarantine: the lease of {lease.identity!r} has been released")
            version.refusal = Refusal(error.with_traceback(None), version.folder, version.files, for_good=True)

    def refusal(self, name: str) -> Exception | None:
        """The error that a batch with ``name`` raises at once, or None. Raises AdapterNotFound."""
        with self._lock:
            return self._refused(self._find(name))

    def refusals(self) -> dict[str, Exception]:
        """The names that cannot be served with the files that they have, and why. Some may be tried again by now."""
        with self._lock:
            refused = {name: version.refusal for name, version in self._versions.items() if version.refusal is not None}
        return {name: refusal.copy() for name, refusal in refused.items() if refusal.files_are_the_same}

    def stats(self) -> dict[str, int | None]:
        """Counters since the start (hits, misses, loads, evictions) and the state now, bytes and adapters."""
        place = self._residency
        with self._lock:
            return {
                "adapters": len(self._versions),
                "resident": len(place.resident),
                "in_use": sum(version.held > 0 for version in place.resident),
                "pinned": len(place.pinned),
                "hits": self._hits,
                "misses": self._misses,
                "loads": place.loads,
                "evictions": place.evictions,
                "bytes_used": place.used,
                "bytes_reserved": place.arena.reserved,
                "capacity": place.arena.capacity,
                "host_bytes_used": place.host_used,
                "host_capacity": place.host_capacity,
            }

    def lease(self, name: str) -> Lease:
        """Hold the current version of ``name`` on the device, through batches and loads, until the release.

        Raises:
            AdapterNotFound: unknown name. StoreFull: no room. AdapterError: its files are damaged.
        """
        holds: list[Version] = []
        try:
            self._hold(name, holds)
            return Lease(holds, self._residency)
        except BaseException:
            self._residency.release(holds)
            raise

    def _hold_all(self, keys: Sequence[str | Lease], holds: list[Version]) -> dict[str | Lease, Version]:
        """:meth:`_hold` of each. What has been held before an error is in ``holds``, too."""
        try:
            return {key: self._hold(key, holds) for key in keys}
        except StoreFull:  # perhaps one that is there divides the room of another
            self._residency.release(holds)
            with self._lock:
                sizes = {key: 0 if isinstance(key, Lease) else self._find(key).nbytes for key in keys}
                if len(keys) == 1 or not self._residency.clear([self._find(str(key)) for key in keys if sizes[key]]):
                    raise
        largest_first = sorted(keys, key=lambda key: -sizes[key])
        return {key: self._hold(key, holds) for key in largest_first}

    def _hold(self, key: str | Lease, holds: list[Version]) -> Version:
        """The version of a name (or of a lease), on the device and held: it is added to ``holds``, whoever has these
        releases it, also after an error."""
        before = len(holds)
        while True:
            with self._lock:
                if isinstance(key, Lease):
                    if not key.belongs_to(self._residency):
                        raise ValueError(f"names: the lease of {key.identity!r} is one of another store")
                    version, anew = key.held, False
                    if version is None:
                        raise RuntimeError(f"names: the lease of {key.identity!r} has been released")
                else:
                    version = self._find(key)
                    if (refused := self._refused(version)) is not None:
                        raise refused
                    anew = version.quarantined
                self._residency.hold(version, holds)
            try:
                if anew:  # what was refused for good has other files now
                    raise _Changed(*self._read(version))
                found = self._residency.bring(version, lambda version=version: self._read_again(version))
                with self._lock:
                    self._hits, self._misses = self._hits + found, self._misses + (not found)
                return version
            except _Changed as change:
                self._residency.release(holds, before)
                again = Version(version.name, 0, version.folder, files=change.files, inside=version.inside)
                again.allow_partial = version.allow_partial
                self._load_packed(again, change.packed, version)

    @staticmethod
    def _refused(version: Version) -> Exception | None:
        return None if version.refusal is None else version.refusal.now()

    def _read_again(self, version: Version) -> Packed:
        packed, files = self._read(version)
        if version.files not in (None, files):
            raise _Changed(packed, files)  # other bytes under the same identity would poison every cache
        version.files = files
        if not version.quarantined:
            version.refusal = None
        return packed

    def _read(self, version: Version) -> tuple[Packed, Any]:
        """Read the folder of a version. A failure is remembered."""
        if version.folder is None:
            raise RuntimeError(f"adapter {version.identity!r} has no files to be read again")
        before = signature(version.folder)
        try:
            where = version.inside, version.allow_partial
            packed, files = from_folder(self.model, self._sites, version.folder, self._transfer.dtype, *where)
            self._check_reached(part.site.path for part in packed.parts)
            return packed, files
        except (OSError, ValueError) as error:
            version.refusal = Refusal(error.with_traceback(None), version.folder, before, version.quarantined)
            raise

    def check_called(self, groups: Sequence[Sequence[tuple[Version, float]]]) -> None:
        """After a forward under these versions: raise ValueError for one with a layer that the model does not call, and
        refuse it from now on."""
        versions = list(dict.fromkeys(version for group in groups for version, _ in group))
        if self._attachment.unreached(part.site.path for version in versions for part in version.parts) is None:
            return
        for version in versions:
            why = self._attachment.unreached(part.site.path for part in version.parts)
            if why is not None:
                error = ValueError(f"adapter {version.identity!r} cannot be served: {why}")
                with self._lock:
                    version.refusal = Refusal(error, version.folder, version.files, for_good=True)
                raise error

    def _check_reached(self, paths: Iterable[str]) -> None:
        why = self._attachment.unreached(paths)
        if why is not None:
            raise ValueError(f"source: an adapter cannot be served: {why}")

    def _load_packed(self, version: Version, packed: Packed, instead_of: Version | None = None) -> Version:
        self._check_reached(part.site.path for part in packed.parts)
        version.retired, holds = True, []  # until it has a name
        try:
            self._residency.hold(version, holds)
            self._residency.bring(version, lambda: packed)
            return self._name(version, instead_of)
        finally:
            try:
                self._residency.release(holds)
            except BaseException:  # an interrupt
                self._residency.release(holds)
                raise

    def _name(self, version: Version, instead_of: Version | None = None) -> Version:
        """Make ``version`` the current one of its name, unless ``instead_of`` is no longer the current one."""
        name = version.name
        with self._lock:
            self._check_attached()
            if instead_of is not None and self._versions.get(name) is not instead_of:
                return version
            old = self._versions.get(name)
            version.number = self._last_number(name) + 1
            if old is not None:
                old.retired = True
            self._versions[name], version.retired = version, False  # Python handles no signal between these
            self._unloaded.pop(name, None)
            if old is not None:
                self._residency.retire(old)
            return version

    def _last_number(self, name: str) -> int:
        """The highest version that ``name`` may have had."""
        version = self._versions.get(name)
        return self._unloaded.get(name, self._forgotten) if version is None else version.number

    def _find(self, name: str) -> Version:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a str, got {name!r}")
        version = self._versions.get(name)
        if version is None:
            raise AdapterNotFound(
                f"adapter {name[:100]!r} not found; adapters of the store: {some(self._versions, near=name)}"
            )
        return version

    def _check_attached(self) -> None:
        if self._detached:
            raise RuntimeError("the store has been detached from its model")
