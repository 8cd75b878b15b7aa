"""docs/examples/notebook.ipynb: its cells run, and what is shown below them in the repository has come from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import indexmem_edge
from indexmem_edge.native import find
from support.examples import EXAMPLES

NOTEBOOK = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
CELLS: list[dict[str, Any]] = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


@pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")
def test_the_cells_run(demo_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="there is no matplotlib: pip install matplotlib")
    program = tmp_path / "notebook.py"
    program.write_text("\n".join(f"# cell {i}\n{source(cell)}" for i, cell in enumerate(CELLS, 1)), encoding="utf-8")
    roots = [str(Path(indexmem_edge.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots)), "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "256 kept" in done.stdout


def test_it_has_been_run_from_top_to_bottom() -> None:
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    shown = [output for cell in CELLS for output in cell["outputs"]]
    assert all(output["output_type"] in ("stream", "execute_result", "display_data") for output in shown)
    assert any("image/png" in output.get("data", {}) for output in shown)
    for cell in CELLS:
        assert not ("print(" in source(cell) and "def " not in source(cell)) or cell["outputs"], source(cell)
