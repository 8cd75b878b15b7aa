"""A cache that is as full as after a long text, without the hours that reading it takes.

What attention costs depends on how many entries there are and not on what is in them. So the first tokens that a cache has read are
put into it again and again, each copy at the positions after the one before it, through llama.cpp's own interface, which
turns the keys to their new places.
"""

from __future__ import annotations

import ctypes
from typing import Any

from ..runner import BenchError, System, llama_cpp

PIECE = 1024  # tokens of one copy: so little that it does not show in the memory of the process
WHOLE, COPY = 0, 1  # sequences
HOW = (
    "past {read} tokens the caches that keep everything are filled with copies of their first {piece} tokens, and the seconds of a "
    "prompt are computed from those of an ubatch before and after"
)


def can_copy(system: System) -> bool:
    """Whether `fill_with_copies` works with this kind of cache: recurrent states are no entries to copy."""
    return not system.setup.budget and bool(llama_cpp.llama_memory_can_shift(llama_cpp.llama_get_memory(system.ctx)))


def fill_with_copies(system: System, depth: int) -> None:
    """Copies of the first PIECE tokens, or of as many as were read, until there are `depth` of them.

    Raises:
        BenchError: nothing was read, or the context has no room for a second sequence or for so many tokens.
    """
    ctx, memory = system.ctx, llama_cpp.llama_get_memory(system.ctx)
    size = min(PIECE, system.seen)
    if not size or system.setup.sequences < 2 or depth > llama_cpp.llama_n_ctx(ctx):
        raise BenchError(f"{system.setup.label}: copies up to {depth} tokens need a text to copy, room and a second sequence")
    piece = _first(system, memory, size)
    while system.seen < depth:
        n = min(size, depth - system.seen)
        if not llama_cpp.llama_state_seq_set_data(ctx, piece, len(piece), COPY):
            raise BenchError(f"{system.setup.label}: no room for a copy after {system.seen} tokens")
        llama_cpp.llama_memory_seq_rm(memory, COPY, n, -1)
        llama_cpp.llama_memory_seq_add(memory, COPY, 0, -1, system.seen)
        llama_cpp.llama_memory_seq_cp(memory, COPY, WHOLE, -1, -1)
        llama_cpp.llama_memory_seq_rm(memory, COPY, -1, -1)
        system.seen += n
    system.step(0)  # turns the keys
    system.rollback(depth)


def _first(system: System, memory: Any, n: int) -> Any:
    """State of the first `n` tokens."""
    llama_cpp.llama_memory_seq_cp(memory, WHOLE, COPY, 0, n)
    buffer = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(system.ctx, COPY))()
    if not llama_cpp.llama_state_seq_get_data(system.ctx, buffer, len(buffer), COPY):
        raise BenchError(f"{system.setup.label}: the state could not be copied")
    llama_cpp.llama_memory_seq_rm(memory, COPY, -1, -1)
    return buffer
