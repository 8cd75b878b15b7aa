"""Attention to a context of which entries are gone, and the objective that trains through it."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from indexmem_edge.train.cache.future import kept_mask
from indexmem_edge.train.indexers.scorers import KVzap, Retention
from indexmem_edge.train.model.decoder import causal
from indexmem_edge.train.objectives import (
    losses,
    select_kl,
)
from indexmem_edge.train.objectives.select_kl import SelectKL
from indexmem_edge.train.objectives.selected import choose, selected_attention, selected_dense
from reference.random_decoder import modules_of, random_decoder, random_sample


@pytest.mark.parametrize("n, budget", [(30, 12), (30, 7), (30, 30), (30, 40), (6, 6), (7, 7), (1, 1)])
def test_those_that_are_kept_are_those_of_use(n: int, budget: int) -> None:
    ranks = torch.randint(0, 4, (3, n), generator=torch.Generator().manual_seed(n)).float().requires_grad_()  # ties
    factors = choose(ranks, budget, sinks=2, window=4)
    assert torch.equal(factors.detach().bool(), kept_mask(ranks.detach(), budget, 2, 4))
    assert set(factors.detach().flatten().tolist()) <= {0.0, 1.0}


def test_ranks_near_the_threshold_get_the_gradient_and_it_sums_to_nothing() -> None:
    ranks = torch.tensor([[9.0, 0, 1, 2, 3, 4, 9, 9]], requires_grad=True)
    upstream = torch.tensor([5.0, 1, -2, 3, 0, 1, 5, 5])
    (choose(ranks, 5, sinks=1, window=2) * upstream).sum().backward()
    width = 0.5 * torch.arange(5.0).std(correction=0)
    soft = ((torch.arange(5.0) - 2.5) / width).sigmoid()  # two of the five are kept
    slope, g = soft * (1 - soft) / width, upstream[1:6]
    expected = torch.zeros(8)
    expected[1:6] = slope * (g - (slope * g).sum() / slope.sum())
    torch.testing.assert_close(ranks.grad[0], expected)
    assert abs(ranks.grad.sum().item()) < 1e-6


def test_equal_ranks_and_one_candidate_give_finite_gradients() -> None:
    for n, budget in ((9, 4), (4, 4), (5, 4)):
        ranks = torch.ones(2, n, requires_grad=True)
        factors = choose(ranks, budget, sinks=1, window=2)
        if factors.requires_grad:
            factors.square().sum().backward()
            assert torch.isfinite(ranks.grad).all()


def operands(n: int, m: int, heads: int = 2, group: int = 3, dim: int = 8) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(n * 100 + m)
    shapes = [(heads * group, m, dim), (heads, n, dim), (heads, n, dim), (heads, n), (heads, m, dim), (heads, m, dim)]
    q, k, v, factors, k_new, v_new = (torch.randn(shape, generator=draw) for shape in shapes)
    return [t.requires_grad_() for t in (q, k, v, (factors > 0).float(), k_new, v_new)]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("n, m", [(1, 1), (5, 1), (1, 5), (37, 13), (64, 3)])
def test_attention_equals_the_equation(n: int, m: int, group: int) -> None:
    grads = []
    for attention in (selected_attention, selected_dense):
        q, k, v, factors, k_new, v_new = given = operands(n, m, group=group)
        out = attention(*given, 0.4)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        kept = torch.where(factors > 0, factors.grad, 0)
        grads.append((out, q.grad, k_new.grad, v_new.grad, kept))
    for name, a, b in zip(("out", "q", "k_new", "v_new", "factors of kept entries"), *grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_gradient_of_one_that_is_gone_is_what_its_return_would_change() -> None:
    q, k, v, factors, k_new, v_new = operands(20, 1, heads=1, group=1)
    k.data[:, ::3] *= 6  # some would take nearly all of the attention
    out = selected_attention(q, k, v, factors, k_new, v_new, 0.4)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * direction).sum().backward()
    for j in (factors[0] == 0).nonzero()[:, 0].tolist():
        back = factors.detach().clone()
        back[0, j] = 1
        change = ((selected_attention(q, k, v, back, k_new, v_new, 0.4) - out) * direction).sum()
        assert factors.grad[0, j].item() == pytest.approx(change.item(), rel=1e-3, abs=1e-5)


def test_what_is_gone_may_hold_anything_and_large_logits_are_no_trouble() -> None:
    q, k, v, factors, k_new, v_new = operands(12, 4)
    other = torch.where(factors[..., None] > 0, k, 50 * k)
    a = selected_attention(q, k, v, factors, k_new, v_new, 0.4)
    assert torch.equal(a, selected_attention(q, other, v, factors, k_new, v_new, 0.4))
    out = selected_attention(q * 100, k * 100, v, factors, k_new, v_new, 1.0)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(factors.grad).all() and torch.isfinite(q.grad).all()


def asking(n_tokens: int, asked: int, seed: int = 0):  # type: ignore[no-untyped-def]
    sample = random_sample(n_tokens, seed)
    sample.weight[-5:] = 10.0
    return type(sample)(sample.tokens, sample.weight, asked, sample.source)


def test_the_loss_is_the_divergence_of_a_model_that_lacks_the_entries() -> None:
    decoder, sample, n, ratios = random_decoder(), asking(60, 48), 48, (0.3, 0.5)
    modules = modules_of(Retention, decoder)
    found = SelectKL(decoder, modules, 2, 4).loss(sample, ratios)
    tokens, expected = torch.from_numpy(sample.tokens).long()[None], []
    teacher = decoder.logits(decoder(tokens))[0, n:].log_softmax(-1)
    for ratio in ratios:

        def attend(heads, ratio: float = ratio):  # type: ignore[no-untyped-def]
            ranks = modules[heads.layer].ranks(heads.hidden[0, :n], torch.arange(n), n - 1)
            kept = kept_mask(ranks, int(np.ceil(ratio * n)), 2, 4)
            i, j = torch.arange(60)[:, None], torch.arange(60)
            gone = torch.cat((~kept, torch.zeros(2, 12, dtype=torch.bool)), -1)
            hidden = (j > i) | ((i >= n) & gone[:, None])  # rows of the context see all of it
            mask = torch.zeros(2, 60, 60).masked_fill_(hidden, -torch.inf).repeat_interleave(2, 0)
            k, v = (t.repeat_interleave(2, 1) for t in (heads.k, heads.v))
            return ((decoder.config.scale * heads.q @ k.mT + mask).softmax(-1)) @ v

        student = decoder.logits(decoder(tokens, attend))[0, n:].log_softmax(-1)
        both = ((student.exp() - teacher.exp()) * (student - teacher)).sum(-1) / 2
        weight = torch.from_numpy(sample.weight[n:])
        expected.append(0.25 * ((both * weight).sum() / weight.sum() / 0.25).log1p())
    torch.testing.assert_close(found, sum(expected) / 2, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [Retention, KVzap])
def test_training_lowers_the_loss_and_repeats_itself(kind: type) -> None:
    decoder, samples = random_decoder(), [asking(96, 80, seed=i) for i in range(2)]
    ends = []
    for _ in range(2):
        modules = modules_of(kind, decoder)
        objective = SelectKL(decoder, modules, 2, 4)
        before = objective.held_out_loss(samples)
        optimizer = torch.optim.Adam(modules.parameters(), 3e-3)
        for step in range(40):
            optimizer.zero_grad()
            objective.backward(samples, step, seed=3)
            optimizer.step()
        ends.append([p.detach().clone() for p in modules.parameters()])
        assert objective.held_out_loss(samples) < 0.9 * before
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_budgets_are_those_of_heads() -> None:
    """A table of shares decides how much of what is not protected each KV head keeps, in training as in use."""
    decoder = random_decoder()
    objective = SelectKL(decoder, modules_of(Retention, decoder), 2, 4)
    hidden = torch.randn(100, decoder.config.n_embd, generator=torch.Generator().manual_seed(3))
    assert objective.factors(0, hidden, (0.26,))[0].sum(-1).tolist() == [26, 26]
    objective.shares = {0: (1.7, 1.7), 1: (0.3, 1.0)}
    for layer, kept in ((0, [6 + 34, 6 + 34]), (1, [6 + 6, 6 + 20])):
        assert objective.factors(layer, hidden, (0.26,))[0].sum(-1).tolist() == kept


def test_pages_without_questions_and_long_questions_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_kl, "ROWS", 16)
    decoder, seen = random_decoder(), []
    objective = SelectKL(decoder, modules_of(Retention, decoder), 2, 4)

    def watched(tokens, attend=causal, first: int = 0, **more: object):  # type: ignore[no-untyped-def]
        seen.append((first, tokens.shape[1]))
        return type(decoder).__call__(decoder, tokens, attend, first, **more)

    monkeypatch.setattr(objective, "decoder", type("Watched", (), {
        "__call__": staticmethod(watched), "config": decoder.config, "device": decoder.device, "output": decoder.output,
        "geometry": decoder.geometry,
    })())  # fmt: skip
    for sample, rows in ((random_sample(100), (84, 16)), (random_sample(40), (30, 10)), (asking(100, 40), (40, 16)), (asking(9, 3), (7, 2))):
        assert torch.isfinite(objective.loss(sample, (0.3,)))
        assert seen.pop() == rows and not seen.pop()[0]


def test_both_divergences_are_their_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, 5, generator=draw)
    head, weight = torch.randn(11, 5, generator=draw), torch.arange(7.0)
    s, t = ((h @ head.T).log_softmax(-1) for h in (student, teacher))
    plain = ((s.exp() * (s - t)).sum(-1) + (t.exp() * (t - s)).sum(-1)) / 2
    for rows in (1, 3, 100):
        torch.testing.assert_close(losses.both_kl(student, teacher, head, weight, rows), (plain * weight).sum() / weight.sum())
