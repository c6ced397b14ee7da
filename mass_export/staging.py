"""A directory is written aside and takes its name in one step: whoever looks sees the old one or the new one.

On Linux the two are exchanged by one system call, so that even a kill leaves a whole directory under the name. Where
the file system or the system cannot, the old one is first renamed to `.NAME.previous`; a kill between the two renames
leaves it there, and the next call of `staging` puts it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_NO_LOCKS = (*_NOT_SUPPORTED, errno.ENOLCK, errno.EBADF)
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """An empty directory beside `out`, of this process alone; it is removed in the end.

    What killed processes left of theirs is removed, too. It is told from one in use by a lock, which ends with its
    process.

    Raises:
        OSError: it cannot be made.
    """
    prefix = f".{out.name}.staging-"
    with _locked(out.parent):
        _recover(out)
        for left in out.parent.glob(f"{prefix}*"):
            with contextlib.suppress(OSError), _locked(left, wait=False) as held:
                if held:
                    shutil.rmtree(left, ignore_errors=True)
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        lock = contextlib.ExitStack()
        lock.enter_context(_locked(directory))
    with lock:
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def replace_directory(staged: Path, out: Path) -> None:
    """Give `staged` the name `out`; what had it before is then under the name `staged`, if there was anything.

    Everything in `staged` is brought to the disk first.

    Raises:
        OSError: it is not possible; `out` is what it was.
    """
    for path in (*staged.iterdir(), staged):
        _sync(path)
    with _locked(out.parent):
        try:
            staged.rename(out)  # out is not there, or empty
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
            if not _exchange(staged, out):
                _replace_in_two_steps(staged, out)
    _sync(out.parent)


def previous_name(out: Path) -> Path:
    """Where the old directory is for a moment, on systems that cannot exchange two."""
    return out.with_name(f".{out.name}.previous")


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names at once; False where that is not supported."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library without it
        return False
    names = (_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b))
    if renameat2(*names, _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(b))


def _replace_in_two_steps(staged: Path, out: Path) -> None:
    previous = previous_name(out)
    out.rename(previous)
    try:
        staged.rename(out)
    except BaseException:
        previous.rename(out)
        raise
    previous.rename(staged)


def _recover(out: Path) -> None:
    """After a kill between the two renames: the old directory gets its name back."""
    previous = previous_name(out)
    if previous.is_dir():
        if out.exists():  # the new one had its name already
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(out)


@contextlib.contextmanager
def _locked(directory: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a directory's lock, which a dead process cannot hold; False where there are no such locks.

    Raises:
        BlockingIOError: another process holds it, and `wait` is not set.
    """
    if sys.platform == "win32":
        yield False
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        held = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            held = False
        yield held
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
