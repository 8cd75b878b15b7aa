"""told-apart: where facts stand in generated text, its targets, its loss, and what it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file

from indexmem_edge.errors import TrainingError
from indexmem_edge.train.data import generated
from indexmem_edge.train.data.sample import Sample
from indexmem_edge.train.indexers.scorers import KVzap, Retention, with_decay
from indexmem_edge.train.objectives import told_apart
from indexmem_edge.train.objectives.told_apart import ToldApart
from reference.random_decoder import modules_of, random_decoder, random_sample

SINKS, WINDOW = 2, 8


def telling(n: int, *told: tuple[int, int], answer: int = 7, seed: int = 0) -> Sample:
    """A context of n tokens, and an answer after it if something was told."""
    if not told:
        return replace(random_sample(n, seed), asked=n)
    sample = random_sample(n + answer, seed)
    weight = np.where(np.arange(n + answer) < n + 2, 1, 10).astype(np.float32)
    return replace(sample, asked=n, told=told, weight=weight)


def prepared(samples: list[Sample], folder: Path, kind: type = Retention, decay: bool = False) -> ToldApart:
    decoder = random_decoder()
    modules = modules_of(kind, decoder)
    objective = ToldApart(decoder, with_decay(modules) if decay else modules, SINKS, WINDOW)
    objective.prepare(samples, folder, lambda *_: None)
    return objective


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", list(generated.KINDS))
def test_facts_stand_where_a_sample_says(kind: str, held_out: bool) -> None:
    """Letters are tokens, so that a span can be read."""
    rng = np.random.default_rng(3)
    draft = generated._Draft(lambda text: list(text.encode()), lambda n: [0] * n, 3000, rng, held_out)
    sample = generated.KINDS[kind][0](draft, kind)
    spans = [bytes(sample.tokens[a:b].tolist()).decode() for a, b in sample.told]
    assert all(0 <= a < b <= sample.asked for a, b in sample.told)
    assert all(b <= c for (_, b), (c, _) in zip(sample.told, sample.told[1:]))
    assert all(span.strip() and "\0" not in span for span in spans)
    if kind in ("facts_in_noise", "listing", "frequent", "repetition"):  # there is no book around it
        assert not spans
    elif kind not in ("several", "assignments"):  # where there is one only in some
        assert spans
    if kind in ("facts_in_passing", "facts_in_chat"):  # have no opening: all else is of the book, which is zeros here
        context = sample.tokens[: sample.asked].copy()
        for a, b in sample.told:
            context[a:b] = 0
        assert not context.any()


@pytest.mark.parametrize("answer", [3, 20])
def test_targets_are_ranks_as_they_were(tmp_path: Path, answer: int) -> None:
    asked = 60 - answer
    sample = telling(asked, (5, 9), (20, 31), answer=answer)
    objective = prepared([sample], tmp_path)
    found = load_file(objective.shards[0])
    assert found["positions"].tolist() == list(range(SINKS, asked))
    assert found["told"].tolist() == [5 <= p < 9 or 20 <= p < 31 for p in range(SINKS, asked)]

    def look(heads) -> None:  # type: ignore[no-untyped-def]
        ranks = objective.modules[heads.layer].ranks(heads.hidden[0], torch.arange(60), 0)[:, SINKS:asked]
        torch.testing.assert_close(found["target"][heads.layer].float(), ranks.detach(), atol=2e-2, rtol=2e-2)

    objective.decoder.observe(torch.from_numpy(sample.tokens), look)


def test_how_much_answers_look_at_what_was_told(tmp_path: Path) -> None:
    """By plain attention; and which heads remember is said by the samples that have answers."""
    samples = [telling(40, (5, 9), (20, 31), answer=12), telling(30), telling(50, (2, 4), seed=4)]
    objective = prepared(samples, tmp_path)
    looks = []
    for sample in (samples[0], samples[2]):
        rows = np.flatnonzero(sample.weight > 1)
        told = [i for a, b in sample.told for i in range(a, b)]
        found: list[torch.Tensor] = []

        def look(heads) -> None:  # type: ignore[no-untyped-def]
            k = heads.k[0].repeat_interleave(heads.q.shape[1] // heads.k.shape[1], 0)
            p = (heads.q[0] @ k.mT * heads.scale + torch.full((len(sample.tokens),) * 2, -torch.inf).triu(1)).softmax(-1)
            found.append(p[:, rows][..., told].sum(-1).mean(-1).unflatten(0, (heads.k.shape[1], -1)).amax(1))

        objective.decoder.observe(torch.from_numpy(sample.tokens), look)
        looks.append(torch.stack(found))
    torch.testing.assert_close(load_file(objective.shards[0])["looks"], looks[0], atol=1e-4, rtol=1e-3)
    assert not load_file(objective.shards[1])["looks"].any()
    mean = torch.stack(looks).mean(0)
    assert objective.remember[..., 0].tolist() == (mean >= 0.2 * mean.max()).tolist()
    objective.agree(lambda values: [0.9, 0.1, 0.3, 1.0][: len(values)])  # as processes with other sequences have it
    assert objective.remember[..., 0].tolist() == [[True, False], [True, True]]
    objective.remember = torch.tensor([[False, True], [True, True]])[..., None]
    assert objective.found() == "3 of 4 heads remember (layer: heads) 0: 1, 1: 0 1"
    assert objective.needs() == {0: [1.0, told_apart.SHARE], 1: [told_apart.SHARE] * 2}


def test_no_fact_is_left_out_where_there_are_too_many_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told_apart, "OTHERS", 5)
    found = load_file(prepared([telling(60, (5, 9), (20, 31))], tmp_path).shards[0])
    assert found["told"].sum() == 15 and len(found["positions"]) == 20
    assert (found["positions"].diff() > 0).all()


@pytest.mark.parametrize("decay", [False, True])
def test_the_loss_is_as_it_says(tmp_path: Path, decay: bool) -> None:
    samples = [telling(200, (5, 25), seed=1), telling(200, seed=2), telling(90, (30, 40), seed=3)]
    objective = prepared(samples, tmp_path, decay=decay)
    objective.remember = torch.arange(objective.remember.numel()).view(objective.remember.shape) % 2 == 0
    parts = [load_file(path) for path in objective.shards]
    for module in objective.modules:
        module.magnitude_proj.weight.data += 0.1
    losses = []
    for il, module in enumerate(objective.modules):
        sd = torch.cat([part["target"][il].float() for part in parts], -1).std(-1, correction=0, keepdim=True)
        for part in parts:
            ranks = module.ranks(part["hidden"][il].float(), part["positions"], int(part["positions"][-1])).detach()
            told, moved, rate = part["told"], (ranks - part["target"][il].float()) / sd, module(part["hidden"][il].float())[1]
            each = []
            for h, remembers in enumerate(objective.remember[il, :, 0].tolist()):
                fact, rest = (told, ~told) if remembers else (told & False, told | True)
                loss = 4 * moved[h, rest].square().mean() + ((moved[h, fact] - 3).square().mean() if fact.any() else 0.0)
                if rate is not None:
                    falls = -rate[h].detach() / sd[h] / 3
                    stays = 3 * (falls[fact] - 0.03).square().mean() if fact.any() else 0.0
                    loss = loss + stays + 2 * (1 - falls[rest]).clamp_min(0).square().mean()
                each.append(loss)
            losses.append(torch.stack(each).mean())
    found = sum(float(loss.detach()) for loss in objective._losses(objective.shards)) * len(parts)
    assert found == pytest.approx(float(sum(losses)), rel=1e-4)


@pytest.mark.parametrize("kind, decay", [(Retention, False), (Retention, True), (KVzap, False)])
def test_facts_rise_above_the_rest_which_stays(tmp_path: Path, kind: type, decay: bool) -> None:
    """What is a fact can be told here: its tokens are among the first ten."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    samples = []
    for i in range(12):
        sample = telling(200, (40, 60), (120, 130), seed=i)
        tokens = sample.tokens % 50 + 10
        for a, b in sample.told:
            tokens[a:b] = rng.integers(0, 10, b - a)
        samples.append(replace(sample, tokens=tokens.astype(np.int32)))
    objective = prepared(samples[:8], tmp_path, kind, decay)
    objective.remember = torch.zeros_like(objective.remember)
    objective.remember[:, 0] = True
    before = objective.held_out_loss(samples[8:])
    optimizer = torch.optim.Adam(objective.modules.parameters(), 1e-2)
    for step in range(100):
        optimizer.zero_grad()
        objective.backward(samples[:4], step, seed=0)
        optimizer.step()
    assert objective.held_out_loss(samples[8:]) < 0.5 * before
    for path in sorted(tmp_path.glob("held-out-*")):
        part = load_file(path)
        for il, module in enumerate(objective.modules):
            ranks = module.ranks(part["hidden"][il].float(), part["positions"], int(part["positions"][-1])).detach()
            told, moved = part["told"], (ranks - part["target"][il].float()) / objective.spread[il]
            assert moved[0, told].mean() > 0.8 and moved[0, ~told].square().mean() < 0.5  # of unrelated ranks 2
            assert moved[1:].square().mean() < 0.5, "the others keep their ranks"
            if decay:
                falls = -module(part["hidden"][il].float())[1].detach() / objective.spread[il]
                assert falls[0, ~told].mean() > 1.5 * falls[0, told].mean() > 0
                assert falls[1:, told].mean() > 1.5 * falls[0, told].mean(), "and forget"


