"""Safetensors files, read strictly; those of adapters are written with a digest.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length n; n bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}``; the tensors, offsets counted
from the end of the header. Files are read into memory, never mapped: a later change of a mapped file would
change the weights, and a truncated one would kill the process.

A file written here carries SHA-256 of the whole file (with zeros in place of the digest) under the metadata key
``fused_lora.sha256``. It detects damage. It is not a signature.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from fused_lora.adapters.errors import AdapterError

MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 5  # of a convolution over volumes
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# of counters in modules that are saved whole, as BatchNorm's
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
KNOWN = {**DTYPES, **_INTEGERS}
# of a whole model: what is not known here by its size cannot be carried from one file to another
EVERY = {
    **KNOWN,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
NAMES = {dtype: name for name, dtype in EVERY.items()}
METADATA = "__metadata__"
_DIGEST = "fused_lora.sha256"
_BASE = "fused_lora.quantised_base"
_BLANK = "0" * 64
_SHOWN = 48  # bytes of a file that is something else
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
POINTER = "a pointer of Git LFS to the file; `git lfs pull` in the clone fetches what it points to"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header: dtype, shape and its bytes [begin, end) in the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors in the order of their bytes, the header's raw bytes and the digest, if any.

    base: how layers of the base model were quantised when the file was written, by path and topic.
    """

    entries: dict[str, TensorEntry]
    raw: bytes
    digest: str | None
    base: dict[str, dict[str, str]]
    metadata: dict[str, str]


@contextlib.contextmanager
def open_regular(
    path: str, max_bytes: int, dir_fd: int | None = None, inside: str | None = None
) -> Iterator[tuple[io.FileIO, int]]:
    """(unbuffered file, size) of a regular file of at most ``max_bytes``, looked up in ``dir_fd`` if given.

    A link to a regular file is followed (hub caches are made of links); a FIFO, device or directory is refused
    without blocking on it. With ``inside``, a folder, what was opened must lie in it once all links are followed.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        fd = os.open(path if dir_fd is None else os.path.basename(path), flags, dir_fd=dir_fd)
    except (OSError, ValueError) as error:
        raise AdapterError(path, None, "a readable regular file", _reason(error)) from None
    try:
        info = os.fstat(fd)
        if stat.S_ISDIR(info.st_mode):
            raise AdapterError(path, None, "a regular file", "a folder")
        if not stat.S_ISREG(info.st_mode):
            raise AdapterError(path, None, "a regular file", f"a file of mode {stat.filemode(info.st_mode)}")
        if inside is not None and not _lies_in(fd, path, inside):
            raise AdapterError(path, None, "a file inside the folder that adapters may come from", "a link out of it")
        if info.st_size > max_bytes:
            raise AdapterError(path, None, f"at most {max_bytes} bytes", f"{info.st_size} bytes")
        yield io.FileIO(fd, "r", closefd=False), info.st_size
    except OSError as error:
        if error.filename is not None:  # of another file, which the caller opened meanwhile
            raise
        raise AdapterError(path, None, "a readable regular file", _reason(error)) from None
    finally:
        os.close(fd)


def state_of(file: int) -> tuple[int, int]:
    """(size, time of the last change in nanoseconds) of an open file."""
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns


def check_unchanged(path: str, file: int, state: tuple[int, int]) -> None:
    """AdapterError unless an open file is as it was. Many programs write over a file instead of replacing it."""
    if state_of(file) != state:
        raise AdapterError(path, None, "a file that stays as it is", "another size or time of change")


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _lies_in(fd: int, path: str, folder: str) -> bool:
    """Whether the open file ``fd``, found at ``path``, lies in ``folder``; asked of the file itself where the system
    tells, so that no link that is changed meanwhile can lie."""
    try:
        real = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        real = os.path.realpath(path)
    return real.startswith(os.path.join(os.path.realpath(folder), ""))


def read_exactly(path: str, file: io.FileIO, buffer: Any) -> None:
    """Fill ``buffer`` from ``file``."""
    view = memoryview(buffer)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise AdapterError(path, None, "a file that keeps its size", f"an end {len(view)} bytes early")
        view = view[count:]


def parse_json(path: str, raw: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN, Infinity or half a surrogate pair."""
    if raw.startswith(LFS_POINTER):
        raise AdapterError(path, None, "a JSON object", POINTER)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for name, value in pairs:
            if name in entries:
                raise AdapterError(path, name, "one entry", "duplicate entries")
            entries[name] = value
        return entries

    def no_constant(text: str) -> NoReturn:
        raise AdapterError(path, None, "finite numbers", text)

    def finite(text: str) -> float:
        return value if math.isfinite(value := float(text)) else no_constant(text)

    try:
        text = raw.decode("utf-8")
        parsed = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
        if "\\u" in text:  # an escape can spell what is no text; nobody else reads such a file
            json.dumps(parsed, ensure_ascii=False).encode()
    except AdapterError:
        raise
    except (ValueError, RecursionError) as error:
        raise AdapterError(path, None, "valid JSON in UTF-8", f"{type(error).__name__}: {error}") from None
    if not isinstance(parsed, dict):
        raise AdapterError(path, None, "a JSON object", f"a JSON {type(parsed).__name__}")
    return parsed


