"""Reading a text file that a person named."""

from __future__ import annotations

import os
from typing import Union

from .errors import IndexMemError


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
    if b"\0" in data:
        raise IndexMemError(f"{name} is not a text file: it has zero bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IndexMemError(
            f"{name} is not UTF-8 text (byte {error.start}): convert it first, for example with iconv -t UTF-8"
        ) from None
