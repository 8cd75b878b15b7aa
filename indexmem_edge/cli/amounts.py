"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from ..errors import BudgetError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parsed_bytes(option: str, text: str) -> int:
    """Bytes of `8G`, `8GiB` or `8GB` (the same: powers of 1024), `512M`, `1.5G` or a plain number.

    Raises:
        BudgetError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE | re.ASCII)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found is not None else -1
    if not 0 <= size < 1 << 62:
        raise BudgetError(f"{option} must be an amount of memory such as 8G, 8GiB or 512M, found {text!r}")
    return size
