"""The command line, run as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import indexmem_edge


def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(indexmem_edge.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "indexmem_edge", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,  # not the clone, whose package has no libraries in it
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "NO_COLOR": "1", **environment},
    )




def one_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The whole complaint is one line that holds all the words. Notes, on what was loaded, may come before."""
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]
    assert result.returncode == 1 and result.stdout == ""


