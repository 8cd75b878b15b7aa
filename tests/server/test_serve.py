"""`indexmem serve`: what it adds to the arguments of the server."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from indexmem_edge.cli import serve
from indexmem_edge.cli.serve import complete
from indexmem_edge.models.demo import demo_sidecar
from support.commands import one_error, run


def test_without_anything_it_is_the_demo_model_with_its_sidecar(demo_model: Path) -> None:
    assert complete(["--port", "1"]) == [
        "--port", "1", "-m", str(demo_model), "--kv-budget", "1024", "--ctx-checkpoints", "4", "--indexmem", str(demo_sidecar())
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, added",
    [
        (["-m", "a.gguf"], ["--kv-budget", "1024", "--ctx-checkpoints", "4"]),
        (["-hf", "somebody/model"], ["--kv-budget", "1024", "--ctx-checkpoints", "4"]),
        (["-m", "a.gguf", "--kv-budget", "256", "-ctxcp", "9"], []),
        (["--model=a.gguf", "--kv-budget=0"], []),
        (["--help"], []),
        (["--version"], []),
    ],
)
def test_what_is_named_stays(arguments: list[str], added: list[str]) -> None:
    assert complete(arguments) == arguments + added


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MODEL", "a.gguf"), ("KV_BUDGET", "256"), ("CTX_CHECKPOINTS", "9"), ("INDEXMEM", "a.indexmem.gguf")):
        monkeypatch.setenv(f"LLAMA_ARG_{name}", value)
    assert complete(["--port", "1"]) == ["--port", "1"]
    monkeypatch.setenv("LLAMA_ARG_KV_BUDGET", "0")
    monkeypatch.delenv("LLAMA_ARG_CTX_CHECKPOINTS")
    assert complete([]) == []


def test_the_sidecar_beside_a_model_is_found(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").symlink_to(demo_model)
    (tmp_path / "m.indexmem.gguf").symlink_to(demo_sidecar())
    for arguments in (["-m", str(tmp_path / "m.gguf")], [f"--model={tmp_path}/m.gguf"]):
        assert complete(arguments)[-2:] == ["--indexmem", str(tmp_path / "m.indexmem.gguf")]


@pytest.mark.parametrize("off", [["--indexmem", "off"], ["--indexmem=off"]])
def test_none_where_none_is_wanted(demo_model: Path, off: list[str]) -> None:
    assert complete([*off, "--port", "1"]) == ["--port", "1", "-m", str(demo_model), "--kv-budget", "1024", "--ctx-checkpoints", "4"]


@pytest.mark.parametrize("arguments", [["--gpt-oss-20b-default"], ["--spec-default", "--fim-qwen-3b-default"]])
def test_a_model_by_name(arguments: list[str]) -> None:
    assert complete(arguments) == [*arguments, "--kv-budget", "1024", "--ctx-checkpoints", "4"]


def test_the_policy_that_needs_a_sidecar_gets_one(demo_model: Path) -> None:
    assert complete(["--spec-default", "--kv-policy", "indexer"])[-2:] == ["--indexmem", str(demo_sidecar())]


def test_off_is_not_left_in_the_environment(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server reads it, and would open a file of that name."""
    seen: list[Any] = []
    monkeypatch.setattr(serve, "server_program", lambda: Path("server"))
    monkeypatch.setattr(serve, "_run", lambda file, arguments: seen.append((arguments, os.environ.get("LLAMA_ARG_INDEXMEM"))) or 0)
    for variable, arguments in (("off", []), ("a.indexmem.gguf", ["--indexmem", "off"])):
        monkeypatch.setenv("LLAMA_ARG_INDEXMEM", variable)
        context: Any = SimpleNamespace(args=["--port", "1", *arguments])
        with pytest.raises(typer.Exit):
            serve.serve(context)
    assert len(seen) == 2 and all("--indexmem" not in given and value is None for given, value in seen)


@pytest.mark.parametrize("arguments", [["--kv-budget", "0"], ["--kv-budget=0"], ["--kv-policy", "keydiff"]])
def test_a_sidecar_only_where_it_is_of_use(demo_model: Path, arguments: list[str]) -> None:
    assert "--indexmem" not in complete(arguments)


def test_a_build_without_the_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if serve.program(serve.SERVER) is None:
        one_error(run("serve"), "llama-server", "make server")
