"""The arithmetic of the benchmarks, on small made-up data: no model is loaded."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from indexmem_edge.bench import machine, ruler, synthetic
from indexmem_edge.bench.cli.app import app
from indexmem_edge.bench.cli.options import finish
from indexmem_edge.bench.quality import run as quality, summary, table as quality_table, trial
from indexmem_edge.bench.quality.arms import FULL_ARM, Arm, Sidecar, Sidecars, setup_for
from indexmem_edge.bench.report import QUALITY_KEYS, ROW_KEYS, Report, Verdict
from indexmem_edge.bench.runner import BYTE_KEYS, BenchError, Model, Setup, System, token_nll
from indexmem_edge.bench.speed import indexer, memory
from indexmem_edge.bench.speed.turns import whole_cycles
from indexmem_edge.bench.stats import alternate, bootstrap, pair_ratio
from indexmem_edge.bench.text import TokenStream, builtin_text
from support.bench_data import invoke, ruler_folder, sidecar_shape, single_runs


@pytest.mark.parametrize(
    ("text", "outputs", "expected"),
    [
        ("the number is 8973915.", ["8973915"], 1.0),
        ("PZAPI ulzdx", ["PZAPI", "ULZDX", "EBLNU", "RYTFL"], 0.5),
        ("", ["a"], 0.0),
    ],
)
def test_score_is_the_share_of_strings_found_ignoring_case(text: str, outputs: list[str], expected: float) -> None:
    assert ruler.score(text, outputs) == expected


@pytest.mark.parametrize("tail", ["", "\n"])
def test_the_question_is_the_last_line(tail: str) -> None:
    context, question = ruler.split_question("one\ntwo\nWhat is it?" + tail)
    assert (context, question) == ("one\ntwo\n", "What is it?" + tail)


def test_samples_are_read_and_answers_printed_as_the_task_prints_them(tmp_path: Path) -> None:
    row = {"input": "c\nQuestion?", "answer_prefix": " It is", "outputs": ["a", "b"]}
    (tmp_path / "64").mkdir()
    for task in ("cwe", "vt", "niah_single_1"):
        with gzip.open(tmp_path / "64" / f"{task}.jsonl.gz", "wt") as file:
            file.write((json.dumps(row) + "\n") * 3)
    assert ruler.tasks(tmp_path, 64) == ["cwe", "niah_single_1", "vt"]
    cwe, vt, niah = (ruler.load(tmp_path, 64, task, 2)[1] for task in ("cwe", "vt", "niah_single_1"))
    assert (niah.context, niah.question, niah.index) == ("c\n", "Question? It is", 1)
    assert (cwe.answer, vt.answer, niah.answer) == (" 1. a 2. b", " a b", " a, b")
    assert (cwe.n_generate, vt.n_generate, niah.n_generate) == (120, 30, 128)


def test_bootstrap_brackets_the_mean_of_group_means_and_repeats() -> None:
    mean, low, high = bootstrap([[0.0, 1.0, 0.0, 1.0], [1.0, 1.0]])
    assert mean == 0.75 and 0.5 <= low < mean < high <= 1.0
    assert bootstrap([[0.0, 1.0, 0.0, 1.0], [1.0, 1.0]]) == (mean, low, high)
    assert bootstrap([[2.0, 2.0]]) == (2.0, 2.0, 2.0)


def test_turns_alternate_and_ratios_pair_neighbours() -> None:
    order: list[str] = []

    def act(name: str) -> Any:
        return lambda: order.append(name) or float(len(order))

    a, b = alternate(3, [act("a"), act("b")])
    assert "".join(order) == "abbaab" and a == [1, 4, 5] and b == [2, 3, 6]
    assert pair_ratio([2.0, 30.0, 8.0], [1.0, 10.0, 1.0]) == 3.0


def test_token_nll_is_minus_the_log_of_the_softmax() -> None:
    import numpy as np

    logits = np.log(np.array([[1, 1, 2], [8, 1, 1]], dtype=np.float32))
    assert token_nll(logits, [2, 1]) == pytest.approx(-np.log([0.5, 0.1]))


def test_token_streams_cycle_and_the_built_in_text_repeats() -> None:
    stream = TokenStream([1, 2, 3], start=2)
    assert stream.take(5) == [3, 1, 2, 3, 1] and stream.take(1) == [2]
    assert builtin_text(500) == builtin_text(500) and len(builtin_text(500)) == 500


class FakeModel:
    """One token a letter; `ab` is one token."""

    def tokens(self, text: str, bos: bool = False) -> list[int]:
        return [0] * bos + [ord(c) for c in text.replace("ab", "X")]


def test_a_token_across_the_cut_belongs_to_the_question() -> None:
    assert trial.split_tokens(FakeModel(), "xyz", "qr") == ([0, *map(ord, "xyz")], [*map(ord, "qr")])
    assert trial.split_tokens(FakeModel(), "xya", "br") == ([0, *map(ord, "xy")], [*map(ord, "Xr")])


def test_small_budgets_get_a_small_window() -> None:
    base = Setup(window=128)
    assert setup_for(base, Arm("knorm", 0.1), Sidecars(), 2000, 99).window == 50
    assert setup_for(base, Arm("knorm", 0.5), Sidecars(), 2000, 99).window == 128
    full = setup_for(base, FULL_ARM, Sidecars(), 2000, 99)
    assert (full.budget, full.n_ctx) == (0, 2099)


def an_indexer(identity: str = "1") -> Sidecar:
    return Sidecar(Path("s.gguf"), "kvzap", "none", 0, True, identity)


def test_only_the_policy_of_the_sidecar_gets_it() -> None:
    base, sidecars = Setup(budget_ratio=0.5), Sidecars({"kvzap s": an_indexer()})
    setup = setup_for(base, Arm("kvzap s", 0.5), sidecars, 2000, 99)
    assert (setup.policy, setup.sidecar) == ("indexer", "s.gguf")
    assert setup_for(base, Arm("knorm", 0.5), sidecars, 2000, 99).sidecar is None
    assert setup_for(base, FULL_ARM, sidecars, 2000, 99).sidecar is None
    assert replace(setup, budget=64).label == "indexer 64, at most 50%"
    assert replace(setup, window=128).window_says == "min(128, budget / 4)" and replace(setup, window=0).window_says == "a quarter of the budget"


def test_jobs_keep_all_policies_of_a_sample_together() -> None:
    plan = quality.Plan(Path(), (64,), ("a", "b"), ("knorm", "tova"), (0.5,), 2, Setup(), book_windows=1)
    jobs = list(plan.jobs({64: ["a", "b"]}, plan.bounded()))
    assert [job.sample for job in jobs] == [0] * 6 + [1] * 4
    assert [(job.task, job.policy) for job in jobs[:3]] == [("a", "knorm"), ("a", "tova"), ("b", "knorm")]
    assert len({job.key for job in jobs}) == len(jobs)


def test_the_log_survives_a_cut_off_line_and_skips_other_settings(tmp_path: Path) -> None:
    path, job = tmp_path / "rows.jsonl", quality.Job("a", 64, "knorm", 0.5, 0)
    quality.Log(path, "f16").add(job, {"score": 1.0})
    quality.Log(path, "q8_0").add(job, {"score": 0.0})
    with path.open("a") as file:
        file.write('{"key": "a/64/kn')
    assert quality.Log(path, "f16").rows[job.key]["score"] == 1.0
    quality.Log(path, "f16").add(quality.Job("a", 64, "knorm", 0.5, 1), {"score": 0.5})
    assert len(quality.Log(path, "f16").rows) == 2


def test_the_log_binds_rows_of_the_indexer_to_its_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    jobs = [quality.Job("a", 64, policy, 0.5, 0) for policy in ("knorm", "indexer")]
    one, other = (Sidecars({"indexer": an_indexer(identity)}) for identity in "12")
    log = quality.Log(path, "f16", one)
    for job in jobs:
        log.add(job, {"score": 1.0})
    assert set(quality.Log(path, "f16", one).rows) == {job.key for job in jobs}
    assert set(quality.Log(path, "f16", other).rows) == set(quality.Log(path, "f16").rows) == {jobs[0].key}


def test_summary_compares_on_the_same_samples_and_averages_judged_tasks() -> None:
    able = {64: ["a"]}
    rows = summary.summarise(single_runs(), able)
    cell = {(row["policy"], row["task"]): row for row in rows}
    mean = cell["knorm", "mean"]
    assert (mean["score"], mean["score_delta"], mean["n"]) == (0.5, -0.5, 4)
    assert mean["score_low"] < -0.5 < mean["score_high"]
    assert cell["knorm", "book"]["nll_delta"] == 1.0 and cell["knorm", "book"]["score"] is None
    assert "score_delta" not in cell["full", "a"]


def test_quality_report_has_its_keys_and_renders_markdown(tmp_path: Path) -> None:
    report = Report("quality", machine.describe("m.gguf", "lib", 2, how="fake"))
    for row in summary.summarise(single_runs(), {64: ["a"]}):
        report.add(**row)
    (path,) = report.save(tmp_path)
    data = json.loads(path.read_text())
    assert set(data) == {"benchmark", "meta", "rows", "verdicts"}
    assert {"date", "cpu", "threads", "model", "library", "command", "how"} <= set(data["meta"])
    assert all(set(ROW_KEYS + QUALITY_KEYS) <= set(row) for row in data["rows"])
    text = quality_table.markdown(data)
    assert "### 64 tokens" in text and "| knorm | off | 25% | 1.0 MiB | 0.5 MiB |" in text and "-0.500 [" in text


def test_rows_have_the_common_keys_and_nan_becomes_null(tmp_path: Path) -> None:
    report = Report(
        "speed",
        machine.describe("m.gguf", "lib", 2),
        verdicts=[Verdict("x", 3.9, 4), Verdict("y", 1.0, 2, at_most=True)],
    )
    report.add(policy="knorm", budget=4, decode_tps=float("nan"))
    data = json.loads(report.save(tmp_path)[0].read_text())
    assert set(ROW_KEYS) <= set(data["rows"][0]) and data["rows"][0]["decode_tps"] is None
    assert [verdict["ok"] for verdict in data["verdicts"]] == [False, True]
    assert [Verdict("z", n, 0.0, strictly=True).ok for n in (0.0, 0.1)] == [False, True]


def test_memory_verdicts() -> None:
    rows = [{"tokens_seen": n, "kv_bytes": 7, "rss_bytes": 100_000_000 + n} for n in (1024, 4096, 65536)]
    assert [v.ok for v in memory.verdicts(rows, Setup(), 0.96, 0.94)] == [True, True, True, False]
    rows[-1].update(kv_bytes=8, rss_bytes=200_000_000)
    assert [v.ok for v in memory.verdicts(rows, Setup(), 0.96, 0.96)] == [False, False, True, True]
    assert memory.checkpoints(5000) == [1024, 2048, 4096, 5000]


def test_indexer_verdicts_and_turns() -> None:
    rows = [{"system": "streaming", "decode_ratio": 1.0, "prefill_ratio": 1.0}]
    for name, ratio in (("retention", 0.98), ("retention-linear", 0.94), ("kvzap", 0.5)):
        ratios = {f"{what}_ratio": ratio for what in ("decode", "prefill")}
        intervals = {f"{what}_interval": (ratio - 0.01, ratio + 0.01) for what in ("decode", "prefill")}
        rows.append({"system": name, "indexer": name, **ratios, **intervals})
    assert [v.ok for v in indexer.verdicts(rows)] == [True, False, None] * 2
    assert [whole_cycles(step) for step in (0, 1, 7, 32, 40)] == [32, 32, 35, 32, 40]


TINY = synthetic.Shape("qwen3", 2, 64, 6, 2, 32, 96)


@pytest.mark.parametrize("weights", ["q4_0", "q8_0", "q4_k_m"])
def test_synthetic_models_load_and_their_numbers_are_finite(tmp_path: Path, weights: str) -> None:
    path = synthetic.cached_model(TINY, weights, tmp_path)
    stamp = path.stat().st_mtime_ns
    assert synthetic.cached_model(TINY, weights, tmp_path).stat().st_mtime_ns == stamp
    model = Model(path)
    assert replace(synthetic.shape_of(model), n_ff=96) == TINY
    with System(model, Setup(n_ctx=256, threads=1)) as system:
        system.feed(model.tokens("Some text, any text."), last_logits=True)
        assert system.logits is not None and abs(system.logits).max() < 100 and system.logits.std() > 0.1
    model.close()
    with pytest.raises(BenchError, match="q4_0, q8_0, q4_k_m"):
        synthetic.cached_model(TINY, "q2_k", tmp_path)


@pytest.mark.parametrize("variant", synthetic.VARIANTS)
def test_random_sidecars_are_accepted(tmp_path: Path, variant: str) -> None:
    from indexmem_edge.native import api

    sizes = []
    for kind in ("f32", "q8_0"):
        sizes.append(synthetic.random_sidecar(tmp_path / kind, TINY, variant, kind).stat().st_size)
        api.check_sidecar(str(tmp_path / kind))
    assert (sizes[0] > sizes[1]) == synthetic.has_matrices(TINY, variant)


def test_memory_runs_on_a_tiny_model(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("llama")
    common = ["-m", model, "--out", tmp_path, "--json", "--kv-budget", 96, "--kv-window", 32, "-ub", 64, "-t", 1]
    invoke("memory", *common, "--tokens", 1500, "--unbounded-tokens", 1024, "--repeats", 2)
    data = json.loads((tmp_path / "memory.json").read_text())
    bounded = [row for row in data["rows"] if row["budget"]]
    assert [row["tokens_seen"] for row in bounded] == [1024, 1500]
    assert len({row["kv_bytes"] for row in bounded}) == 1 and data["verdicts"][0]["ok"]
    assert all(row[key] is not None for row in data["rows"] for key in ROW_KEYS)

    sidecar = synthetic.random_sidecar(tmp_path / "s.gguf", sidecar_shape(model), "kvzap")
    learned = ["--indexmem", sidecar, "--kv-budget-ratio", 0.5]
    invoke("memory", *common, *learned, "--tokens", 1100, "--unbounded-tokens", 0, "--repeats", 1)
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert {row["policy"] for row in rows} == {"indexer"}
    assert all(row["meta_bytes"] > row["indexer_bytes"] > 0 < row["sidecar_bytes"] for row in rows)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("qwen3vl", ()), ("qwen35", ("recurrent",)), ("gemma3", ("window",)), ("gpt-oss", ("window",)),
        ("gemma4-shared", ("window",)), ("deepseek2", ()), ("kimi-linear", ("recurrent",)),
    ],
)  # fmt: skip
def test_memory_of_each_kind_of_layers(tiny: Any, tmp_path: Path, name: str, parts: tuple[str, ...]) -> None:
    """The table names the parts that there are, and none of them changes."""
    common = ["-m", tiny(name)[0], "--out", tmp_path, "--kv-budget", 96, "--kv-window", 32, "-ub", 64, "-t", 1]
    shown = invoke("memory", *common, "--tokens", 1100, "--unbounded-tokens", 512, "--repeats", 1).stdout
    data = json.loads((tmp_path / "memory.json").read_text())
    bounded, whole = ([row for row in data["rows"] if bool(row["budget"]) == b] for b in (True, False))
    assert data["verdicts"][0]["ok"] and [row["tokens_seen"] for row in bounded] == [1024, 1100]
    for key in ("kv_bytes", "window_bytes", "recurrent_bytes", "meta_bytes"):
        assert len({row[key] for row in bounded}) == 1
    for part in ("window", "recurrent"):
        assert all((row[f"{part}_bytes"] > 0) == (part in parts) for row in data["rows"])
    assert bounded[0]["kv_bytes"] < whole[-1]["kv_bytes"]
    assert tuple(word for word in ("window", "recurrent") if word in shown.split("\nok")[0]) == parts


@pytest.mark.parametrize("name", ["gemma3", "qwen35"])
def test_quality_of_layers_of_several_kinds(tiny: Any, tmp_path: Path, name: str) -> None:
    """Shares of bytes count windows and recurrent states, which are there without a budget, too."""
    book = tmp_path / "book.txt"
    book.write_text(builtin_text(2000))
    words = ["quality", "--data", ruler_folder(tmp_path / "data"), "-m", tiny(name)[0], "--lengths", 256, "--budgets", "0.7"]
    words += ["--policies", "full,streaming", "--samples", 1, "-ub", 64, "-t", 1, "--out", tmp_path, "--json"]
    invoke(*words, "--nll-text", book, "--nll-tokens", 512)
    rows = [json.loads(line) for line in (tmp_path / "quality.rows.jsonl").read_text().splitlines()]
    part = "window_bytes" if name == "gemma3" else "recurrent_bytes"
    assert {row["policy"] for row in rows} == {"full", "streaming"}
    for row in rows:
        assert row[part] > 0 and row["nll"] > 0
        if row["policy"] == "streaming":
            assert row["bytes_share"] <= 0.7 and row["used_bytes"] > row[part]


def test_quality_runs_on_a_tiny_model_and_goes_on_where_it_stopped(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("llama")
    words = [
        "quality",
        "--data",
        ruler_folder(tmp_path / "data"),
        "-m",
        model,
        "--lengths",
        256,
        "--budgets",
        "0.5",
        "--samples",
        2,
    ]
    words += ["--policies", "full,streaming,knorm", "--all-tasks", "-ub", 64, "-t", 1, "--out", tmp_path, "--json"]
    book = tmp_path / "book.txt"
    book.write_text(builtin_text(2000))
    invoke(*words, "--nll-text", book, "--nll-tokens", 512, "--markdown", tmp_path / "q.md")
    lines = (tmp_path / "quality.rows.jsonl").read_text().splitlines()
    assert len(lines) == (2 * 2 + 1) * 5  # two tasks of two samples and one window; three full caches and two policies
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert {(row["policy"], row["task"]) for row in rows} >= {
        ("knorm", "vt"),
        ("full", "book"),
        ("streaming", "niah_single_1"),
    }
    text = (tmp_path / "q.md").read_text()
    assert "| streaming | off | 50% |" in text and "| full q8_0 | off | all |" in text and "### Retained" in text

    invoke(*words)
    assert (tmp_path / "quality.rows.jsonl").read_text().splitlines() == lines

    sidecar = synthetic.random_sidecar(tmp_path / "s.gguf", sidecar_shape(model), "retention", mid_dim=32)
    invoke(*words, "--indexmem", sidecar)
    assert len((tmp_path / "quality.rows.jsonl").read_text().splitlines()) == len(lines) + 4  # the indexer's alone
    rows = [row for row in json.loads((tmp_path / "quality.json").read_text())["rows"] if row["policy"] == "indexer"]
    assert rows and all(row["indexer_bytes"] > 0 < row["sidecar_bytes"] for row in rows)


def test_the_indexer_is_no_policy_without_a_sidecar() -> None:
    from indexmem_edge.bench.cli.options import policies_of
    from indexmem_edge.errors import PolicyError

    assert "indexer" not in policies_of(None) and "indexer" in policies_of(None, ["indexer"])
    assert policies_of("indexer,knorm", ["kvzap a", "kvzap b"]) == ["knorm", "kvzap a", "kvzap b"]
    with pytest.raises(PolicyError, match="--indexmem"):
        policies_of("indexer")


def test_indexer_runs_on_a_tiny_model_and_on_a_synthetic_one(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    common = ["indexer", "--out", tmp_path, "--json", "--kv-budget", 96, "--kv-window", 32, "-ub", 64, "-t", 1]
    common += ["--repeats", 1, "--prefill-repeats", 1]
    invoke(*common, "-m", tiny("llama")[0])
    data = json.loads((tmp_path / "indexer.json").read_text())
    systems = [row["system"] for row in data["rows"]]
    assert systems[0] == "streaming" and "retention, q8_0" in systems and "retention-linear, f32" in systems
    assert len(systems) == 1 + 2 * 4 + 1 and len(data["verdicts"]) == 2 * 9
    assert all(row[key] is not None for row in data["rows"] for key in ROW_KEYS + BYTE_KEYS)
    assert data["meta"]["turn"] % 7 == 0  # an eighth of the room of 60

    monkeypatch.setitem(synthetic.GEOMETRIES, "qwen3-4b", replace(TINY, n_layer=3))
    words = ["--geometry", "qwen3-4b", "--layers", 2, "--cache", tmp_path, "--kinds", "kvzap", "--types", "f16"]
    invoke(*common, *words)
    meta = json.loads((tmp_path / "indexer-qwen3-4b.json").read_text())["meta"]
    assert (meta["layers"], meta["all_layers"], meta["geometry"]) == (2, 3, "qwen3-4b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("memory", "--text", "missing.txt"), "missing.txt"),
        (("memory", "--text", "."), "cannot read"),
        (("memory", "--text", "empty.txt"), "holds no text"),
        (("checkpoint", "--out", "file"), "results cannot be written to file"),
        (("background", "--budgets", ""), "expected numbers"),
        (("memory", "-b", "0"), "--kv-budget"),
        (("background", "--policies", "indexer"), "name one with --indexmem"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(tiny: Any, tmp_path: Path, monkeypatch: Any, arguments: tuple[str, ...], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "file").write_text("x")
    out = () if "--out" in arguments else ("--out", "results")
    result = CliRunner().invoke(app, [*arguments, "-m", str(tiny("llama")[0]), *out], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code in (1, 2) and words in result.output, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_results_that_cannot_be_saved_are_shown(tmp_path: Path, capsys: Any) -> None:
    report = Report("x", {"model": "m", "threads": 1, "cpu": "c"})
    report.add(policy="streaming", budget=77)
    (tmp_path / "gone").write_text("")
    with pytest.raises(typer.Exit):
        finish(report, ("policy", "budget"), tmp_path / "gone", None, False)
    shown = capsys.readouterr()
    assert "streaming" in shown.out and "77" in shown.out and shown.err.startswith("error: ")
