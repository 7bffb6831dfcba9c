"""merge_checkpoint and unmerge_checkpoint: adapters into a model's files and back, without a model."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from fused_lora._version import __version__
from fused_lora.adapters.checkpoint import CONFIG_NAME, path_text
from fused_lora.adapters.errors import AdapterError
from fused_lora.adapters.tensorfile import check_unchanged, header_bytes, write_all
from fused_lora.checkpoints.adapter_file import AdapterFile, Weighted, open_adapters
from fused_lora.checkpoints.changes import CAST, Change, Item, change_pieces
from fused_lora.checkpoints.check import Checked, check_shard
from fused_lora.checkpoints.files import (
    MODEL_CONFIG,
    Checkpoint,
    Report,
    Shard,
    json_bytes,
    open_checkpoint,
    other_tokenizer,
    read_json,
    read_shard,
    read_text,
    told,
)
from fused_lora.checkpoints.output import Output
from fused_lora.checkpoints.planning import Changes, plan_changes
from fused_lora.checkpoints.quantised import check_dequantised
from fused_lora.checkpoints.record import RECORD_NAME, ShardRecord, old_header, unmerge_pieces
from fused_lora.checkpoints.stream import Piece, single_threads, write_pieces
from fused_lora.checkpoints.write import DTYPES
from fused_lora.modules.config import check_bool
from fused_lora.modules.names import some
from fused_lora.ops.merge.op import seed_of

PROVENANCE_NAME = "fused_lora_merge.json"
_PROVENANCE = "fused_lora.merge"  # in the metadata of each shard
_UNQUANTISED = (*CAST, torch.int64, torch.bool)  # with the counters and masks of whole models
_MOST_LOST = 0.5  # share of the adapters that rounding may take without a warning
_SPARE_BYTES = 16 << 20  # of the disk, for what is not counted

Progress = Callable[[int, int], Any]


@dataclass
class MergeReport(Report):
    """What a merge or unmerge of files did, or with ``dry_run`` would do.

    Attributes:
        out: the folder. changes: one dict for each tensor that changes. nbytes: of the output's tensors.
        seconds: it took. written, kept: names of the shards written by this call, and by one that was interrupted.
        left_out: files of the base that were not carried along, and tokenizers and templates of the adapters that are
            not the base's. checked: what ``verify`` found. provenance: what is noted in the output.
    """

    out: str
    changes: list[dict[str, Any]]
    nbytes: int
    seconds: float = 0.0
    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    checked: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def merge_checkpoint(
    base: str | os.PathLike,
    adapters: Weighted | Iterable[Weighted],
    out: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    record: str | os.PathLike | None = None,
    rename: Mapping[str, str] | None = None,
    in_place: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    stochastic: int | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge adapters into the safetensors files of a model: round(W + sum_i weight_i scaling_i B_i A_i), rounded once.

    Tensor by tensor, without a model. Memory holds pieces of 4 MiB, the lora_A and lora_B of one layer, and a tensor
    that is replaced. The bits are those of :func:`fused_lora.merge` on a model of the same dtype. A DoRA adapter scales
    the rows of W, and of the adapters before it, to its magnitude; where the norms of the rows are summed in another
    order its scale may differ from the model's in the last place.

    Where an adapter is for a quantised weight (bitsandbytes, block-scaled fp8), all of them become dense.

    Everything is checked before a byte is written. Every tensor of the adapters is used. The output is written to
    ``OUT.partial``, shard by shard, and is called OUT when it is whole. The same call after an interrupt goes on with
    the shards that are missing. The base is never changed without ``in_place``.

    Args:
        base: a folder with a checkpoint, or one .safetensors file, of fp32, bf16, fp16, fp64 or quantised weights.
        adapters: folders of PEFT adapters, or pairs (folder, weight). A weight multiplies the adapter's scaling; it is
            not 0, and 1 for DoRA. No folder comes twice.
        out: the new folder, which must not exist, or be empty.
        dtype: fp32, bf16 or fp16 for all floating tensors; the sum is in fp32 and rounded once. None: as in the base;
            what was quantised gets the dtype of the base's config.
        device: where sums are computed.
        record: a new folder for what :func:`unmerge_checkpoint` needs; on a CPU, without ``dtype`` and ``in_place``,
            and not over quantised weights.
        rename: beginnings of the adapter's paths -> what the checkpoint has in their place, where no known rule fits.
        in_place: instead of ``out``: the merged folder takes the base's place when it is whole. Not over a base that
            one of the adapters is merged into already.
        dry_run: check and report, write nothing.
        verify: read each shard again before it gets its name, and those of an earlier call; compare what must not
            change byte by byte, and rows of each merged weight with a sum in fp64.
        stochastic: a seed: sums are rounded at random, as by :func:`fused_lora.merge` with it. For merged weights of
            bf16 and fp16 that keep their dtype.
        progress: called with (bytes done, bytes in all).

    Raises:
        AdapterError: a file is malformed, or adapters and base do not fit; the message names the tensor.
        FileExistsError: ``out`` or ``record`` holds something, or their ``.partial`` is of another call.
        TypeError, ValueError: an unsuitable argument; or a number would not be finite.
        RuntimeError: another process writes the same output.
        OSError: from the file system. Shards that are finished stay in ``OUT.partial``.
    """
    for name, value in (("in_place", in_place), ("dry_run", dry_run), ("verify", verify)):
        check_bool(name, value)
    place = _check_options(dtype, device, None if record is None else path_text("record", record), in_place)
    start = time.perf_counter()
    checkpoint = open_checkpoint(base)
    target = _target(checkpoint, out, in_place)
    with single_threads() as workers, open_adapters(adapters) as opened:
        _check_effects(opened)
        changes = plan_changes(checkpoint, opened, rename)
        for adapter in opened:
            if not adapter.acts():
                expected = "a layer whose scaling, lora_A and lora_B are not 0, without which the adapter has no effect"
                raise AdapterError(adapter.plan.weights, None, expected, "none")
        merge = _Merge(checkpoint, opened, changes, dtype, place, record is not None, in_place, stochastic)
        report = merge.report(target)
        output = Output("in_place" if in_place else "out", target, merge.identity, in_place)
        notes = None if record is None else Output("record", path_text("record", record), merge.identity)
        if _is_done(target, merge.identity) and not in_place:
            if notes is not None and not _is_done(notes.target, merge.identity, RECORD_NAME):
                text = f"record: {target!r} is merged already, without its record in {notes.target!r}; delete it first"
                raise FileExistsError(errno.EEXIST, text)
            merge.check_done(target, report, verify)
            return report
        inputs = [checkpoint.folder, *(adapter.folder for adapter in opened)]
        output.check(inputs if notes is None else [*inputs, notes.target, notes.stage])
        if notes is not None and not _is_done(notes.target, merge.identity, RECORD_NAME):
            notes.check([*inputs, target, output.stage])
        output.check_space(report.nbytes + _SPARE_BYTES)
        if not dry_run:
            meter = _Meter(progress, merge.total, 1 if place.type == "cuda" else workers)
            merge.run(output, notes, report, verify, meter)
    report.seconds = time.perf_counter() - start
    return report


