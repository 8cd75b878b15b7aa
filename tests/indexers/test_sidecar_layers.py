"""Sidecars for some layers of a model: the list of docs/sidecar.md, written, read, refused and shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from indexmem_edge.convert import (
    Checkpoint,
    ConvertError,
    Geometry,
    Provenance,
    read_checkpoint,
    read_sidecar,
    write_checkpoint,
    write_sidecar,
)
from indexmem_edge.convert.cli import app

N, D, H = 6, 8, 2
ONLY = (2, 5)
T = gguf.GGUFValueType


def some_layers(only: tuple[int, ...] | None = ONLY, memory: bool = False) -> Checkpoint:
    """An indexer, and a residual memory if wanted, with other numbers in every layer."""
    rng, numbers = np.random.default_rng(0), range(N) if only is None else only

    def layer(il: int) -> dict[str, np.ndarray]:
        shapes = {"out_proj.weight": (H, D), "out_proj.bias": (H,)} | ({"phi_proj.weight": (3, 4)} if memory else {})
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} if il in numbers else {}

    constants = {"feature_dim": 3, "head_dim": 4, "eps": 1e-6} | {
        name: [float(il) for il in range(N)] for name in ("gate_logit", "eta_raw", "decay_logit")
    }
    constants["enabled"] = [il in numbers for il in range(N)]
    return Checkpoint(
        Geometry(N, D, H), "kvzap", {"mid_dim": 0}, [layer(il) for il in range(N)],
        Provenance("indexmem-edge", ("a",), ("0" * 64,)), architecture="gemma3", only=only,
        memory="residual" if memory else "none", memory_constants=constants if memory else {},
    )  # fmt: skip


@pytest.mark.parametrize("memory", [False, True])
def test_what_is_written_is_read(tmp_path: Path, memory: bool) -> None:
    c = some_layers(memory=memory)
    written = write_sidecar(tmp_path / "s.gguf", c, "f32")
    assert {row.count for row in written.rows} == {2}
    found = read_sidecar(tmp_path / "s.gguf")
    assert found.metadata["indexmem.schema_version"] == 2 and list(found.metadata["indexmem.layers"]) == [2, 5]
    assert {name.split(".")[1] for name in found.tensors} == {"2", "5"}
    write_checkpoint(tmp_path / "c.safetensors", found.checkpoint)
    for read in (found.checkpoint, read_checkpoint(tmp_path / "c.safetensors")):
        assert read.only == read.numbers == ONLY and read.geometry.block_count == N
        assert read.memory_constants == c.validated().memory_constants
        for ours, theirs in zip(read.layers, c.layers):
            assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], a) for name, a in theirs.items())


def test_a_memory_without_tensors(tmp_path: Path) -> None:
    c = replace(
        some_layers(), kind="none", constants={}, layers=[{}] * N, memory="centroid",
        memory_constants={"slot_count": 4, "enabled": [False] * 5 + [True], "gate": [1.0] * N},
    )  # fmt: skip
    write_sidecar(tmp_path / "s.gguf", c)
    assert read_sidecar(tmp_path / "s.gguf").checkpoint == c.validated()
    with pytest.raises(ConvertError, match="layer 1: centroid.enabled must be false there, the file is for the layers 2, 5"):
        replace(c, memory_constants={**c.memory_constants, "enabled": [False, True] * 3}).validated()


def test_a_file_for_all_layers_is_as_it_was(tmp_path: Path) -> None:
    """Also if somebody lists them all."""
    plain, listed = tmp_path / "a.gguf", tmp_path / "b.gguf"
    c = some_layers(None)
    write_sidecar(plain, c)
    write_sidecar(listed, replace(c, only=tuple(range(N))))
    assert plain.read_bytes() == listed.read_bytes() and b"indexmem.layers" not in plain.read_bytes()
    found = read_sidecar(plain)
    assert found.metadata["indexmem.schema_version"] == 1 and found.checkpoint.only is None


def rewritten(source: Path, target: Path, change: Callable[[str, Any], Any], drop: str = "", more: tuple[str, ...] = ()) -> Path:
    """A copy with other values, as (value, type, type of items), None for none; without a tensor, or with more."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "gemma3")
    fields = {name: f for name, f in reader.fields.items() if not name.startswith("GGUF.") and name != "general.architecture"}
    for name in [*fields, *(() if "indexmem.layers" in fields else ("indexmem.layers",))]:
        f = fields.get(name)
        old = None if f is None else (f.contents(), f.types[0], f.types[-1] if len(f.types) > 1 else None)
        if (new := change(name, old)) is not None:
            writer.add_key_value(name, *new)
    tensors = [t for t in reader.tensors if t.name != drop]
    for name, data in [*((t.name, t.data) for t in tensors), *((name, tensors[0].data) for name in more)]:
        writer.add_tensor(name, np.array(data))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return target


def listing(*numbers: int, kind: gguf.GGUFValueType = T.INT32) -> Callable[[str, Any], Any]:
    return lambda name, old: (list(numbers), T.ARRAY, kind) if name == "indexmem.layers" else old


def schema(n: int) -> Callable[[str, Any], Any]:
    return lambda name, old: (n, T.UINT32, None) if name == "indexmem.schema_version" else old


def unlisted(name: str, old: Any) -> Any:
    return None if name == "indexmem.layers" else old


