"""How a quality run goes: its rounds, where it is cut off, what one trial measures, and what the command makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexmem_edge.bench import synthetic
from indexmem_edge.bench.quality import run as quality, trial
from indexmem_edge.bench.quality.arms import FULL_ARM, Arm, Sidecar, Sidecars
from indexmem_edge.bench.quality.byte_budget import Budgets, DoesNotFit
from indexmem_edge.bench.quality.plan import Job, Plan
from indexmem_edge.bench.ruler import Sample
from indexmem_edge.bench.runner import BenchError, Model, Setup, System
from indexmem_edge.bench.text import builtin_text
from support.bench_data import invoke, ruler_folder, sidecar_shape


def test_jobs_have_the_type_of_their_entries_in_their_key() -> None:
    job = Job("a", 64, "knorm", 0.5, 0, "centroid", "q8_0")
    assert job.key == "a/64/knorm/0.5/0/centroid/q8_0" and job.arm == Arm("knorm", 0.5, "centroid", "q8_0")


def test_full_caches_in_other_types_run_beside_the_policies() -> None:
    plan = Plan(
        Path(), (64,), ("a",), ("knorm",), (0.5,), 1, Setup(), cache_types=("f16", "q8_0"), full_types=("q4_0", "f16")
    )
    assert [arm.name for arm in plan.others()] == ["full q4_0", "knorm", "knorm q8_0"]
    assert Plan(Path(), (64,), ("a",), ("knorm",), (0.5,), 1, Setup(), full_only=True).others() == []


class Scripted:
    """A model and a context that says what it is told to, a letter a token; `.` ends a text."""

    def __init__(self, says: str):
        self.says, self.steps, self.model = says, 0, self

    def greedy(self) -> int:
        return ord(self.says[self.steps])

    def step(self, token: int) -> None:
        self.steps += 1

    def text(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))

    def is_end(self, token: int) -> bool:
        return token == ord(".")


@pytest.mark.parametrize(
    ("says", "outputs", "least", "expected"),
    [
        ("is 17 and so on and on", ("17",), 0, "is 17"),  # no further: the score is 1
        ("is 17 and so on and on", ("17",), 9, "is 17 and"),  # the full cache goes on
        ("is 17 and so on and on", ("17", "so"), 0, "is 17 and so"),
        ("is 17. and so on", ("18",), 9, "is 17."),
        ("abcdefghijklmnopqrstuvwxyz" * 9, ("18",), 0, ("abcdefghijklmnopqrstuvwxyz" * 9)[:30]),
    ],
)
def test_an_answer_ends_where_its_score_cannot_rise(
    says: str, outputs: tuple[str, ...], least: int, expected: str
) -> None:
    system = Scripted(says)
    out = trial._generate(system, Sample("vt", 0, "", "", outputs), least)  # type: ignore[arg-type]
    assert system.text(out) == expected and system.steps <= len(out) - 1
    assert trial._text(system, out) == expected.rstrip(".")  # type: ignore[arg-type]


def test_agreement_is_counted_along_the_answer_of_the_full_cache() -> None:
    assert trial.agreement(np.array([1, 2, 9, 4]), [1, 2, 3, 4]) == {"agreement": 0.75, "prefix": 2}
    assert trial.agreement(np.array([1, 2]), [1, 2]) == {"agreement": 1.0, "prefix": 2}
    assert trial.agreement(np.array([2]), [1]) == {"agreement": 0.0, "prefix": 0}


def test_a_trial_of_the_full_cache_agrees_with_itself_and_an_evicted_one_less(tiny: Any) -> None:
    model = Model(tiny("llama")[0])
    budgets = Budgets(model, Setup(ubatch=64, threads=1), Sidecars())
    sample = Sample("niah_single_1", 0, builtin_text(400) + "\n", "Which one?", ("pears",))

    def row(arm: Arm, reference: list[int] | None) -> dict[str, Any]:
        return trial.run_sample(
            model, budgets, Job("a", 64, arm.policy, arm.ratio, 0, cache_type=arm.cache_type), sample, reference
        )

    full = row(FULL_ARM, None)
    assert len(full["tokens"]) == trial.AGREED and "agreement" not in full and full["bytes_share"] == 1
    again = row(FULL_ARM, full["tokens"])
    assert (again["agreement"], again["prefix"], again["score"]) == (1.0, 32, full["score"]) and "tokens" not in again
    evicted = row(Arm("streaming", 0.2), full["tokens"])
    assert evicted["agreement"] < 1 and evicted["prefix"] < 32 and evicted["context_tokens"] == full["context_tokens"]
    assert evicted["bytes_share"] <= 0.2 and evicted["used_bytes"] + evicted["room_bytes"] == (
        evicted["kv_bytes"] + evicted["meta_bytes"] + evicted["sidecar_bytes"]
    )
    book = model.tokens(builtin_text(900), bos=True)
    marked = np.zeros(trial.BOOK_SCORED, bool)
    marked[:128] = True
    found = trial.run_book(model, budgets, Job("book", 64, "streaming", 0.5, 0), book, marked)
    assert found["nll"] == pytest.approx((found["nll_recall"] + 3 * found["nll_rest"]) / 4) and found["n_recall"] == 128
    none = trial.run_book(model, budgets, Job("book", 64, "streaming", 0.5, 0), book, ~np.ones_like(marked))
    assert none["nll_recall"] is None and none["nll_rest"] == none["nll"]
    model.close()


@pytest.fixture
def runner_of(monkeypatch: Any, tmp_path: Path) -> Callable[..., quality.Runner]:
    """A runner whose trials take a second each and need no model: the full cache scores as `knows` says."""

    def make(plan: Plan, knows: dict[str, list[float]], seconds: float | None = None) -> quality.Runner:
        clock = [0.0]

        def run_sample(model: Any, budgets: Any, job: Job, sample: Any, reference: Any) -> dict[str, Any]:
            clock[0] += 1
            if job.policy == "snapkv":
                raise DoesNotFit("too small")
            assert (reference is None) == (job.arm == FULL_ARM)
            score = knows[job.task][job.sample] if job.policy == "full" else 0.5
            more = {"tokens": [1]} if reference is None else {"agreement": 1.0, "prefix": 1}
            return {
                **job.arm._asdict(),
                "task": job.task,
                "length": job.length,
                "sample": job.sample,
                "score": score,
                **more,
            }

        monkeypatch.setattr(quality, "run_sample", run_sample)
        monkeypatch.setattr(quality.time, "monotonic", lambda: clock[0])
        plan = replace(plan, load=lambda data, length, task, n: [Sample(task, i, "context", "question", ("answer",)) for i in range(n)])
        return quality.Runner(None, plan, quality.Log(tmp_path / "rows.jsonl", "s"), seconds=seconds)  # type: ignore[arg-type]

    return make


def a_plan(*policies: str, samples: int = 3) -> Plan:
    return Plan(Path(), (64,), ("a", "b"), policies, (0.5,), samples, Setup())


def test_rounds_go_through_all_arms_before_the_next_sample(runner_of: Any) -> None:
    runner = runner_of(a_plan("knorm", "tova"), {"a": [1, 1, 1], "b": [0, 0, 0]})
    order = [(job.sample, job.task, job.policy) for job in runner.run()]
    one = [("a", "full"), ("b", "full"), ("a", "knorm"), ("a", "tova")]
    assert order == [(sample, *rest) for sample in range(3) for rest in one]
    assert runner.able() == {64: ["a"]} and not runner.cut
    assert list(runner.run()) == []  # all is in the log


def test_a_task_that_the_full_cache_can_do_later_catches_up(runner_of: Any) -> None:
    runner = runner_of(a_plan("knorm"), {"a": [1, 1, 1], "b": [0.5, 1, 1]})
    order = [(job.sample, job.task, job.policy) for job in runner.run()]
    assert order[:3] == [(0, "a", "full"), (0, "b", "full"), (0, "a", "knorm")]
    assert order[3:8] == [(1, "a", "full"), (1, "b", "full"), (0, "b", "knorm"), (1, "a", "knorm"), (1, "b", "knorm")]
    found = quality.balanced(runner.rows(), [FULL_ARM, *runner.others], runner.able())
    assert found.samples == {64: {"a": 3, "b": 3}}


@pytest.mark.parametrize(("seconds", "a", "b"), [(3.5, 1, 0), (6, 1, 1), (9, 1, 1), (10, 2, 1), (12, 2, 2), (99, 3, 3)])
def test_what_is_cut_off_is_judged_on_what_all_arms_finished(runner_of: Any, seconds: float, a: int, b: int) -> None:
    runner = runner_of(a_plan("knorm", "tova"), {"a": [1, 1, 1], "b": [1, 1, 1]}, seconds)
    done = list(runner.run())
    assert len(done) == min(int(np.ceil(seconds)), 18) and runner.cut == (seconds < 18)
    found = quality.balanced(runner.rows(), [FULL_ARM, *runner.others], runner.able())
    counts: dict[tuple[str, str], int] = {}
    for row in found.rows:
        counts[row["task"], row["policy"]] = counts.get((row["task"], row["policy"]), 0) + 1
    assert counts == {(t, p): n for t, n in (("a", a), ("b", b)) if n for p in ("full", "knorm", "tova")}


def test_arms_that_do_not_fit_are_told_and_not_tried_again(runner_of: Any) -> None:
    runner = runner_of(a_plan("knorm", "snapkv"), {"a": [1, 1, 1], "b": [0, 0, 0]})
    list(runner.run())
    found = quality.balanced(runner.rows(), [FULL_ARM, *runner.others], runner.able())
    assert found.samples == {64: {"a": 3}} and [row["why"] for row in found.left_out] == ["too small"]
    assert list(runner.run()) == []


def test_the_memory_of_a_sidecar_is_lent_for_an_ablation() -> None:
    both, alone = (
        Sidecar(Path("b.gguf"), "kvzap", "residual", 0, False, "b"),
        Sidecar(Path("m.gguf"), "none", "centroid", 8, False, "m"),
    )
    lent = Sidecars({"indexer": both}).lent()
    assert lent.of("streaming", "residual") == both and lent.of("streaming", "off") is None
    with pytest.raises(BenchError, match="one sidecar with a memory, found b.gguf, m.gguf"):
        Sidecars({"indexer": both}, alone).lent()
    with pytest.raises(BenchError, match="found none"):
        Sidecars().lent()


def sidecar_of_both(path: Path, model: Path) -> Path:
    shape = sidecar_shape(model)
    layers = {name: [value] * shape.n_layer for name, value in synthetic._RESIDUAL.items()}
    empty = synthetic._checkpoint(
        shape,
        kind="kvzap",
        constants={"mid_dim": 8},
        memory="residual",
        memory_constants={"feature_dim": 16, "head_dim": shape.head_dim, "eps": 1e-6, **layers},
    )
    return synthetic._write_drawn(path, empty, "f16", 0)


def test_an_ablation_shows_each_part_alone_and_both_for_tasks_and_book(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("llama", tensor_type="Q8_0")
    book = tmp_path / "book.txt"
    book.write_text(builtin_text(2000))
    words = ["quality", "--data", ruler_folder(tmp_path / "data"), "-m", model, "--lengths", 256, "--budgets", "0.75"]
    words += ["--samples", 2, "--policies", "streaming", "--all-tasks", "-ub", 64, "-t", 1, "--out", tmp_path / "out"]
    words += ["--nll-text", book, "--nll-tokens", 1024, "--budget-in", "entries", "--full-types", ""]
    shown = invoke(*words, "--ablation", "--indexmem", sidecar_of_both(tmp_path / "s.gguf", model)).output
    data = json.loads((tmp_path / "out" / "quality.json").read_text())
    names = {(row["policy"], row["memory"]) for row in data["rows"] if row["task"] == "vt"}
    assert names == {
        ("full", "off"),
        ("streaming", "off"),
        ("streaming", "residual"),
        ("indexer", "off"),
        ("indexer", "residual"),
    }
    changed = {(row["policy"], row["task"]): row for row in data["differences"]}
    for policy in ("streaming", "indexer"):
        assert {task for name, task in changed if name == policy} == {"book", "niah_single_1", "vt"}
        assert (
            changed[policy, "book"]["nll_low"]
            <= changed[policy, "book"]["nll_delta"]
            <= changed[policy, "book"]["nll_high"]
        )
        assert changed[policy, "vt"]["n"] == 2
    table = shown.partition("memory - off")[2]
    assert all(word in table for word in ("niah_single_1", "vt", "book"))
    assert {(row["policy"], row["memory"]) for row in data["standing"] if row["trained"]} == names - {
        ("full", "off"),
        ("streaming", "off"),
    }
    assert data["meta"]["sidecars"]["memory residual"].startswith("s.gguf")


def test_equal_bytes_and_plain_weights_on_the_command_line(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, _ = tiny("llama", tensor_type="Q8_0")
    words = ["quality", "--data", ruler_folder(tmp_path / "data"), "-m", model, "--weights", "bf16", "--lengths", 256]
    words += [
        "--budgets",
        "0.75,0.5,0.02",
        "--samples",
        2,
        "--policies",
        "streaming",
        "--all-tasks",
        "-ub",
        64,
        "-t",
        1,
    ]
    words += ["--cache-types", "f16,q8_0/q4_0", "--out", tmp_path / "out", "--markdown", tmp_path / "q.md"]
    shown = invoke(*words).output
    data = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert data["meta"]["weights"] == "bf16" and "-bf16.gguf" in data["meta"]["model"]
    vt = {(row["policy"], row["cache_type"], row["ratio"]): row for row in data["rows"] if row["task"] == "vt"}
    assert vt["full", "q8_0", 1.0]["bytes_share"] == pytest.approx(34 / 64, abs=1e-6)
    for (policy, _, ratio), row in vt.items():
        if policy == "streaming":
            assert row["bytes_share"] <= ratio < row["bytes_share"] + 0.02
    assert vt["streaming", "q8_0/q4_0", 0.5]["budget"] > 2 * vt["streaming", "f16", 0.5]["budget"]
    assert len({key for key in vt if key[2] == 0.02}) == 0 and "left out at 256 tokens" in shown
    assert len(data["left_out"]) == 2 and "would keep" in (tmp_path / "q.md").read_text()
    assert all(row["room_bytes"] > 0 for row in vt.values())

    only = json.loads(Path(invoke(*words, "--full-only", "--json").output.strip().splitlines()[-1]).read_text())
    assert {(row["policy"], row["cache_type"]) for row in only["rows"]} == {("full", "f16")}


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2", "qwen35"])
def test_what_was_read_after_a_bookmark_is_forgotten(tiny: Any, name: str) -> None:
    """By a cache that keeps everything as well: recurrent states and windows cannot be rolled back."""
    model = Model(tiny(name)[0])
    tokens = model.tokens(builtin_text(400), bos=True)
    with System(model, Setup(n_ctx=512, threads=1)) as system, System(model, Setup(n_ctx=512, threads=1)) as other:
        for one in (system, other):
            one.feed(tokens[:60], last_logits=True)
        back = system.bookmark()
        for n in (20, 1, 40):
            system.nll(tokens[60 : 60 + n])
            back()
            assert system.seen == other.seen == 60
            np.testing.assert_array_equal(system.logits, other.logits)
        assert system.greedy() == other.greedy()
        system.step(7), other.step(7)
        np.testing.assert_allclose(system.logits, other.logits, atol=1e-4)
    model.close()


def test_rows_of_other_text_are_not_taken_for_this_ones(tiny: Any, tmp_path: Path) -> None:
    """Another folder of samples, another book, or windows that moved because a longer one was asked for."""
    model = Model(tiny("llama")[0])
    a, b = (ruler_folder(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2)))
    books = [tmp_path / "1.txt", tmp_path / "2.txt"]
    for seed, book in enumerate(books):
        book.write_text(builtin_text(12_000, seed=seed), encoding="utf-8")
    log = tmp_path / "out" / "quality.rows.jsonl"

    def run(data: Path, book: Path, tasks: tuple[str, ...] = ("niah_single_1",), lengths: tuple[int, ...] = (256,)) -> tuple[list[float], int]:
        plan = Plan(data, lengths, tasks, (), (0.5,), 1, Setup(threads=1, ubatch=64), full_only=True, book=book, book_windows=2)
        before = len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0
        report = quality.run_quality(model, plan, tmp_path / "out")
        added = len(log.read_text(encoding="utf-8").splitlines()) - before
        return [row["nll"] for row in report.rows if row["length"] == 256], added

    first, added = run(a, books[0])
    assert added == 3 and run(a, books[0]) == (first, 0)
    other, added = run(b, books[0])
    assert added == 1 and other != first
    third, added = run(b, books[1])
    assert added == 2 and third not in (first, other)
    assert run(b, books[1], ())[1] == 0
    assert run(b, books[1], (), (256, 320))[1] == 4  # where the longer windows end, the shorter ones do
    model.close()