def _check_options(dtype: Any, device: Any, record: str | None, in_place: bool) -> torch.device:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype or None, got {dtype!r:.100}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES} or None, got {dtype}")
    try:
        place = torch.device(device)
        torch.empty(0, device=place).tolist()  # of the meta device nothing can be read
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"device: expected one of this machine's, got {device!r:.100}: {error}") from None
    if record is not None and (dtype is not None or place.type != "cpu" or in_place):
        raise ValueError("record: expected none with another dtype, in place, or on a device other than the CPU")
    return place


def _check_effects(adapters: Sequence[AdapterFile]) -> None:
    folders = [os.path.realpath(adapter.folder) for adapter in adapters]
    for adapter, folder in zip(adapters, folders, strict=True):
        if tokens := adapter.plan.config.alora_invocation_tokens:
            config = os.path.join(adapter.folder, CONFIG_NAME)
            expected = "null or empty: the rows before an invocation are the base's, which no weight has"
            raise AdapterError(config, "alora_invocation_tokens", expected, tokens)
        if adapter.weight == 0:
            raise ValueError(f"adapters: expected a weight other than 0 for {adapter.folder!r}, which has no effect")
        if folders.count(folder) > 1:
            raise ValueError(f"adapters: expected each folder once, got {adapter.folder!r} more often; add its weights")


