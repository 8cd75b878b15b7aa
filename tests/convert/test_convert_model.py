"""The base model: geometry that is compared, and the fingerprint."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from indexmem_edge.convert import ConvertError, ReadOptions, bind, read_base_model, read_source
from indexmem_edge.errors import ModelFileError
from indexmem_edge.files.fingerprint import fnv1a64, norms_fingerprint
from support import convert_samples as samples
from tiny.models import write_model

SHAPE = {
    "n_embd": samples.D,
    "n_head": samples.N_HEAD,
    "n_head_kv": samples.H,
    "head_dim": samples.HEAD_DIM,
    "n_layer": 2,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "base.gguf", "llama", **SHAPE)
    return tmp_path / "base.gguf"


def test_known_values_of_fnv1a64() -> None:
    assert [fnv1a64(data) for data in (b"", b"a", b"foobar")] == [
        0xCBF29CE484222325,
        0xAF63DC4C8601EC8C,
        0x85944171F73967E8,
    ]


def test_the_fingerprint_is_over_names_and_bytes_in_the_order_of_names() -> None:
    expected = fnv1a64(b"a.norm.weight\0\1\2\3\4" + b"b_norm.weight\0\5\6\7\x08")
    norms = [("b_norm.weight", b"\5\6\7\x08"), ("a.norm.weight", b"\1\2\3\4")]
    assert norms_fingerprint(norms) == norms_fingerprint(norms[::-1]) == f"{expected:016x}"


def test_a_model_says_its_geometry_and_fingerprint(model: Path) -> None:
    base = read_base_model(model)
    assert base.geometry.to_dict() == {
        "block_count": 2, "embedding_length": 64, "head_count_kv": 3, "head_count": 9, "key_length": 16,
    }  # fmt: skip
    assert (base.architecture, base.name) == ("llama", "tiny")
    norms = [(t.name, t.data.tobytes()) for t in gguf.GGUFReader(model).tensors if t.name.endswith("norm.weight")]
    assert len(norms) == 5 and base.fingerprint == norms_fingerprint(norms)
    assert read_base_model(model, fingerprint=False).fingerprint is None


@pytest.mark.parametrize("arch", ["qwen35-draft", "deepseek2-draft"])
def test_layers_that_guess_ahead_are_no_layers_of_the_model(tmp_path: Path, arch: str) -> None:
    config = write_model(tmp_path / "m.gguf", arch)
    assert config.draft_layers > 0 and read_base_model(tmp_path / "m.gguf").geometry.block_count == config.n_layer


def test_the_fingerprint_survives_quantisation_and_tells_weights_apart(tmp_path: Path) -> None:
    for name, more in (("base", {}), ("q", {"tensor_type": "Q8_0"}), ("other", {"seed": 1})):
        write_model(tmp_path / f"{name}.gguf", "llama", **{**SHAPE, "n_head": 6, **more})  # rows of 96 for Q8_0
    first, same, other = (read_base_model(tmp_path / f"{x}.gguf").fingerprint for x in ("base", "q", "other"))
    assert first == same != other


def test_a_checkpoint_takes_what_the_model_says(model: Path, tmp_path: Path) -> None:
    base = read_base_model(model)
    checkpoint = read_source(samples.kvzap(tmp_path).paths, ReadOptions(base))
    assert (checkpoint.architecture, checkpoint.base_model) == ("llama", "tiny")
    assert checkpoint.geometry == base.geometry and checkpoint.fingerprint == base.fingerprint
    memory = samples.v1(tmp_path, "memory", torch=False)
    assert read_source(memory.paths, ReadOptions(base)).geometry == base.geometry  # it says neither width nor heads


@pytest.mark.parametrize(
    "shape, word",
    [
        ({"n_layer": 3}, "block_count 2, this one has 3"),
        ({"n_embd": 96}, "embedding_length 64, this one has 96"),
        ({"n_head_kv": 9}, "head_count_kv 3, this one has 9"),
        ({"head_dim": 32}, "key_length 16, this one has 32"),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, shape: dict[str, int], word: str) -> None:
    write_model(tmp_path / "base.gguf", "llama", **{**SHAPE, **shape})
    sample = samples.v1(tmp_path, torch=False)
    with pytest.raises(ConvertError, match=word):
        read_source(sample.paths, ReadOptions(read_base_model(tmp_path / "base.gguf"), kv_heads=3))


def test_another_architecture_and_another_fingerprint_are_refused(model: Path, tmp_path: Path) -> None:
    base = read_base_model(model)
    checkpoint = read_source(samples.kvzap(tmp_path).paths)
    with pytest.raises(ConvertError, match="architecture 'qwen3', the model is 'llama'"):
        bind(replace(checkpoint, architecture="qwen3"), base)
    with pytest.raises(ConvertError, match="fine-tune"):
        bind(replace(checkpoint, fingerprint="0" * 16), base)
    assert bind(replace(checkpoint, fingerprint="0" * 16), replace(base, fingerprint=None)).fingerprint is None


def test_heads_that_differ_between_layers_are_refused(tmp_path: Path) -> None:
    def write(heads: Any, **more: Any) -> Path:
        writer = gguf.GGUFWriter(path := tmp_path / "m.gguf", "llama")
        writer.add_block_count(2)
        writer.add_embedding_length(64)
        writer.add_head_count(4)
        if heads is not None:
            writer.add_head_count_kv(heads)
        for key, value in more.items():
            writer.add_uint16(key.replace("_", "."), value)
        writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    assert read_base_model(write([2, 2])).geometry.head_count_kv == 2
    assert read_base_model(write(None)).geometry.to_dict()["head_count_kv"] == 4
    assert read_base_model(write(2)).geometry.key_length == 16
    assert read_base_model(write([0, 2])).geometry.head_count_kv == 2  # the first has no attention
    with pytest.raises(ConvertError, match="head_count_kv must be an integer from 1"):
        read_base_model(write([0, 0]))
    with pytest.raises(ConvertError, match="differs between layers"):
        read_base_model(write([2, 1]))
    with pytest.raises(ConvertError, match="split model"):
        read_base_model(write(2, split_count=3))
    assert read_base_model(write(2, split_count=3), fingerprint=False).fingerprint is None


def test_files_that_are_no_model_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        read_base_model(tmp_path / "missing.gguf")
    whole = model.read_bytes()
    head = whole.index(b"tokenizer.ggml.model")  # what is compared comes before the vocabulary
    (tmp_path / "cut.gguf").write_bytes(whole[:head])
    with pytest.raises(ConvertError, match="truncated"):
        read_base_model(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole[: -320 * 64 * 4])  # without the last matrix
    with pytest.raises(ConvertError, match="begins beyond the file"):
        read_base_model(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(ConvertError, match="general.architecture"):
        read_base_model(tmp_path / "cut.gguf")
