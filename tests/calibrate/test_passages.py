"""What a calibration observes of a model: the operands of attention, who is kept when, and how text is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import IndexMemError
from indexmem_edge.calibrate.attention import Logits, attend
from indexmem_edge.calibrate.passages import Reader, passages
from indexmem_edge.options import CacheOptions
from reference.indexers import random_indexer, write_sidecar
from support.native_context import Capture, Context, open_model
from tiny.models import SUPPORTED

BUDGET, SLOTS, UBATCH, LENGTH = 64, 8, 32, 192


@pytest.mark.parametrize("arch", SUPPORTED)
def test_the_operands_of_attention_are_those_of_the_model(tiny: Tiny, arch: str) -> None:
    """Attention computed from them is what the model's own graph computes, in the second text as well."""
    path, config = tiny(arch)
    options = CacheOptions.from_keywords({"kv_budget": BUDGET, "kv_window": 8})
    texts = [np.array([1, *(3 + np.arange(n) * k % 250)], np.int32) for n, k in ((100, 7), (150, 11))]
    capture = Capture("kqv_out-")
    with open_model(path) as model, Reader(model, [options], LENGTH, UBATCH, 1) as reader:
        for tokens in texts:
            passage, layers = reader.read(tokens, lambda: None)
            assert [len(r) for r in passage.rows] == [0, 0, 0, *(min(16, e - s) for s, e in passage.ubatches[3:])]
            with Context(model, n_ubatch=UBATCH, capture=capture, n_threads=1) as context:
                capture.found.clear()
                context.feed(tokens.tolist(), UBATCH)
            for il in range(config.n_layer):
                layer = layers[il]
                outputs = np.concatenate(capture.found[f"kqv_out-{il}"], axis=2)[0, 0]
                expected = outputs.reshape(-1, config.n_head, config.head_dim)
                queries = iter(layer.queries)
                for rows in (r for r in passage.rows if len(r)):
                    asked = next(queries)
                    for j, i in enumerate(rows):
                        for h in range(config.n_head):
                            k, v = (a[h // config.group, : i + 1].astype("f") for a in (layer.keys, layer.values))
                            found = attend(Logits(layer.scale, layer.softcap)(asked[h, j : j + 1], k), v).output[0]
                            np.testing.assert_allclose(found, expected[i, h], atol=1e-2 * np.abs(v).max())


def test_a_bounded_cache_keeps_what_the_product_keeps(tiny: Tiny) -> None:
    path, config = tiny("llama")
    tokens = np.array([3 + 7 * i % 250 for i in range(160)], np.int32)
    with open_model(path) as model:
        bounded = [
            CacheOptions.from_keywords({"kv_budget": b, "kv_policy": "keydiff", "kv_window": 8}) for b in (BUDGET, BUDGET - SLOTS)
        ]
        with Reader(model, bounded, LENGTH, UBATCH, 1) as reader:
            reader.read(tokens[::-1].copy(), lambda: None)
            passage, _ = reader.read(tokens, lambda: None)
        for options in bounded:
            with Context(model, budget=options.budget, policy="keydiff", n_ubatch=UBATCH, n_threads=1) as context:
                for (start, end), kept in zip(passage.ubatches, passage.kept[options.budget]):
                    context.decode(tokens[start:end].tolist())
                    for mine, its in zip(kept, context.positions()):
                        for a, b in zip(mine, its):
                            np.testing.assert_array_equal(a, b)
                            assert len(a) == min(end, options.budget)
        assert passage.ubatches == [(i, i + 32) for i in range(0, 160, 32)]


def test_rows_begin_where_any_head_has_lost_something(tiny: Tiny, tmp_path: Path) -> None:
    """Here the first head holds all of the text."""
    path, config = tiny("llama", n_layer=2)
    sidecar = tmp_path / "a.indexmem.gguf"
    share = [5.0] + [1.0] * (2 * config.n_head_kv - 1)
    write_sidecar(sidecar, random_indexer("retention-mlp", 2, config.n_embd, config.n_head_kv, 0), architecture=config.arch, keys={"indexmem.budget_share": share})
    tokens = np.array([3 + 7 * i % 250 for i in range(128)], np.int32)
    options = CacheOptions.from_keywords({"kv_budget": BUDGET, "kv_policy": "indexer", "kv_window": 8, "indexmem": str(sidecar)})
    with open_model(path) as model, Reader(model, [options], LENGTH, UBATCH, 1) as reader:
        passage, _ = reader.read(tokens, lambda: None)
        assert len(passage.kept[BUDGET][-1][0][0]) == 96 and min(len(head) for head in passage.kept[BUDGET][-1][1]) < BUDGET
        assert len(passage.rows[-1]) == 16
        with pytest.raises(IndexMemError, match="of a text of 32 tokens nothing leaves"):
            reader.read(tokens[:32], lambda: None)


@pytest.mark.parametrize(
    "lengths, expected",
    [
        ([50], [25, 25]),  # one passage is halved
        ([100], [50, 50]),
        ([105], [50, 50]),  # the remainder is too short
        ([135], [50, 50, 35]),
        ([60, 10, 50], [50, 50]),
        ([500], [50] * 4),
    ],
)
def test_passages(lengths: list[int], expected: list[int]) -> None:
    texts = [list(range(1000 * i, 1000 * i + n)) for i, n in enumerate(lengths)]
    found = passages(texts, [-1], 51, 26, 4)
    assert [len(p) - 1 for p in found] == expected and all(p[0] == -1 for p in found)
    taken = np.concatenate([p[1:] for p in found])
    assert len(set(taken.tolist())) == len(taken) and (np.diff(taken) > 0).all()
    if lengths == [500]:
        assert found[0][1] == 0 and found[-1][-1] == 499


def test_too_little_text_for_two_passages() -> None:
    for lengths in ([49], [24, 24], [30, 20], []):
        with pytest.raises(IndexMemError, match="at least 26 tokens"):
            passages([list(range(n)) for n in lengths], [-1], 51, 26, 4)
