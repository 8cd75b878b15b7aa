"""Copies of the KV state in memory: to come back to after a cancel, and to the last prompt for another answer."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from .._vendor.llama_cpp import llama_cpp as llama_lib
from ..native import api  # noqa: F401  (chooses the library)
from .align import common_prefix


class StateCopy:
    """A copy of the KV state of sequence 0, in a buffer that is kept for the next one."""

    def __init__(self) -> None:
        self._buffer: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the buffer takes."""
        return self._buffer.nbytes

    def take(self, ctx: int) -> bool:
        """Copies the state as it is now; False if there is no memory for it."""
        size = llama_lib.llama_state_seq_get_size(ctx, 0)
        if size > self._buffer.nbytes:
            self._buffer = np.empty(0, dtype=np.uint8)  # first, so that there are never two
            try:
                self._buffer = np.empty(size, dtype=np.uint8)
            except MemoryError:
                return False
        self._used = llama_lib.llama_state_seq_get_data(ctx, self._pointer(), size, 0)
        return 0 < self._used <= size

    def give_back(self, ctx: int) -> bool:
        """Makes the state of the sequence what it was."""
        return bool(llama_lib.llama_state_seq_set_data(ctx, self._pointer(), self._used, 0) == self._used)

    def _pointer(self) -> Any:
        return self._buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class Checkpoint:
    """The state after some tokens, and which these were: another history that begins with them can go on from there."""

    def __init__(self) -> None:
        self._copy = StateCopy()
        self._tokens: npt.NDArray[np.intc] = np.empty(0, dtype=np.intc)
        self._least = 0

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self._copy.nbytes + self._tokens.nbytes

    def take(self, ctx: int, tokens: npt.NDArray[np.intc], least: int) -> None:
        """Keeps the state as it is now, after these tokens, of which those from `least` on can be taken out."""
        self._tokens = tokens.copy() if len(tokens) and self._copy.take(ctx) else tokens[:0].copy()
        self._least = least

    def give_back(self, ctx: int, tokens: npt.NDArray[np.intc]) -> int:
        """Makes the state that of a beginning of `tokens`; returns how many, 0 if they begin with others."""
        n = common_prefix(self._tokens, tokens)
        if n == 0 or n < self._least or not self._copy.give_back(ctx):
            return 0
        memory = llama_lib.llama_get_memory(ctx)
        if n == len(self._tokens) or llama_lib.llama_memory_seq_rm(memory, 0, n, -1):
            return n
        llama_lib.llama_memory_clear(memory, True)  # better none than that of other tokens
        return 0
