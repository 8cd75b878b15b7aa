"""The examples of docs/, for tests that run them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


def desktop(name: str) -> Any:
    """A module of the desktop example, whose modules import each other by name, as a program's do."""
    folder = str(EXAMPLES / "desktop")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
