"""The trainer's decoder beside the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexmem_edge import llama_cpp
from indexmem_edge.train.model.decoder import Decoder
from support.native_context import F32, Context, open_model
from tiny.models import BOS

torch = pytest.importorskip("torch")
LINEAR = ("rope.scaling.type", "linear"), ("rope.scaling.factor", 4.0)
YARN = ("rope.scaling.type", "yarn"), ("rope.scaling.factor", 4.0), ("rope.scaling.original_context_length", 256)


def library_logits(path: Path, tokens: Sequence[int]) -> np.ndarray:
    """[T, V], cache and attention in F32, so that nothing but the order of sums differs."""
    exact: dict[str, Any] = {"type_k": F32, "type_v": F32, "flash_attn": False}
    with open_model(path) as model, Context(model, n_threads=1, n_ubatch=512, **exact) as context:
        return context.decode(tokens)




def slope(loss: Callable[[], Any], gates: Any, i: int, ahead: float = 1e-5) -> float:
    """How the loss changes with one of the gates, by a difference."""
    measured = []
    for step in (-ahead, ahead):
        gates[i] += step
        measured.append(loss().item())
        gates[i] -= step
    return (measured[1] - measured[0]) / (2 * ahead)




def our_logits(decoder: Decoder, tokens: Sequence[int], **kwargs: Any) -> np.ndarray:
    return decoder.logits(decoder(torch.tensor([tokens]), **kwargs)[0]).float().numpy()




def text(n: int, n_vocab: int = 320) -> list[int]:
    return [BOS, *np.random.default_rng(1).integers(3, n_vocab, n - 1).tolist()]




def tokenize(path: Path, content: str, n: int) -> list[int]:
    """The first n tokens of a text, with BOS where the model has one."""
    data = content.encode()
    tokens = (llama_cpp.llama_token * (len(data) + 1))()
    with open_model(path) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        found = llama_cpp.llama_tokenize(vocab, data, len(data), tokens, len(tokens), True, False)
    assert found >= n
    return list(tokens[:n])


