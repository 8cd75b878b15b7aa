"""`indexmem inspect`: what it says of good files, and that bad ones end in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import Tiny
from indexmem_edge import IndexMemError, ModelFileError, SidecarError
from indexmem_edge.cli.terminal import printable
from indexmem_edge.convert.sidecar import read_sidecar
from indexmem_edge.convert.writer import write_sidecar
from indexmem_edge.native import find
from support.commands import one_error, run
from support.sidecars import fingerprint, shape
from tiny.models import REFUSED

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a sidecar that fits, one that does not, and a damaged one."""
    from indexmem_edge.bench.synthetic import random_sidecar

    place = tmp_path_factory.mktemp("inspect")
    model, config = tiny("qwen3")
    (place / "m.gguf").write_bytes(model.read_bytes())
    mark = fingerprint(model)
    random_sidecar(place / "m.indexmem.gguf", shape(config), "retention", "q8_0", fingerprint=mark, mid_dim=32)
    random_sidecar(place / "m-other.indexmem.gguf", shape(config), "pairwise", fingerprint="f" * 16)
    (place / "m-cut.indexmem.gguf").write_bytes((place / "m.indexmem.gguf").read_bytes()[:500])
    return place


def examine(*paths: Path) -> dict[str, Any]:
    from indexmem_edge.cli import inspection

    return inspection.examine(*paths)


