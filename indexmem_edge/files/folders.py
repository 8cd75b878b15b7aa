"""Where this user's programs keep their files."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """For what can be made again."""
    return _folder("XDG_CACHE_HOME", "Library/Caches", ".cache")


def state_dir() -> Path:
    """For what is neither settings nor can be made again."""
    return _folder("XDG_STATE_HOME", "Library/Application Support", ".local/state")


def _folder(variable: str, on_macos: str, elsewhere: str) -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get(variable) or Path.home() / (on_macos if sys.platform == "darwin" else elsewhere)
    return Path(base) / "indexmem-edge"
