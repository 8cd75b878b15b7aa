"""What the standard streams can show, and when nobody reads them any more."""

from __future__ import annotations

import contextlib
import errno
import os
import sys


def make_complete() -> None:
    """Where a standard stream is closed (`indexmem ... <&-`, a service without one), there is an empty one in its place: else the
    next file that is opened would be it, and get what the library says to standard error.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def make_forgiving() -> None:
    """Standard output shows `?` for what its encoding lacks (an answer on a console with code page 1252, a pipe with
    LC_ALL=C) instead of raising. Standard error does so by itself.
    """
    with contextlib.suppress(AttributeError, ValueError):  # replaced by something else, or closed
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def reader_left(error: BaseException, system: str = os.name) -> bool:
    """Whether writing failed because the reader has left (`indexmem ... | head`): to Windows, an invalid argument."""
    if isinstance(error, BrokenPipeError):
        return True
    return system == "nt" and isinstance(error, OSError) and error.errno == errno.EINVAL and error.filename is None
