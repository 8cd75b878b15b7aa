"""A file that one process works on at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Optional

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)  # what systems call a lock that another process has
_PID = 32  # bytes at most
_FAR = 1 << 30  # where Windows locks a byte: those that it locks cannot be read


class InUse(Exception):
    """Another process has the file; `pid` is its number, if that can be known."""

    def __init__(self, pid: Optional[int]) -> None:
        super().__init__(f"process {pid}" if pid else "another process")
        self.pid = pid


@contextlib.contextmanager
def holding(path: str) -> Iterator[None]:
    """Within the block no other process gets beyond this line with the same path.

    The lock is on a file beside it, `path` with `.lock` at its end, so that the file itself can be replaced. The system ends it
    with the process, however that ends; a file that is left behind by a crash locks nothing.

    Raises:
        InUse: another process has it.
        OSError: there can be no lock: the folder cannot be written to, or its system knows of none.
    """
    name = os.path.realpath(path) + ".lock"
    handle = _taken(name)
    try:
        yield
    finally:
        if sys.platform == "win32":  # which removes no open file
            os.close(handle)
        with contextlib.suppress(OSError):
            os.unlink(name)
        if sys.platform != "win32":  # only now: nobody must get a lock on a file that is about to go
            os.close(handle)


def _taken(name: str) -> int:
    """An open, locked file of that name."""
    while True:
        handle = os.open(name, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            _lock(handle)
            if _is_at(handle, name):
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                return handle
        except OSError as error:
            pid = _pid(handle)
            os.close(handle)
            if error.errno in _TAKEN:
                raise InUse(pid) from None
            raise
        os.close(handle)  # who had it has removed it in between


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, _FAR, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(handle: int, name: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(name))
    except FileNotFoundError:
        return False


def _pid(handle: int) -> Optional[int]:
    with contextlib.suppress(OSError, ValueError):
        os.lseek(handle, 0, os.SEEK_SET)
        return int(os.read(handle, _PID))
    return None