def _target(checkpoint: Checkpoint, out: Any, in_place: bool) -> str:
    if in_place == (out is not None):
        raise ValueError(f"out: expected a folder, or in_place=True instead, got out={out!r:.200} and {in_place=}")
    if not in_place:
        if not path_text("out", out):
            raise ValueError("out: expected a folder, got an empty path")
        return path_text("out", out)
    if not checkpoint.whole:
        raise ValueError("in_place: expected a base that is a folder, not one file")
    return checkpoint.folder


def _is_done(target: str, identity: str, name: str = PROVENANCE_NAME) -> bool:
    path = os.path.join(target, name)
    return os.path.isfile(path) and read_json(path).get("id") == identity


class _Merge:
    """A merge whose every change is known."""

    def __init__(
        self,
        base: Checkpoint,
        adapters: Sequence[AdapterFile],
        changes: Changes,
        dtype: torch.dtype | None,
        device: torch.device,
        recorded: bool,
        in_place: bool,
        stochastic: int | None,
    ):
        self._seed = stochastic
        self._base, self._adapters, self._changes = base, adapters, changes
        self._dtype, self._device, self._packed = dtype, device, changes.packed
        self._parts = {part for weight in self._packed.values() for part in weight.parts}
        self._check_used()
        self._check_quantised(recorded)
        self._dense_dtype = self._dtype_of_dense()
        self._check_random()
        self._by_source: dict[str, list[Change]] = {}
        for change in changes.by_name.values():
            self._by_source.setdefault(change.source, []).append(change)
        about = [a.describe() for a in adapters]
        configs = [[a.plan.config.to_dict(), dict(a.plan.stacks)] for a in adapters]
        known = [[s.name, *s.state] for s in base.shards], base.config, configs
        places = sorted([name, [key for _, key in change.used()]] for name, change in changes.by_name.items())
        kind = [base.digest(), str(dtype), recorded, places, stochastic]
        text = json.dumps([__version__, about, known, kind], sort_keys=True, default=str)
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        self.provenance = {
            "id": self.identity,
            "fused_lora": __version__,
            "base": {"path": told(base.folder), "headers_sha256": base.digest()},
            "adapters": about,
            "dtype": None if dtype is None else _name_of(dtype),
            **({} if stochastic is None else {"stochastic": stochastic}),
        }
        if (earlier := base.shards[0].header.metadata.get(_PROVENANCE)) is not None:
            self.provenance["before"] = _parsed(earlier)  # of a merge that gave the base
            if again := [adapter["path"] for adapter in about if adapter["sha256"] in earlier]:
                if in_place:  # most likely the same command, run once more
                    raise ValueError(
                        f"in_place: {some(again)} are merged into {base.folder!r} already, so nothing was done; to add "
                        "them once more, write to another folder"
                    )
                warnings.warn(f"base: {some(again)} are merged into it already, and now once more", stacklevel=4)

    def _check_used(self) -> None:
        used = {(id(adapter), key) for change in self._changes.by_name.values() for adapter, key in change.used()}
        for adapter in self._adapters:
            held = adapter.plan.copies.values()
            left = [key for key in adapter.plan.entries if (id(adapter), key) not in used and key not in held]
            if left:
                raise AdapterError(adapter.plan.weights, left[0], "a tensor that is merged", f"unused: {some(left)}")

    def _check_quantised(self, recorded: bool) -> None:
        """A loader would quantise floating weights by such a config, and with them lose most of the adapters."""
        if self._packed:
            if recorded:
                raise ValueError(
                    "record: expected none over quantised weights: the output is another, dense checkpoint"
                )
            return check_dequantised(self._base, self._packed, _UNQUANTISED)
        quantised = (self._base.config or {}).get("quantization_config")
        if self._dtype is not None and (quantised or self._changes.stays_quantised):
            raise ValueError("dtype: expected none over a checkpoint with a quantization_config or quantised weights")
        if quantised and all(entry.dtype in _UNQUANTISED for _, entry in self._base.tensors.values()):
            path = os.path.join(self._base.folder, MODEL_CONFIG)
            expected = "no such entry, for no weight is quantised, and a loader would quantise the merged ones"
            raise AdapterError(path, "quantization_config", expected, quantised)
        return None

    def _check_random(self) -> None:
        """Sums are rounded at random from fp32 in one step: not in another dtype first."""
        if self._seed is None:
            return
        if isinstance(self._seed, bool) or not isinstance(self._seed, int):
            raise TypeError(f"stochastic: expected an int or None, got {self._seed!r:.100}")
        if self._dtype is not None or self._packed:
            raise ValueError("stochastic: expected none with a dtype, and over quantised weights")
        for change in self._changes.by_name.values():
            dtype = self._base.tensors[change.source][1].dtype
            if change.kind == "merge" and dtype.itemsize != 2:
                raise ValueError(
                    f"stochastic: expected none, for {change.name} has {dtype}: only 16 bits are rounded at random"
                )

    def _dtype_of_dense(self) -> torch.dtype | None:
        """Of weights that were quantised."""
        config = self._base.config or {}
        found = self._dtype or getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), None)
        if self._packed and found not in DTYPES:
            raise ValueError(f"dtype: expected one of {DTYPES} over quantised weights: the base's config names none")
        return found if self._packed else None

    def items(self, shard: Shard) -> list[Item]:
        """The tensors of one shard of the output, wide ones first as safetensors aligns them."""
        found = []
        for name, entry in shard.header.entries.items():
            if name in self._parts:
                continue
            packed = self._packed.get(name)
            dtype = self._dtype if self._dtype is not None and entry.dtype in CAST else entry.dtype
            dtype = dtype if packed is None or self._dense_dtype is None else self._dense_dtype
            changes = self._by_source.get(name, [])
            parts = [
                (name, next((c for c in changes if not c.added), None)),
                *((c.name, c) for c in changes if c.added),
            ]
            found += [Item(n, change, entry, dtype, packed, self._seed_of(n)) for n, change in parts]
        return sorted(found, key=lambda item: -item.dtype.itemsize)

    def _seed_of(self, name: str) -> int | None:
        return None if self._seed is None else seed_of(self._seed, name)

    @property
    def total(self) -> int:
        """Bytes of the base that the output is made from."""
        return sum(item.read_bytes for shard in self._base.shards for item in self.items(shard))

    def report(self, target: str) -> MergeReport:
        """What will be done."""
        items = [item for shard in self._base.shards for item in self.items(shard)]
        nbytes = sum(item.nbytes for item in items)
        changes = [item.change.describe(item.shape, item.dtype) for item in items if item.change is not None]
        others = [path for a in self._adapters if self._base.whole for path in other_tokenizer(a.folder, self._base)]
        left_out = [*self._base.left_out, *others]
        return MergeReport(target, changes, nbytes, left_out=left_out, provenance=self.provenance)

    def check_done(self, folder: str, report: MergeReport, verify: bool) -> None:
        """All shards of an output that has its name must be there and whole; with ``verify`` their tensors, too."""
        checked = Checked()
        for shard in self._base.shards:
            if verify:
                check_shard(shard, os.path.join(folder, shard.name), self.items(shard), checked)
            else:
                read_shard(folder, shard.name)
            report.kept.append(shard.name)
        if verify:
            _note_checked(report, checked)

    def run(self, output: Output, notes: Output | None, report: MergeReport, verify: bool, meter: _Meter) -> None:
        """Write all shards that are not there yet, then the small files, and give the folders their names."""
        checked = Checked() if verify else None
        recorded = notes is None or _is_done(notes.target, self.identity, RECORD_NAME)
        items = {shard.name: self.items(shard) for shard in self._base.shards}
        with output.open(), contextlib.nullcontext() if recorded else notes.open(), ThreadPoolExecutor(1) as finisher:
            last: Future | None = None
            for shard in self._base.shards:
                name, part = shard.name, items[shard.name]
                if output.has(name) and (recorded or notes.has(name)):
                    if checked is not None:
                        check_shard(shard, os.path.join(output.stage, name), part, checked)
                    report.kept.append(name)
                    meter.add(sum(item.read_bytes for item in part))
                    continue
                record = None if recorded else ShardRecord(notes.writing(name))
                header = self._write(shard, output.writing(name), part, record, meter)
                if checked is not None:
                    check_shard(shard, output.writing(name), part, checked)
                if record is not None:
                    record.finish(shard.header.raw, header)
                if last is not None:
                    last.result()
                # the disk works on one shard while the next is computed
                last = finisher.submit(_finish, name, output, None if recorded else notes)
                report.written.append(name)
            if last is not None:
                last.result()
            meter.end()
            if checked is not None:
                _note_checked(report, checked)
            files = self._small_files()
            if not recorded:
                old = [MODEL_CONFIG, self._base.index_name]
                kept = {n: read_text(os.path.join(self._base.folder, n)).decode() for n in old if n in files}
                entries = {**self.provenance, "files": kept, "shards": [shard.name for shard in self._base.shards]}
                notes.finish({RECORD_NAME: json_bytes(entries)}, self._base.folder, ())
            output.finish(files, self._base.folder, self._base.others)

    def _write(
        self, shard: Shard, path: str, items: Sequence[Item], record: ShardRecord | None, meter: _Meter
    ) -> bytes:
        """Write one shard to ``path``; returns its header."""
        # loaders take a file without metadata as torch's, but none with metadata that does not say so
        metadata = {"format": "pt", **shard.header.metadata, _PROVENANCE: json.dumps(self.provenance)}
        header = header_bytes([(i.name, i.dtype, i.shape) for i in items], metadata)
        note = None if record is None else record.note

        def pieces() -> Iterator[Piece]:
            for item in items:
                yield from change_pieces(item, shard.data, self._device, note)

        write_shard(shard, path, header, pieces(), meter)
        return header

    def _sums(self, about: dict[str, Any], items: Collection[Item]) -> dict[str, Any]:
        """What the index has of these entries, of the output's tensors."""
        found: dict[str, Any] = {"total_size": sum(item.nbytes for item in items)}
        if isinstance(count := about.get("total_parameters"), int):
            added = [item for item in items if item.change is not None and item.change.added]
            found["total_parameters"] = count + sum(math.prod(item.shape) for item in added)
        if self._dtype is not None:
            found["dtype"] = _name_of(self._dtype)
        return {name: value for name, value in found.items() if name in about}

    def _small_files(self) -> dict[str, bytes]:
        """Index, config and provenance of the output. A file that does not change keeps its bytes."""
        base, files = self._base, {}
        if base.index is not None and base.index_name is not None:
            items = {item.name: (item, shard.name) for shard in base.shards for item in self.items(shard)}
            index = {**base.index, "weight_map": {name: shard for name, (_, shard) in sorted(items.items())}}
            if isinstance(about := base.index.get("metadata"), dict):
                index["metadata"] = {**about, **self._sums(about, [item for item, _ in items.values()])}
            files[base.index_name] = json_bytes(index)
        if base.config is not None:
            config = {**base.config, **self._changes.config}
            if self._packed:
                config = _without(config, "quantization_config")
            if self._dtype is not None:
                keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
                config |= dict.fromkeys(keys, _name_of(self._dtype))
            same = config == base.config
            files[MODEL_CONFIG] = read_text(os.path.join(base.folder, MODEL_CONFIG)) if same else json_bytes(config)
        return {**files, PROVENANCE_NAME: json_bytes(self.provenance)}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parsed(text: str) -> Any:
    """What is noted of an earlier merge. As text inside text each merge over the last would double its length."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _without(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The config of a model, and those of its parts, without an entry."""
    kept = {name: value for name, value in config.items() if name != key}
    return {
        n: {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else value
        for n, value in kept.items()
    }


def _note_checked(report: MergeReport, checked: Checked) -> None:
    report.checked = checked.to_dict()
    if checked.lost_share > _MOST_LOST:
        text = f"verify: rounding took {checked.lost_share:.0%} of the adapters; use a wider dtype"
        warnings.warn(text, stacklevel=4)


class _Meter:
    """Counts the bytes that are done; ``workers``: how many pieces are worked on at a time."""

    def __init__(self, progress: Progress | None, total: int, workers: int):
        self._progress, self._total, self._done, self.workers = progress, total, 0, workers

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)

    def end(self) -> None:
        """All of it is done, what was replaced without reading included."""
        self.add(self._total - self._done)


