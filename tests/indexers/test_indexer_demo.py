"""Indexers on the demo model: in hidden states of real text a few directions are far larger than the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from indexmem_edge import llama_cpp
from reference.indexers import VARIANTS, Indexer, random_indexer, write_sidecar
from support.native_context import Capture, Context, open_model

N_LAYER, N_EMBD, N_HEAD_KV = 30, 576, 3
TEXT = """The tide had gone out before dawn, and the flats lay open for a mile. Two boys with a bucket walked along the
edge of the channel, turning stones. Under most of them there was nothing but sand; under one, a crab the size of a
coin lifted its claws and went sideways into the weed. "Leave it," said the older one. "It was here first." They came
back with eleven cockles, a length of blue rope, and a bottle that had no message in it."""


def tokenize(model: Any, text: str) -> list[int]:
    data, tokens = text.encode(), (llama_cpp.llama_token * 1024)()
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    return tokens[: llama_cpp.llama_tokenize(vocabulary, data, len(data), tokens, len(tokens), True, False)]


class Run(NamedTuple):
    tokens: list[int]
    hidden: list[np.ndarray]  # [30] of [T, 576], what each layer's attention reads


@pytest.fixture(scope="module")
def model(demo_model: Path) -> Any:
    with open_model(demo_model) as model:
        yield model


@pytest.fixture(scope="module")
def run(model: Any) -> Run:
    """64 tokens of text in one ubatch."""
    tokens, capture = tokenize(model, TEXT)[:64], Capture("attn_norm-")
    with Context(model, budget=128, n_ubatch=64, capture=capture) as c:
        c.decode(tokens)
    return Run(tokens, [capture[f"attn_norm-{il}"] for il in range(N_LAYER)])


def for_demo(variant: str, hidden: list[np.ndarray], seed: int = 0) -> Indexer:
    """A random indexer. What has no norm of its own in front is made for the size of the layer's hidden states."""
    indexer = random_indexer(variant, N_LAYER, N_EMBD, N_HEAD_KV, seed)
    for layer, x in zip(indexer.layers, hidden):
        for name, a in layer.items():
            if a.ndim == 2 and a.shape[1] == N_EMBD and "in_norm.weight" not in layer:
                layer[name] = a / np.float32(np.sqrt(np.mean(x[1:] ** 2)))  # the first token's is out of proportion
    return indexer


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_of_real_hidden_states(model: Any, run: Run, tmp_path: Path, variant: str) -> None:
    """Against the reference in PyTorch, or without it in NumPy; in units of the deviation of each head's scores."""
    indexer = for_demo(variant, run.hidden)
    write_sidecar(tmp_path / "a.gguf", indexer)
    capture = Capture("attn_norm-", "indexmem_state-")
    with Context(model, budget=128, policy="indexer", sidecar=tmp_path / "a.gguf", n_ubatch=64, capture=capture) as c:
        c.decode(run.tokens)
    for il in range(N_LAYER):
        np.testing.assert_array_equal(capture[f"attn_norm-{il}"], run.hidden[il])
        expected = reference_state(indexer, il, run.hidden[il])
        error = np.abs(capture[f"indexmem_state-{il}"] - expected).max(axis=0) / expected.std(axis=0)
        assert error.max() < 1e-3, f"layer {il}"


def reference_state(indexer: Indexer, il: int, hidden: np.ndarray) -> np.ndarray:
    try:
        import torch

        from reference.indexers_torch import module
    except ImportError:
        return indexer.state(il, hidden)
    return module(indexer, il)(torch.from_numpy(hidden)).numpy()


class Difference(NamedTuple):
    entries: float  # share of the entries kept with the matrices in F32 that are not kept with these
    score: float  # largest difference of a score, in deviations of its head
    n_bytes: int  # of the file


def kept_by_type(
    model: Any, tokens: list[int], indexer: Indexer, folder: Path, outtypes: list[str]
) -> dict[str, Difference]:
    """What the type of a sidecar's matrices changes: one ubatch of text, about half of which is kept."""
    runs: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}  # positions of each head, states of each layer
    for outtype in ("f32", *outtypes):
        capture = Capture("indexmem_state-")
        write_sidecar(folder / f"{outtype}.gguf", indexer, outtype)
        options = dict(budget=len(tokens) // 2, policy="indexer", sidecar=folder / f"{outtype}.gguf")
        with Context(model, n_ubatch=len(tokens), capture=capture, **options) as c:
            c.decode(tokens)
            runs[outtype] = sum(c.positions(), []), [capture[f"indexmem_state-{il}"] for il in range(N_LAYER)]

    held, states = runs["f32"]
    found = {}
    for outtype in outtypes:
        gone = sum(len(np.setdiff1d(a, b)) for a, b in zip(held, runs[outtype][0])) / sum(map(len, held))
        errors = [np.abs(a - b).max(axis=0) / a.std(axis=0) for a, b in zip(states, runs[outtype][1])]
        found[outtype] = Difference(gone, float(np.max(errors)), (folder / f"{outtype}.gguf").stat().st_size)
    return found


@pytest.mark.parametrize("variant", ["retention-mlp", "kvzap-mlp"])
def test_type_of_the_matrices_hardly_matters(model: Any, run: Run, tmp_path: Path, variant: str) -> None:
    tokens = tokenize(model, TEXT)
    found = kept_by_type(model, tokens, for_demo(variant, run.hidden), tmp_path, ["f16", "q8_0"])
    for outtype, (entries, score, n_bytes) in found.items():
        print(f"\n{variant} {outtype}, {len(tokens)} tokens: {entries:.3%} of the kept entries differ, "
              f"scores by up to {score:.4f} deviations; {n_bytes} bytes")  # fmt: skip
    assert found["f16"].entries < 0.002
    assert found["q8_0"].entries < 0.015
