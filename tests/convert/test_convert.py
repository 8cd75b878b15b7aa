"""Every source format becomes a sidecar that reads back as its tensors; everything else is refused with the reason."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexmem_edge.convert import (
    ConvertError,
    ReadOptions,
    read_checkpoint,
    read_sidecar,
    read_source,
    write_checkpoint,
    write_sidecar,
)
from indexmem_edge.convert.model import Checkpoint
from support import convert_samples as samples
from support.convert_samples import Sample

SAMPLES: dict[str, Callable[[Path], Sample]] = {
    "indexmem": lambda folder: samples.golden("tiny"),
    "indexmem-bf16": lambda folder: samples.golden("tiny_bf16"),
    "indexmem-linear": lambda folder: samples.golden("tiny_linear"),
    "indexmem-nodecay": lambda folder: samples.golden("tiny_nodecay"),
    "indexmem-legacy": lambda folder: samples.golden("tiny_legacy"),
    "v1": samples.v1,
    "v1-two-files": lambda folder: samples.v1(folder, files=2),
    "v1-indexer": lambda folder: samples.v1(folder, "indexer", reduce="max", query_count=7),
    "v1-safetensors": lambda folder: samples.v1(folder, torch=False),
    "kvzap": samples.kvzap,
    "kvzap-linear": lambda folder: samples.kvzap(folder, 0),
    "kvzap-file": lambda folder: samples.kvzap(folder, as_folder=False),
    "fast-kvzip": samples.fast_kvzip,
}
NO_TORCH = ("v1-safetensors", "kvzap")


@pytest.fixture(params=SAMPLES)
def sample(request: pytest.FixtureRequest, tmp_path: Path) -> Sample:
    if not request.param.startswith(NO_TORCH):
        pytest.importorskip("torch")
    made = SAMPLES[request.param](tmp_path)
    if request.param == "v1-indexer":
        made.constants |= {"reduce": "max", "query_count": 7}
    return made


def same_constants(found: Any, expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        single = isinstance(value, (float, list)) and not isinstance(value, bool)
        assert found[name] == (pytest.approx(value, rel=1e-7) if single else value), name


def same(checkpoint: Checkpoint, sample: Sample) -> None:
    assert (checkpoint.kind, checkpoint.memory) == (sample.kind, sample.memory)
    same_constants(checkpoint.constants, sample.constants)
    same_constants(checkpoint.memory_constants, sample.memory_constants)
    for found, expected in zip(checkpoint.layers, sample.layers):
        assert set(found) == set(expected)
        for name, array in expected.items():
            assert found[name].dtype == np.float32 and np.array_equal(found[name], array), name


def convert(sample: Sample, out: Path, outtype: str = "f32") -> Any:
    write_sidecar(out, read_source(sample.paths, sample.options), outtype)
    return read_sidecar(out)


def test_f32_sidecars_equal_their_source(sample: Sample, tmp_path: Path) -> None:
    sidecar = convert(sample, tmp_path / "s.gguf")
    same(sidecar.checkpoint, sample)
    assert sidecar.checkpoint.provenance.source_format == sample.format
    assert set(sidecar.types.values()) == {"F32"}
    geometry = sidecar.checkpoint.geometry
    assert (geometry.block_count, geometry.embedding_length, geometry.head_count_kv) == (2, samples.D, samples.H)


def test_the_gguf_package_reads_what_we_write(sample: Sample, tmp_path: Path) -> None:
    import gguf

    sidecar = convert(sample, tmp_path / "s.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "s.gguf")
    assert [t.name for t in reader.tensors] == list(sidecar.tensors)
    for t in reader.tensors:
        assert np.array_equal(gguf.quants.dequantize(t.data, t.tensor_type), sidecar.tensors[t.name])
        assert list(t.shape) == list(sidecar.tensors[t.name].shape[::-1])
    assert {k for k in reader.fields if not k.startswith("GGUF.")} == set(sidecar.metadata)


def test_exports_read_back(sample: Sample, tmp_path: Path) -> None:
    sidecar = convert(sample, tmp_path / "s.gguf")
    write_checkpoint(tmp_path / "c.safetensors", sidecar.checkpoint)
    assert read_checkpoint(tmp_path / "c.safetensors").provenance == sidecar.checkpoint.provenance
    again = read_source([tmp_path / "c.safetensors"])
    same(again, sample)
    assert again.provenance.source_format == "indexmem-edge"
    assert again.provenance.step == sidecar.checkpoint.provenance.step


@pytest.mark.parametrize("outtype, bits", [("f16", 11), ("q8_0", 8)])
def test_only_matrices_are_rounded_and_only_as_much_as_their_type_does(
    sample: Sample, tmp_path: Path, outtype: str, bits: int
) -> None:
    sidecar = convert(sample, tmp_path / "s.gguf", outtype)
    for i, layer in enumerate(sample.layers):
        for name, array in layer.items():
            found, kind = (part[f"blk.{i}.indexmem.{name}"] for part in (sidecar.tensors, sidecar.types))
            assert kind == (outtype.upper() if sidecar.checkpoint.shapes()[name][1] else "F32")
            # half a step; the scale of Q8_0 is itself an f16
            scale = np.abs(array) if outtype == "f16" else np.abs(array).max()
            assert (np.abs(found - array) <= (0 if kind == "F32" else scale * 2.0**-bits * 1.1 + 1e-7)).all()


def test_rows_that_q8_0_cannot_hold_are_f16(tmp_path: Path) -> None:
    sample = samples.kvzap(tmp_path, mid_dim=20)
    checkpoint = read_source(sample.paths)
    wide = replace(checkpoint, geometry=replace(checkpoint.geometry, embedding_length=40))
    layers = [{**layer, "in_proj.weight": layer["in_proj.weight"][:, :40].copy()} for layer in checkpoint.layers]
    written = write_sidecar(tmp_path / "s.gguf", replace(wide, layers=layers), "q8_0")
    assert written.fallbacks == ("in_proj.weight",)
    assert read_sidecar(tmp_path / "s.gguf").types["blk.0.indexmem.in_proj.weight"] == "F16"


def test_legacy_equals_native() -> None:
    pytest.importorskip("torch")
    native, legacy = (read_source(samples.golden(name).paths) for name in ("tiny", "tiny_legacy"))
    assert native.tensors().keys() == legacy.tensors().keys()
    assert all(np.array_equal(a, b) for a, b in zip(native.tensors().values(), legacy.tensors().values()))
    assert native.constants == legacy.constants and native.provenance.step == legacy.provenance.step == 600
    assert legacy.provenance.source_files == ("indexmem_tiny_legacy.pt", "indexmem_tiny_legacy.scorer.json")


def test_what_a_checkpoint_carries_arrives_in_the_sidecar(tmp_path: Path) -> None:
    sample = samples.kvzap(tmp_path)
    c = replace(
        read_source(sample.paths), architecture="qwen3", name="n", base_model="b", fingerprint="0123456789abcdef",
        defaults={"sinks": 4, "budget": 2048}, scores={"ruler.4k": 0.5},
    )  # fmt: skip
    c = replace(c, provenance=replace(c.provenance, trained_on="books", step=7))
    write_sidecar(tmp_path / "s.gguf", c)
    found = read_sidecar(tmp_path / "s.gguf").checkpoint
    for what in ("architecture", "name", "base_model", "fingerprint", "defaults", "scores", "provenance", "geometry"):
        assert getattr(found, what) == getattr(c, what), what
    write_checkpoint(tmp_path / "c.safetensors", found)
    assert read_checkpoint(tmp_path / "c.safetensors").scores == {"ruler.4k": 0.5}


# refusals


@pytest.fixture
def native() -> Any:
    """The content of a native checkpoint, to be spoiled."""
    pytest.importorskip("torch")
    return samples.load_torch(samples.GOLDEN / "indexmem_tiny.pt")


def refused(tmp_path: Path, content: Any, *words: str, options: ReadOptions = ReadOptions()) -> None:
    path = samples.save_torch(tmp_path / "bad.pt", content)
    with pytest.raises(ConvertError) as error:
        read_source([path], options)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind, words",
    [("conv", ("history", "mlp")), ("rnn", ("history",)), ("prefix", ("growing cache",)), ("kvzip", ("fast-kvzip",))],
)
def test_kinds_without_a_place_are_refused_with_the_reason(
    native: Any, tmp_path: Path, kind: str, words: tuple[str, ...]
) -> None:
    native["scorer_config"] |= {"kind": kind, "conv_kernel": 8}
    refused(tmp_path, native, f"{kind!r}", *words)


@pytest.mark.parametrize("key", ["backbone", "model"])
def test_joint_checkpoints_are_refused(native: Any, tmp_path: Path, key: str) -> None:
    refused(tmp_path, {**native, key: {}}, key, "unmodified base model")
    legacy = samples.load_torch(samples.GOLDEN / "indexmem_tiny_legacy.pt")
    refused(tmp_path, {**legacy, key: {}}, key, "unmodified base model")


SPOILED: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "no step": (lambda d: d.pop("step"), ("'step'", "missing")),
    "another key": (lambda d: d.update(extra=1), ("unexpected", "'extra'")),
    "no constant": (lambda d: d["scorer_config"].pop("age_scale"), ("'age_scale'", "missing")),
    "another constant": (lambda d: d["scorer_config"].update(more=1), ("unexpected", "'more'")),
    "unknown kind": (lambda d: d["scorer_config"].update(kind="big"), ("'big'",)),
    "kind of another type": (lambda d: d["scorer_config"].update(kind=[1]), ("a list",)),
    "width as text": (lambda d: d["scorer_config"].update(mid_dim="32"), ("mid_dim", "'32'")),
    "absurd width": (lambda d: d["scorer_config"].update(hidden_size=10**30), ("hidden_size", "18 digits")),
    "eps of zero": (lambda d: d["scorer_config"].update(norm_eps=0.0), ("norm_eps", "above 0")),
    "age without an end": (lambda d: d["scorer_config"].update(age_scale=float("inf")), ("age_scale", "finite")),
    "linear with a width": (lambda d: d["scorer_config"].update(kind="linear"), ("mid_dim",)),
    "no tensor": (lambda d: d["scorers"].pop("1.mid_norm.bias"), ("layer 1", "mid_norm.bias", "missing")),
    "no gate": (lambda d: d["scorers"].pop("1.gate_scale"), ("layer 1", "gate_scale", "missing")),
    "gate not announced": (lambda d: d["scorer_config"].update(gate_scale=False), ("layer 0", "'gate_scale'")),
    "decay not announced": (lambda d: d["scorer_config"].update(decay=False), ("layer 0", "'retention_proj.weight'")),
    "another tensor": (lambda d: d["scorers"].update({"0.z": d["scorers"]["0.gate_scale"]}), ("layer 0", "'z'")),
    "a gap": (lambda d: d["scorers"].update({"3.more": d["scorers"]["0.gate_scale"]}), ("layer 2", "contiguous")),
    "no layer": (lambda d: d["scorers"].update({"x.more": d["scorers"]["0.gate_scale"]}), ("'x.more'",)),
    "control characters": (lambda d: d["scorers"].update({"0.\x1b[2J": d["scorers"]["0.gate_scale"]}), ("\\x1b",)),
    "no text as a name": (lambda d: d["scorers"].update({1: 2}), ("no text",)),
    "no tensor but a number": (lambda d: d["scorers"].update({"0.in_norm.bias": 1.0}), ("in_norm.bias", "float")),
    "integers": (lambda d: d["scorers"].update({"0.in_norm.bias": np.zeros(64, int)}), ("in_norm.bias", "int64")),
    "another shape": (lambda d: d["scorers"].update({"0.in_norm.bias": np.zeros(63)}), ("in_norm", "[63]", "[64]")),
    "NaN": (lambda d: d["scorers"]["1.input_proj.weight"][3].fill_(float("nan")), ("layer 1", "input_proj", "NaN")),
    "infinity": (lambda d: d["scorers"]["0.in_norm.bias"].fill_(float("inf")), ("layer 0", "in_norm.bias")),
    "scorers as a list": (lambda d: d.update(scorers=[]), ("scorers", "dictionary")),
    "negative step": (lambda d: d.update(step=-1), ("step",)),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_native_checkpoints_are_read_strictly(native: Any, tmp_path: Path, what: str) -> None:
    spoil, words = SPOILED[what]
    spoil(native)
    refused(tmp_path, native, *words)


def test_a_view_larger_than_its_storage_is_refused_before_memory_is_taken(native: Any, tmp_path: Path) -> None:
    import torch

    native["scorers"]["0.in_norm.bias"] = torch.zeros(1).expand(10**9, 10**6)
    refused(tmp_path, native, "in_norm.bias", "more than is stored")


def test_a_legacy_checkpoint_needs_its_scorer_json(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / "old.pt"
    path.write_bytes((samples.GOLDEN / "indexmem_tiny_legacy.pt").read_bytes())
    config = (samples.GOLDEN / "indexmem_tiny_legacy.scorer.json").read_text()
    with pytest.raises(ConvertError, match=r"old\.scorer\.json or scorer\.json"):
        read_source([path])
    (tmp_path / "elsewhere.json").write_text(config)
    assert read_source([path, tmp_path / "elsewhere.json"]).kind == "retention"
    (tmp_path / "scorer.json").write_text(config)
    assert read_source([path]).kind == "retention"
    (tmp_path / "scorer.json").write_text(json.dumps({**json.loads(config), "kind": "rnn"}))
    with pytest.raises(ConvertError, match="history"):
        read_source([path])
    for text in ("{", "[1]", "[" * 100000):
        (tmp_path / "scorer.json").write_text(text)
        with pytest.raises(ConvertError, match="scorer.json"):
            read_source([path])


def test_a_legacy_gate_of_another_shape_and_type_becomes_one_number(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    content = samples.load_torch(samples.GOLDEN / "indexmem_tiny_legacy.pt")
    key = "model.layers.0.self_attn.indexer."
    content["indexer"][key + "gate_scale"] = torch.tensor(-0.5, dtype=torch.bfloat16)
    path = samples.save_torch(tmp_path / "old.pt", content)
    config = samples.GOLDEN / "indexmem_tiny_legacy.scorer.json"
    checkpoint = read_source([path, config])
    assert checkpoint.constants["gate_scale"][0] == -0.5
    assert "negative in layer 0:" in checkpoint.warnings()[0]
    del content["indexer"][key + "w_in.weight"]
    with pytest.raises(ConvertError, match=r"input_proj.weight \(w_in.weight in the source\) is missing"):
        read_source([samples.save_torch(path, content), config])


def test_v1_needs_the_number_of_kv_heads_and_a_memory_alone_its_model(tmp_path: Path) -> None:
    sample = samples.v1(tmp_path, torch=False)
    with pytest.raises(ConvertError, match="--kv-heads"):
        read_source(sample.paths)
    sample = samples.v1(tmp_path, "memory", torch=False)
    with pytest.raises(ConvertError, match="--model"):
        read_source(sample.paths, ReadOptions(kv_heads=3))


def test_v1_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    sample = samples.v1(tmp_path, files=2, torch=False)
    (tmp_path / "twice.safetensors").write_bytes(sample.paths[0].read_bytes())
    with pytest.raises(ConvertError, match="in both files"):
        read_source([sample.paths[0], tmp_path / "twice.safetensors"], sample.options)
    with pytest.raises(ConvertError, match="named twice"):
        read_source([sample.paths[0], sample.paths[0]], sample.options)
    name = "model.layers.0.self_attn.q_proj.weight"
    samples.save_safetensors(tmp_path / "twice.safetensors", {name: np.zeros(3, np.float32)})
    with pytest.raises(ConvertError, match=name):
        read_source([sample.paths[0], tmp_path / "twice.safetensors"], sample.options)


def test_options_of_v1_are_refused_elsewhere(tmp_path: Path) -> None:
    paths = samples.kvzap(tmp_path).paths
    with pytest.raises(ConvertError, match="--reduce"):
        read_source(paths, ReadOptions(reduce="max"))
    with pytest.raises(ConvertError, match="--kv-heads 4"):
        read_source(paths, ReadOptions(kv_heads=4))
    for options in (ReadOptions(kv_heads=3, reduce="median"), ReadOptions(kv_heads=3, query_count=2000)):
        with pytest.raises(ConvertError, match="pairwise"):
            read_source(samples.v1(tmp_path, torch=False).paths, options)


@pytest.mark.parametrize(
    "key, value, word",
    [
        ("n_modules", 3, "3 layers"), ("hidden_dim", None, "unexpected tensor"), ("input_dim", 65, "65"),
        ("output_dim", -1, "-1"),
    ],
)  # fmt: skip
def test_kvzap_configurations_that_contradict_the_weights_are_refused(
    tmp_path: Path, key: str, value: Any, word: str
) -> None:
    folder = samples.kvzap(tmp_path).paths[0]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ConvertError, match=word):
        read_source([folder])
    (folder / "config.json").unlink()
    for paths in ([folder], [folder / "model.safetensors"]):
        with pytest.raises(ConvertError, match="config.json"):
            read_source(paths)


def test_bfloat16_safetensors_are_widened_exactly_without_torch(tmp_path: Path) -> None:
    raw = np.arange(samples.H * samples.D, dtype=np.uint16) * 11 + 0x3000
    tensors = {
        "layers.0.weight": ("BF16", [samples.H, samples.D], raw.tobytes()),
        "layers.0.bias": ("F16", [3], bytes(6)),
    }
    header, data = {}, b""
    for name, (dtype, shape, part) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    config = {"input_dim": samples.D, "output_dim": samples.H, "n_modules": 1, "hidden_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_source([path]).layers[0]["out_proj.weight"]
    assert np.array_equal(found.view(np.uint32), raw.astype(np.uint32).reshape(found.shape) << 16)


# files that are not what they should be


class Touch:
    """Runs a command when it is unpickled without restrictions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused_and_not_executed(native: Any, tmp_path: Path) -> None:
    for content in (Touch(tmp_path / "pwned"), {**native, "training_config": Touch(tmp_path / "pwned")}):
        refused(tmp_path, content, "system", "could run code")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit itself
