"""The examples of docs/, for tests that run them."""

from __future__ import annotations

import importlib
import importlib.util
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


def example(name: str) -> Any:
    """An example that is one file."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where pydantic looks for the names in annotations
        spec.loader.exec_module(module)
    return sys.modules[name]
