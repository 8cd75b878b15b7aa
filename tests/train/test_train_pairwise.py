"""The trainable pairwise indexer against the references, and its objective against the formula, written out densely."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from reference.indexers import random_indexer, tensor_shapes

torch = pytest.importorskip("torch")
from torch import Tensor, nn

from indexmem_edge.errors import TrainingError
from indexmem_edge.train.indexers.pairwise import Pairwise
from indexmem_edge.train.indexers.scorers import SCORERS, KVzap
from indexmem_edge.train.model.decoder import Heads
from indexmem_edge.train.objectives import OBJECTIVES
from indexmem_edge.train.objectives.operands import operands
from indexmem_edge.train.objectives.pooled_kl import PooledKL
from reference import indexers_torch
from reference.random_decoder import random_decoder, random_sample

CONSTANTS = {"head_count": 3, "head_dim": 6, "norm_eps": 2e-5, "reduce": "max", "query_count": 8}
DECODER = random_decoder()


def modules(reduce: str = "max", dtype: torch.dtype = torch.float64) -> nn.ModuleList:
    torch.manual_seed(1)
    return nn.ModuleList([Pairwise(32, 2, CONSTANTS | {"reduce": reduce}).to(dtype) for _ in range(2)])


def gradients(ms: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in ms.named_parameters()}


# ---------------------------------------------------------------------------------------------- the module


@pytest.mark.parametrize("variant", ["pairwise-mean", "pairwise-max"])
def test_the_module_is_that_of_the_references(variant: str) -> None:
    indexer = random_indexer(variant, 2, 64, 3)
    ours, theirs = Pairwise(64, 3, indexer.constants), indexers_torch.module(indexer, 1)
    ours.load_state_dict(theirs.state_dict())
    hidden = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    x = torch.from_numpy(hidden)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x)[:, 0])
        torch.testing.assert_close(ours.scores(*ours.queries(x[-7:]), ours(x)), theirs.scores(x[-7:], x))
        ranks = ours.ranks(x, torch.arange(50), 49)
        assert ranks.shape == (1, 50) and ranks.dtype == torch.float32
        torch.testing.assert_close(ours.ranks(x.expand(2, -1, -1), torch.arange(50), 49)[1], ranks)
    expected = indexer.rank(indexer.state(1, hidden)[:, 0], np.arange(50), 49, indexer.queries(1, hidden))
    np.testing.assert_allclose(ranks[0], expected, rtol=0, atol=1e-5)


def test_ranks_are_of_the_queries_before_the_newest() -> None:
    """Whatever else is in the hidden states: later tokens, and none where something left."""
    module, x = Pairwise(16, 2, CONSTANTS), torch.randn(40, 16)
    positions = torch.cat((torch.arange(10), torch.arange(25, 55)))
    ranks = module.ranks(x, positions, 50)
    torch.testing.assert_close(ranks[0], module.scores(*module.queries(x[28:36]), module(x)).amax(0))


def test_the_state_dict_is_a_layer_of_a_sidecar() -> None:
    assert SCORERS["pairwise"] is Pairwise
    constants = Pairwise.defaults(mid_dim=96, head_dim=24)
    assert constants["head_count"] == 4
    shapes = {name: tuple(p.shape) for name, p in Pairwise(32, 2, constants).state_dict().items()}
    assert shapes == tensor_shapes("pairwise", constants, 32, 2)
    spec = pytest.importorskip("indexmem_edge.convert.spec")
    checked = spec.check_constants(spec.INDEXERS["pairwise"], constants, 2)
    assert checked == constants | {"norm_eps": np.float32(constants["norm_eps"])}


def test_gradients_of_scores() -> None:
    module, x = Pairwise(5, 1, CONSTANTS | {"head_count": 2, "head_dim": 3}).double(), torch.randn(4, 5).double()
    assert torch.autograd.gradcheck(lambda h: module.scores(*module.queries(h), module(h)), x.requires_grad_())


# ---------------------------------------------------------------------------------------------- the objective


def dense_loss(module: Pairwise, heads: Heads, sinks: int, window: int, queries: int | None, teacher: str) -> Tensor:
    """The formula for one layer: pair by pair, with Python lists, and one autograd graph."""
    q, k, hidden = heads.q[0].double(), heads.k[0].double(), heads.hidden[0].double()
    total, group = len(hidden), len(q) // len(k)
    logits = torch.einsum("htd,hud->htu", q, k.repeat_interleave(group, 0)) / math.sqrt(q.shape[-1])
    if teacher == "attention":
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        logits = logits.masked_fill(~causal, -math.inf).softmax(-1).log()
    wanted, keys = logits.amax(0), module(hidden)
    asked, weights = module.queries(hidden)
    given = torch.einsum("sh,sht->st", weights, torch.einsum("shi,ti->sht", asked, keys).relu())
    losses = []
    for first in range(0, total, queries or total):
        rows = range(first, min(first + (queries or total), total))
        pairs = [[s for s in rows if t <= s - window] for t in range(sinks, total)]
        pools = []
        for a in (wanted, given):
            columns = [torch.stack([a[s, t] for s in ss]) for t, ss in enumerate(pairs, sinks) if ss]
            how = module.constants["reduce"]
            pools.append([c.mean() if how == "mean" else c.max() for c in columns])
        if len(pools[0]) > 1:
            p, r = (torch.stack(a).softmax(0) for a in pools)
            losses.append((p * (p / r).log()).sum())
    return torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float64)


def dense(ms: nn.ModuleList, samples: list[Any], sinks: int, window: int, **options: Any) -> float:
    ms.zero_grad()
    losses = [
        dense_loss(module, heads, sinks, window, options.get("queries"), options.get("teacher", "logits"))
        for sample in samples
        for module, (heads, _) in zip(ms, operands(DECODER, sample))
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("teacher", ["logits", "attention"])
@pytest.mark.parametrize("sinks,window,queries", [(3, 4, None), (2, 0, None), (0, 0, None), (2, 3, 9), (1, 6, 5)])
def test_loss_and_gradients_are_those_of_the_formula(
    reduce: str, teacher: str, sinks: int, window: int, queries: int | None
) -> None:
    ms, samples = modules(reduce), [random_sample(n, n) for n in (31, 26)]
    expected = dense(ms, samples, sinks, window, queries=queries, teacher=teacher)
    wanted = gradients(ms)
    for chunk in (1, 7, 64):
        ms.zero_grad()
        objective = PooledKL(DECODER, ms, sinks, window, queries=queries, teacher=teacher, chunk=chunk)
        figures = objective.backward(samples, 0, 0)
        assert figures["loss"] == pytest.approx(expected, rel=1e-5) and expected > 0
        assert 0 <= figures["agreement"] <= 1
        for name, gradient in gradients(ms).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)


def test_gradients_add_up_and_the_model_has_none() -> None:
    ms, sample = modules(), random_sample(30)
    objective = PooledKL(DECODER, ms, 2, 4)
    objective.backward([sample], 0, 0)
    once = gradients(ms)
    objective.backward([sample], 1, 0)
    for name, gradient in gradients(ms).items():
        torch.testing.assert_close(gradient, 2 * once[name])
    assert not any(w.requires_grad for w in DECODER.weights.values())


@pytest.mark.parametrize("n_tokens", [1, 5, 9, 10])
def test_samples_with_nothing_to_choose_from(n_tokens: int) -> None:
    """With 3 sinks and a window of 6, the query at 9 is the first that has one key, that at 10 the first that has two."""
    ms = modules()
    figures = PooledKL(DECODER, ms, 3, 6).backward([random_sample(n_tokens)], 0, 0)
    assert figures == {"loss": 0.0, "agreement": 0.0}
    assert all(p.grad is None for p in ms.parameters())


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("queries,dtype", [(None, torch.float32), (4, torch.float32), (None, torch.bfloat16)])
def test_a_few_steps_lower_the_loss(reduce: str, queries: int | None, dtype: torch.dtype) -> None:
    """Also of a model in half precision; nothing becomes NaN, whatever is masked."""
    ms, samples = modules(reduce, torch.float32), [random_sample(n, n) for n in (11, 48)]
    objective = PooledKL(DECODER.to("cpu", dtype), ms, 3, 6, queries=queries, teacher="attention", chunk=8)
    optimiser, losses = torch.optim.Adam(ms.parameters(), 1e-2), []
    for step in range(15):
        optimiser.zero_grad()
        losses.append(objective.backward(samples, step, 0)["loss"])
        assert all(p.grad is not None and p.grad.isfinite().all() for p in ms.parameters())
        optimiser.step()
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]


def test_what_does_not_fit_is_refused() -> None:
    assert OBJECTIVES["pooled-kl"] is PooledKL
    with pytest.raises(TrainingError, match="pairwise, found kvzap"):
        PooledKL(DECODER, nn.ModuleList([KVzap(32, 2, {"mid_dim": 0})]), 2, 4)
    with pytest.raises(TrainingError, match="logits or attention, found 'mass'"):
        PooledKL(DECODER, modules(), 2, 4, teacher="mass")
    with pytest.raises(TrainingError, match="at least one query"):
        PooledKL(DECODER, modules(), 2, 4, queries=0)


@pytest.mark.parametrize("teacher", ["logits", "attention"])
def test_soft_caps_and_sinks_are_the_models_own(teacher: str) -> None:
    """Against plain attention: what a sink takes nobody else has, and capped logits are no further apart than the cap."""
    torch.manual_seed(0)
    n, H, G, D, cap = 24, 2, 3, 8, 5.0
    q, k = 3 * torch.randn(1, H * G, n, D), 3 * torch.randn(1, H, n, D)
    sinks = torch.randn(H * G)
    heads = Heads(0, torch.randn(1, n, 16), q, k, k, 1.0, softcap=cap, sinks=sinks)
    objective = PooledKL(DECODER, nn.ModuleList(), 2, 4, teacher=teacher)
    found = objective._teacher(heads, slice(10, 20), slice(2, 12))
    s = q[0].unflatten(0, (H, G)) @ k[0, :, None].mT
    s = cap * (s / cap).tanh()
    if teacher == "attention":
        s = s.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        s = torch.cat((s, sinks.view(H, G, 1, 1).expand(-1, -1, n, 1)), -1).log_softmax(-1)[..., :-1]
    torch.testing.assert_close(found, s[:, :, 10:20, 2:12].amax((0, 1)))
