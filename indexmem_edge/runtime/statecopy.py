"""A copy of the KV state in memory, to come back to."""

from __future__ import annotations

import ctypes
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from .._vendor.llama_cpp import llama_cpp as llama_lib


class StateCopy:
    """A copy of the KV state of sequence 0, in a buffer that is kept for the next one."""

    def __init__(self) -> None:
        self._buffer: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the buffer takes."""
        return self._buffer.nbytes

    @property
    def state(self) -> bytes:
        """What was copied."""
        return self._buffer[: self._used].tobytes()

    @staticmethod
    def size(ctx: int) -> int:
        """Bytes that a copy of the state as it is now takes."""
        return int(llama_lib.llama_state_seq_get_size(ctx, 0))

    def take(self, ctx: int, size: Optional[int] = None) -> bool:
        """Copies the state as it is now; False if there is no memory for it. `size` is that of `size()`, if it is known."""
        size = self.size(ctx) if size is None else size
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
