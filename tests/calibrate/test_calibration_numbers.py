"""Errors and gates of a memory against brute force, and the promise: no layer is worse for a memory that is on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from indexmem_edge.calibrate.attention import (
    CentroidMemory,
    Errors,
    Logits,
    Passage,
    ResidualMemory,
    attend,
    layer_errors,
)
from indexmem_edge.calibrate.gates import CENTROID, GATES, RESIDUAL, choose

N, D, H, G = 5, 6, 2, 3  # widths of keys and values, KV heads, query heads of each
BUDGET, EXACT, SLOTS = 12, 9, 3
UBATCHES = [(0, 8), (8, 16), (16, 24), (24, 29)]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


class Example:
    """Random operands, and random choices of who is kept."""

    def __init__(self, seed: int = 0, softcap: float = 0.0, scale: float = 0.7) -> None:
        rng = np.random.default_rng(seed)
        n = UBATCHES[-1][1]
        self.q, self.k, self.v = (rng.standard_normal(s) for s in ((H * G, n, N), (H, n, N), (H, n, D)))
        self.logits = Logits(scale, softcap)
        self.kept: dict[int, list[Any]] = {BUDGET: [], EXACT: []}
        for budget, after in self.kept.items():
            held = [np.empty(0, int)] * H
            for start, end in UBATCHES[:-1]:
                seen = [np.concatenate([p, np.arange(start, end)]) for p in held]
                held = [np.sort(rng.choice(p, min(budget, len(p)), replace=False)) for p in seen]
                after.append([held])
        rows = [np.empty(0, int), np.array([8, 15]), np.array([16, 20, 23]), np.array([24, 28])]
        self.passage = Passage(UBATCHES, rows, self.kept)

    def errors(self, new_memory: Any) -> Errors:
        wanted = [self.q[:, rows] for rows in self.passage.rows if len(rows)]
        operands = (wanted, self.k, self.v)
        return layer_errors(self.passage, 0, operands, self.logits, new_memory, BUDGET, EXACT)

    def logit(self, h: int, i: int, key: np.ndarray) -> float:
        raw = self.logits.scale * float(self.q[h, i] @ key)
        cap = self.logits.softcap
        return cap * np.tanh(raw / cap) if cap else raw

    def outputs(self, h: int, i: int, entries: Any, more: Any = ()) -> np.ndarray:
        """One softmax over positions, and over (key, value, bias)."""
        k, v = self.k[h // G], self.v[h // G]
        logits = [self.logit(h, i, k[j]) for j in entries] + [self.logit(h, i, key) + b for key, _, b in more]
        values = [v[j] for j in entries] + [value for _, value, _ in more]
        return softmax(np.array(logits)) @ np.array(values)

    def measured(self) -> list[tuple[int, int, int]]:
        """(query head, ubatch, row) in the order of the errors."""
        return [
            (head * G + g, u, i)
            for head in range(H)
            for u, rows in enumerate(self.passage.rows)
            for g in range(G)
            for i in rows.tolist()
        ]

    def seen(self, budget: int, head: int, u: int, i: int) -> list[int]:
        before = self.kept[budget][u - 1][0][head].tolist() if u else []
        return [*before, *range(UBATCHES[u][0], i + 1)]

    def left(self, head: int, u: int) -> list[list[int]]:
        """Positions that left the smaller budget with each ubatch before `u`."""
        gone, held = [], set()
        for (start, end), after in list(zip(UBATCHES, self.kept[EXACT]))[:u]:
            held |= set(range(start, end))
            gone.append(sorted(held - set(after[0][head].tolist())))
            held = set(after[0][head].tolist())
        return [g for g in gone if g]


def slots_by_the_rule(k: np.ndarray, v: np.ndarray, batches: list[list[int]]) -> list[tuple[Any, Any, int]]:
    """The rule of the op, one entry at a time: members of each slot, whose means are taken at the end."""
    members: list[list[int]] = []
    for batch in batches:
        fresh = batch[: SLOTS - len(members)]
        members += [[j] for j in fresh]
        centres = [k[m].mean(axis=0) for m in members]
        homes = [int(np.argmin([((k[j] - c) ** 2).sum() for c in centres])) for j in batch[len(fresh) :]]
        for j, home in zip(batch[len(fresh) :], homes):
            members[home].append(j)
    return [(k[m].mean(axis=0), v[m].mean(axis=0), len(m)) for m in members]


def square(x: np.ndarray) -> float:
    return float(x @ x)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_errors_with_a_centroid_memory(softcap: float) -> None:
    example = Example(softcap=softcap)
    errors = example.errors(lambda: CentroidMemory(SLOTS, N, D))
    measured = example.measured()
    assert len(errors.full) == len(measured)
    for gate in (0.25, 1.0, 3.0):
        found = errors.at(CENTROID.weight(gate, errors))
        for r, (h, u, i) in enumerate(measured):
            head = h // G
            full = example.outputs(h, i, range(i + 1))
            slots = slots_by_the_rule(example.k[head], example.v[head], example.left(head, u))
            biased = [(key, value, np.log(n * gate)) for key, value, n in slots]
            with_memory = example.outputs(h, i, example.seen(EXACT, head, u, i), biased)
            assert errors.full[r] == pytest.approx(square(full), rel=1e-4)
            without = example.outputs(h, i, example.seen(BUDGET, head, u, i))
            assert errors.without[r] == pytest.approx(square(without - full), rel=1e-3, abs=1e-6)
            assert found[r] == pytest.approx(square(with_memory - full), rel=5e-3, abs=1e-4)  # slots are f16


def test_errors_with_a_residual_memory() -> None:
    example, rate, decay, eps = Example(1), 0.3, 0.8, 1e-3
    phi = np.random.default_rng(2).standard_normal((4, N))
    errors = example.errors(lambda: ResidualMemory(phi, D, rate, decay, eps))
    gate = 0.4
    found = errors.at(RESIDUAL.weight(gate, errors))
    for r, (h, u, i) in enumerate(example.measured()):
        head = h // G
        a, b = np.zeros((4, D)), np.zeros(4)
        for batch in example.left(head, u):
            f = [phi @ example.k[head][j] for j in batch]
            a = decay * a + rate * sum(np.outer(x, example.v[head][j]) for x, j in zip(f, batch))
            b = decay * b + rate * sum(x * x for x in f)
        f_q = phi @ example.q[h, i]
        exact = example.outputs(h, i, example.seen(EXACT, head, u, i))
        o = exact + gate * (f_q @ a) / max(float(f_q**2 @ b), eps)
        assert found[r] == pytest.approx(square(o - example.outputs(h, i, range(i + 1))), rel=1e-3, abs=1e-5)


def test_a_memory_to_which_nothing_has_come_changes_nothing() -> None:
    queries, exact = np.ones((2, N), np.float32), attend(np.zeros((2, 1), np.float32), np.ones((1, D), np.float32))
    direction, log_mass = CentroidMemory(SLOTS, N, D).read(queries, Logits(1.0), exact)
    errors = Errors.of(exact.output + 1, exact.output, exact.output, direction, log_mass)
    np.testing.assert_array_equal(errors.at(CENTROID.weight(4.0, errors)), errors.base)
    direction, _ = ResidualMemory(np.ones((4, N)), D, 1.0, 1.0, 1e-6).read(queries, Logits(1.0), exact)
    assert not direction.any()


def test_logits_of_any_size_are_summed() -> None:
    logits = np.array([[1600.0, 1600.0, -1600.0], [-900.0, -900.0, -900.0]], np.float32)
    found = attend(logits, np.eye(3, dtype=np.float32))
    np.testing.assert_allclose(found.output, [[0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-5)
    np.testing.assert_allclose(found.mass, [1600 + np.log(2), -900 + np.log(3)], rtol=1e-6)


# gates


def random_errors(seed: int, n: int = 40) -> Errors:
    rng = np.random.default_rng(seed)
    full = rng.standard_normal((n, D))
    exact = full + 0.5 * rng.standard_normal((n, D))
    direction = 1.4 * (full - exact) + 0.2 * rng.standard_normal((n, D))
    return Errors.of(full, exact, exact, direction, rng.normal(0.5, 1, n))


def test_the_best_gate_of_a_centroid_memory() -> None:
    errors = random_errors(0)
    tried = {g: errors.at(g * np.exp(errors.log_mass) / (1 + g * np.exp(errors.log_mass))).sum() for g in GATES}
    best = CENTROID.best(errors)
    assert best == min(tried, key=tried.__getitem__) and GATES[0] < best < GATES[-1]
    assert 1.0 in GATES and (GATES[0], GATES[-1]) == (1 / 16, 4)


def test_the_best_gate_of_a_residual_memory() -> None:
    errors = random_errors(1)
    tried = np.linspace(0, 1, 2001)[:-1]
    brute = tried[np.argmin([errors.at(np.full(len(errors.full), g)).sum() for g in tried])]
    assert RESIDUAL.best(errors) == pytest.approx(brute, abs=1e-3)
    assert RESIDUAL.best(replace(errors, cross=-errors.cross)) == 0.0  # it points away
    assert RESIDUAL.best(replace(errors, cross=-9 * errors.square)) < 1.0  # a sigmoid never gets there
    assert RESIDUAL.best(replace(errors, cross=0 * errors.cross, square=0 * errors.square)) == 0.0


@pytest.mark.parametrize("kind", [CENTROID, RESIDUAL])
def test_a_memory_that_helps_everywhere_is_on(kind: Any) -> None:
    row = choose(3, [random_errors(seed) for seed in range(4)], kind, 1.0)
    assert row.enabled and row.layer == 3
    assert row.error == row.gated < row.off and row.gated <= row.plain + 0.02


@pytest.mark.parametrize("kind", [CENTROID, RESIDUAL])
def test_what_helps_only_where_the_gate_was_chosen_is_off(kind: Any) -> None:
    good = random_errors(0)
    bad = replace(good, cross=-good.cross)
    for passages in ([good, bad], [bad, good], [good, bad, good, bad]):
        row = choose(0, passages, kind, 1.0)
        assert not row.enabled and row.error == row.off


def test_a_memory_that_misleads_is_off() -> None:
    """Two entries leave for one slot. What all queries look for is in one of them, and the mean points away from it."""
    u = np.eye(N)[0]
    k = np.stack([[5 * u, -5 * u, *[0 * u] * 4]])
    v = np.stack([[np.ones(D), -3 * np.ones(D), *[np.zeros(D)] * 4]])
    rows = [np.empty(0, int), np.array([4, 5])]
    passage = Passage([(0, 4), (4, 6)], rows, {3: [[[np.array([1, 2, 3])]]], 2: [[[np.array([2, 3])]]]})
    operands = ([np.broadcast_to(u, (G, 2, N)).copy()], k, v)
    errors = layer_errors(passage, 0, operands, Logits(1.0), lambda: CentroidMemory(1, N, D), 3, 2)
    row = choose(0, [errors, errors], CENTROID, 1.0)
    assert not row.enabled and row.error == row.off < row.gated < row.plain


def test_whatever_the_text_a_memory_is_on_only_where_it_helps() -> None:
    seen = set()
    for seed in range(20):
        texts = [Example(seed + i, scale=4.0).errors(lambda: CentroidMemory(SLOTS, N, D)) for i in (0, 100, 200)]
        row = choose(0, texts, CENTROID, 1.0)
        assert row.error <= row.off and (row.error < row.off) == row.enabled
        seen.add(row.enabled)
    assert seen == {True, False}