def shown(facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    from indexmem_edge.cli import inspection

    inspection.show(facts)
    return capsys.readouterr().out


def test_a_sidecar(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = examine(folder / "m.indexmem.gguf", folder / "m.gguf")
    assert (facts["what"], facts["schema_version"]) == ("sidecar", 1)
    assert facts["bytes"] == (folder / "m.indexmem.gguf").stat().st_size
    base = facts["base_model"]
    assert (base["architecture"], base["layers"], base["kv_heads"], base["heads"]) == ("qwen3", 2, 2, 6)
    assert base["fingerprint"] == facts["fits"]["fingerprint"] == fingerprint(folder / "m.gguf")
    assert facts["indexer"] == {
        "kind": "retention", "input": "attention_input", "trunk": "mlp", "mid_dim": 32, "norm_eps": 1e-05,
        "pos_slope": 0.001, "age_scale": 4096.0, "decay": True,
    }  # fmt: skip
    tensors = {t["name"]: t for t in facts["tensors"]}
    assert tensors["input_proj.weight"] == {
        "name": "input_proj.weight", "layers": 2, "shape": [64, 32], "type": "Q8_0", "bytes": 2 * 64 * 32 * 34 // 32,
    }  # fmt: skip
    assert len(tensors) == 8 and facts["memory"] == {"kind": "none"}
    text = shown(facts, capsys)
    for word in ("retention", "age_scale", "4096", "Q8_0", "64 x 32", "fits", "m.gguf", "sha256", base["fingerprint"]):
        assert word in text


def test_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = examine(folder / "m.gguf")
    assert (facts["what"], facts["architecture"], facts["trained_length"]) == ("model", "qwen3", 4096)
    assert facts["bounded"] and facts["why_not"] is None
    assert facts["kv_bytes_per_1024"] == 1024 * 2 * 2 * (64 + 64) * 2
    assert facts["fingerprint"] == fingerprint(folder / "m.gguf")
    found = {s["file"]: s for s in facts["sidecars"]}
    assert list(found) == ["m.indexmem.gguf", "m-cut.indexmem.gguf", "m-other.indexmem.gguf"]
    assert [s["fits"] for s in found.values()] == [True, False, False]
    assert "ffffffffffffffff" in found["m-other.indexmem.gguf"]["why_not"]
    text = shown(facts, capsys)
    for word in (
        "qwen3",
        "2 layers",
        "6 heads",
        "2 KV heads of 64",
        "4,096 tokens",
        "1.0 MiB per 1024 slots",
        "F32",
        "fits",
    ):
        assert word in text


@pytest.mark.parametrize("arch", REFUSED)
def test_a_model_that_cannot_be_bounded(tiny: Tiny, arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = examine(tiny(arch)[0])
    assert not facts["bounded"] and facts["kv_bytes_per_1024"] is None
    assert arch in facts["why_not"] and "not possible" in shown(facts, capsys)


def test_what_layers_and_heads_need_of_a_budget(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = read_sidecar(folder / "m.indexmem.gguf").checkpoint  # of two layers of two heads
    write_sidecar(tmp_path / "layers.gguf", replace(checkpoint, budget_share=(1.0, 2.5), budget_least=(0, 0)))
    text = " ".join(shown(examine(tmp_path / "layers.gguf"), capsys).split())
    assert "share of a budget 2.5: layer 1" in text and "entries before the same for all" in text
    write_sidecar(tmp_path / "heads.gguf", replace(checkpoint, budget_share=(1.0, 2.0, 1.0, 2.0), budget_least=(0, 90, 0, 0)))
    text = " ".join(shown(examine(tmp_path / "heads.gguf"), capsys).split())
    assert "share of a budget 2: layer.head 0.1 1.1" in text and "entries before 90: layer.head 0.1" in text


def test_as_json(folder: Path) -> None:
    result = run("inspect", str(folder / "m.indexmem.gguf"), "-m", str(folder / "m.gguf"), "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["indexer"]["kind"] == "retention"
    result = run("inspect", str(folder / "m.gguf"))
    assert result.returncode == 0 and "bounded cache" in result.stdout


def test_errors_are_one_line(folder: Path, tmp_path: Path) -> None:
    one_error(run("inspect", str(folder / "m-cut.indexmem.gguf")), "m-cut.indexmem.gguf")
    one_error(run("inspect", str(folder / "m-other.indexmem.gguf"), "-m", str(folder / "m.gguf")), "ffffffffffffffff")
    one_error(run("inspect", str(tmp_path / "none.gguf")), "does not exist")
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
    one_error(run("inspect", str(junk)), "junk.gguf")


def test_files_of_other_kinds(folder: Path, tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null"), Path(__file__)):
        with pytest.raises(ModelFileError):
            examine(path)
    with pytest.raises(SidecarError, match="model"):
        examine(folder / "m.gguf", folder / "m.gguf")  # a model where a sidecar is meant
    with pytest.raises(ModelFileError):
        examine(folder / "m.indexmem.gguf", Path(__file__))


def test_no_truncation_gets_through(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "m.indexmem.gguf").read_bytes()
    for n in range(4, len(whole), len(whole) // 50):
        (tmp_path / "x.indexmem.gguf").write_bytes(whole[:n])
        with pytest.raises(IndexMemError):
            examine(tmp_path / "x.indexmem.gguf")


def test_text_out_of_a_file_cannot_drive_the_terminal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = b"indexmem-edge, random weights"
    nasty = "\x1b[31m[red]\r\n\u202e\x07\x9b2J".encode()
    bad = tmp_path / "nasty.gguf"
    bad.write_bytes((folder / "m.indexmem.gguf").read_bytes().replace(tool, nasty.ljust(len(tool), b"\xff")))
    facts = examine(bad)
    text = shown(facts, capsys)
    assert r"\x1b[31m[red]\r\n\u202e\x07" in text
    assert not any(c in text for c in "\x1b\r\x07\x9b\u202e")
    assert "\x1b" not in json.dumps(facts)


def test_printable() -> None:
    assert printable("naïve 木 text") == "naïve 木 text"
    assert printable("\x1b]0;\u2028\ud800\u202e") == r"\x1b]0;\u2028\ud800\u202e"


def test_a_session(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it needs, with names that come from the file escaped; another model, and damage, in one line."""
    from indexmem_edge import Llama
    from indexmem_edge.sessions.file import SessionData, read, write

    with Llama(folder / "m.gguf", kv_budget=96, kv_window=16, n_ubatch=32, indexmem="off", verbose=False) as llm:
        llm.prefill([3 + i % 200 for i in range(60)])
        llm.save_session(tmp_path / "s", extra={"messages": []}, checkpoints=True)
    facts = examine(tmp_path / "s", folder / "m.gguf")
    assert (facts["what"], facts["tokens"], facts["kept"], facts["messages"], facts["least_budget"]) == ("session", 60, 60, 0, 21)
    assert json.loads(run("inspect", str(tmp_path / "s"), "--json").stdout)["options"]["kv_budget"] == 96
    text = shown(facts, capsys)
    assert "--kv-budget 21 or more; 60 keeps all of it" in text and "fits" in text and "60, 60 kept" in text
    data = read(tmp_path / "s")
    write(tmp_path / "t", SessionData({**data.header, "model name": "a\x1b[2Jb"}, data.tokens, None, data.state))
    assert "\x1b" not in shown(examine(tmp_path / "t"), capsys)
    other = folder / "other.gguf"
    other.write_bytes((folder / "m.gguf").read_bytes() + b"0")
    one_error(run("inspect", str(tmp_path / "s"), "-m", str(other)), "another model file")
    damaged = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(damaged[:-1] + b"x")
    one_error(run("inspect", str(tmp_path / "s")), "damaged")
