"""Files that take a while to make and can be made again: written once, then found again in a folder for temporary files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    return Path(tempfile.gettempdir()) / "indexmem-bench"


def write_once(path: Path, write: Callable[[Path], object]) -> Path:
    """`path`, which `write` makes if it is not there: whole or not at all, whatever `write` raises.

    Raises:
        OSError: it cannot be written.
    """
    if path.is_file():
        return path
    draft = path.with_suffix(f".{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        draft.replace(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return path
