"""Every block of code of docs/embedding.md runs, one after the other, in one program with the demo model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import indexmem_edge
from indexmem_edge.native import find

PAGE = Path(__file__).resolve().parents[2] / "docs" / "embedding.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.S | re.M)


@pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")
def test_the_blocks_run(demo_model: Path, tmp_path: Path) -> None:
    assert len(BLOCKS) > 8
    program = tmp_path / "page.py"
    program.write_text("\n".join(f"# block {i}\n{block}" for i, block in enumerate(BLOCKS, 1)), encoding="utf-8")
    roots = [str(Path(indexmem_edge.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots))}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
