"""The sidecar and our own checkpoint under attack, the writer at its limits, and the table against docs/sidecar.md."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from indexmem_edge.convert import (
    Checkpoint,
    ConvertError,
    Geometry,
    Provenance,
    Sidecar,
    read_checkpoint,
    read_sidecar,
    read_source,
    write_checkpoint,
    write_sidecar,
)
from indexmem_edge.convert.spec import INDEXERS, MEMORIES, check_f32, check_needs, needs_of_heads
from support import convert_samples as samples

DOCS = Path(__file__).parents[2] / "docs" / "sidecar.md"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """An indexer and a memory: every kind of value is in its file."""
    sample = samples.v1(tmp_path, torch=False)
    c = read_source(sample.paths, sample.options)
    return replace(
        c, scores={"a": 1.5}, defaults={"sinks": 4}, base_model="base", provenance=replace(c.provenance, step=3)
    )


@pytest.fixture
def file(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    write_sidecar(tmp_path / "s.gguf", checkpoint, "q8_0")
    return tmp_path / "s.gguf"


def small_file(folder: Path) -> Path:
    layers = [{"out_proj.weight": np.ones((1, 2), np.float32), "out_proj.bias": np.zeros(1, np.float32)}]
    c = Checkpoint(Geometry(1, 2, 1), "kvzap", {"mid_dim": 0}, layers, Provenance("kvzap", ("a",), ("0" * 64,)))
    write_sidecar(folder / "small.gguf", c, force=True)
    return folder / "small.gguf"


def test_shares_of_a_budget(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """They come back as they were written; others are refused, by the writer and by the reader."""
    n, path = checkpoint.geometry.block_count, tmp_path / "shares.gguf"
    shares = tuple(float(1 + i % 4) for i in range(n))
    write_sidecar(path, replace(checkpoint, budget_share=shares))
    assert read_sidecar(path).checkpoint.budget_share == shares
    write_sidecar(path, checkpoint, force=True)
    assert read_sidecar(path).checkpoint.budget_share is None
    write_checkpoint(tmp_path / "shares.safetensors", replace(checkpoint, budget_share=shares))
    assert read_checkpoint(tmp_path / "shares.safetensors").budget_share == shares
    for wrong in ((1.0,) * (n + 1), (), (0.0,) * n, (65.0,) * n, (math.nan,) * n, (1.0,) * (n - 1) + ("1",), 1.0):
        with pytest.raises(ConvertError, match="budget_share"):
            replace(checkpoint, budget_share=wrong).validated()
    many = Checkpoint(
        Geometry(5, 2, 1), "kvzap", {"mid_dim": 0},
        [{"out_proj.weight": np.ones((1, 2), np.float32), "out_proj.bias": np.zeros(1, np.float32)}] * 5,
        Provenance("kvzap", ("a",), ("0" * 64,)), budget_share=(1.0, 2.0, 3.0, 4.0, 5.0),
    )  # fmt: skip
    with pytest.raises(ConvertError, match="5 different pairs of values: expected at most 4"):
        many.validated()
    with pytest.raises(ConvertError, match="5 different pairs of values"):
        replace(many, budget_share=(1.0, 2.0, 3.0, 4.0, 4.0), budget_least=(0, 0, 0, 0, 7)).validated()
    assert replace(many, budget_share=(1.0, 2.0, 3.0, 4.0, 4.0)).validated().budget_share == (1.0, 2.0, 3.0, 4.0, 4.0)
    with pytest.raises(ConvertError, match="without an indexer"):
        replace(checkpoint, kind="none", constants={}, budget_share=shares).validated()


def test_entries_that_layers_get_first(checkpoint: Checkpoint, tmp_path: Path) -> None:
    n, path = checkpoint.geometry.block_count, tmp_path / "least.gguf"
    least = (0,) * (n - 1) + (1 << 20,)
    write_sidecar(path, replace(checkpoint, budget_least=least))
    assert read_sidecar(path).checkpoint.budget_least == least and read_sidecar(path).checkpoint.budget_share is None
    write_checkpoint(tmp_path / "least.safetensors", replace(checkpoint, budget_least=least))
    assert read_checkpoint(tmp_path / "least.safetensors").budget_least == least
    for wrong in ((0,) * (n + 1), (), (-1,) * n, ((1 << 20) + 1,) * n, (1.5,) * n, (True,) * n, 7):
        with pytest.raises(ConvertError, match="budget_least"):
            replace(checkpoint, budget_least=wrong).validated()
    with pytest.raises(ConvertError, match="budget_least without an indexer"):
        replace(checkpoint, kind="none", constants={}, budget_least=least).validated()


def test_needs_of_heads(tmp_path: Path) -> None:
    """One value a KV head in the place of one a layer; not where an indexer ranks for all heads of a layer together."""
    n, heads, path = 3, 2, tmp_path / "heads.gguf"
    checkpoint = Checkpoint(
        Geometry(n, 32, heads), "kvzap", {"mid_dim": 0},
        [{"out_proj.weight": np.ones((heads, 32), np.float32), "out_proj.bias": np.zeros(heads, np.float32)}] * n,
        Provenance("kvzap", ("a",), ("0" * 64,)),
    )  # fmt: skip
    shares, least = tuple(float(1 + i % 2) for i in range(n * heads)), tuple(i % 2 for i in range(n * heads))
    apart = replace(checkpoint, budget_share=shares, budget_least=least)
    write_sidecar(path, apart)
    found = read_sidecar(path).checkpoint
    assert (found.budget_share, found.budget_least) == (shares, least)
    write_checkpoint(tmp_path / "heads.safetensors", apart)
    assert read_checkpoint(tmp_path / "heads.safetensors").budget_share == shares
    mixed = replace(checkpoint, budget_share=shares, budget_least=(3,) * n).validated()  # one of each kind
    assert len(mixed.budget_share or ()) == n * heads and len(mixed.budget_least or ()) == n
    for wrong in (shares[:-1], (*shares, 1.0), (0.0, *shares[1:])):
        with pytest.raises(ConvertError, match="budget_share"):
            replace(checkpoint, budget_share=wrong).validated()
    assert needs_of_heads(None, 2, 2, 1.0) == [1.0] * 4 and needs_of_heads((5, 6), 2, 2, 0) == [5, 5, 6, 6]
    assert needs_of_heads((1, 2, 3, 4), 2, 2, 0) == [1, 2, 3, 4] and needs_of_heads((7, 8), 2, 1, 0) == [7, 8]
    with pytest.raises(ConvertError, match="tell KV heads of layer 1 apart, and this indexer ranks for all heads"):
        check_needs((1.0, 1.0, 2.0, 1.0), None, 2, 2, (0, 1), ranks_heads=False)
    assert check_needs((1.0, 1.0, 2.0, 2.0), None, 2, 2, (0, 1), ranks_heads=False)[0] == (1.0, 1.0, 2.0, 2.0)
    assert check_needs((1.0, 1.0, 2.0, 1.0), None, 2, 2, (0,), ranks_heads=False)[1] is None  # the file is not for the other layer


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = (path := small_file(tmp_path)).read_bytes()
    last = 4  # bytes of the last tensor; what follows is padding
    for n in range(len(whole) - 32 + last):
        path.write_bytes(whole[:n])
        with pytest.raises(ConvertError, match="not a readable sidecar"):
            read_sidecar(path)


def test_appended_bytes_are_refused(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ConvertError, match="expected a file of"):
        read_sidecar(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_end_in_a_sidecar_or_an_error(file: Path, data: st.DataObject) -> None:
    whole = bytearray(file.read_bytes())
    header = whole.index(b"blk.1.indexmem.phi_proj") + 60
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, header))] ^= data.draw(st.integers(1, 255))
    altered = file.with_name("altered.gguf")
    altered.write_bytes(whole)
    try:
        assert isinstance(read_sidecar(altered), Sidecar)
    except ConvertError as error:
        assert str(error).isprintable()


def test_every_byte_of_a_small_header_set_to_its_extremes(tmp_path: Path) -> None:
    whole = (path := small_file(tmp_path)).read_bytes()
    for at in range(len(whole)):
        for value in (0x00, 0xFF, whole[at] ^ 0x80):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                assert isinstance(read_sidecar(path), Sidecar)
            except ConvertError:
                pass


def test_a_huge_array_does_not_take_hours(tmp_path: Path) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    for item in (0, 7, 8, 9):
        path = tmp_path / "huge.gguf"
        path.write_bytes(head + struct.pack("<IIQ", 9, item, 1 << 60) + bytes(64))
        with pytest.raises(ConvertError):
            read_sidecar(path)


@pytest.mark.parametrize("content", [b"", b"G", b"GGUF", b"GGUF" + b"\xff" * 100, b"\x80\x04}q\x00.", bytes(4096)])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ConvertError):
        read_sidecar(tmp_path / "f")
    with pytest.raises(ConvertError):
        read_checkpoint(tmp_path / "f")


def write_changed(monkeypatch: pytest.MonkeyPatch, path: Path, checkpoint: Checkpoint, key: str, new: Any) -> None:
    """Writes a sidecar with another value, and its type, under one key; None leaves the key out."""
    add = gguf.GGUFWriter.add_key_value

    def changed(self: Any, name: str, *value: Any, **more: Any) -> None:
        if name != key or new is not None:
            add(self, name, *(new if name == key else value), **({} if name == key else more))

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_key_value", changed)
        write_sidecar(path, checkpoint)


T = gguf.GGUFValueType
CHANGED: dict[str, tuple[Any, str]] = {
    "general.type": (("model", T.STRING), "expected 'adapter'"),
    "adapter.type": (("lora", T.STRING), "expected 'indexmem'"),
    "indexmem.schema_version": ((2, T.UINT32), "schema 2"),
    "indexmem.block_count": ((3, T.UINT32), "3 layers"),
    "indexmem.embedding_length": ((64, T.INT32), "i32, expected u32"),
    "indexmem.attention.head_count_kv": ((0, T.UINT32), "head_count_kv"),
    "indexmem.attention.key_length": ((32, T.UINT32), "heads of 32"),
    "indexmem.indexer.kind": (("big", T.STRING), "unknown indexer kind 'big'"),
    "indexmem.indexer.input": (("residual", T.STRING), "'residual'"),
    "indexmem.memory.kind": (("none", T.STRING), "phi_proj.weight"),
    "indexmem.pairwise.reduce": (("median", T.STRING), "mean, max"),
    "indexmem.pairwise.query_count": ((1025, T.UINT32), "1 to 1024"),
    "indexmem.pairwise.norm_eps": ((float("nan"), T.FLOAT32), "norm_eps"),
    "indexmem.residual.eps": (None, "eps is missing"),
    "indexmem.provenance.tool": (None, "tool is missing"),
    "indexmem.provenance.source_files": (None, "source_files is missing"),
}


@pytest.mark.parametrize("key", CHANGED)
def test_keys_that_break_a_rule_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    new, word = CHANGED[key]
    write_changed(monkeypatch, tmp_path / "changed.gguf", checkpoint, key, new)
    with pytest.raises(ConvertError, match=re.escape(word)):
        read_sidecar(tmp_path / "changed.gguf")


def test_what_only_the_file_says_of_itself_may_hold_anything(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, key = tmp_path / "changed.gguf", "general.base_model.0.name"
    write_changed(monkeypatch, path, checkpoint, key, ("\x1b[2J\n", T.STRING))
    found = read_sidecar(path).checkpoint
    assert found.base_model == "\x1b[2J\n"  # data; what prints it escapes it
    with pytest.raises(ConvertError, match=r"control characters: '\\x1b"):
        write_checkpoint(tmp_path / "c.safetensors", found)


# the writer


def test_weights_too_large_for_the_type_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    layers = [dict(layer) for layer in checkpoint.layers]
    layers[1]["w_k.weight"] = np.full_like(layers[1]["w_k.weight"], 1e9)
    large = replace(checkpoint, layers=layers)
    for outtype in ("f16", "q8_0"):
        with pytest.raises(ConvertError, match="layer 1: w_k.weight .* --outtype f32"):
            write_sidecar(tmp_path / "s.gguf", large, outtype)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*.tmp"))
    write_sidecar(tmp_path / "s.gguf", large, "f32")


def test_a_full_disk_leaves_what_was_there(
    file: Path, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, names = file.read_bytes(), sorted(os.listdir(tmp_path))

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(ConvertError, match="No space left"):
        write_sidecar(file, checkpoint, force=True)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConvertError, match="No space left"):
        write_checkpoint(tmp_path / "c.safetensors", checkpoint)
    assert file.read_bytes() == before and sorted(os.listdir(tmp_path)) == names


def test_files_are_not_overwritten_unless_asked(file: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="--force"):
        write_sidecar(file, checkpoint)
    write_sidecar(file, checkpoint, force=True)
    for path, word in ((tmp_path, "is a folder"), (tmp_path / "no" / "f", "does not exist")):
        with pytest.raises(ConvertError, match=word):
            write_sidecar(path, checkpoint, force=True)
    assert file.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022) or 0o022)


def test_a_checkpoint_that_breaks_a_rule_is_not_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    p, c = checkpoint.provenance, checkpoint
    for bad, word in (
        (replace(c, provenance=replace(p, source_files=(), source_sha256=())), "no source file"),
        (replace(c, provenance=replace(p, source_files=("a/b",), source_sha256=("0" * 64,))), "without folders"),
        (replace(c, provenance=replace(p, source_sha256=("0" * 63,))), "64 lower-case"),
        (replace(c, provenance=replace(p, source_format="gptq")), "unknown source format"),
        (replace(c, name="a\x07"), "control characters"),
        (replace(c, architecture=""), "architecture is empty"),
        (replace(c, fingerprint="0" * 15), "16 lower-case"),
        (replace(c, defaults={"speed": 1}), "unknown default"),
        (replace(c, scores={"a b": 1.0}), "name of a score"),
        (replace(c, scores={"a": float("nan")}), "scores.a"),
        (replace(c, kind="none", memory="none", constants={}, memory_constants={}), "neither"),
        (replace(c, layers=c.layers[:1]), "expected 2 layers"),
    ):
        with pytest.raises(ConvertError, match=word):
            write_sidecar(tmp_path / "s.gguf", bad)
    assert not (tmp_path / "s.gguf").exists()


# our own checkpoint


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_of_a_checkpoint_end_in_a_checkpoint_or_an_error(
    checkpoint: Checkpoint, tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, checkpoint, force=True)
    whole = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 2))):
        whole[data.draw(st.integers(0, end))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        assert isinstance(read_checkpoint(path), Checkpoint)
    except ConvertError:
        pass


@pytest.mark.parametrize(
    "text, word",
    [
        ("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "'schema'"), ('{"schema": 2}', "schema 2"),
        ('{"schema": true}', "schema True"), ("[" * 100000, "not JSON"),
        ('{"schema": 1, "memory": 3}', "memory must be"),
        ('{"schema": 1, "memory": {}, "geometry": {"layers": 1}}', "'layers'"),
        ('{"schema": 1, "memory": {}, "geometry": {"block_count": 1}}', "'embedding_length'"),
    ],
)  # fmt: skip
def test_metadata_of_a_checkpoint_are_checked(tmp_path: Path, text: str, word: str) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "c.safetensors"
    save_file({"blk.0.indexmem.out_proj.weight": np.zeros((1, 2), np.float32)}, path, {"indexmem": text})
    with pytest.raises(ConvertError, match=re.escape(word)):
        read_checkpoint(path)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_constants_are_as_exact_as_a_file_holds_them(value: float) -> None:
    assert check_f32("x", value) == value == json.loads(json.dumps(check_f32("x", value)))


# a memory without tensors


CENTROID = {"slot_count": 64, "enabled": [True, False], "gate": [0.5, 1.0]}


def test_a_memory_alone_needs_no_tensor(tmp_path: Path) -> None:
    c = Checkpoint(
        Geometry(2, 8, 1), "none", {}, [{}, {}], Provenance("indexmem-edge", ("a.txt",), ("0" * 64,)),
        memory="centroid", memory_constants=CENTROID,
    )  # fmt: skip
    write_sidecar(tmp_path / "s.gguf", c)
    assert read_sidecar(tmp_path / "s.gguf").checkpoint == c
    write_checkpoint(tmp_path / "c.safetensors", c)
    assert read_checkpoint(tmp_path / "c.safetensors") == c


def test_it_takes_the_place_of_the_memory_beside_an_indexer(checkpoint: Checkpoint, tmp_path: Path) -> None:
    layers = [{name: a for name, a in layer.items() if name != "phi_proj.weight"} for layer in checkpoint.layers]
    c = replace(checkpoint, memory="centroid", memory_constants=CENTROID, layers=layers).validated()
    write_sidecar(tmp_path / "s.gguf", c, "f32")
    found = read_sidecar(tmp_path / "s.gguf").checkpoint
    assert (found.memory, found.memory_constants) == ("centroid", CENTROID)
    assert found.constants == c.constants and found.tensors().keys() == c.tensors().keys()
    with pytest.raises(ConvertError, match="phi_proj.weight"):
        replace(c, layers=checkpoint.layers).validated()


@pytest.mark.parametrize(
    "changed, word",
    [
        ({"slot_count": 0}, "1 to 4096"), ({"slot_count": 4097}, "1 to 4096"),
        ({"gate": [1.0, 0.0]}, "gate[1] must be a finite number above 0"),
        ({"gate": [1.0]}, "one value for each of 2 layers"), ({"enabled": [1, 0]}, "true or false"),
    ],
)  # fmt: skip
def test_its_constants_are_checked(checkpoint: Checkpoint, changed: dict[str, Any], word: str) -> None:
    constants = {**CENTROID, **changed}
    with pytest.raises(ConvertError, match=re.escape(word)):
        replace(checkpoint, memory="centroid", memory_constants=constants).validated()


# the table


def _documented(heading: str) -> tuple[set[str], set[str], dict[str, bool]]:
    """Keys, tensors, and which tensors are matrices, of one kind's section of the page."""
    text = DOCS.read_text()
    section = re.split(r"\n\*\*`|\n##", text.split(f"\n**`{heading}`**")[1])[0]
    keys, tensors, matrices = set(), set(), {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = re.findall(r"`([^`]+)`", cells[0]) if line.startswith("|") else []
        if any(name.startswith("indexmem.") for name in found):
            keys |= {name.rpartition(".")[2] for name in found}
        elif found and found[0] != "blk.<layer>.indexmem.":
            tensors |= set(found)
            marks = [mark.strip() for mark in cells[2].split(",")]
            matrices |= dict(
                zip(
                    found,
                    [mark == "M" for mark in marks * len(found)] if len(marks) == 1 else [m == "M" for m in marks],
                )
            )
    return keys, tensors, matrices


@pytest.mark.parametrize("kind", [k for k in (*INDEXERS, *MEMORIES) if k != "none"])
def test_the_table_is_the_one_of_the_page(kind: str) -> None:
    keys, tensors, matrices = _documented(kind)
    spec = {**INDEXERS, **MEMORIES}[kind]
    assert keys == {c.name for c in spec.constants}
    assert tensors == {t.name for t in spec.tensors}
    assert matrices == {t.name: t.matrix for t in spec.tensors}
