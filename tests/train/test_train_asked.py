"""asked-kl: its targets against a dense evaluation, its loss, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file

from indexmem_edge.train.data.sample import Sample
from indexmem_edge.train.indexers.scorers import KVzap, Retention
from indexmem_edge.train.model.attention import Heads
from indexmem_edge.train.model.decoder import Decoder
from indexmem_edge.train.objectives.asked_kl import TEMPERATURE, AskedKL
from reference.random_decoder import random_decoder, random_sample

N, SINKS, WINDOW = 60, 2, 8


def largest(decoder: Decoder, tokens: np.ndarray, first: int) -> dict[int, torch.Tensor]:
    """Of every layer the largest attention [H, T] from queries at `first` and later."""
    found = {}

    def look(heads: Heads) -> None:
        n = heads.q.shape[2]
        s = heads.q[0].unflatten(0, (heads.k.shape[1], -1)) @ heads.k[0, :, None].mT * heads.scale
        p = s.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        found[heads.layer] = p[:, :, first:].amax((1, 2))

    decoder.observe(torch.from_numpy(tokens), look)
    return found


def objective_of(decoder: Decoder, kind: type = Retention) -> AskedKL:
    c = decoder.config
    torch.manual_seed(0)
    modules = torch.nn.ModuleList([kind(c.n_embd, c.n_head_kv, kind.defaults(32)) for _ in range(c.n_layer)])
    return AskedKL(decoder, modules, SINKS, WINDOW)


@pytest.mark.parametrize("asked", [40, N])
def test_targets_are_what_questions_and_a_second_reading_look_at(tmp_path: Path, asked: int) -> None:
    decoder, sample = random_decoder(), replace(random_sample(N), asked=asked)
    objective = objective_of(decoder)
    objective.prepare([sample], tmp_path, lambda *_: None)
    found = load_file(objective.shards[0])
    end = min(asked, N - WINDOW)
    assert found["positions"].tolist() == list(range(SINKS, end))
    again = largest(decoder, np.concatenate((sample.tokens[:end], sample.tokens[1:end])), end)
    late = largest(decoder, sample.tokens, asked) if asked < N else again
    for il in range(decoder.config.n_layer):
        logs = [p[il][:, SINKS:end].clamp_min(1e-6).log() for p in (again, late)]
        torch.testing.assert_close(found["target"][il].float(), (logs[0] + logs[1]) / 2, atol=5e-3, rtol=1e-3)


def test_the_loss_is_least_where_ranks_are_the_targets(tmp_path: Path) -> None:
    decoder = random_decoder()
    objective = objective_of(decoder)
    objective.prepare([random_sample(N)], tmp_path, lambda *_: None)
    target = load_file(objective.shards[0])["target"][0].float()

    class Given(torch.nn.Module):
        def __init__(self, ranks: torch.Tensor) -> None:
            super().__init__()
            self.given = ranks

        def ranks(self, hidden: torch.Tensor, positions: torch.Tensor, newest: int) -> torch.Tensor:
            return self.given

    positions = torch.arange(target.shape[1])
    p = (TEMPERATURE * target).softmax(-1)
    least = objective._loss(Given(target + 3), torch.zeros(0), target, {"positions": positions}, 0)  # a constant is free
    assert float(least) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    assert objective._loss(Given(target + noise), torch.zeros(0), target, {"positions": positions}, 0) > least


@pytest.mark.parametrize("kind", [Retention, KVzap])
def test_an_order_is_learned_and_held_out_samples_are_observed_once(tmp_path: Path, kind: type) -> None:
    decoder = random_decoder()
    objective = objective_of(decoder, kind)
    samples: list[Sample] = [replace(random_sample(120, seed=i), asked=90) for i in range(7)]
    objective.prepare(samples[:5], tmp_path, lambda *_: None)
    before = objective.held_out_loss(samples[5:])
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(stamps) == 7
    optimizer = torch.optim.Adam(objective.modules.parameters(), 5e-3)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        losses.append(objective.backward(samples[:2], step, seed=0)["loss"])
        optimizer.step()
    after = objective.held_out_loss(samples[5:])
    assert before is not None and after is not None and after < before - 0.02 and sum(losses[-5:]) < sum(losses[:5])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    optimizer.zero_grad()
    assert objective.backward(samples[:2], 3, seed=0) == objective.backward(samples[:2], 3, seed=0)