def write_shard(source: Shard, path: str, header: bytes, pieces: Iterable[Piece], meter: _Meter) -> None:
    """Write a file of this header and what the pieces of ``source`` give. It is not synced."""
    with open(source.path, "rb", buffering=0) as old, open(path, "wb", buffering=0) as new:
        check_unchanged(source.path, old.fileno(), source.state)
        write_all(new, header)
        write_pieces(source.path, old.fileno(), new.fileno(), len(header), pieces, meter.add, meter.workers)
        check_unchanged(source.path, old.fileno(), source.state)


def _finish(name: str, output: Output, notes: Output | None) -> None:
    if notes is not None:
        notes.finish_file(name)
    output.finish_file(name)


def unmerge_checkpoint(
    merged: str | os.PathLike,
    record: str | os.PathLike,
    out: str | os.PathLike,
    *,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the checkpoint from before a :func:`merge_checkpoint` with ``record``: the same shards, byte for byte.

    Args:
        merged: the folder, or file, that the merge wrote. record: the folder that it wrote beside it.
        out: the new folder, which must not exist, or be empty. Small files are carried along from ``merged``.
        progress: called with (bytes done, bytes in all).

    Raises:
        AdapterError: a file is malformed, or the record is not of this checkpoint.
        RuntimeError: a weight is not what the merge left; the message names the file and the tensor.
        FileExistsError, TypeError, ValueError, OSError: as in :func:`merge_checkpoint`.
    """
    start, notes = time.perf_counter(), path_text("record", record)
    checkpoint = open_checkpoint(merged, "merged")
    entries = read_json(os.path.join(notes, RECORD_NAME))
    names, files = entries.get("shards"), entries.get("files")
    if names != [shard.name for shard in checkpoint.shards]:
        raise AdapterError(os.path.join(notes, RECORD_NAME), "shards", f"the record of {checkpoint.folder!r}", names)
    texts = files.items() if isinstance(files, dict) else [("", None)]
    if not all(isinstance(t, str) and os.path.basename(n) == n and n.endswith(".json") for n, t in texts):
        raise AdapterError(os.path.join(notes, RECORD_NAME), "files", "texts of .json files in the folder", files)
    records = {shard.name: read_shard(notes, shard.name) for shard in checkpoint.shards}
    output = Output("out", path_text("out", out), f"unmerge {entries.get('id')} {checkpoint.digest()}")
    output.check([checkpoint.folder, notes])
    nbytes = sum(shard.size for shard in checkpoint.shards)
    output.check_space(nbytes + _SPARE_BYTES)
    report = MergeReport(output.target, [], nbytes, left_out=checkpoint.left_out, provenance=entries)
    with single_threads() as workers, output.open():
        meter = _Meter(progress, nbytes, workers)
        for shard in checkpoint.shards:
            if output.has(shard.name):
                report.kept.append(shard.name)
                meter.add(shard.size)
                continue
            held = records[shard.name]
            with open(held.path, "rb", buffering=0) as file:
                pieces = unmerge_pieces(shard, held, file.fileno())
                write_shard(shard, output.writing(shard.name), old_header(held), pieces, meter)
            output.finish_file(shard.name)
            report.written.append(shard.name)
        meter.end()
        others = [name for name in checkpoint.others if name != PROVENANCE_NAME]
        output.finish({name: text.encode() for name, text in files.items()}, checkpoint.folder, others)
    report.seconds = time.perf_counter() - start
    return report
