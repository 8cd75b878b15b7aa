"""Names and values out of files of unknown origin, made fit for a message or refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import ConvertError

MAX_TEXT = 4096


def quote(text: str, limit: int = 80) -> str:
    """The text in quotes, with control characters escaped and no longer than `limit`."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def show(value: Any) -> str:
    """A value for a message. Containers are only named: theirs could be endless, and nested without end."""
    if isinstance(value, str):
        return quote(value)
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**18 else "an integer of more than 18 digits"
    return f"a {type(value).__name__}"


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first names, quoted, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(quote(name) for name in names[:limit]) + more


def check_text(what: str, value: Any) -> str:
    """Returns a string that may go into a file.

    Raises:
        ConvertError: it is not a string, is too long, or has characters that are not printable.
    """
    if not isinstance(value, str):
        raise ConvertError(f"{what} must be a text, found {show(value)}")
    if len(value) > MAX_TEXT:
        raise ConvertError(f"{what} has {len(value)} characters, more than {MAX_TEXT}")
    if not value.isprintable():  # false for surrogates as well, so what is left can be encoded
        raise ConvertError(f"{what} has control characters: {quote(value)}")
    return value
