"""A folder that gets its name when all of it is there; until then it is called ``NAME.partial``.

Its files are written one by one, each synced and renamed when it is whole. A call with the same identity after an
interrupt finds them and goes on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping

from fused_lora.adapters.staging import check_writable, holds_current, link_tree, move_missing, put_in_place, sync
from fused_lora.checkpoints.files import read_text

_MARK = ".fused_lora_partial"  # holds the identity of what is being written
_WRITING = ".writing"


class Output:
    """One folder to come.

    Args:
        argument: its name in messages. target: the folder. identity: what is written into it, as text.
        instead: the target exists and is replaced as a whole at the end.
    """

    def __init__(self, argument: str, target: str, identity: str, instead: bool = False):
        self.target = os.path.realpath(target)
        self.stage = f"{self.target}.partial"
        self._argument, self._identity, self._instead = argument, identity, instead

    def check(self, inputs: Iterable[str]) -> None:
        """Refuse a target that holds something or lies in an input, and a stage of something else.

        Raises FileExistsError, NotADirectoryError, ValueError or PermissionError. Nothing is changed.
        """
        if not self._instead:
            check_new(self._argument, self.target, inputs)
        if os.path.ismount(self.target):
            raise ValueError(f"{self._argument}: {self.target!r} is a mount point; name a folder inside")
        if holds_current(self.target):
            expected = "a folder that is not the current directory or above it, for another will have its name"
            raise ValueError(f"{self._argument}: expected {expected}, got {self.target!r}")
        if [n for n in _list(self.stage) if not _unfinished(n)] and self._found() != self._identity:
            text = (
                f"{self._argument}: {self.stage!r} is what another call left unfinished; delete it or finish that one"
            )
            raise FileExistsError(errno.EEXIST, text)
        for folder in (_existing(os.path.dirname(self.target)), *([self.target] if self._instead else [])):
            check_writable(folder, f"{self._argument}: ")

    def check_space(self, nbytes: int) -> None:
        """OSError unless the disk has room for so many bytes, those of an unfinished call included."""
        found = os.statvfs(_existing(os.path.dirname(self.target)))
        held = sum(os.path.getsize(os.path.join(self.stage, n)) for n in _list(self.stage))
        if found.f_bavail * found.f_frsize + held < nbytes:
            free = found.f_bavail * found.f_frsize
            raise OSError(errno.ENOSPC, f"{self._argument}: {nbytes:,} bytes are needed, the disk has {free:,}")

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Make the stage and hold its lock. On an error a stage without a finished file is removed again."""
        os.makedirs(self.stage, exist_ok=True)
        with _alone(self.stage, self._argument):
            if not os.path.lexists(os.path.join(self.stage, _MARK)):
                self.put(_MARK, self._identity.encode())
            try:
                yield
            except BaseException:
                names = _list(self.stage)
                for name in filter(_unfinished, names):
                    os.unlink(os.path.join(self.stage, name))
                if names and all(name == _MARK or _unfinished(name) for name in names):
                    shutil.rmtree(self.stage)
                raise

    def has(self, name: str) -> bool:
        """Whether the file is finished."""
        return os.path.lexists(os.path.join(self.stage, name))

    def writing(self, name: str) -> str:
        """The path at which a file is written until :meth:`finish_file`."""
        path = os.path.join(self.stage, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path + _WRITING

    def finish_file(self, name: str) -> None:
        """Sync the file and give it its name."""
        path = os.path.join(self.stage, name)
        sync(path + _WRITING)
        os.replace(path + _WRITING, path)

    def put(self, name: str, content: bytes) -> None:
        """A whole small file."""
        with open(self.writing(name), "wb") as file:
            file.write(content)
        self.finish_file(name)

    def finish(self, files: Mapping[str, bytes], source: str, copied: Iterable[str]) -> None:
        """Write the small ``files``, copy those of ``source`` that are none of them, and give the folder its name."""
        for name, content in files.items():
            self.put(name, content)
        for name in copied:
            if name in files:
                continue
            shutil.copyfile(os.path.join(source, name), self.writing(name))
            self.finish_file(name)
        if self._instead:
            link_tree(self.target, self.stage)
            shutil.copymode(self.target, self.stage)
        elif os.path.isdir(self.target):
            os.rmdir(self.target)
        sync(self.stage)
        put_in_place(self.stage, self.target, self._instead)
        os.unlink(os.path.join(self.target, _MARK))
        sync(os.path.dirname(self.target))
        if self._instead:
            move_missing(self.stage, self.target)  # the old folder by now, and what has come into it meanwhile
            shutil.rmtree(self.stage)

    def _found(self) -> str | None:
        mark = os.path.join(self.stage, _MARK)
        return read_text(mark).decode(errors="replace") if os.path.isfile(mark) else None


def check_new(argument: str, folder: str, inputs: Iterable[str]) -> None:
    """FileExistsError unless a folder for output is new or empty, ValueError where it is an input or lies in one."""
    target = os.path.realpath(folder)
    for source in map(os.path.realpath, inputs):
        if os.path.join(target, "").startswith(os.path.join(source, "")):
            raise ValueError(f"{argument}: expected a folder outside {source!r}, got {target!r}")
    if os.path.lexists(target) and (not os.path.isdir(target) or os.listdir(target)):
        text = f"{argument}: expected a new or empty folder, got {target!r}, which holds something"
        raise FileExistsError(errno.EEXIST, text)


def _unfinished(name: str) -> bool:
    return name.endswith((_WRITING, f"{_WRITING}.data"))


def _existing(folder: str) -> str:
    """The folder, or the lowest one above it that is there."""
    while not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise NotADirectoryError(errno.ENOTDIR, f"{folder!r} is no folder")
        folder = os.path.dirname(folder)
    return folder


def _list(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


@contextlib.contextmanager
def _alone(folder: str, argument: str) -> Iterator[None]:
    """Hold the lock of the folder; RuntimeError where another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{argument}: another process is writing {folder!r}") from None
        yield
    finally:
        os.close(fd)
