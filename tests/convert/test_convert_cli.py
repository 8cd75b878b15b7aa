"""`indexmem-convert` as a person and as a program use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import indexmem_edge
from indexmem_edge.convert import read_sidecar
from support import convert_samples as samples
from tiny.models import write_model

SHAPE = {
    "n_embd": samples.D,
    "n_head": samples.N_HEAD,
    "n_head_kv": samples.H,
    "head_dim": samples.HEAD_DIM,
    "n_layer": 2,
}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(indexmem_edge.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "indexmem_edge.convert", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, cwd=root,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "NO_COLOR": "1", **environment},
    )  # fmt: skip


def one_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The whole complaint is one line that holds all the words."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]
    assert result.returncode == 1 and result.stdout == ""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return samples.kvzap(tmp_path).paths[0]


def test_a_conversion_with_a_model_and_what_it_prints(source: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "base.gguf", "llama", **SHAPE)
    out = tmp_path / "m.indexmem.gguf"
    result = run(source, "--out", out, "-m", tmp_path / "base.gguf", "--trained-on", "[red]books", "--sinks", 4)
    assert (result.returncode, result.stderr) == (0, "")
    for word in ("in_proj.weight", "64 x 32", "F16", "kvzap", "mid_dim 32", "tiny, llama", "[red]books", "config.json"):
        assert word in result.stdout
    sidecar = read_sidecar(out)
    assert sidecar.metadata["indexmem.base_model.norms_fnv1a64"] in result.stdout
    assert sidecar.metadata["indexmem.defaults.sinks"] == 4 and sidecar.metadata["general.base_model.0.name"] == "tiny"
    assert f"{out.stat().st_size:,} bytes" in result.stdout


def test_json_and_the_way_back(source: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "m.gguf", tmp_path / "back.safetensors"
    result = run(source, "--out", out, "--outtype", "f32", "--arch", "qwen3", "--name", "mine", "--score", "ruler=0.5", "--json")
    told = json.loads(result.stdout)
    assert (told["kind"], told["bytes"], told["notes"]) == ("kvzap", out.stat().st_size, [])
    assert told["tensors"][0] == {
        "name": "in_proj.weight",
        "count": 2,
        "shape": [64, 32],
        "type": "F32",
        "bytes": 16384,
    }
    assert json.loads(run("--export", back, out, "--json").stdout)["tensors"] == 8
    again = tmp_path / "again.gguf"
    assert run(back, "--out", again, "--outtype", "f32").returncode == 0
    first, second = read_sidecar(out), read_sidecar(again)
    assert first.checkpoint.scores == second.checkpoint.scores == {"ruler": 0.5}
    assert all((first.tensors[name] == second.tensors[name]).all() for name in first.tensors)
    assert second.metadata["general.architecture"] == "qwen3" and second.metadata["general.name"] == "mine"


def test_notes_go_to_standard_error(source: Path, tmp_path: Path) -> None:
    result = run(source, "--out", tmp_path / "m.gguf")
    assert result.returncode == 0 and result.stderr.startswith("note: without --model")


def test_a_negative_gate_is_told(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    content = samples.load_torch(samples.GOLDEN / "indexmem_tiny.pt")
    content["scorers"]["1.gate_scale"] *= -1
    result = run(samples.save_torch(tmp_path / "n.pt", content), "--out", tmp_path / "m.gguf", "--arch", "llama")
    assert result.returncode == 0 and "gate_scale is negative in layer 1:" in result.stderr


def test_errors_are_one_line(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    one_error(run(tmp_path / "missing.pt", "--out", out), "missing.pt", "No such file")
    one_error(run(source), "--out", "--export")
    one_error(run(source, "--out", out, "--outtype", "q4_0"), "q4_0", "f32, f16, q8_0")
    one_error(run(source, "--out", source / "config.json", "--force"), "config.json", "was read")
    one_error(run(source, "--out", source / "a.gguf", "-m", source / "a.gguf"), "a.gguf is to be read")
    out.write_text("mine")
    one_error(run(source, "--out", out), "--force")
    one_error(run("--export", tmp_path / "c.safetensors", out), "not a readable sidecar")
    assert out.read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["kvzap", "m.gguf"]
    assert "Traceback" in run(tmp_path / "missing.pt", "--out", out, "--force", INDEXMEM_DEBUG="1").stderr


def test_help_and_version() -> None:
    text = run("--help").stdout
    for word in ("--model", "--outtype", "--export", "--kv-heads", "indexmem-convert final.pt"):
        assert word in text
    assert run("--version").stdout.strip() == f"indexmem-edge {indexmem_edge.__version__}"


def test_neither_the_library_nor_torch_is_loaded_without_need(source: Path) -> None:
    code = "import sys; from indexmem_edge.convert import cli, read_source as r; r(sys.argv[1:]); print(*sys.modules)"
    root = str(Path(indexmem_edge.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, str(source)]
    loaded = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=root, env={**os.environ, "PYTHONPATH": path}
    )
    assert not {"llama_cpp", "torch", "matplotlib"} & set(loaded.stdout.split())


def test_a_score_is_a_name_and_a_number(source: Path, tmp_path: Path) -> None:
    for text in ("ruler", "ruler=", "ruler=good", "a b=1"):
        result = run(source, "--out", tmp_path / "m.gguf", "--arch", "qwen3", "--score", text)
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and not (tmp_path / "m.gguf").exists()
