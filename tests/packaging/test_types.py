"""What a type checker sees of the installed package: the types of llama_cpp's methods, and those of our options."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from typing import Any, Optional, Union, get_type_hints

import pytest

from indexmem_edge import Llama
from indexmem_edge.native import find
from indexmem_edge.options import OPTIONS
from indexmem_edge.runtime import signature

pytest.importorskip("mypy", reason="make check installs it")
INSTALLED = find.library_dir().parent  # the package in a place that mypy knows: not the clone, which has no llama_cpp
pytestmark = pytest.mark.skipif(
    not (INSTALLED / "_vendor" / "llama_cpp").is_dir() or INSTALLED.parent.name != "site-packages",
    reason="the package has not been installed",
)

PROGRAM = """
from indexmem_edge import CacheOptions, KVStats, Llama, demo_model

llm = Llama(demo_model(), kv_budget=1024, kv_policy="keydiff", kv_pin="auto", n_ctx=0)
reveal_type(llm)
reveal_type(llm.tokenize(b"text"))
reveal_type(llm.create_chat_completion([{"role": "user", "content": "Hello"}]))
reveal_type(llm.create_completion("Hello", max_tokens=4))
reveal_type(llm.kv_stats())
reveal_type(llm.kv_stats().evicted)
reveal_type(llm.n_ctx())
reveal_type(llm.cancel())
"""

WRONG = """
from indexmem_edge import Llama

llm = Llama("model.gguf", kv_budget="many")
llm = Llama("model.gguf", kv_policy=3)
llm.tokenize("text")
llm.create_chat_completion([{"role": "nobody"}])
llm.create_completion("Hello", max_tokens="four")
llm.kv_stats().no_such_count
llm.no_such_method()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What mypy says of the two programs, as it is installed for a person: no path of the clone is in its way."""
    folder = tmp_path_factory.mktemp("programs")
    for name, program in (("right.py", PROGRAM), ("wrong.py", WRONG)):
        (folder / name).write_text(program, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    options = ["--strict", "--cache-dir", str(folder / "cache"), "--config-file", os.devnull]
    command = [sys.executable, "-m", "mypy", *options, "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    return {name: "\n".join(line for line in lines if line.startswith(name)) for name in ("right.py", "wrong.py")}


def test_the_options_of_the_cache_are_those_that_type_checkers_know() -> None:
    known = get_type_hints(signature.made_with)
    given = {name: known.pop(name) for name in ("self", "model_path", "kwargs", "return", "kv_cancel", "kv_checkpoints", "kv_warn")}
    assert given["model_path"] == Union[str, os.PathLike[str]]

    def words(kind: Any) -> list[str]:
        """In order: that of a Union is the one that somebody in this process, a plugin for instance, has written first."""
        return sorted(re.findall(r"[\w.]+", re.sub(r"ForwardRef\('(.*?)'\)", r"\1", str(kind))))

    taken = {option.keyword: words(Optional[option.takes]) for option in OPTIONS.values()}
    assert {name: words(kind) for name, kind in known.items()} == taken
    at_run_time = inspect.signature(Llama).parameters
    assert {*known, *given} - {"self", "return"} <= set(at_run_time)


def test_types_are_real(said: dict[str, str]) -> None:
    assert "error:" not in said["right.py"], said
    types = dict(re.findall(r'right\.py:(\d+): note: Revealed type is "(.*)"', said["right.py"]))
    lines = dict(enumerate(PROGRAM.splitlines(), 1))
    found = {re.sub(r"reveal_type\((.*)\)", r"\1", lines[int(n)]): kind for n, kind in types.items()}
    assert len(found) == PROGRAM.count("reveal_type")
    assert not [of for of, kind in found.items() if kind in ("Any", "Unknown")], found
    assert found["llm"] == "indexmem_edge.llama.Llama"
    assert found['llm.tokenize(b"text")'].endswith("list[int]") or found['llm.tokenize(b"text")'].endswith("List[int]")
    chat = found['llm.create_chat_completion([{"role": "user", "content": "Hello"}])']
    assert "CreateChatCompletionResponse" in chat and "CreateChatCompletionStreamResponse" in chat
    assert "CreateCompletionResponse" in found['llm.create_completion("Hello", max_tokens=4)']
    assert found["llm.kv_stats()"] == "indexmem_edge.stats.KVStats"
    assert found["llm.kv_stats().evicted"].endswith("int") and found["llm.n_ctx()"].endswith("int")
    assert found["llm.cancel()"].endswith("bool")


def test_mistakes_are_found(said: dict[str, str]) -> None:
    wrong = {int(n) for n in re.findall(r"wrong\.py:(\d+): error", said["wrong.py"])}
    assert wrong == {n for n, line in enumerate(WRONG.splitlines(), 1) if line.startswith("llm")}, said["wrong.py"]
