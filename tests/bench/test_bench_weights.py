"""Copies of models with plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from indexmem_edge.bench.quality.weights import converted
from indexmem_edge.bench.runner import BenchError, Model, Setup, System
from indexmem_edge.errors import ModelFileError


@pytest.mark.parametrize(("kind", "close"), [("bf16", 2**-8), ("f16", 2**-11)])
def test_quantised_weights_are_written_out_and_the_rest_stays(
    tiny: Any, tmp_path: Path, kind: str, close: float
) -> None:
    path, config = tiny("qwen3", tensor_type="Q8_0")
    copy = converted(path, kind, tmp_path)
    before, after = gguf.GGUFReader(path), gguf.GGUFReader(copy)
    fields = {name: field.contents() for name, field in before.fields.items() if not name.startswith("GGUF.")}
    fields["general.file_type"] = int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    assert {n: f.contents() for n, f in after.fields.items() if not n.startswith("GGUF.")} == fields
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    for old, new in zip(before.tensors, after.tensors):
        quantised = old.tensor_type == gguf.GGMLQuantizationType.Q8_0
        assert new.tensor_type.name.lower() == (kind if quantised else "f32")
        value = gguf.quants.dequantize(new.data, new.tensor_type)
        np.testing.assert_allclose(value, config.weights[new.name], rtol=close if quantised else 0, atol=1e-7)
    stamp = copy.stat().st_mtime_ns
    assert converted(path, kind, tmp_path) == copy and copy.stat().st_mtime_ns == stamp
    assert [file.name for file in tmp_path.iterdir()] == [copy.name]

    nll = []
    for file in (path, copy):
        model = Model(file)
        with System(model, Setup(n_ctx=256, threads=1)) as system:
            system.feed(model.tokens("Some text", bos=True), last_logits=True)
            nll.append(system.nll(model.tokens(" and more of it")))
        model.close()
    np.testing.assert_allclose(nll[0], nll[1], rtol=0.05)


def test_what_cannot_be_copied_says_why(tiny: Any, tmp_path: Path) -> None:
    path, _ = tiny("llama")
    with pytest.raises(BenchError, match="bf16, f16"):
        converted(path, "q4_0", tmp_path)
    with pytest.raises(ModelFileError, match="does not exist"):
        converted(tmp_path / "none.gguf", "bf16", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match="cannot write a copy"):
        converted(path, "bf16", tmp_path / "file")