def test_other_archives_are_refused(native: Any, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.script(torch.nn.Identity()), path)
    with pytest.raises(ConvertError, match="TorchScript"):
        read_source([path])
    torch.save(native, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConvertError, match="since 1.6"):
        read_source([path])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    with pytest.raises(ConvertError, match="compressed"):
        read_source([path])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", b"c")
    with pytest.raises(ConvertError, match=r"data\.pkl"):
        read_source([path])


@pytest.mark.parametrize("name", ["indexmem_tiny.pt", "kvzap", "v1"])
def test_truncated_sources_are_refused(tmp_path: Path, name: str) -> None:
    if name == "indexmem_tiny.pt":
        pytest.importorskip("torch")
        source = samples.GOLDEN / name
    else:
        made = samples.kvzap(tmp_path) if name == "kvzap" else samples.v1(tmp_path, torch=False)
        source = made.paths[0] / "model.safetensors" if name == "kvzap" else made.paths[0]
    whole, path = source.read_bytes(), source if name == "kvzap" else tmp_path / f"cut{source.suffix}"
    for n in sorted({0, 1, 3, 4, 8, 9, 10, 100, 1000, *range(0, len(whole), 1 + len(whole) // 60), len(whole) - 1}):
        path.write_bytes(whole[:n])
        with pytest.raises(ConvertError):
            read_source([path], ReadOptions(kv_heads=3))


def test_flipped_bytes_of_a_torch_file_end_in_a_checkpoint_or_an_error(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    whole, path = (samples.GOLDEN / "indexmem_tiny_linear.pt").read_bytes(), tmp_path / "flipped.pt"
    for at in np.random.default_rng(5).integers(0, len(whole), 150).tolist():
        altered = bytearray(whole)
        altered[at] ^= 1 << at % 8
        path.write_bytes(altered)
        try:
            assert isinstance(read_source([path]), Checkpoint)
        except ConvertError:
            pass


def test_missing_torch_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConvertError, match="pip install --upgrade torch"):
        read_source([samples.GOLDEN / "indexmem_tiny.pt"])


def test_a_torch_that_can_run_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ConvertError, match="CVE-2025-32434"):
        read_source([samples.GOLDEN / "indexmem_tiny.pt"])


def test_files_of_no_use_are_refused(tmp_path: Path) -> None:
    for content, word in (
        (b"", "empty"),
        (b"hello world", "begins with"),
        (b"GGUF" + bytes(99), "GGUF"),
        (b"{}", "no known"),
    ):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(ConvertError, match=word):
            read_source([tmp_path / "f"])
    with pytest.raises(ConvertError, match="No such file"):
        read_source([tmp_path / "missing.pt"])
    with pytest.raises(ConvertError, match="folder with 0 .safetensors files and no config.json"):
        read_source([tmp_path])
    with pytest.raises(ConvertError, match="unknown format 'gptq'"):
        read_source([tmp_path / "f"], format="gptq")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConvertError, match="regular file"):
        read_source([tmp_path / "pipe"])