def _other_kind(start: bytes) -> str | None:
    """What a file that begins so is, in words; None where it may be a damaged safetensors file."""
    if not start:
        return "an empty file (an incomplete download or copy?)"
    if start.startswith(LFS_POINTER):
        return POINTER
    if start.startswith((b"PK", b"\x80")):  # torch.save's zip archive, and pickle before it
        return "a pickle, which is not read; save it with safetensors"
    if all(32 <= byte < 127 or byte in b"\r\n\t" for byte in start):
        return f"a text, of which the beginning is {start.decode()!r} (a page in place of a download?)"
    return None


def read_header(path: str, file: io.FileIO, size: int, dtypes: Mapping[str, torch.dtype] = KNOWN) -> Header:
    """Read and check the header of a safetensors file of ``size`` bytes: every byte of the data belongs to exactly
    one tensor whose dtype, one of ``dtypes``, and shape account for it. With ``EVERY`` tensors may be empty."""
    prefix = bytearray(min(size, 8))
    read_exactly(path, file, prefix)
    (length,) = struct.unpack("<Q", prefix.ljust(8))
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        start = bytearray(min(size, _SHOWN))
        file.seek(0)
        read_exactly(path, file, start)
        if (found := _other_kind(bytes(start))) is not None:
            raise AdapterError(path, None, "a safetensors file", found)
        limit = f"at most {min(MAX_HEADER_BYTES, size - 8)} bytes in a file of {size} bytes"
        raise AdapterError(path, "header length", limit, f"{length} bytes")
    raw = bytearray(length)
    read_exactly(path, file, raw)
    parsed = parse_json(path, bytes(raw))
    metadata = parsed.pop(METADATA, {})
    digest, base = _digest_of(path, metadata), _base_of(path, metadata.get(_BASE, "{}"))
    entries = {name: _entry(path, name, value, dtypes) for name, value in parsed.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for name, entry in entries.items():
        if entry.begin != position:
            raise AdapterError(path, name, f"data_offsets that begin at {position}", entry.begin)
        position = entry.end
    if position != size - 8 - length:
        cut = " (an incomplete download or copy?)" * (position > size - 8 - length)
        raise AdapterError(path, "data", f"{position} bytes of tensors", f"{size - 8 - length} bytes{cut}")
    return Header(entries, bytes(prefix + raw), digest, base, metadata)


def read_tensors(path: str, file: io.FileIO, header: Header) -> dict[str, torch.Tensor]:
    """The tensors behind ``header`` in fresh CPU memory, checked against the digest and for NaN and Inf."""
    return dict(each_tensor(path, file, header))


def each_tensor(path: str, file: io.FileIO, header: Header) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors behind ``header`` one by one. What is wrong with them is raised after the last one."""
    blank = header.raw.replace(header.digest.encode(), _BLANK.encode(), 1) if header.digest else b""
    digest = hashlib.sha256(blank)
    broken = None
    for name, entry in header.entries.items():
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
        read_exactly(path, file, data.numpy())
        if header.digest:
            digest.update(data.numpy().data)
        tensor = data.view(entry.dtype).view(entry.shape)
        if broken is None and not torch.isfinite(tensor).all():
            broken = name
        yield name, tensor
    if header.digest and digest.hexdigest() != header.digest:
        raise AdapterError(path, _DIGEST, header.digest, f"{digest.hexdigest()}: the file is damaged")
    if broken is not None:
        raise AdapterError(path, broken, "finite values", "NaN or Inf")


def write_tensors(
    file: io.FileIO, tensors: dict[str, torch.Tensor], base: dict[str, dict[str, str]] | None = None
) -> None:
    """Write ``tensors`` (of ``KNOWN`` dtypes, on any device) as a safetensors file with a digest.

    base: as of a :class:`Header`.
    """
    # widest dtype first keeps every tensor aligned to its element size
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries = [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in order]
    write_each(file, entries, (tensors[name] for name in order), base)


def write_each(
    file: io.FileIO,
    entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    tensors: Iterable[torch.Tensor],
    base: dict[str, dict[str, str]] | None = None,
) -> None:
    """The same of tensors that come one by one, in the order of their (name, dtype, shape) in ``entries``."""
    metadata = {"format": "pt", _DIGEST: _BLANK}
    if base:
        metadata[_BASE] = json.dumps(base)
    header = header_bytes(entries, metadata)
    digest = hashlib.sha256(header)
    write_all(file, header)
    for tensor in tensors:
        # of a copy: torch never resizes a storage again that numpy has seen, and FSDP1 resizes
        data = tensor.detach().cpu().reshape(-1).clone().view(torch.uint8).numpy().data
        digest.update(data)
        write_all(file, data)
    file.seek(header.index(_BLANK.encode()))
    write_all(file, digest.hexdigest().encode())


def header_bytes(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file with these (name, dtype, shape), their data in this order."""
    entries: dict[str, Any] = {METADATA: metadata} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    """Write all of ``data`` to an unbuffered file."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def _digest_of(path: str, metadata: Any) -> str | None:
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise AdapterError(path, METADATA, "an object of strings", metadata)
    digest = metadata.get(_DIGEST)
    if digest is not None and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
        raise AdapterError(path, _DIGEST, "64 hexadecimal digits", digest)
    return digest


def _base_of(path: str, text: str) -> dict[str, dict[str, str]]:
    try:
        found = parse_json(path, text.encode("utf-8", "surrogatepass"))
    except AdapterError as error:
        raise AdapterError(path, _BASE, error.expected, error.found) from None
    for topics in found.values():
        if not (isinstance(topics, dict) and all(isinstance(value, str) for value in topics.values())):
            raise AdapterError(path, _BASE, "an object of objects of strings", topics)
    return found


def _entry(path: str, name: str, value: Any, dtypes: Mapping[str, torch.dtype]) -> TensorEntry:
    if not (isinstance(value, dict) and set(value) == {"dtype", "shape", "data_offsets"}):
        raise AdapterError(path, name, "an entry with dtype, shape and data_offsets", value)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (isinstance(dtype, str) and dtype in dtypes):
        raise AdapterError(path, name, f"dtype {', '.join(dtypes)}", dtype)
    if not (_integers(shape) and len(shape) <= MAX_DIMENSIONS and min(shape, default=1) >= (dtypes is not EVERY)):
        empty = " (saved by one of several processes that share the weights?)" * (_integers(shape) and 0 in shape)
        raise AdapterError(path, name, f"at most {MAX_DIMENSIONS} positive sizes as shape", f"{shape}{empty}")
    if not (_integers(offsets) and len(offsets) == 2 and 0 <= offsets[0] <= offsets[1]):
        raise AdapterError(path, name, "two ascending data_offsets", offsets)
    if math.prod(shape) * dtypes[dtype].itemsize != offsets[1] - offsets[0]:
        raise AdapterError(path, name, f"bytes for {dtype} {shape}", f"data_offsets {offsets}")
    return TensorEntry(dtypes[dtype], tuple(shape), *offsets)


def _integers(values: Any) -> bool:
    return isinstance(values, list) and {*map(type, values)} <= {int}  # of JSON; a bool is no integer