def test_what_is_there_is_not_observed_again(tmp_path: Path) -> None:
    """After a resume the weights are others, and the ranks from before are still those."""
    samples = [telling(60, (5, 9)), telling(60, seed=1)]
    objective = prepared(samples, tmp_path)
    before = [path.read_bytes() for path in objective.shards]
    for parameter in objective.modules.parameters():
        parameter.data.add_(1.0)
    objective.prepare(samples, tmp_path, lambda *_: None)
    assert [path.read_bytes() for path in objective.shards] == before


def test_only_books_that_tell_something_teach(tmp_path: Path) -> None:
    """Lists and noise with questions about them are left out; pages without questions are not."""
    asked = replace(random_sample(60, seed=3), asked=40)
    objective = prepared([asked, telling(60, (5, 9)), asked, telling(60, seed=1)], tmp_path)
    assert [load_file(path)["told"].sum() for path in objective.shards] == [4, 0]
    assert objective.held_out_loss([asked]) is None
    assert objective.held_out_loss([asked, telling(60, seed=1)]) == objective.held_out_loss([telling(60, seed=1)]) is not None


def test_facts_are_needed(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--generated above 0"):
        prepared([telling(60)], tmp_path)


def test_ranks_of_an_indexer_begin_to_fall_with_age() -> None:
    decoder = random_decoder()
    modules = modules_of(Retention, decoder)
    aged = with_decay(modules)
    hidden, at = torch.randn(30, decoder.config.n_embd, generator=torch.Generator().manual_seed(1)), torch.arange(30)
    for before, after in zip(modules, aged):
        falls = before.ranks(hidden, at, 29) - after.ranks(hidden, at, 29)
        torch.testing.assert_close(falls, (0.5 * (29 - at) / after.constants["age_scale"]).expand_as(falls), atol=1e-5, rtol=1e-3)
    assert [id(module) for module in with_decay(aged)] == [id(module) for module in aged]
    with pytest.raises(TrainingError, match="--decay: ranks of kind kvzap"):
        with_decay(modules_of(KVzap, decoder))
