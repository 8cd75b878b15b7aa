"""The fingerprint of a base model: FNV-1a (64 bits) over its norms, as docs/sidecar.md defines it."""

from __future__ import annotations

from collections.abc import Iterable

_OFFSET, _PRIME, _MASK = 0xCBF29CE484222325, 0x100000001B3, 0xFFFFFFFFFFFFFFFF


def fnv1a64(data: bytes, state: int = _OFFSET) -> int:
    """FNV-1a over bytes, continuing from `state`. About 0.1 s for a MiB; models have a few MiB of norms at most."""
    for byte in data:
        state = ((state ^ byte) * _PRIME) & _MASK
    return state


def norms_fingerprint(norms: Iterable[tuple[str, bytes]]) -> str:
    """16 hexadecimal digits over (name, stored bytes) of norms in any order: one hash runs through all of them."""
    state = _OFFSET
    for name, data in sorted((name.encode("utf-8", "surrogateescape"), data) for name, data in norms):
        state = fnv1a64(data, fnv1a64(name + b"\0", state))
    return f"{state:016x}"
