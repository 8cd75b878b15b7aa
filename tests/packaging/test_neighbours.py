"""Beside others: another llama_cpp in the environment, variables that children inherit, folders with any name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.native import find

Tiny = Callable[..., tuple[Path, Any]]
INSTALLED = find.library_dir().parent  # not the clone, whose package has no libraries in it

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

OTHER = """
import builtins
builtins.other_llama_cpp_was_imported = True
__version__ = "0.1.0"

class Llama:
    pass
"""

# What a program does with both, and what it finds. `changed` and `inherited` are variables of the environment.
PROGRAM = """
import builtins, json, os, subprocess, sys

before = dict(os.environ)
if sys.argv[2] == "other first":
    import llama_cpp
import indexmem_edge
llm = indexmem_edge.Llama(sys.argv[1], kv_budget=160, n_ubatch=32, verbose=False)
llm.eval(list(range(1, 200)))
untouched = sys.argv[2] == "other first" or not hasattr(builtins, "other_llama_cpp_was_imported")
words = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
child = subprocess.run(words, capture_output=True, check=True)
inherited = {name for name, value in json.loads(child.stdout).items() if before.get(name) != value}
import llama_cpp
print(json.dumps({
    "evicted": llm.kv_stats().evicted, "untouched": untouched, "inherited": sorted(inherited - {"LC_CTYPE"}),
    "changed": sorted(name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)),
    "other": llama_cpp.__version__, "ours": indexmem_edge.llama_cpp.__version__,
    "theirs": llama_cpp.Llama.__module__, "base": indexmem_edge.llama_cpp.Llama.__module__,
    "package": indexmem_edge.__file__, "other_file": llama_cpp.__file__, "modules": sorted(sys.modules),
}))
"""


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder with another llama_cpp, which sets a flag when it is imported."""
    folder = tmp_path / "other"
    (folder / "llama_cpp").mkdir(parents=True)
    (folder / "llama_cpp" / "__init__.py").write_text(OTHER, encoding="utf-8")
    return folder


def run_program(model: Path, order: str, *folders: Path) -> dict[str, Any]:
    """What PROGRAM finds, with these folders first on sys.path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", PROGRAM, str(model), order]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=env, cwd=model.parent, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("order", ["ours first", "other first"])
def test_another_llama_cpp_is_neither_used_nor_disturbed(tiny: Tiny, other: Path, order: str) -> None:
    found = run_program(tiny("llama")[0], order, other, INSTALLED.parent)
    assert found["untouched"], "importing the package or loading a model imported the other llama_cpp"
    assert (found["other"], found["ours"]) == ("0.1.0", find.LLAMA_CPP_PYTHON_VERSION)
    assert found["theirs"] == "llama_cpp" and found["base"].startswith("indexmem_edge._vendor.llama_cpp")
    assert Path(found["other_file"]).parent == other / "llama_cpp"
    assert found["evicted"] > 0


def test_the_environment_stays_as_it_was(tiny: Tiny, other: Path) -> None:
    found = run_program(tiny("llama")[0], "ours first", other, INSTALLED.parent)
    assert found["changed"] == [] and found["inherited"] == []


def test_a_program_loads_nothing_of_the_command_line_or_of_training(tiny: Tiny, other: Path) -> None:
    loaded = set(run_program(tiny("llama")[0], "ours first", other, INSTALLED.parent)["modules"])
    assert not loaded & {"typer", "click", "rich", "prompt_toolkit", "torch", "matplotlib", "indexmem_edge.cli"}


def test_from_a_folder_with_spaces_and_umlauts(tiny: Tiny, other: Path, tmp_path: Path) -> None:
    place = tmp_path / "Eigene Dateien" / "Größe & Maß"
    leave_out = shutil.ignore_patterns("__pycache__", "bench", "convert", "train")
    shutil.copytree(INSTALLED, place / "indexmem_edge", ignore=leave_out)
    model = place / "Modell für alle.gguf"
    shutil.copy(tiny("llama")[0], model)
    found = run_program(model, "ours first", place, other)
    assert Path(found["package"]) == place / "indexmem_edge" / "__init__.py" and found["evicted"] > 0
