"""`indexmem train` as a person and as a program use it. The objective is a stub; the command, model and books are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import Tiny
from support.commands import one_error, run

pytest.importorskip("torch")

import indexmem_edge
from indexmem_edge.cli.app import app
from indexmem_edge.convert import read_sidecar
from indexmem_edge.native import find
from support.training import Follow, stub_tools, write_books

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

_COMMAND = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from indexmem_edge.train import run
from support.training import stub_tools
run.default_tools = lambda options: stub_tools()
sys.argv[1:2] = []
from indexmem_edge.cli.app import app
app()
"""
SMALL = (
    "--length", "64", "--samples", "4", "--batch", "2", "--steps", "4", "--eval-samples", "1", "--eval-every", "2",
    "--kv-window", "8", "--mid-dim", "16", "--objective", "follow", "--device", "cpu",
)  # fmt: skip


def environment() -> dict[str, str]:
    root = str(Path(indexmem_edge.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-c", _COMMAND, str(Path(__file__).parents[1]), "train", *map(str, arguments)]


def train(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120, cwd=cwd, env=environment()
    )


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    (tmp_path / "m.gguf").symlink_to(tiny("llama")[0])
    write_books(tmp_path / "books")
    return tmp_path


def test_a_training_and_what_it_prints(folder: Path) -> None:
    result = train("-m", "m.gguf", "--text", "books", "--out", "m.indexmem.gguf", *SMALL, cwd=folder)
    assert result.returncode == 0, result.stderr
    for word in ("follow", "held-out recall", "m.indexmem.train/metrics.jsonl", "bytes", "indexmem chat -m m.gguf --indexmem"):
        assert word in result.stdout
    assert "follow: step 4 of 4, loss" in result.stderr and "books ..." in result.stderr
    c = read_sidecar(folder / "m.indexmem.gguf").checkpoint
    assert (c.kind, c.constants["mid_dim"], c.defaults["window"]) == ("retention", 16, 8)

    told = train("--resume", "m.indexmem.train", "--force", "--json", cwd=folder)
    assert told.returncode == 0 and told.stderr == "", told.stderr
    found = json.loads(told.stdout)
    assert found["stages"][0]["done"] == 4 and found["recall"] > found["recall_before"]


def test_ctrl_c_saves_and_says_how_to_go_on(folder: Path) -> None:
    arguments = ("-m", "m.gguf", "--text", "books", "--out", "m.indexmem.gguf", *SMALL, "--steps", "1000000", "--eval-every", "0")
    with subprocess.Popen(
        command(*arguments), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment()
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("follow: step 0"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith("stopped: ") and "steps of follow are saved" in last and "--resume m.indexmem.train" in last
    assert not (folder / "m.indexmem.gguf").exists() and (folder / "m.indexmem.train/checkpoint.safetensors").exists()


def refused(*arguments: Any) -> str:
    """The one line that a command says, in this process: PyTorch takes a second to load."""
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    lines = [line for line in result.stderr.splitlines() if line != "books ..."]  # progress, as a log has it
    assert result.exit_code == 1 and len(lines) == 1 and lines[0].startswith("error: ") and not result.stdout, result.output
    return lines[0]


def test_errors_are_one_line(folder: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = stub_tools(objectives={"follow": Follow, "regress": Follow})
    monkeypatch.setattr("indexmem_edge.train.run.default_tools", lambda options: tools)
    good = ("-m", folder / "m.gguf", "--text", folder / "books", "--out", folder / "m.indexmem.gguf", "--device", "cpu")
    (folder / "damaged.gguf").write_bytes((folder / "m.gguf").read_bytes()[:2000])
    for arguments, words in (
        (good[:4], ("--out is missing", "--resume FOLDER")),
        ((*good[:2], *good[4:]), ("--text is missing",)),
        ((*good, "--lr", "fast"), ("--lr 'fast'", "numbers with commas")),
        ((*good, "--kind", "oracle"), ("--kind 'oracle'", "retention, kvzap, pairwise")),
        ((*good, "--length", "64"), ("nothing to rank", "--kv-window")),
        ((*good[:2], "--text", folder / "none", *good[4:]), ("there is no text at",)),
        (("-m", folder / "books/book-0.txt", *good[2:]), ("not a GGUF model",)),
        (("-m", folder / "damaged.gguf", *good[2:]), ("damaged.gguf",)),
        (("-m", tiny("gemma2")[0], *good[2:]), ("architecture 'gemma2'", "soft cap", "--kv-policy keydiff")),
        ((*good, "--length", "4096"), ("the text is too short", "2,900 tokens", "4,096")),
        ((*good, "--objective", "magic"), ("unknown objective 'magic'", "follow")),
        ((*good[:4], "--out", folder / "no/such/m.gguf"), ("folder does not exist",)),
        (("--resume", folder), ("no folder of a training", "run.json")),
    ):
        said = refused(*arguments)
        for word in words:
            assert word in said
    assert sorted(p.name for p in folder.iterdir()) == ["books", "damaged.gguf", "m.gguf"]
    (folder / "m.indexmem.gguf").write_text("mine")
    assert "--force" in refused(*good)

def test_without_torch(folder: Path) -> None:
    code = _COMMAND.replace("import torch\ntorch.set_num_threads(1)\n", "sys.modules['torch'] = None\n")
    code = code.replace("from indexmem_edge.train import run\nfrom support.training import stub_tools\n", "")
    code = code.replace("run.default_tools = lambda options: stub_tools()\n", "")
    arguments = [sys.executable, "-c", code, ".", "train", "--text", "books", "--out", "o.gguf", "-m", "m.gguf"]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=folder, env=environment(), timeout=60)
    one_error(result, "PyTorch", "pip install torch")


def test_help(folder: Path) -> None:
    text = run("train", "--help").stdout
    for word in ("--text", "--objective", "--resume", "gated-kl", "pip install torch", "accelerate launch", "0.75"):
        assert word in text
    assert "train" in run("--help").stdout


def test_resume_takes_no_other_options(folder: Path) -> None:
    (folder / "r").mkdir()
    from indexmem_edge.train.options import RUN_FILE, TrainOptions

    options = TrainOptions(Path("m.gguf"), (Path("books"),), folder / "o.gguf")
    (folder / "r" / RUN_FILE).write_text(json.dumps(options.to_dict()))
    assert "leave out --lr" in refused("--resume", folder / "r", "--lr", "1e-4")
    for flag, value in (("--text", folder), ("--from", folder / "x.gguf"), ("--kv-sinks", 3), ("--length", 64)):  # as it was given
        assert f"leave out {flag}," in refused("--resume", folder / "r", flag, value)
    assert "leave out --no-fingerprint," in refused("--resume", folder / "r", "--no-fingerprint")
    assert "give one of them" in refused("--resume", folder / "r", "--restart")
