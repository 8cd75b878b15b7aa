"""Who retains what: balanced samples, shares and differences by hand, the words and tables made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.bench.quality import table as quality_table
from indexmem_edge.bench.quality.arms import FULL_ARM, Arm
from indexmem_edge.bench.quality.balance import balanced
from indexmem_edge.bench.quality.standing import ALL, standing, verdicts
from indexmem_edge.bench.quality.summary import summarise

KNORM, TOVA, LEARNED = (Arm(name, 0.5) for name in ("knorm", "tova", "indexer"))
Q8 = FULL_ARM._replace(cache_type="q8_0")
ARMS = [FULL_ARM, Q8, KNORM, TOVA, LEARNED]
SHARES = {FULL_ARM: 1.0, Q8: 0.53}


def run(arm: Arm, task: str, sample: int, score: float | None, length: int = 64, **more: Any) -> dict[str, Any]:
    row = {**arm._asdict(), "task": task, "length": length, "sample": sample, "score": score, "trained": arm == LEARNED}
    sizes = {"budget": int(arm.ratio < 1) * 9, "kv_bytes": 2**20, "bytes_share": SHARES.get(arm, arm.ratio)}
    return row | sizes | {"nll": 3.0 - (score or 0.0)} | more


def runs(length: int = 64) -> list[dict[str, Any]]:
    """Six samples of tasks a and b; the full cache knows all of a and five of six of b."""
    known = {
        FULL_ARM: [6, 5],
        Q8: [6, 5],
        KNORM: [3, 2],
        TOVA: [2, 2],
        LEARNED: [6, 4],
    }
    out = []
    for arm, counts in known.items():
        for task, count in zip("ab", counts):
            more = {"agreement": count / 6, "prefix": count} if arm != FULL_ARM else {}
            out += [run(arm, task, i, float(i < count), length, **more) for i in range(6)]
        for i, lost in enumerate((0.1, 0.2, 0.3)):
            nll = 2.0 + i + lost * (arm.ratio < 1)
            out.append(run(arm, "book", i, None, length, nll=nll, nll_recall=2 * nll, nll_rest=nll / 2))
    return out


ABLE = {64: ["a", "b"], 128: ["a", "b"]}


def test_only_samples_of_all_arms_are_kept() -> None:
    rows = [r for r in runs() if not (arm_is(r, TOVA) and r["task"] == "a" and r["sample"] > 3)]
    found = balanced(rows, ARMS, {64: ["a", "b"]})
    assert found.samples == {64: {"a": 4, "b": 6, "book": 3}} and found.left_out == []
    assert {(r["policy"], r["cache_type"]) for r in found.rows if r["task"] == "a" and r["sample"] < 4} == {
        (arm.policy, arm.cache_type) for arm in ARMS
    }
    assert not any(r["task"] == "a" and r["sample"] > 3 for r in found.rows)


def arm_is(row: dict[str, Any], arm: Arm) -> bool:
    return (row["policy"], row["cache_type"]) == (arm.policy, arm.cache_type)


def test_a_round_that_was_cut_off_in_its_first_task_leaves_the_others_out() -> None:
    rows = [r for r in runs() if r["task"] == "a" or arm_is(r, FULL_ARM)]
    found = balanced(rows, ARMS, {64: ["a", "b"]})
    assert found.samples == {64: {"a": 6, "b": 0, "book": 0}}
    assert {r["task"] for r in found.rows} == {"a"}
    placed = standing(found.rows, {64: ["a", "b"]})
    assert {(r["n"], r["tasks"], r["windows"]) for r in placed.rows} == {(6, 1, 0)}


def test_tasks_that_the_full_cache_cannot_do_keep_its_rows_alone() -> None:
    found = balanced(runs(), ARMS, {64: ["a"]})
    assert {r["policy"] for r in found.rows if r["task"] == "b"} == {"full"} and "b" not in found.samples[64]


def test_an_arm_that_cannot_be_made_does_not_hold_up_the_others() -> None:
    left = {**run(TOVA, "a", 0, None), "left_out": "too small"}
    found = balanced([left, *(r for r in runs() if not arm_is(r, TOVA))], ARMS, {64: ["a", "b"]})
    assert found.samples[64] == {"a": 6, "b": 6, "book": 3}
    assert [(r["length"], r["policy"], r["why"]) for r in found.left_out] == [(64, "tova", "too small")]


def placed_by(rows: Iterable[dict[str, Any]], length: Any = 64) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    found = standing(rows, ABLE)
    names = {id(row): Arm(*(row[key] for key in Arm._fields)).name for row in [*found.rows, *found.versus]}
    return (
        {names[id(row)]: row for row in found.rows if row["length"] == length},
        {(names[id(row)], row["against"]): row for row in found.versus if row["length"] == length},
    )


def test_shares_of_the_full_score_and_differences_by_hand() -> None:
    rows, versus = placed_by(runs())
    full = (6 / 6 + 5 / 6) / 2
    assert rows["knorm"]["retained"] == pytest.approx((3 / 6 + 2 / 6) / 2 / full)
    assert rows["indexer"]["retained"] == pytest.approx((1 + 4 / 6) / 2 / full)
    assert rows["full"]["retained"] == rows["full q8_0"]["retained"] == rows["full q8_0"]["retained_high"] == 1
    assert rows["knorm"]["retained_low"] < rows["knorm"]["retained"] < rows["knorm"]["retained_high"]
    assert rows["knorm"]["nll_delta"] == pytest.approx(full - 5 / 12)
    assert rows["tova"]["agreement"] == pytest.approx(1 / 3) and "agreement" not in rows["full"]
    assert rows["tova"]["book_nll_delta"] == pytest.approx(0.2) and rows["tova"]["book_recall_delta"] == pytest.approx(
        0.4
    )
    assert 0.1 <= rows["tova"]["book_nll_delta_low"] < rows["tova"]["book_nll_delta_high"] <= 0.3 + 1e-9
    assert [name for name, row in rows.items() if row.get("best_training_free")] == ["knorm"]
    assert [name for name, row in rows.items() if row["trained"]] == ["indexer"]

    best = versus["indexer", "knorm"]
    assert best["retained_delta"] == pytest.approx((10 - 5) / 12 / full) and best["against_best"]
    assert best["retained_delta_low"] > 0 and best["retained_delta_effect"] == "better" == best["nll_delta_effect"]
    assert best["book_nll_delta"] == 0 and best["book_nll_delta_effect"] == "too few samples"
    assert versus["knorm", "tova"]["retained_delta_effect"] == "no difference"
    assert ("knorm", "knorm") not in versus and ("knorm", "indexer") not in versus
    assert versus["knorm", "full q8_0"]["retained_delta_effect"] == "worse"
    assert versus["knorm", "full q8_0"]["against_share"] == 0.53 and not versus["knorm", "full q8_0"]["against_best"]


def test_lengths_are_pooled_for_arms_that_are_at_all_of_them() -> None:
    longer = [r for r in runs(128) if not arm_is(r, TOVA)]
    rows, versus = placed_by(runs() + longer, ALL)
    one, _ = placed_by(runs())
    assert set(rows) == {"full", "full q8_0", "knorm", "indexer"}
    assert rows["knorm"]["retained"] == pytest.approx(one["knorm"]["retained"]) and rows["knorm"]["n"] == 24
    assert rows["knorm"]["retained_high"] - rows["knorm"]["retained_low"] < (
        one["knorm"]["retained_high"] - one["knorm"]["retained_low"]
    )
    assert versus["indexer", "knorm"]["against_best"]
    assert all(row["length"] == 64 for row in standing(runs(), ABLE).rows)  # nothing to pool


def test_a_book_alone_is_enough() -> None:
    rows, versus = placed_by(r for r in runs() if r["task"] == "book")
    assert "retained" not in rows["knorm"] and rows["knorm"]["book_nll_delta"] == pytest.approx(0.2)
    assert "retained_delta" not in versus["indexer", "knorm"]
    assert standing([], ABLE).rows == []


def test_verdicts_are_for_trained_arms_and_the_best_without_training() -> None:
    told = verdicts(standing(runs(), ABLE), {64: ["a", "b"]}, "bytes")
    by_name = {v.name.split(" at 64")[0] + (" " + v.name.split("(")[1] if "(" in v.name else ""): v for v in told}
    assert told[0].value == 2
    knorm, learned = by_name["score retained knorm, best training-free)"], by_name["score retained indexer)"]
    assert (knorm.threshold, knorm.ok, learned.ok) == (0.97, False, False)
    over = by_name["indexer minus knorm"]
    assert over.ok and "above 0" in str(over) and over.value is not None and over.value > 0
    few = [r for r in runs() if r["task"] == "a" and r["sample"] < 5]
    over = verdicts(standing(few, ABLE), {}, "bytes")[-1]
    assert over.ok is None and "6 samples" in over.name


def test_tables_and_the_picture(tmp_path: Path) -> None:
    rows = runs() + [r for r in runs(128) if not arm_is(r, TOVA)]
    found = standing(rows, ABLE)
    columns, cells = quality_table.table(found.rows, found.versus)
    lines = {line[0]: dict(zip(columns, line)) for line in cells}
    assert [c for c in columns if c.startswith("retained")] == ["retained 64", "retained 128"]
    assert lines["full q8_0"]["bytes"] == "53.0%" and lines["full q8_0"]["kept"] == "all"
    assert lines["indexer"]["retained 64"].startswith("0.909 [0.") and lines["tova"]["retained 128"] == "-"
    assert lines["knorm"]["over best"] == "is the best" and lines["full"]["over best"] == "-"
    data = {
        "rows": summarise(rows, ABLE),
        "standing": found.rows,
        "versus": found.versus,
        "left_out": [{"length": 128, "why": "tova does not fit"}],
    }
    text = quality_table.markdown(data)
    assert "| indexer | 50% | 50.0% | 0.909 [" in text and "**+0.455 [" in text and "tova does not fit." in text
    assert "| 64 | indexer | 50% | knorm, best | 50.0% | **+0.455 [" in text
    assert "| all | indexer | 50% | full q8_0 | 53.0% | " in text and "| knorm | 50% | tova |" not in text
    assert "### 128 tokens" in text and "| full q8_0 | off | all |" in text

    pyplot = pytest.importorskip("matplotlib.pyplot")
    for shown, panels in ((found.rows, 4), (placed_alone(rows), 2), ([], 1)):
        figure = pyplot.figure()
        quality_table.plot(figure, type("Report", (), {"extra": {"standing": shown}}))
        assert len(figure.axes) == panels
        figure.savefig(tmp_path / "q.png")
        pyplot.close(figure)


def placed_alone(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the book alone."""
    return standing([r for r in rows if r["task"] == "book"], ABLE).rows


def test_one_sample_has_a_value_without_an_interval() -> None:
    rows, versus = placed_by(r for r in runs() if r["sample"] == 0)
    assert rows["knorm"]["retained"] == 1 and math.isnan(rows["knorm"]["retained_low"])
    assert versus["indexer", "knorm"]["retained_delta_effect"] == "too few samples"
