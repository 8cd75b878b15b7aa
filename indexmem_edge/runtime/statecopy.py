"""A copy of the KV state in memory, to come back to."""

from __future__ import annotations

import weakref
from typing import Optional

import numpy as np

from ..native import api


class StateCopy:
    """A copy of the KV state of sequence 0 of a bounded cache, in memory that is kept for the next one: of the devices where the
    cache lies, as far as they have room, else the host's. It does not depend on the context that it came from.
    """

    def __init__(self) -> None:
        self._copy: Optional[int] = None  # the library's; made for the first state

    @property
    def nbytes(self) -> int:
        """Bytes that its memory takes, of the host and of devices."""
        return self._bytes(False) + self.device_nbytes

    @property
    def device_nbytes(self) -> int:
        """Those in memory of devices."""
        return self._bytes(True)

    def _bytes(self, on_device: bool) -> int:
        return int(api.library().indexmem_copy_bytes(self._copy, on_device)) if self._copy is not None else 0

    @property
    def state(self) -> bytes:
        """What was copied, as the library writes states; nothing if nothing was."""
        if self._copy is None:
            return b""
        get = api.library().indexmem_copy_state
        buffer = np.empty(int(get(self._copy, None, 0)), dtype=np.uint8)
        return buffer[: int(get(self._copy, buffer.ctypes.data, buffer.nbytes))].tobytes()

    @staticmethod
    def size(ctx: int) -> int:
        """Bytes that a copy of the state as it is now takes."""
        return int(api.library().indexmem_copy_size(ctx, 0))

    def take(self, ctx: int) -> bool:
        """Copies the state as it is now; False if there is no memory for it."""
        lib = api.library()
        if self._copy is None:
            self._copy = lib.indexmem_copy_new()
            if self._copy is None:
                return False
            weakref.finalize(self, lib.indexmem_copy_free, self._copy)
        return bool(lib.indexmem_copy_take(self._copy, ctx, 0))

    def give_back(self, ctx: int) -> bool:
        """Makes the state of the sequence what it was; in another context than its own, if that can take it up."""
        return self._copy is not None and bool(api.library().indexmem_copy_put(self._copy, ctx, 0))
