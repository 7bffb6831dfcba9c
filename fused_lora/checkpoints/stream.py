"""Write one file from pieces of another: several threads read, compute and write, each a piece at a time.

Bytes that stay as they are go from file to file inside the kernel where the system can. So memory holds a few pieces,
whatever the size of the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.adapters.errors import AdapterError
from fused_lora.adapters.tensorfile import TensorEntry
from fused_lora.ops import native

PIECE_BYTES = 4 << 20  # of a piece that is computed
_COPIED_BYTES = 64 << 20
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)


class Piece(NamedTuple):
    """Bytes [begin, begin + size) of the source, which are copied as they are.

    With ``work`` its result is written instead: from uint8 [size] to (uint8 [out_size], what to note), called in any
    order by any thread. ``note`` gets what to note, in the order of the pieces.
    """

    begin: int
    size: int
    work: Callable[[Tensor], tuple[Tensor, Any]] | None = None
    out_size: int = 0
    note: Callable[[Any], Any] | None = None


def write_pieces(
    source_path: str,
    source: int,
    target: int,
    at: int,
    pieces: Iterable[Piece],
    progress: Callable[[int], Any],
    workers: int = 1,
) -> None:
    """Write what the pieces give, one behind the other, to the file ``target`` from byte ``at`` on.

    Args:
        source, target: descriptors. progress: called with the number of bytes of the source that are done.
        workers: how many pieces are worked on at a time, each by one thread.

    Raises AdapterError where the source ends too soon, and what ``work`` and the file system raise.
    """
    own = threading.local()

    def do(piece: Piece, at: int) -> Any:
        if piece.work is None:
            return _copy(source_path, source, target, piece.begin, piece.size, at)
        if piece.size > PIECE_BYTES:
            data = torch.empty(piece.size, dtype=torch.uint8, device="cpu")
        else:
            if not hasattr(own, "buffer"):
                own.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, device="cpu")
            data = own.buffer[: piece.size]
        fill(source_path, source, piece.begin, data)
        result, noted = piece.work(data)
        _write(target, result, at)
        return noted

    def end(piece: Piece, future: Future) -> None:
        noted = future.result()
        if piece.note is not None:
            piece.note(noted)
        progress(piece.size)

    running: deque[tuple[Piece, Future]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for piece in _short(pieces):
                running.append((piece, pool.submit(do, piece, at)))
                at += piece.size if piece.work is None else piece.out_size
                if len(running) > 2 * workers:
                    end(*running.popleft())
            while running:
                end(*running.popleft())
        finally:
            for _, future in running:
                future.cancel()


@contextlib.contextmanager
def single_threads() -> Iterator[int]:
    """torch in one thread inside; gives how many it had, to work on as many pieces. Threads that wait for each other
    inside a piece would idle."""
    workers = torch.get_num_threads()
    with native.one_thread():
        yield workers


def read_bytes(path: str, file: int, begin: int, size: int) -> Tensor:
    """uint8 [size], bytes of an open file from ``begin`` on."""
    data = torch.empty(size, dtype=torch.uint8, device="cpu")
    fill(path, file, begin, data)
    return data


def read_tensor(path: str, file: int, data: int, entry: TensorEntry) -> Tensor:
    """A tensor of an open safetensors file, whose tensors begin at byte ``data``."""
    return read_bytes(path, file, data + entry.begin, entry.end - entry.begin).view(entry.dtype).view(entry.shape)


def fill(path: str, file: int, begin: int, data: Tensor) -> None:
    """The same into ``data``."""
    view = memoryview(data.numpy().data)
    while len(view):
        count = os.preadv(file, [view], begin)
        if not count:
            raise AdapterError(path, None, "a file that keeps its size", f"an end {len(view)} bytes early")
        view, begin = view[count:], begin + count


def _short(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Neighbours that are copied as one, in pieces short enough for a progress bar."""
    begin = end = 0
    for piece in pieces:
        if piece.work is None and piece.begin == end:
            end += piece.size
            continue
        yield from _parts(begin, end)
        begin, end = (piece.begin, piece.begin + piece.size) if piece.work is None else (0, 0)
        if piece.work is not None:
            yield piece
    yield from _parts(begin, end)


def _parts(begin: int, end: int) -> Iterator[Piece]:
    for first in range(begin, end, _COPIED_BYTES):
        yield Piece(first, min(_COPIED_BYTES, end - first))


def _write(target: int, data: Tensor, at: int) -> None:
    view = memoryview(data.numpy().data)
    while len(view):
        count = os.pwrite(target, view, at)
        view, at = view[count:], at + count


def _copy(path: str, source: int, target: int, begin: int, size: int, at: int) -> None:
    while size and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source, target, size, begin, at)
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
            break
        if not count:
            break  # at the end of the file, or a file system that copies nothing
        begin, size, at = begin + count, size - count, at + count
    while size:
        part = min(size, PIECE_BYTES)
        _write(target, read_bytes(path, source, begin, part), at)
        begin, size, at = begin + part, size - part, at + part