def kept(name: str, old: Any) -> Any:
    return old


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "descending": ({"change": listing(5, 2)}, "must ascend"),
    "twice": ({"change": listing(2, 2)}, "must ascend"),
    "negative": ({"change": listing(-1, 5)}, "the number of a layer must be an integer from 0 to 5, found -1"),
    "beyond": ({"change": listing(2, 6)}, "from 0 to 5, found 6"),
    "of another type": ({"change": listing(2, 5, kind=T.UINT32)}, "u32 array, expected i32 array"),
    "with a layer that has no tensors": ({"change": listing(2, 4, 5)}, "layer 4: out_proj.weight is missing"),
    "without a layer that has some": ({"change": listing(2)}, "layer 5 has tensors, the file is for the layers 2"),
    "missing": ({"change": unlisted}, "it has schema 2 and no indexmem.layers"),
    "in schema 1": ({"change": schema(1)}, "it has schema 1 and indexmem.layers"),
    "in schema 3": ({"change": schema(3)}, "it has schema 3, this program reads up to 2"),
    "with a tensor too few": ({"change": kept, "drop": "blk.5.indexmem.out_proj.bias"}, "layer 5: out_proj.bias is missing"),
    "with a tensor elsewhere": ({"change": kept, "more": ("blk.0.indexmem.out_proj.bias",)}, "layer 0 has tensors"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_list_that_breaks_a_rule_is_refused(tmp_path: Path, how: str) -> None:
    write_sidecar(tmp_path / "s.gguf", some_layers(), "f32")
    assert read_sidecar(rewritten(tmp_path / "s.gguf", tmp_path / "same.gguf", kept)).checkpoint.only == ONLY
    arguments, message = BROKEN[how]
    with pytest.raises(ConvertError, match=re.escape(message)):
        read_sidecar(rewritten(tmp_path / "s.gguf", tmp_path / "changed.gguf", **arguments))


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="a list of one number or more, found none"):
        replace(some_layers(), only=()).validated()
    write_sidecar(tmp_path / "s.gguf", some_layers(), "f32")
    data = (tmp_path / "s.gguf").read_bytes()
    at = data.index(b"indexmem.layers") + len("indexmem.layers") + 4 + 4  # value type and type of items
    empty = data[:at] + bytes(8) + data[at + 8 + 2 * 4 :]
    (tmp_path / "empty.gguf").write_bytes(empty)
    with pytest.raises(ConvertError):
        read_sidecar(tmp_path / "empty.gguf")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"only": (5, 2)}, "must ascend"), ({"only": (2, 6)}, "from 0 to 5"), ({"only": (2,)}, "layer 5: 'out_proj"),
        ({"only": (1, 2, 5)}, "layer 1: out_proj.weight is missing"), ({"only": (True, 5)}, "an integer"),
        ({"only": "25"}, "a list of one number or more, found '25'"),
    ],
)  # fmt: skip
def test_checkpoints_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvertError, match=re.escape(message)):
        replace(some_layers(), **change).validated()


def test_metadata_of_our_own_checkpoint(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "c.safetensors"
    write_checkpoint(path, some_layers())
    tensors = load_file(path)
    for old, new, message in (
        ('"schema": 2', '"schema": 1', "it has schema 1 and layers"),
        ('"layers": [2, 5], ', "", "it has schema 2 and no layers"),
        ('"layers": [2, 5]', '"layers": [5, 2]', "must ascend"),
        ('"layers": [2, 5]', '"layers": 2', "a list of one number or more, found 2"),
    ):
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            text = file.metadata()["indexmem"]
        assert old in text
        save_file(tensors, tmp_path / "changed.safetensors", {"indexmem": text.replace(old, new)})
        with pytest.raises(ConvertError, match=re.escape(message)):
            read_checkpoint(tmp_path / "changed.safetensors")


def test_the_command_converts_there_and_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c.safetensors", some_layers())
    out = tmp_path / "s.gguf"
    told = CliRunner().invoke(app, [str(tmp_path / "c.safetensors"), "--out", str(out)])
    assert told.exit_code == 0 and "6 layers (the file is for 2, 5)" in told.output, told.output
    told = CliRunner().invoke(app, ["--export", str(tmp_path / "back.safetensors"), str(out)])
    assert told.exit_code == 0 and read_checkpoint(tmp_path / "back.safetensors").only == ONLY


def test_inspect_says_which_layers_are_covered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from indexmem_edge.native import find

    if find.library_file() is None:
        pytest.skip("the native library has not been built")
    from indexmem_edge.cli import inspection

    write_sidecar(tmp_path / "s.gguf", some_layers())
    facts = inspection._sidecar_facts(str(tmp_path / "s.gguf"), None)
    assert facts["base_model"]["covered"] == [2, 5] and facts["base_model"]["layers"] == N
    assert {t["layers"] for t in facts["tensors"]} == {2}
    inspection.show(facts)
    assert re.search(r"layers covered +2 of 6: 2, 5", capsys.readouterr().out)
    write_sidecar(tmp_path / "all.gguf", some_layers(None))
    facts = inspection._sidecar_facts(str(tmp_path / "all.gguf"), None)
    assert facts["base_model"]["covered"] is None
    inspection.show(facts)
    assert "covered" not in capsys.readouterr().out
