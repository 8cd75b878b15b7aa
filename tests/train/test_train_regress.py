"""Regression on future attention: its targets against a dense evaluation, its files, and that it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file

from indexmem_edge.train.cache.future import future_attention, future_mass, kept_mask
from indexmem_edge.train.indexers.scorers import KVzap, Retention
from indexmem_edge.train.model.decoder import causal
from indexmem_edge.train.objectives import regress
from indexmem_edge.train.objectives.regress import Regress
from reference.random_decoder import random_decoder, random_sample


def operands(total: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(6, total, 8, generator=draw) * 2, torch.randn(2, total, 8, generator=draw)


def probabilities(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[H, G, T, T]"""
    s = q.unflatten(0, (2, 3)) @ k[:, None].mT * 0.3
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


@pytest.mark.parametrize("total", [1, 9, 257, 300])
@pytest.mark.parametrize("window", [1, 8, 400])
def test_future_attention_is_the_largest_of_later_queries(total: int, window: int) -> None:
    q, k = operands(total)
    asked = total // 2
    best, late = future_attention(q, k, 0.3, window, asked)
    p = probabilities(q, k)
    i, j = torch.arange(total)[:, None], torch.arange(total)
    outside = p * (j <= i - window)
    torch.testing.assert_close(best, outside.amax((1, 2)))
    torch.testing.assert_close(late, outside[:, :, asked:].amax((1, 2)))


@pytest.mark.parametrize(("total", "context"), [(2, 1), (300, 270), (300, 40)])
def test_future_mass_is_what_later_queries_give_to_the_context(total: int, context: int) -> None:
    q, k = operands(total)
    mass = future_mass(q, k, 0.3, context)
    torch.testing.assert_close(mass, probabilities(q, k)[:, :, context:, :context].sum((1, 2)), atol=1e-4, rtol=1e-4)


def test_ties_go_to_the_earlier_position_and_protected_entries_stay() -> None:
    scores = torch.zeros(2, 20)
    mask = kept_mask(scores, 9, 2, 3)
    assert mask.sum(-1).tolist() == [9, 9]
    assert mask[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 17, 18, 19]
    scores[:, 10] = 1
    assert kept_mask(scores, 9, 2, 3)[1, 10]
    assert kept_mask(scores, 100, 2, 3).all()


def test_targets_are_log_attention_of_tokens_outside_of_the_window(tmp_path: Path) -> None:
    decoder, sample = random_decoder(), random_sample(60)
    objective = Regress(decoder, torch.nn.ModuleList(), 2, 8)
    objective.prepare([sample], tmp_path, lambda *_: None)
    found = load_file(objective.shards[0])
    assert found["positions"].tolist() == list(range(2, 52))
    seen = {}

    def attend(heads):  # type: ignore[no-untyped-def]
        seen[heads.layer] = heads
        return causal(heads)

    decoder(torch.from_numpy(sample.tokens).long()[None], attend)
    for il, heads in seen.items():
        s = heads.q[0].unflatten(0, (2, 2)) @ heads.k[0, :, None].mT * decoder.config.scale
        p = s.masked_fill(torch.ones(60, 60, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        i, j = torch.arange(60)[:, None], torch.arange(60)
        best = (p * (j <= i - 8)).amax((1, 2))[:, 2:52]
        torch.testing.assert_close(found["target"][il].float(), best.clamp_min(1e-6).log(), atol=5e-3, rtol=1e-3)
        torch.testing.assert_close(found["hidden"][il].float(), heads.hidden[0, 2:52], atol=2e-2, rtol=1e-2)


def test_long_sequences_are_thinned_out_and_nothing_is_computed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regress, "TOKENS", 16)
    decoder = random_decoder()
    samples = [random_sample(60, seed=i) for i in range(3)]
    told: list[tuple[int, int]] = []
    first = Regress(decoder, torch.nn.ModuleList(), 2, 8)
    first.prepare(samples[:2], tmp_path, lambda done, total, what: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    stamps = [path.stat().st_mtime_ns for path in first.shards]
    again = Regress(decoder, torch.nn.ModuleList(), 2, 8)
    again.prepare(samples, tmp_path, lambda *_: None)
    assert [path.stat().st_mtime_ns for path in again.shards[:2]] == stamps and len(again.shards) == 3
    parts = [load_file(path) for path in again.shards]
    assert all(len(part["positions"]) == 16 and part["hidden"].shape == (2, 16, 32) for part in parts)
    assert not np.array_equal(parts[0]["positions"], parts[1]["positions"])


@pytest.mark.parametrize("kind", [Retention, KVzap])
def test_a_better_order_is_learned(tmp_path: Path, kind: type) -> None:
    decoder = random_decoder()
    c = decoder.config
    samples = [random_sample(120, seed=i) for i in range(6)]
    torch.manual_seed(0)
    modules = torch.nn.ModuleList([kind(c.n_embd, c.n_head_kv, kind.defaults(32)) for _ in range(c.n_layer)])
    objective = Regress(decoder, modules, 2, 8)
    objective.prepare(samples, tmp_path, lambda *_: None)
    optimizer = torch.optim.Adam(modules.parameters(), 5e-3)
    first = last = 0.0
    for step in range(60):
        optimizer.zero_grad()
        last = objective.backward(samples[:2], step, seed=0)["loss"]
        first = first or last
        optimizer.step()
    assert last < 0.8 * first
    optimizer.zero_grad()
    assert objective.backward(samples[:2], 3, seed=0) == objective.backward(samples[:2], 3, seed=0)
