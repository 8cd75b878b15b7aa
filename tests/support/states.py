"""What the bytes of a state begin with."""

from __future__ import annotations

import struct

N_HEAD = 56  # of a sequence, see indexmem-state.h


def n_header(policy: str, n_layer: int = 2) -> int:
    """What is before the head of the first sequence: llama.cpp's own 8 bytes, magic, version, policy, memory, numbers, the sidecar's
    hash, numbers and sizes of every layer, the number of sequences."""
    return 8 + 4 + 4 + 4 + len(policy) + 4 + len("off") + 5 * 4 + 8 + n_layer * 12 * 4 + 4


N_HEADER = n_header("streaming")


def of_format_6(state: bytes, policy: str, sinks: int, window: int, n_layer: int = 2) -> bytes:
    """The state of a sequence that has never got new positions, in the format that had no numbers for that, and sinks and window in
    place of sizes."""
    version, head = 8 + 4, n_header(policy, n_layer)
    names = version + 4 + 4 + len(policy) + 4 + len("off") + 4
    layers = head - 4 - n_layer * 48
    assert state[version : version + 4] == struct.pack("<I", 8) and state[head + 36 : head + 48] == bytes(12)
    return (
        state[:version] + struct.pack("<I", 6) + state[version + 4 : names] + struct.pack("<2I", sinks, window) + state[names:layers]
        + b"".join(state[layers + 48 * i : layers + 48 * i + 24] for i in range(n_layer))
        + state[head - 4 : head + 36] + state[head + N_HEAD :]
    )  # fmt: skip
