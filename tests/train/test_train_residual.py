"""The trainable residual memory against the references, and its objective against the rules, written out entry by entry."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reference.memories import random_residual

torch = pytest.importorskip("torch")
import torch.nn.functional as F
from torch import Tensor, nn

from indexmem_edge.errors import BudgetError, TrainingError
from indexmem_edge.train.cache.eviction import Schedule, evictions
from indexmem_edge.train.data.sample import Sample
from indexmem_edge.train.indexers.pairwise import Pairwise
from indexmem_edge.train.indexers.residual import Residual
from indexmem_edge.train.indexers.scorers import SCORERS, Retention
from indexmem_edge.train.model.decoder import Heads
from indexmem_edge.train.objectives import OBJECTIVES
from indexmem_edge.train.objectives.operands import operands
from indexmem_edge.train.objectives.residual_mse import Errors, ResidualMSE
from reference import memories_torch
from reference.random_decoder import random_decoder, random_sample

DECODER = random_decoder()
SCALARS = ("gate_logit", "eta_raw", "decay_logit")
CONSTANTS = {
    "retention": {"trunk": "linear", "mid_dim": 0, "norm_eps": 1e-5, "pos_slope": 0.02, "age_scale": 16.0, "decay": True},
    "kvzap": {"mid_dim": 0},
    "pairwise": {"head_count": 2, "head_dim": 4, "norm_eps": 1e-5, "reduce": "mean", "query_count": 5},
}  # fmt: skip


def memories(dtype: torch.dtype = torch.float64, gate: float = 0.6) -> nn.ModuleList:
    """Their scalars are not where training starts, so that each of them matters; so does the bound of the denominator."""
    torch.manual_seed(2)
    made = nn.ModuleList([Residual({"feature_dim": 5, "head_dim": 8, "eps": 2.0}) for _ in range(2)])
    for memory in made:
        memory.load_state_dict({n: torch.tensor(x) for n, x in zip(SCALARS, (gate, -0.5, 0.8))}, strict=False)
    return made.to(dtype)


def scorers(kind: str = "retention", seed: int = 3) -> nn.ModuleList:
    torch.manual_seed(seed)
    made = nn.ModuleList([SCORERS[kind](32, 2, CONSTANTS[kind]) for _ in range(2)])
    for module in made:
        if isinstance(module, Retention):  # else no head forgets
            nn.init.normal_(module.retention_proj.weight)
    return made.requires_grad_(False)


# ---------------------------------------------------------------------------------------------- the module


@pytest.mark.parametrize("group,n_feature,head_dim", [(1, 8, 16), (3, 24, 64), (4, 5, 33)])
def test_the_module_is_that_of_the_references(group: int, n_feature: int, head_dim: int) -> None:
    n_head, memory = 2, random_residual(2, head_dim, n_feature, seed=5)
    draw = np.random.default_rng(3)
    plain, theirs = [memory.head(1, head_dim) for _ in range(n_head)], memories_torch.ResidualMemory(memory, 1)
    ours = Residual({"feature_dim": n_feature, "head_dim": head_dim, "eps": memory.eps}).requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    q, kept = torch.from_numpy(draw.standard_normal((2, n_head * group, 7, head_dim)).astype(np.float32))
    state, expected = ours.start(n_head), theirs.start(n_head, head_dim)
    torch.testing.assert_close(ours(state, q, kept), kept, rtol=0, atol=0)
    for n in (1, 40, 0, 3):
        k, v = torch.from_numpy(draw.standard_normal((2, n_head, n, head_dim)).astype(np.float32))
        state, expected = ours.write(state, k, v), theirs.write(expected, k, v)
        for a, b in zip(state, expected):
            torch.testing.assert_close(a, b)
        for h, one in enumerate(plain):
            one.write(k[h].double().numpy(), v[h].double().numpy())
    torch.testing.assert_close(ours(state, q, kept), theirs(expected, q, kept))
    for h, one in enumerate(plain):
        read = one.gate * one.read(q[h * group].double().numpy())
        np.testing.assert_allclose(ours.read(state, q)[h * group], read, rtol=0, atol=1e-4)


def test_what_training_starts_from() -> None:
    constants = Residual.defaults(64)
    memory = Residual(constants)
    assert (constants["feature_dim"], constants["eps"]) == (64, 1e-6)
    assert set(memory.state_dict()) == {"phi_proj.weight", *SCALARS}
    assert torch.sigmoid(memory.gate_logit).item() == pytest.approx(1e-3, rel=1e-5)
    assert F.softplus(memory.eta_raw).item() == pytest.approx(1e-3, rel=1e-4)
    assert torch.sigmoid(memory.decay_logit).item() == pytest.approx(0.99, rel=1e-5)
    spec = pytest.importorskip("indexmem_edge.convert.spec")
    assert {c.name for c in spec.MEMORIES["residual"].constants} == {*constants, *SCALARS, "enabled"}


def test_gradients_through_several_writes() -> None:
    memory = Residual({"feature_dim": 2, "head_dim": 3, "eps": 0.5}).double()
    k, v, q = (torch.randn(n, 2, 3).double() for n in (1, 1, 2))

    def read(weight: Tensor, *scalars: Tensor) -> Tensor:
        parameters = {"phi_proj.weight": weight, **dict(zip(SCALARS, scalars))}
        return torch.func.functional_call(Twice(memory), {f"memory.{n}": p for n, p in parameters.items()}, (k, v, q))

    inputs = [torch.randn(2, 3).double(), *(torch.tensor(x).double() for x in (0.3, 1.0, 0.5))]
    assert torch.autograd.gradcheck(read, [x.requires_grad_() for x in inputs])


class Twice(nn.Module):
    """Two evictions, and a read after each."""

    def __init__(self, memory: Residual) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, k: Tensor, v: Tensor, q: Tensor) -> Tensor:
        first = self.memory.write(self.memory.start(1), k, v)
        second = self.memory.write(first, -2 * k, v + 1)
        return torch.stack((self.memory.read(first, q), self.memory.read(second, q)))


# ---------------------------------------------------------------------------------------------- who leaves


def test_what_left_does_not_come_back() -> None:
    """Ranks are turned round after the first block: what it lost would be the best then."""
    turned = {12: torch.arange(12.0), 24: -torch.arange(24.0), 30: -torch.arange(30.0)}
    schedule = Schedule(ratio=0.5, budget=9, block=12)
    device = torch.device("cpu")
    blocks = list(evictions(lambda n: turned[n][None], 2, 30, schedule, sinks=1, window=2, device=device))
    assert [(b.start, b.end, b.lost) for b in blocks] == [(0, 12, 0), (12, 24, 6), (24, 30, 15)]
    assert blocks[1].held.tolist() == [[0, 7, 8, 9, 10, 11]] * 2, "half of 12"
    assert blocks[2].held.tolist() == [[0, 7, 8, 9, 10, 11, 12, 22, 23]] * 2, "nine, the cap"
    assert blocks[0].gone.tolist() == [[1, 2, 3, 4, 5, 6]] * 2
    assert blocks[2].gone.shape == (2, 6)


def test_budgets() -> None:
    assert [Schedule(0.25).limit(n, 4, 128) for n in (512, 600, 4097)] == [133, 150, 1025]
    assert Schedule(0.25, budget=140).limit(4096, 4, 128) == 140
    with pytest.raises(BudgetError, match="at least 133"):
        Schedule(0.25, budget=132).limit(4096, 4, 128)
    with pytest.raises(BudgetError, match="share above 0"):
        Schedule(0.0)
    with pytest.raises(BudgetError, match="block"):
        Schedule(block=0)


# ---------------------------------------------------------------------------------------------- the objective


def slow_loss(
    memory: Residual, scorer: nn.Module, heads: Heads, sinks: int, window: int, schedule: Schedule
) -> tuple[Tensor, list[float]]:
    """One layer: KV head by KV head, sets of positions, query by query; and sums of squares as in `Errors`."""
    q, k, v, hidden = heads.q[0].double(), heads.k[0].double(), heads.v[0].double(), heads.hidden[0]
    total, group = len(hidden), len(q) // len(k)
    W = memory.phi_proj.weight.T
    gate, eta, decay = torch.sigmoid(memory.gate_logit), F.softplus(memory.eta_raw), torch.sigmoid(memory.decay_logit)
    residuals, sums = [], [0.0, 0.0, 0.0]
    for h in range(len(k)):
        held: set[int] = set()
        A, b = torch.zeros(W.shape[1], v.shape[-1]).double(), torch.zeros(W.shape[1]).double()
        for start in range(0, total, schedule.block):
            end = min(start + schedule.block, total)
            for i in range(start, end) if len(held) < start else ():
                seen = sorted(held) + list(range(start, i + 1))
                for g in range(h * group, (h + 1) * group):
                    everything = (k[h, : i + 1] @ q[g, i] / math.sqrt(8)).softmax(0) @ v[h, : i + 1]
                    some = (k[h, seen] @ q[g, i] / math.sqrt(8)).softmax(0) @ v[h, seen]
                    f = q[g, i] @ W
                    out = some + gate * (f @ A) / torch.clamp((f * f) @ b, min=memory.constants["eps"])
                    residuals.append(out - everything)
                    for n, a in enumerate((out - everything, some - everything, everything)):
                        sums[n] += a.square().sum().item()
            held |= set(range(start, end))
            ranks = scorer.ranks(hidden[:end], torch.arange(end), end - 1)
            order = ranks[h if len(ranks) > 1 else 0].tolist()
            stay = max(math.ceil(schedule.ratio * end), sinks + window + 1)
            stay = min(stay, schedule.budget or stay)
            free = sorted((p for p in held if sinks <= p < end - window), key=lambda p: (order[p], -p))
            gone = free[: max(len(held) - stay, 0)]
            held -= set(gone)
            if gone:
                f = k[h, gone] @ W
                A, b = decay * A + eta * f.T @ v[h, gone], decay * b + eta * (f * f).sum(0)
    if not residuals:
        return torch.zeros(()), sums
    return torch.stack(residuals).square().mean(), sums


@pytest.mark.parametrize("kind", SCORERS)
@pytest.mark.parametrize("schedule", [Schedule(0.4, None, 8), Schedule(0.9, 9, 5), Schedule(0.2, None, 13)], ids=str)
def test_loss_and_gradients_are_those_of_the_rules(kind: str, schedule: Schedule) -> None:
    ms, judges, sinks, window = memories(), scorers(kind), 2, 4
    samples = [random_sample(n, n) for n in (33, 22)]
    sums = [Errors(), Errors()]
    losses = []
    for sample in samples:
        for il, (heads, _) in enumerate(operands(DECODER, sample, torch.float64)):
            loss, squares = slow_loss(ms[il], judges[il], heads, sinks, window, schedule)
            losses.append(loss)
            sums[il].add(Errors(*squares))
    expected = torch.stack(losses).mean()
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in ms.named_parameters()}
    ms.zero_grad()
    objective = ResidualMSE(DECODER, ms, sinks, window, scorers=judges, schedule=schedule)
    figures = objective.backward(samples, 0, 0)
    assert figures["loss"] == pytest.approx(expected.item(), rel=1e-6) and expected > 0
    for name, p in ms.named_parameters():
        assert wanted[name].abs().max() > 0, "nothing is idle"
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-5, atol=1e-9)
    relative = [e.relative for e in sums]
    assert figures["error"] == pytest.approx(np.mean([a for a, _ in relative]), rel=1e-5)
    assert figures["error_without"] == pytest.approx(np.mean([b for _, b in relative]), rel=1e-5)
    assert figures["hurts"] == sum(not e.helps for e in sums)
    for il, (a, b) in enumerate(relative):
        assert figures[f"change.{il}"] == pytest.approx(a / b - 1, abs=1e-5)
    for measured, e in zip(objective.measure(samples), sums):
        assert measured.relative == pytest.approx(e.relative, rel=1e-5) and measured.helps == e.helps


def test_scorers_and_model_are_left_alone() -> None:
    ms, judges = memories(), scorers()
    judges.requires_grad_(True)
    objective = ResidualMSE(DECODER, ms, 2, 4, scorers=judges, schedule=Schedule(0.4, None, 8))
    objective.backward([random_sample(30)], 0, 0)
    once = [p.grad.clone() for p in ms.parameters()]
    objective.measure([random_sample(30)])
    objective.backward([random_sample(30)], 1, 0)
    for p, gradient in zip(ms.parameters(), once):
        torch.testing.assert_close(p.grad, 2 * gradient)
    assert all(p.grad is None for p in judges.parameters())


@pytest.mark.parametrize("n_tokens", [1, 8, 14])
def test_samples_that_lose_nothing(n_tokens: int) -> None:
    """One block, or a budget that holds everything: no loss, no error, no gradient."""
    ms, schedule = memories(), Schedule(1.0 if n_tokens > 8 else 0.1, None, 8)
    objective = ResidualMSE(DECODER, ms, 2, 4, scorers=scorers(), schedule=schedule)
    figures = objective.backward([random_sample(n_tokens)], 0, 0)
    assert set(figures.values()) == {0.0}
    assert all(p.grad is None for p in ms.parameters())
    assert [e.helps for e in objective.measure([random_sample(n_tokens)])] == [False, False]


def repeated(sample: Sample) -> Sample:
    """Text that repeats itself, so that what left can be told from its keys."""
    tokens = np.resize(sample.tokens[:6], len(sample.tokens)).astype(np.int32)
    return Sample(tokens, sample.weight, sample.asked, sample.source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_steps_lower_the_loss(dtype: torch.dtype) -> None:
    """From the values that training starts from; the memory has to become better than none."""
    torch.manual_seed(0)
    ms = nn.ModuleList([Residual(Residual.defaults(8, 16)) for _ in range(2)])
    decoder, samples = DECODER.to("cpu", dtype), [repeated(random_sample(n, n)) for n in (48, 40)]
    objective = ResidualMSE(decoder, ms, 2, 4, scorers=scorers(), schedule=Schedule(0.25, None, 8))
    optimiser, losses = torch.optim.Adam(ms.parameters(), 0.03), []
    for step in range(40):
        optimiser.zero_grad()
        figures = objective.backward(samples, step, 0)
        losses.append(figures["loss"])
        assert all(p.grad.isfinite().all() for p in ms.parameters())
        optimiser.step()
    assert np.isfinite(losses).all() and losses[-1] < 0.95 * losses[0]
    assert figures["error"] < figures["error_without"] and figures["hurts"] == 0
    assert all(e.helps for e in objective.measure(samples))


def test_a_layer_that_is_worse_is_said_to_be() -> None:
    """Its memory answers with large values that nobody evicted."""
    ms = memories(gate=3.0)
    with torch.no_grad():
        ms[1].phi_proj.weight.mul_(0.1)
        ms[1].constants["eps"] = 1e-6
    objective = ResidualMSE(DECODER, ms, 2, 4, scorers=scorers(), schedule=Schedule(0.25, None, 8))
    figures = objective.backward([random_sample(40)], 0, 0)
    assert figures["change.1"] > 0 and not objective.measure([random_sample(40)])[1].helps


def test_what_does_not_fit_is_refused() -> None:
    assert OBJECTIVES["residual-mse"] is ResidualMSE
    with pytest.raises(TrainingError, match="each of 2 layers, found none"):
        ResidualMSE(DECODER, memories(), 2, 4)
    with pytest.raises(TrainingError, match="found 1"):
        ResidualMSE(DECODER, memories(), 2, 4, scorers=scorers()[:1])
    with pytest.raises(TrainingError, match="residual, found pairwise"):
        ResidualMSE(DECODER, nn.ModuleList([Pairwise(32, 2, CONSTANTS["pairwise"])] * 2), 2, 4, scorers=scorers())
    with pytest.raises(BudgetError, match="at least 7"):
        ResidualMSE(DECODER, memories(), 2, 4, scorers=scorers("kvzap"), schedule=Schedule(budget=6))
