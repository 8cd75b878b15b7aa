"""Reading a text that a person named."""

from __future__ import annotations

import os
import sys
from typing import Union

from ..errors import IndexMemError


def read_text(path: Union[str, os.PathLike[str]]) -> str:
    """The text of a UTF-8 file.

    Raises:
        IndexMemError: it cannot be read, or is not text.
    """
    name = os.path.expanduser(os.fspath(path))
    try:
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


def _decode(name: str, data: bytes) -> str:
    if b"\0" in data:
        raise IndexMemError(f"{name} is not a text file: it has zero bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IndexMemError(
            f"{name} is not UTF-8 text (byte {error.start}): convert it first, for example with iconv -t UTF-8"
        ) from None
