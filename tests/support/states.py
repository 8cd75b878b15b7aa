"""What the bytes of a state begin with."""

from __future__ import annotations

N_HEAD = 56  # of a sequence, see indexmem-state.h


def n_header(policy: str, n_layer: int = 2) -> int:
    """What is before the head of the first sequence: llama.cpp's own 8 bytes, magic, version, policy, memory, numbers, the sidecar's
    hash, numbers and sizes of every layer, the number of sequences."""
    return 8 + 4 + 4 + 4 + len(policy) + 4 + len("off") + 5 * 4 + 8 + n_layer * 12 * 4 + 4


N_HEADER = n_header("streaming")
