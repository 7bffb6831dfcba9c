"""The record of a merge of files: what it takes to get the old files back, to the bit.

A folder with one safetensors file for each shard, and ``record.json``. For every merged piece of a weight a file holds
the factors of its delta, DoRA's scale of its rows, checksums of the old bits and corrections (``ops/merge``), for a
tensor that was replaced its old bytes, and in its metadata the shard's old header as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_lora.adapters.errors import AdapterError
from fused_lora.adapters.tensorfile import METADATA, TensorEntry, header_bytes, parse_json, write_all
from fused_lora.checkpoints.files import Shard
from fused_lora.checkpoints.stream import Piece, read_bytes, read_tensor, write_pieces
from fused_lora.ops.merge.blocks import Factors, Scales, Units, restoring
from fused_lora.ops.native import UNMERGE

RECORD_NAME = "record.json"
_OLD, _MERGED, _PIECES = "fused_lora.old_header", "fused_lora.merged_header_sha256", "fused_lora.pieces"
_PARTS = ("left", "notes", "corrections", "copy")  # of a piece; its right factor is shared with its neighbours


class ShardRecord:
    """Collects and writes the record of one shard while it is merged."""

    def __init__(self, path: str):
        self._path = path
        self._pieces: list[list[Any]] = []
        self._tensors: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        self._right: Tensor | None = None
        self._file = open(f"{path}.data", "w+b", buffering=0)  # noqa: SIM115

    def note(self, noted: tuple[str, int | None, Factors | None, Any]) -> None:
        """(name, first row, factors, units) of a merged piece, (name, None, None, old bytes) of a replaced tensor."""
        name, row, factors, kept = noted
        at = len(self._pieces)
        if row is None or factors is None:
            self._pieces.append([name, None])
            return self._add(f"{at}.old", kept)
        if self._right is not factors.right:
            self._right = factors.right
            self._add(f"{at}.right", factors.right)
        first = next(int(key[: -len(".right")]) for key, *_ in reversed(self._tensors) if key.endswith(".right"))
        self._pieces.append([name, row, len(factors.left), first, kept.height, kept.width])
        parts = (factors.left, *kept.tensors)
        for part, tensor in zip(_PARTS, parts, strict=False):
            self._add(f"{at}.{part}", tensor)
        if factors.scales is not None:
            self._add(f"{at}.scale", factors.scales.rows[0])

    def finish(self, old_header: bytes, merged_header: bytes) -> None:
        """Write and sync the file; not yet under its last name."""
        metadata = {
            _OLD: old_header[8:].decode(),
            _MERGED: hashlib.sha256(merged_header).hexdigest(),
            _PIECES: json.dumps(self._pieces),
        }
        header = header_bytes(self._tensors, metadata)
        with open(self._path, "wb", buffering=0) as file:
            write_all(file, header)
            size = self._file.tell()
            write_pieces(self._path, self._file.fileno(), file.fileno(), len(header), [Piece(0, size)], lambda _: None)
            os.fsync(file.fileno())
        self._file.close()
        os.unlink(f"{self._path}.data")

    def _add(self, key: str, tensor: Tensor) -> None:
        self._tensors.append((key, tensor.dtype, tuple(tensor.shape)))
        write_all(self._file, tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def old_header(record: Shard) -> bytes:
    """The shard's header before the merge."""
    raw = record.header.metadata.get(_OLD)
    if raw is None:
        raise AdapterError(record.path, _OLD, "the header of the shard before the merge", "none")
    return len(raw.encode()).to_bytes(8, "little") + raw.encode()


def unmerge_pieces(merged: Shard, record: Shard, file: int) -> Iterator[Piece]:
    """The pieces of a merged shard that give the old one. ``file``: the open file of the record.

    Raises AdapterError where the record is not of this shard, or is damaged; a piece whose weights are not those of
    the merge raises RuntimeError with the file and the tensor.
    """
    if record.header.metadata.get(_MERGED) != hashlib.sha256(merged.header.raw).hexdigest():
        raise AdapterError(record.path, _MERGED, f"the record of {merged.path!r}", "the record of another file")
    by_name: dict[str, list[tuple[int, list[Any]]]] = {}
    try:
        for at, piece in enumerate(json.loads(record.header.metadata[_PIECES])):
            by_name.setdefault(piece[0], []).append((at, piece))
        old = parse_json(record.path, old_header(record)[8:])
        old.pop(METADATA, None)
        order = sorted(old, key=lambda name: old[name]["data_offsets"])
        for name in order:
            yield from _old_tensor(merged, record, file, name, by_name.get(name, []))
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise AdapterError(record.path, None, "a whole record of a merge", f"{type(error).__name__}: {error}") from None


def _old_tensor(
    merged: Shard, record: Shard, file: int, name: str, pieces: list[tuple[int, list[Any]]]
) -> Iterator[Piece]:
    entry = merged.header.entries[name]
    begin, end = merged.data + entry.begin, merged.data + entry.end
    for at, (_, row, *rest) in pieces:
        if row is None:
            held = record.header.entries[f"{at}.old"]
            yield Piece(begin, 0, _held(record, file, held), held.end - held.begin)
            begin = end
            continue
        rows, right, height, width = rest
        row_bytes = entry.shape[-1] * entry.dtype.itemsize
        first = merged.data + entry.begin + row * row_bytes
        yield Piece(begin, first - begin)
        work = _work(f"{merged.path}: {name}", record, file, entry, at, right, height, width)
        yield Piece(first, rows * row_bytes, work, rows * row_bytes)
        begin = first + rows * row_bytes
    yield Piece(begin, end - begin)


def _held(record: Shard, file: int, entry: TensorEntry) -> Any:
    return lambda _: (read_bytes(record.path, file, record.data + entry.begin, entry.end - entry.begin), None)


def _work(
    where: str, record: Shard, file: int, entry: TensorEntry, at: int, right: int, height: int, width: int
) -> Any:
    def tensor(key: str) -> Tensor | None:
        held = record.header.entries.get(key)
        if held is None:
            return None
        return read_tensor(record.path, file, record.data, held)

    def work(data: Tensor) -> tuple[Tensor, None]:
        left, notes, corrections, copy = (tensor(f"{at}.{part}") for part in _PARTS)
        other = tensor(f"{right}.right")
        if left is None or other is None or notes is None or corrections is None:
            raise AdapterError(record.path, f"{at}", "factors, checksums and corrections", "not all of them")
        units, scale = Units(height, width, notes, corrections, copy), tensor(f"{at}.scale")
        scales = None if scale is None else Scales.of_rows(scale, entry.shape[-1])
        try:
            rows = data.view(entry.dtype).view(-1, entry.shape[-1])
            restoring(rows, Factors(left, other, scales), units).alone(UNMERGE)
        except RuntimeError as error:
            raise RuntimeError(f"{where}: {str(error).removeprefix('weight: ')}") from None
        return data, None

    return work
