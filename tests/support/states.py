"""What the bytes of a state begin with."""

from __future__ import annotations

# before the head of the first sequence: llama.cpp's own 8 bytes, magic, version, policy, memory, numbers, the sidecar's hash, layers
N_HEADER = 8 + 4 + 4 + 4 + len("streaming") + 4 + len("off") + 7 * 4 + 8 + 2 * 6 * 4 + 4
