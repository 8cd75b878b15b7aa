"""`indexmem serve`: what it adds to the arguments of the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexmem_edge.cli import serve
from indexmem_edge.cli.serve import complete
from indexmem_edge.models.demo import demo_sidecar
from support.commands import one_error, run


def test_without_anything_it_is_the_demo_model_with_its_sidecar(demo_model: Path) -> None:
    assert complete(["--port", "1"]) == [
        "--port", "1", "-m", str(demo_model), "--kv-budget", "1024", "--indexmem", str(demo_sidecar())
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, added",
    [
        (["-m", "a.gguf"], ["--kv-budget", "1024"]),
        (["-hf", "somebody/model"], ["--kv-budget", "1024"]),
        (["--model=a.gguf", "--kv-budget=0"], []),
        (["--help"], []),
        (["--version"], []),
    ],
)
def test_what_is_named_stays(arguments: list[str], added: list[str]) -> None:
    assert complete(arguments) == arguments + added


@pytest.mark.parametrize("arguments", [["--kv-budget", "0"], ["--kv-budget=0"], ["--kv-policy", "keydiff"]])
def test_a_sidecar_only_where_it_is_of_use(demo_model: Path, arguments: list[str]) -> None:
    assert "--indexmem" not in complete(arguments)


def test_a_build_without_the_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if serve.program(serve.SERVER) is None:
        one_error(run("serve"), "llama-server", "make server")
