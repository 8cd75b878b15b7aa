"""`bench speed`: its goals and arithmetic on made-up figures, and all of its parts on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.bench.report import ROW_KEYS, Report, report_name
from indexmem_edge.bench.runner import BYTE_KEYS, BenchError, Captures, Model, Setup
from indexmem_edge.bench.speed import evictions, goals as speed_goals, parts as speed_parts, run as speed
from support.bench_data import invoke

PLAIN, ALL = "streaming 1024", "indexer 1024, memory centroid"


def report(rows: list[dict[str, Any]] = [], **parts: list[dict[str, Any]]) -> Report:  # noqa: B006
    return Report("speed", {"indexer_and_memory": [ALL]}, list(rows), [], dict(parts))


def unbounded(depth: int, vs_empty: float, flash: bool = True) -> dict[str, Any]:
    return {"system": "unbounded", "budget": 0, "depth": depth, "decode_vs_empty": vs_empty, "flash": flash}


def bounded(depth: int, vs_empty: float, system: str = PLAIN, **values: Any) -> dict[str, Any]:
    row = {"system": system, "budget": 1024, "depth": depth, "decode_vs_empty": vs_empty, "bytes_limit": 0.8}
    return {**row, **dict.fromkeys(("decode_vs_flash", "decode_vs_no_flash", "prefill_vs_flash")), **values}


def judged(made: Report) -> dict[str, tuple[float | None, bool | None]]:
    return {verdict.name: (verdict.value, verdict.ok) for verdict in speed_goals.verdicts(made)}


def test_a_full_budget_is_judged_at_its_worst_depth_and_with_everything_on_by_a_goal_of_its_own() -> None:
    rows = [bounded(depth, value, system) for system in (PLAIN, ALL) for depth, value in ((512, 0.1), (1024, 0.62), (2048, 0.63))]
    plain, everything = (
        judged(report(rows))[f"{system}: decode at a full budget / empty context (worst depth; bytes allow 0.80)"]
        for system in (PLAIN, ALL)
    )
    assert plain == (0.62, False) and everything == (0.62, True)


def test_the_unbounded_cache_is_compared_where_it_went_with_the_limit_beside_it() -> None:
    against = {"decode_vs_flash": 16.0, "decode_vs_no_flash": 4.0, "prefill_vs_flash": 3.0}
    rows = [unbounded(8192, 0.05), unbounded(8192, 0.2, flash=False), bounded(8192, 0.7, **against), bounded(131072, 0.7)]
    found = judged(report(rows))
    assert found[f"{PLAIN}: decode at 8192 / unbounded with flash attention (bytes allow 16.0)"] == (16.0, True)
    assert found[f"{PLAIN}: decode at 8192 / unbounded without flash attention (bytes allow 4.0)"] == (4.0, False)
    assert found[f"{PLAIN}: prefill at 8192 / unbounded"] == (3.0, None)
    near = [unbounded(4096, 0.05), bounded(4096, 0.7, decode_vs_flash=16.0)]
    assert judged(report(near))[f"{PLAIN}: decode at 4096 / unbounded with flash attention (bytes allow 16.0)"][1] is None


def test_flat_is_told_between_any_depths_and_judged_from_2048_to_131072() -> None:
    rows = [bounded(1024, 0.9), bounded(2048, 0.70), bounded(131072, 0.68)]
    value, ok = judged(report(rows))[f"{PLAIN}: decode from 2048 to 131072 tokens seen: fastest / slowest - 1"]
    assert value == pytest.approx(0.70 / 0.68 - 1) and ok
    assert judged(report([*rows, bounded(8192, 0.67)]))[
        f"{PLAIN}: decode from 2048 to 131072 tokens seen: fastest / slowest - 1"
    ][1] is False
    assert judged(report(rows[1:2])).keys() == judged(report(rows[:2])).keys()
    short = judged(report([bounded(2048, 0.7), bounded(4096, 0.5)]))
    assert short[f"{PLAIN}: decode from 2048 to 4096 tokens seen: fastest / slowest - 1"][1] is None


def test_rows_latency_and_prefill_have_goals() -> None:
    made = report(
        rows_at_once=[{"system": PLAIN, "rows": k, "vs_one": k / 2} for k in (1, 8)],
        latency=[
            {"system": "unbounded", "tokens": 320, "evict_step": 0, "p99_vs_p50": 1.6},
            {"system": PLAIN, "tokens": 320, "evict_step": 32, "p99_vs_p50": 1.6},
        ],
        prefill=[
            {"system": "unbounded", "tokens": 32768},
            {"system": PLAIN, "tokens": 32768, "compared_at": 32768, "vs_unbounded": 5.0},
            {"system": ALL, "tokens": 32768, "compared_at": 32768, "vs_unbounded": 3.0},
        ],
    )
    assert [verdict.ok for verdict in speed_goals.verdicts(made)] == [True, None, False, None, False]
    made = report(prefill=[{"system": ALL, "tokens": 32768, "compared_at": 8192, "vs_unbounded": 3.0}])
    (verdict,) = speed_goals.verdicts(made)
    assert verdict.ok is None and "8192 tokens, where the unbounded one stopped" in verdict.name


def test_goals_of_evictions() -> None:
    rows = [
        {"policy": policy, "budget": budget, "vs_smallest": flat, "decode_steps": steps}
        for policy, steps in (("snapkv", 3.0), ("knorm", 3.0))
        for budget, flat in ((2048, 1.0), (16384, 1.2), (32768, 1.4))
    ]
    found = {verdict.name: verdict for verdict in speed_goals.verdicts(report(evictions=rows))}
    assert [v.ok for name, v in found.items() if "per entry at 32768 / at 2048" in name] == [False, False]
    assert found["snapkv: an eviction at 16384 in decode steps"].ok is True
    assert found["knorm: an eviction at 16384 in decode steps"].ok is False
    assert found["knorm: an eviction at 2048 in decode steps"].ok is None
    part = speed_goals.verdicts(report(evictions=rows[1:3]))
    assert part[0].ok is None and "at 32768 / at 16384" in part[0].name  # both ends have to be there


def test_limits_percentiles_and_prefill_rows() -> None:
    assert speed_goals.bytes_limit(80, 20) == 0.8 and speed_goals.bytes_limit(80, 0) == 1.0
    found = speed_parts.percentiles([0.001] * 99 + [0.003])
    assert found["tokens"] == 100 and found["p50_ms"] == pytest.approx(1.0) and found["max_ms"] == pytest.approx(3.0)
    assert 1.0 < found["p99_vs_p50"] < 3.0
    marks = [(0, 0.0), (10, 1.0), (20, 2.0)]
    assert speed_parts.prefill_row(Setup(), marks, marks)["prefill_tps"] == 10.0
    row = speed_parts.prefill_row(Setup(budget=4), marks, [(0, 0.0), (10, 5.0)])
    assert (row["compared_at"], row["vs_unbounded"], row["tokens"]) == (10, 5.0, 20)


def test_reports_of_other_geometries_and_types_have_names_of_their_own() -> None:
    assert report_name("speed", None, "f16") == "speed"
    assert report_name("speed", "llama-1b", "q8_0/q4_0") == "speed-llama-1b-q8_0-q4_0"


def test_unknown_parts_and_empty_lists_are_refused(tiny: Any) -> None:
    model = Model(tiny("llama")[0])
    setup = Setup(policy="streaming", budget=96)
    for parts, systems, depths, message in (
        (["depth"], [setup], [0], "unknown part depth"),
        ([], [setup], [0], "unknown part list"),
        (["rows"], [], [0], "at least one"),
        (["rows"], [setup], [], "at least one"),
    ):
        with pytest.raises(BenchError, match=message):
            speed.run_speed(model, systems, depths, parts=parts)
    model.close()


def test_tied_embeddings_are_read_and_others_are_not(tiny: Any) -> None:
    import gguf

    path, _ = tiny("llama")
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    spared = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    model = Model(path)
    assert model.weight_bytes() == sum(sizes.values()) - spared
    model.close()


def test_captures_are_read_from_the_log() -> None:
    """The lines are those of the CUDA backend, whose source says them in these words."""
    seen = Captures()
    for line in ("warmup complete", "warmup reset", "warmup complete", "id 3 reused"):
        seen.count(f"ggml_backend_cuda_graph_compute: CUDA graph {line}\n".encode())
    assert (seen.made, seen.dropped) == (2, 1)


def test_all_parts_run_on_a_tiny_model(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("llama")
    common = ["-m", model, "--out", tmp_path, "--json", "--kv-budget", 128, "--kv-window", 32, "-ub", 64, "-t", 1]
    sizes = ["--depths", "0,200,300", "--full-depth-max", 200, "--prefill-tokens", 300, "--prefill-full-tokens", 200]
    invoke("speed", *common, *sizes, "--decode-tokens", 32, "--repeats", 1, "--latency-tokens", 40, "--memory-slots", 8)
    data = json.loads((tmp_path / "speed.json").read_text())
    plain, everything = "streaming 128", "indexer 128, memory centroid"
    systems = [(row["system"], row["depth"]) for row in data["rows"]]
    stock = ["unbounded", "unbounded, no flash"]
    assert systems == [(s, d) for d in (0, 200) for s in (*stock, plain, everything)] + [(plain, 300), (everything, 300)]
    assert all(row[key] is not None for row in data["rows"] for key in (*ROW_KEYS, *BYTE_KEYS, "decode_vs_empty"))
    assert all(row["graphs_built"] <= 1 for row in data["rows"] if row["depth"] == 300)  # evictions build none
    assert not any("captures_made" in row for row in data["rows"])  # there is no device
    assert [row["tokens_seen"] for row in data["rows"] if row["system"] == "unbounded"] == [0, 200]
    assert [row["bytes_limit"] for row in data["rows"][:4]] == [1.0] * 4
    assert data["rows"][-1]["decode_vs_flash"] is None and data["rows"][-3]["decode_vs_flash"] > 0
    assert [(row["system"], row["rows"]) for row in data["rows_at_once"]] == [
        (s, k) for s in (plain, everything) for k in speed_parts.ROWS
    ]
    assert [row["system"] for row in data["latency"]] == ["unbounded", plain, everything]
    assert all(row["tokens"] >= 40 and row["tokens"] % (row["evict_step"] or 1) == 0 for row in data["latency"])
    assert [(row["system"], row["tokens"]) for row in data["prefill"]] == [
        ("unbounded", 200),
        (plain, 300),
        (everything, 300),
    ]
    assert {row["compared_at"] for row in data["prefill"][1:]} == {200}
    assert data["verdicts"] and data["meta"]["indexer_and_memory"] == [everything]

    invoke("speed", *common, "--parts", "latency", "--kv-policy", "knorm", "--latency-tokens", 10)
    data = json.loads((tmp_path / "speed.json").read_text())
    assert data["rows"] == [] and [row["system"] for row in data["latency"]] == ["unbounded", "knorm 128"]
    assert "rows_at_once" not in data


def test_the_cost_of_evictions(tiny: Any, tmp_path: Path) -> None:
    common = ["-m", tiny("llama")[0], "--out", tmp_path, "--json", "--kv-window", 32, "-ub", 64, "-t", 1]
    words = ["--parts", "evictions", "--eviction-budgets", "256,128", "--eviction-rounds", 2]
    invoke("speed", *common, *words)
    data = json.loads((tmp_path / "speed.json").read_text())
    found = {(row["policy"], row["budget"]): row for row in data["evictions"]}
    assert {policy for policy, _ in found} == set(evictions.policies()) >= {"streaming", "keydiff", "tova", "snapkv"}
    assert {budget for _, budget in found} == {128, 256} and len(found) == len(data["evictions"])
    for (policy, budget), row in found.items():
        assert row["evict_ms"] > 0 < row["step_ms"]
        assert row["decode_steps"] == pytest.approx(row["evict_ms"] / row["step_ms"], rel=1e-3)
        small = found[policy, 128]
        assert row["vs_smallest"] == pytest.approx(row["evict_ms"] / small["evict_ms"] * 128 / budget, rel=1e-3)
    assert not data["rows"] and len(data["verdicts"]) == 3 * len(evictions.policies())

    invoke("speed", *common, *words, "--kv-policy", "knorm")
    data = json.loads((tmp_path / "speed.json").read_text())
    assert {row["policy"] for row in data["evictions"]} == {"knorm"}


def test_layers_of_several_kinds(tiny: Any, tmp_path: Path) -> None:
    """Of a hybrid the first layers have no KV head, and no turn can be taken back: it counts as seen, and there is room for it."""
    common = ["speed", "-m", tiny("lfm2")[0], "--out", tmp_path, "--json", "--kv-budget", 128, "--kv-window", 16, "-ub", 64, "-t", 1]
    invoke(*common, "--parts", "depths", "--depths", "0,64,200", "--full-depth-max", 200, "--decode-tokens", 64, "--repeats", 2)
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert {(row["system"], row["depth"]) for row in rows} >= {("unbounded", 200), ("streaming 128", 200), ("indexer 128, memory centroid", 200)}
    invoke(*common, "--parts", "evictions", "--kv-policy", "streaming", "--eviction-budgets", "96,192", "--eviction-rounds", 1)
    rows = json.loads((tmp_path / "speed.json").read_text())["evictions"]
    assert rows and all(row["ns_per_entry"] > 0 for row in rows)
