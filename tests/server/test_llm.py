"""The command `llm` talks to the server: a chat that goes on (`llm -c`) costs its turns."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.serving import SERVER, serving

pytestmark = [
    pytest.mark.skipif(SERVER is None, reason="the server has not been built (make server)"),
    pytest.mark.skipif(importlib.util.find_spec("llm") is None, reason="llm is not installed"),
]

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"


def test_the_recipe_of_the_page(demo_model: Path, tmp_path: Path) -> None:
    recipe = re.search(r"```yaml\n(- model_id: .*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert recipe is not None
    # No plugins: the demo model is one, and wants another llama-cpp-python.
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": "", "LLM_MODEL": "bounded"}

    def llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    options = ("-o", "temperature", "0", "-o", "max_tokens", "16")
    with serving(demo_model, "--kv-budget", 192, "--kv-window", 48, "-ub", 64, "--api-key", "secret", "--slots") as server:
        text = recipe[1].replace("8080", str(server.port))
        (tmp_path / "extra-openai-models.yaml").write_text(text, encoding="utf-8")
        llm("keys", "set", "bounded", "--value", "secret")
        long = Path(__file__).read_text(encoding="utf-8")[:1500] + "\nWhat is this?"
        assert llm(*options, "-s", "You are a clerk.", long)
        assert llm("-c", *options, "Name a river.") and llm("-c", *options, "And another one.")
        assert json.loads(llm("--schema", "name, inhabitants int", "-o", "max_tokens", "60", "A city."))["name"]
        evaluated = [int(n) for n in re.findall(r"prompt eval time =.* ms /\s+(\d+) tokens", server.said)]
    assert evaluated[0] > 300 and max(evaluated[1:3]) <= 64
