"""What a person typed in earlier chats: a file that only this user can read, and that does not grow without bound."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import FileHistory

OFF_VARIABLE = "INDEXMEM_HISTORY"  # 0: nothing is kept
_MOST_BYTES = 1 << 20  # of the file; then its older half goes
_LONGEST = 1 << 14  # characters of an entry: a pasted book is not something to come back to


class KeptHistory(FileHistory):
    """The history in a file. Where that cannot be read or written, it lasts as long as the chat."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            path.chmod(0o600)
            self._shorten()

    def load_history_strings(self) -> Iterable[str]:
        """The entries, latest first."""
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        """Appends an entry."""
        if len(string) <= _LONGEST:
            with contextlib.suppress(OSError):
                super().store_string(string)

    def _shorten(self) -> None:
        size = self._path.stat().st_size
        if size <= _MOST_BYTES:
            return
        with open(self._path, "rb+") as file:
            file.seek(size - _MOST_BYTES // 2)
            _, begin, rest = file.read().partition(b"\n\n#")  # the beginning of an entry
            file.seek(0)
            file.write(begin + rest)
            file.truncate()
