"""Reading a text that a person named."""

from __future__ import annotations

import os
import stat
import sys
from typing import Union

from ..errors import IndexMemError


def read_text(path: Union[str, os.PathLike[str]], *, pipes: bool = False) -> str:
    """The text of a UTF-8 file.

    Args:
        path: a regular file: others may have no end, or nobody who writes.
        pipes: or a pipe, such as the `<(command)` of shells.

    Raises:
        IndexMemError: it cannot be read, or is not text.
    """
    name = os.path.expanduser(os.fspath(path))
    try:
        mode = os.stat(name).st_mode
        if not stat.S_ISREG(mode) and not (pipes and stat.S_ISFIFO(mode)):
            raise IndexMemError(f"cannot read {name}: expected a regular file, found {_kind(mode)}")
        with open(name, "rb") as file:
            data = file.read()
    except (OSError, ValueError) as error:
        raise IndexMemError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from None
    return _decode(name, data)


def read_standard_input() -> str:
    """The UTF-8 text of standard input, whatever the console's own encoding is.

    Raises:
        IndexMemError: it is not text.
    """
    raw = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if raw is None else _decode("standard input", raw.read()).replace("\r\n", "\n")


def argument_text(option: str, text: str) -> str:
    """A text from the command line. Where the locale is not UTF-8, or the bytes are not, Python leaves marks in it.

    Raises:
        IndexMemError: it is not UTF-8.
    """
    if not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    return _decode(f"the text of {option}", text.encode(sys.getfilesystemencoding(), "surrogateescape"))


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((name for is_one, name in kinds.items() if is_one(mode)), "a device")


def _decode(name: str, data: bytes) -> str:
    if b"\0" in data:
        raise IndexMemError(f"{name} is not a text file: it has zero bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IndexMemError(
            f"{name} is not UTF-8 text (byte {error.start}): convert it first, for example with iconv -t UTF-8"
        ) from None
