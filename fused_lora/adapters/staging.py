"""Replace a directory as a whole: a reader sees all old files or all new ones.

The new content is written to a hidden directory beside the target, synced to disk, and exchanged with the target in one
step (``renameat2(RENAME_EXCHANGE)``, Linux 3.15+ on ext4, xfs, btrfs, tmpfs, overlayfs and others). Other systems get
two renames. A process that is killed between them leaves no target, never a mixed one, and the next save restores the
old one first. Other entries of the target are kept, as hard links or as copies. Savers under one parent directory wait
for each other. The next saver removes what a killed one left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_NO_LINK = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


def replace_directory(directory: str, write: Callable[[str], Sequence[str]]) -> None:
    """Replace ``directory`` by what ``write(stage)`` puts into the empty directory ``stage``, in one step.

    Args:
        directory: the target, created with its parents if missing; a link to a directory is followed.
        write: writes regular files into the directory it is given and returns their names. Entries of the target
            with other names are kept.

    Raises:
        ValueError: the target is a file, the root, or the current directory or above it. The process would be left in
            a deleted directory.
        OSError: from the file system. The target is then as before.
    """
    target = os.path.realpath(directory)
    parent, name = os.path.split(target)
    if os.path.lexists(target) and not os.path.isdir(target):
        raise ValueError(f"directory must be a directory, got the file {directory!r}")
    if not name or holds_current(target):
        raise ValueError(f"directory must not be the root, the current directory or above it, got {directory!r}")
    if os.path.isdir(target):
        check_writable(target)
    os.makedirs(parent, exist_ok=True)
    with _locked(parent) as alone:
        if alone:
            _clean(parent, name)
        stage = os.path.join(parent, f".{_tag(name)}.{secrets.token_hex(8)}.fused_lora_tmp")
        try:
            os.mkdir(stage)
            for file in write(stage):
                sync(os.path.join(stage, file))
            exists = os.path.isdir(target)
            if exists:
                link_tree(target, stage)
                shutil.copymode(target, stage)
            sync(stage)
            put_in_place(stage, target, exists)
        except BaseException as error:
            shutil.rmtree(stage, ignore_errors=True)
            # the stage's name says nothing to the user; a full disk has no name at all
            if isinstance(error, OSError) and error.errno and str(error.filename or stage).startswith(stage):
                raise OSError(error.errno, error.strerror, directory) from error
            raise
        sync(parent)
        if exists:
            # what appeared in the old directory since it was linked
            move_missing(stage, target)
            shutil.rmtree(stage)


def holds_current(folder: str) -> bool:
    """Whether the current directory is ``folder``, a real path, or lies in it."""
    try:
        current = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # it was deleted
        return False
    return os.path.commonpath([folder, current]) == folder


def check_writable(folder: str, where: str = "") -> None:
    """PermissionError, which begins with ``where``, unless entries of a folder may be made and removed."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{where}no permission to write in {folder!r}")


def _tag(name: str) -> str:
    """``name``, or a digest of one so long that a longer name might not fit."""
    raw = os.fsencode(name)
    return name if len(raw) <= 200 else hashlib.sha256(raw).hexdigest()


def put_in_place(stage: str, target: str, exists: bool) -> None:
    """Give ``stage`` the name ``target``; afterwards ``stage`` names the old directory, if there was one."""
    if not exists:
        os.rename(stage, target)
    elif not exchange(stage, target):
        old = f"{stage.removesuffix('tmp')}old"
        try:
            os.rename(target, old)
            os.rename(stage, target)
        except BaseException:  # an interrupt, too
            if not os.path.lexists(target):
                os.rename(old, target)
            raise
        os.rename(old, stage)


def exchange(a: str, b: str) -> bool:
    """Swap the names of two directories in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), b)


def _clean(parent: str, name: str) -> None:
    """Remove what killed savers of this target left; bring the old directory back if one died between two renames."""
    left = re.compile(rf"\.{re.escape(_tag(name))}\.[0-9a-f]{{16}}\.fused_lora_(tmp|old)")
    for entry in sorted(os.listdir(parent)):
        if match := left.fullmatch(entry):
            path = os.path.join(parent, entry)
            if match[1] == "old" and not os.path.lexists(os.path.join(parent, name)):
                os.rename(path, os.path.join(parent, name))
            else:
                shutil.rmtree(path)


@contextlib.contextmanager
def _locked(parent: str) -> Iterator[bool]:
    """Hold the lock of savers under ``parent``; False where the system has no such lock."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    fd = os.open(parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            alone = True
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
            alone = False
        try:
            yield alone
        finally:
            if alone:
                # closing is not enough: a process forked meanwhile holds the file open
                fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def link_tree(source: str, destination: str) -> None:
    """Give the entries of ``source`` that ``destination`` has not, in its folders too, a place there: hard links, else
    copies."""
    for entry in os.scandir(source):
        new = os.path.join(destination, entry.name)
        if entry.is_dir(follow_symlinks=False) and (os.path.isdir(new) or not os.path.lexists(new)):
            os.makedirs(new, exist_ok=True)
            link_tree(entry.path, new)
            shutil.copystat(entry.path, new)
            sync(new)
            continue
        if os.path.lexists(new):
            continue
        try:
            os.link(entry.path, new, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            shutil.copy2(entry.path, new, follow_symlinks=False)


def move_missing(source: str, destination: str) -> None:
    """Move the entries of ``source`` that ``destination`` has not there, in its folders too."""
    for entry in os.scandir(source):
        new = os.path.join(destination, entry.name)
        if not os.path.lexists(new):
            os.rename(entry.path, new)
        elif entry.is_dir(follow_symlinks=False) and os.path.isdir(new):
            move_missing(entry.path, new)


def sync(path: str) -> None:
    """fsync a file or directory."""
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows cannot open a directory
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
