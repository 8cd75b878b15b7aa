"""A program that PyInstaller makes of a script that imports the package: it runs without Python and without the package.

`make test-frozen` installs PyInstaller and runs this. Without PyInstaller it is skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.native import find

pytest.importorskip("PyInstaller", reason="make test-frozen installs it")
pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

PROGRAM = """
import json, sys
from indexmem_edge import Llama
from indexmem_edge.models.demo import demo_sidecar

with_budget = Llama(sys.argv[1], kv_budget=160, n_ubatch=32, verbose=False)
with_budget.eval(list(range(1, 200)))
stats = with_budget.kv_stats()
unbounded = Llama(sys.argv[1], n_ctx=256, verbose=False)
unbounded.eval(list(range(1, 200)))
import indexmem_edge
print(json.dumps({
    "frozen": getattr(sys, "frozen", False), "where": indexmem_edge.__file__, "seen": stats.tokens_seen, "evicted": stats.evicted,
    "unbounded": unbounded.n_tokens, "sidecar": demo_sidecar().is_file(), "typer": "typer" in sys.modules,
}))
"""


def test_a_frozen_program(tiny: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    script = tmp_path / "talker.py"
    script.write_text(PROGRAM, encoding="utf-8")
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "ERROR", str(script)]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    # Elsewhere, with a name that is not ASCII, and without the environment of this Python.
    place = tmp_path / "Größe & co"
    (tmp_path / "dist" / "talker").rename(place)
    run = subprocess.run(
        [place / "talker", tiny("llama")[0]], cwd=place, capture_output=True, text=True, env={}, timeout=120
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["frozen"] and str(place) in found["where"]
    assert found["seen"] == 199 and found["evicted"] > 0 and found["unbounded"] == 199
    assert found["sidecar"] and not found["typer"]
