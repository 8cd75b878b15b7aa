"""Latent memories in the benchmarks: what they change, what they cost, and the soak."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexmem_edge.bench import synthetic
from indexmem_edge.bench.quality import arms, effect, run as quality, standing, summary, table as quality_table
from indexmem_edge.bench.quality.arms import Arm, Sidecar, Sidecars
from indexmem_edge.bench.runner import BenchError, Model, Setup, System
from indexmem_edge.bench.speed import latent, soak
from indexmem_edge.bench.stats import standard_error
from indexmem_edge.bench.text import builtin_text
from indexmem_edge.convert.model import Checkpoint, Geometry, Provenance
from indexmem_edge.convert.writer import write_sidecar
from support.bench_data import invoke, ruler_folder, sidecar_shape, single_runs

RETENTION = Sidecar(Path("r.gguf"), "retention", "none", 0, True, "r")
BOTH = Sidecar(Path("b.gguf"), "kvzap", "residual", 0, False, "b")
MEMORY = Sidecar(Path("m.gguf"), "none", "centroid", 32, False, "m")


def test_standard_errors_by_hand() -> None:
    assert standard_error([[1.0, 3.0]]) == pytest.approx(math.sqrt(2 / 2))  # variance 2, two values
    assert standard_error([[1.0, 3.0], [0.0, 0.0, 3.0]]) == pytest.approx(math.sqrt(2 / 2 + 3 / 3) / 2)
    assert math.isnan(standard_error([[1.0, 3.0], [1.0]])) and math.isnan(standard_error([]))


@pytest.mark.parametrize(
    ("memory", "budget", "slots"),
    [
        ("centroid", 1024, 64),
        ("centroid", 255, 56),
        ("centroid", 20, 8),
        ("centroid:16", 1024, 16),
        ("centroid:16", 40, 8),
    ],
)
def test_a_memory_takes_at_most_a_quarter_of_the_budget(memory: str, budget: int, slots: int) -> None:
    assert arms.memory_for(memory, budget, None) == {"memory": "centroid", "memory_slots": slots}


def test_the_memory_of_a_sidecar_has_its_slots_and_goes_with_every_policy() -> None:
    sidecars = Sidecars({"indexer": RETENTION}, MEMORY)
    setups = {
        arm: arms.setup_for(Setup(), arm, sidecars, 2000, 0)
        for arm in arms.arms(["knorm", "indexer"], [0.5], ["off", "centroid", "centroid:16"], sidecars)
    }
    found = {arm[::2]: (s.memory_slots, s.sidecar) for arm, s in setups.items()}
    assert found == {
        ("knorm", "off"): (0, None),
        ("knorm", "centroid"): (32, "m.gguf"),
        ("knorm", "centroid:16"): (16, "m.gguf"),
        ("indexer", "off"): (0, "r.gguf"),
        ("indexer", "centroid"): (64, "r.gguf"),
        ("indexer", "centroid:16"): (16, "r.gguf"),
    }
    assert {s.budget for s in setups.values()} == {1000}


def test_a_memory_that_needs_weights_goes_where_they_are() -> None:
    found = arms.arms(["knorm", "a", "b"], [0.5], ["off", "residual"], Sidecars({"a": RETENTION, "b": BOTH}))
    assert [arm[::2] for arm in found] == [("knorm", "off"), ("a", "off"), ("b", "off"), ("b", "residual")]
    with pytest.raises(BenchError, match="'residual' needs trained weights"):
        arms.arms(["knorm"], [0.5], ["residual"], Sidecars(memory=MEMORY))


def test_memories_are_checked_before_anything_runs() -> None:
    known = {"centroid": "", "residual": ""}
    assert arms.check_memories(["off", "centroid:8", "off"], known) == ("off", "centroid:8")
    for wrong, why in {"cache": "off, centroid, residual", "residual:4": "centroid:16", "centroid:0": "as in"}.items():
        with pytest.raises(BenchError, match=why):
            arms.check_memories([wrong], known)
    with pytest.raises(BenchError, match="no memory was named"):
        arms.check_memories([], known)


def test_several_sidecars_are_named_by_kind_and_file(tmp_path: Path) -> None:
    shape = synthetic.Shape("qwen3", 1, 64, 6, 2, 32, 96)
    paths = [tmp_path / name for name in ("one.indexmem.gguf", "two.gguf", "memory.indexmem.gguf")]
    for path, variant in zip(paths, ("kvzap", "retention-linear")):
        synthetic.random_sidecar(path, shape, variant)
    synthetic.random_memory(paths[2], shape)
    found = Sidecars.open(paths)
    assert found.describe() == {
        "kvzap one": "one.indexmem.gguf (random weights)",
        "retention two": "two.gguf (random weights)",
        "memory residual": "memory.indexmem.gguf (random weights)",
    }
    assert list(Sidecars.open(paths[:1]).indexers) == ["indexer"]
    assert found.of("knorm", "residual") == found.memory and found.of("knorm", "centroid") is None
    (tmp_path / "b").mkdir()
    twin = synthetic.random_sidecar(tmp_path / "b" / "one.gguf", shape, "kvzap")
    for paths_of, why in ([paths[0], twin], "rename"), ([paths[2], paths[2]], "name one"):
        with pytest.raises(BenchError, match=why):
            Sidecars.open(paths_of)


def test_a_calibrated_memory_is_used_with_every_policy(tiny: Any, tmp_path: Path) -> None:
    model = Model(tiny("llama")[0])
    shape = synthetic.shape_of(model)
    gates = {"slot_count": 16, "enabled": [True, False], "gate": [0.5, 1.0]}
    checkpoint = Checkpoint(
        Geometry(shape.n_layer, shape.n_embd, shape.n_head_kv, shape.n_head, shape.head_dim),
        "none",
        {},
        [{}, {}],
        Provenance("indexmem-edge", ("text.txt",), ("1" * 64,)),
        memory="centroid",
        memory_constants=gates,
        architecture=shape.architecture,
    )
    write_sidecar(tmp_path / "calibrated.gguf", checkpoint)
    sidecars = Sidecars.open([tmp_path / "calibrated.gguf"])
    assert sidecars.describe() == {"memory centroid": "calibrated.gguf"}  # weights that somebody measured
    base, nll = Setup(ubatch=64, threads=1), {}
    for name, memory, used in (
        ("gated", "centroid", sidecars),
        ("plain", "centroid:16", Sidecars()),
        ("off", "off", sidecars),
    ):
        setup = arms.setup_for(base, Arm("knorm", 0.5, memory), used, 250, 0)
        with System(model, setup) as system:
            assert system.stats()["memory_slots"] == (0 if name == "off" else 16)
            system.feed(model.tokens(builtin_text(250)), last_logits=True)
            nll[name] = float(system.nll(model.tokens("and so on")).mean())
    assert len(set(nll.values())) == 3
    model.close()


def test_keys_of_rows_without_a_memory_are_those_of_earlier_logs(tmp_path: Path) -> None:
    job = quality.Job("a", 64, "knorm", 0.5, 0)
    assert (job.key, replace(job, memory="centroid:8").key) == ("a/64/knorm/0.5/0", "a/64/knorm/0.5/0/centroid:8")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"key": job.key, "settings": "f16", "policy": "knorm", "score": 1.0}) + "\n")
    log = quality.Log(path, "f16", Sidecars(memory=MEMORY))
    log.add(replace(job, memory="centroid"), {"score": 0.5})
    assert {key: row["score"] for key, row in quality.Log(path, "f16", Sidecars(memory=MEMORY)).rows.items()} == {
        job.key: 1.0,
        f"{job.key}/centroid": 0.5,
    }
    assert list(quality.Log(path, "f16").rows) == [job.key]  # the other was measured with a sidecar


def runs_with_memory() -> list[dict[str, Any]]:
    """Beside the policy of single_runs(): the same with a memory. Score of a: +1, 0, 0, 0; NLL of all: -0.5."""
    rows = single_runs()
    for row in [row for row in rows if row["policy"] == "knorm"]:
        better = row["task"] == "a" and row["sample"] == 3
        score = None if row["score"] is None else row["score"] + better
        more = {"memory": "centroid", "memory_slots": 8, "memory_bytes": 100, "meta_bytes": row["meta_bytes"] + 100}
        rows.append({**row, **more, "score": score, "nll": row["nll"] - 0.5 - 0.1 * (row["sample"] % 2)})
    return rows


def test_differences_pair_the_same_samples_with_and_without_the_memory() -> None:
    rows = effect.differences(runs_with_memory(), {64: ["a", "b"]})
    assert [(row["task"], row["n"]) for row in rows] == [("mean", 8), ("book", 4), ("a", 4), ("b", 4)]
    mean, book, a, _ = rows
    assert (mean["policy"], mean["memory"], mean["memory_slots"], mean["bytes_delta"]) == ("knorm", "centroid", 8, 100)
    assert (a["score_delta"], a["score_se"]) == (0.25, pytest.approx(0.25))  # variance 0.25, four values
    assert (mean["score_delta"], mean["score_se"]) == (0.125, pytest.approx(0.125))
    assert mean["score_low"] <= 0 < mean["score_high"] and mean["score_effect"] == "no difference"
    assert mean["nll_delta"] == pytest.approx(-0.55) and mean["nll_effect"] == "helps"
    assert (book["nll_effect"], "score_delta" in book) == ("too few samples", False)


def test_samples_that_only_one_has_are_left_out_of_differences() -> None:
    rows = [row for row in runs_with_memory() if row.get("memory") or row["sample"] != 3]
    a = next(row for row in effect.differences(rows, {}) if row["task"] == "a")
    assert (a["n"], a["score_delta"]) == (3, 0.0)
    single = [row for row in runs_with_memory() if row["sample"] == 3]
    a = next(row for row in effect.differences(single, {}) if row["task"] == "a")
    assert a["score_delta"] == 1.0 and math.isnan(a["score_se"]) and math.isnan(a["score_low"])  # no interval of one
    assert effect.table([a])[0][-3] == "+1.000 too few samples"
    assert effect.differences(single_runs(), {64: ["a"]}) == []


@pytest.mark.parametrize(
    ("groups", "ends", "word"),
    [
        ([[1.0] * 6], (0.1, 0.3), "helps"),
        ([[1.0] * 6], (0.3, 0.1), "helps"),  # ends of an NLL, turned round
        ([[1.0] * 6], (-0.3, -0.1), "hurts"),
        ([[1.0] * 6], (-0.1, 0.1), "no difference"),
        ([[1.0] * 6], (0.0, 0.1), "no difference"),
        ([[1.0] * 5], (0.1, 0.3), "too few samples"),
        ([[1.0] * 6, [1.0]], (0.1, 0.3), "too few samples"),
    ],
)
def test_words_for_intervals(groups: list[list[float]], ends: tuple[float, float], word: str) -> None:
    assert effect.effect(groups, *ends) == word


def test_tables_and_pictures_show_the_memory_beside_the_policy(tmp_path: Path) -> None:
    able = {64: ["a"]}
    rows = summary.summarise(runs_with_memory(), able)
    cell = {(row["policy"], row["memory"], row["task"]): row for row in rows}
    assert cell["knorm", "off", "mean"]["score"] == 0.5 and cell["knorm", "centroid", "mean"]["score"] == 0.75
    assert cell["knorm", "centroid", "a"]["memory_bytes"] == 100
    placed = standing.standing(runs_with_memory(), able)
    told = [str(verdict) for verdict in standing.verdicts(placed, able, "bytes")]
    assert (
        "retained at 64 tokens with 25% of the bytes (knorm with memory centroid, best training-free): 0.750" in told[1]
    )
    text = quality_table.markdown({"rows": rows})
    assert "| knorm | off | 25% |" in text and "| knorm | centroid | 25% |" in text
    earlier = [{k: v for k, v in row.items() if k != "memory"} for row in rows if row["memory"] == "off"]
    assert "| knorm | off | 25% |" in quality_table.markdown({"rows": earlier})
    changed = effect.differences(runs_with_memory(), able)
    told = "| 64 | knorm | 25% | centroid | 8 | a | 4 | +0.250 ± 0.250 [+0.000, +0.750] too few samples |"
    assert told in effect.markdown(changed)
    assert [cells[5] for cells in effect.table(changed, tasks=False)] == ["mean", "book"] and effect.markdown([]) == ""

    pyplot = pytest.importorskip("matplotlib.pyplot")
    report = type("Report", (), {"rows": rows, "extra": {"differences": changed, "standing": placed.rows}})
    for plot in (quality_table.plot, effect.plot):
        figure = pyplot.figure()
        plot(figure, report)
        assert figure.axes
        pyplot.close(figure)


def test_quality_compares_memories_on_a_tiny_model(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("llama")
    book = tmp_path / "book.txt"
    book.write_text(builtin_text(2000))
    sidecars = [tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "m.gguf"]
    for path, variant in zip(sidecars, ("kvzap", "retention-linear")):
        synthetic.random_sidecar(path, sidecar_shape(model), variant)
    synthetic.random_memory(sidecars[2], sidecar_shape(model))
    words = ["quality", "--data", ruler_folder(tmp_path / "data"), "-m", model, "--lengths", 256, "--budgets", "0.5"]
    words += ["--samples", 2, "--policies", "streaming", "--all-tasks", "-ub", 64, "-t", 1, "--out", tmp_path]
    words += ["--nll-text", book, "--nll-tokens", 1024, "--memories", "off,centroid,centroid:8,residual"]
    words += ["--budget-in", "entries"]  # weights of sidecars are more bytes than such a small cache has
    for path in sidecars:
        words += ["--indexmem", path]
    shown = invoke(*words, "--markdown", tmp_path / "q.md").output
    data = json.loads((tmp_path / "quality.json").read_text())
    assert data["meta"]["memories"] == ["off", "centroid", "centroid:8", "residual"]
    assert data["meta"]["sidecars"]["kvzap a"] == "a.gguf (random weights)"
    cells = {(row["policy"], row["memory"]): row for row in data["rows"] if row["task"] == "vt"}
    memories = {"off": 0, "centroid": 24, "centroid:8": 8}  # a quarter of 125 in whole eights
    for policy in ("streaming", "kvzap a", "retention b"):
        assert {memory: cells[policy, memory]["memory_slots"] for memory in memories} == memories
        assert cells[policy, "centroid"]["memory_bytes"] > cells[policy, "centroid:8"]["memory_bytes"] > 0
        assert cells[policy, "centroid"]["kv_bytes"] >= cells[policy, "off"]["kv_bytes"]
        assert cells[policy, "centroid"]["nll"] != cells[policy, "off"]["nll"]
    assert cells["streaming", "residual"]["sidecar_bytes"] > 0 and ("kvzap a", "residual") not in cells
    changed = {(row["policy"], row["memory"], row["task"]): row for row in data["differences"]}
    row = changed["kvzap a", "centroid", "vt"]
    assert (row["n"], row["budget"]) == (2, cells["kvzap a", "off"]["budget"])
    assert row["nll_delta"] == pytest.approx(
        cells["kvzap a", "centroid"]["nll"] - cells["kvzap a", "off"]["nll"], abs=2e-6
    )
    assert row["nll_se"] is not None and row["nll_low"] <= row["nll_delta"] <= row["nll_high"]
    assert "memory - off" in shown and "### Memory minus off" in (tmp_path / "q.md").read_text()
    assert (tmp_path / "quality-memory.png").is_file()

    lines = (tmp_path / "quality.rows.jsonl").read_text()
    invoke(*words)
    assert (tmp_path / "quality.rows.jsonl").read_text() == lines  # nothing ran twice


def test_latent_verdicts_are_for_rows_with_a_memory() -> None:
    rows = [{"system": "streaming", "memory": "off"}]
    for name, ratio in (("streaming, centroid 64", 0.95), ("indexer, centroid 64", 0.85)):
        ratios = {f"{what}_ratio": ratio for what in ("decode", "prefill")}
        intervals = {f"{what}_interval": (ratio - 0.01, ratio + 0.01) for what in ("decode", "prefill")}
        rows.append({"system": name, "memory": "centroid", **ratios, **intervals})
    assert [v.ok for v in latent.verdicts(rows)] == [True, False, True, False]


def test_latent_measures_every_memory_with_and_without_it(tiny: Any, tmp_path: Path) -> None:
    model, _ = tiny("llama")
    sidecar = synthetic.random_sidecar(tmp_path / "s.gguf", sidecar_shape(model), "kvzap")
    words = [
        "latent",
        "-m",
        model,
        "--out",
        tmp_path,
        "--json",
        "--kv-budget",
        96,
        "--kv-window",
        32,
        "-ub",
        64,
        "-t",
        1,
    ]
    words += ["--repeats", 1, "--prefill-repeats", 1, "--indexmem", sidecar, "--memories", "centroid,residual"]
    invoke(*words)
    data = json.loads((tmp_path / "latent.json").read_text())
    assert [row["system"] for row in data["rows"]] == [
        "streaming",
        "streaming, centroid 24",
        "streaming",
        "streaming, residual",
        "indexer",
        "indexer, centroid 24",
    ]
    plain, centroid = data["rows"][:2]
    assert (plain["decode_ratio"], plain["memory_bytes"]) == (1.0, 0) and centroid["memory_bytes"] > 0
    assert centroid["kept"] <= 96 - 24 and plain["kept"] <= 96
    assert (plain["turn"], centroid["turn"]) == (32, 35)  # evictions of 8 and of 5: an eighth of each room
    assert len(data["verdicts"]) == 2 * 3 and (tmp_path / "latent.png").is_file()
    assert data["meta"]["sidecars"] == {
        "indexer": "s.gguf (random weights)",
        "memory residual": "random.indexmem.gguf (random weights)",
    }


@pytest.mark.parametrize("memory", ["off", "centroid:16", "residual"])
def test_soak_passes_on_a_small_model(tmp_path: Path, monkeypatch: Any, memory: str) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(synthetic.GEOMETRIES, "demo", synthetic.Shape("llama", 2, 64, 2, 1, 32, 96))
    for name, value in (("SPAN", 256), ("DECODED", 16), ("WARM_UP", 512)):
        monkeypatch.setattr(soak, name, value)
    words = ["soak", "--tokens", 1500, "--memory", memory, "--kv-budget", 96, "--kv-window", 24, "-ub", 64, "-t", 1]
    invoke(*words, "--layers", 1, "--out", tmp_path, "--json")
    data = json.loads((tmp_path / "soak.json").read_text())
    assert [row["tokens_seen"] for row in data["rows"]] == [256, 512, 768, 1024, 1280, 1500]
    assert [row["failed"] for row in data["rows"]] == [None] * 6 and [v["ok"] for v in data["verdicts"]] == [True, True]
    assert data["rows"][-1]["memory_slots"] == (16 if memory == "centroid:16" else 0)
    assert data["meta"]["layers"] == 1


def test_soak_sees_what_goes_wrong(tiny: Any) -> None:
    model = Model(tiny("llama")[0])
    setup = Setup(policy="streaming", budget=96, window=32, ubatch=64, threads=1, memory="centroid", memory_slots=16)
    with System(model, setup) as system:
        start = system.stats()
        system.feed(model.tokens("Some text, any text. " * 20), last_logits=True)
        assert list(soak.check(system, start)) == []
        assert next(iter(soak.check(system, {**start, "kv_bytes": 7}))).startswith("kv_bytes was 7 and is ")
        system.setup = replace(setup, budget=64)
        assert any("in a budget of 64" in why for why in soak.check(system, start))
        system.setup = replace(setup, window=90)
        assert any("protected" in why for why in soak.check(system, start))
        system.setup, system.seen = setup, system.seen + 1
        assert any("are not the" in why for why in soak.check(system, start))
        assert system.logits is not None
        system.logits[3] = np.inf
        assert not soak._finite(system)
    model.close()


@pytest.mark.parametrize(
    ("held", "why"),
    [
        ([0, 1, 5, 8, 9], ""),
        ([0, 1, 8, 9], "4 positions for 5"),
        ([0, 1, 5, 5, 9], "twice"),
        ([0, 1, 5, 9, 10], "out of range"),
        ([0, 2, 5, 8, 9], "protected"),
        ([0, 1, 5, 7, 9], "protected"),
    ],
)
def test_positions_of_a_head(held: list[int], why: str) -> None:
    found = soak.positions_wrong(np.array(held), kept=5, seen=10, sinks=2, window=2)
    assert (why in found) and bool(found) == bool(why)


def test_soak_verdicts_name_the_first_failure_and_judge_growth_after_the_start() -> None:
    sizes = (0, 2**30, 2**30 + 2**23)
    rows = [{"tokens_seen": n * soak.WARM_UP, "rss_bytes": size, "failed": None} for n, size in enumerate(sizes)]
    assert [v.ok for v in soak.verdicts(rows)] == [True, True]
    rows[2].update(failed="x", rss_bytes=2**30 + 2**23 + 1)
    assert [v.ok for v in soak.verdicts(rows)] == [False, False] and "tokens: x" in soak.verdicts(rows)[0].name
    assert [v.ok for v in soak.verdicts(rows[:2])] == [True, None]


def test_soak_shows_few_rows() -> None:
    rows: list[dict[str, Any]] = [{"failed": "x" if i == 6 else None, "i": i} for i in range(1, 12)]
    assert [row["i"] for row in soak.shown(rows)] == [1, 2, 4, 6, 8, 11]
