"""What the standard streams can show: characters, and the escape sequences of terminals."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TextIO

_VIRTUAL_TERMINAL = 4  # ENABLE_VIRTUAL_TERMINAL_PROCESSING


def make_forgiving() -> None:
    """Standard output shows `?` for what its encoding lacks (an answer on a console with code page 1252, a pipe with
    LC_ALL=C) instead of raising. Standard error does so by itself.
    """
    with contextlib.suppress(AttributeError, ValueError):  # replaced by something else, or closed
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def shows_escapes(stream: TextIO) -> bool:
    """Whether a person sees this stream on a terminal that understands escape sequences."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    return _enable_escapes(stream) if sys.platform == "win32" else True


def can_show(text: str, stream: TextIO) -> bool:
    """Whether the encoding of a stream has all of these characters."""
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def reader_left(error: BaseException, system: str = os.name) -> bool:
    """Whether writing failed because the reader has left (`indexmem ... | head`): to Windows, an invalid argument."""
    if isinstance(error, BrokenPipeError):
        return True
    return system == "nt" and isinstance(error, OSError) and error.errno == errno.EINVAL and error.filename is None


def _enable_escapes(stream: TextIO) -> bool:
    """Consoles of Windows understand escape sequences on request, since Windows 10."""
    import ctypes
    import msvcrt

    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined, unused-ignore]
    try:
        console = ctypes.c_void_p(msvcrt.get_osfhandle(stream.fileno()))  # type: ignore[attr-defined, unused-ignore]
    except OSError:
        return False
    mode = ctypes.c_uint32()
    if not kernel.GetConsoleMode(console, ctypes.byref(mode)):
        return False
    return bool(kernel.SetConsoleMode(console, ctypes.c_uint32(mode.value | _VIRTUAL_TERMINAL)))
