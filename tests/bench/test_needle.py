"""The map of needles: where they lie, which runs there are, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.bench.machine import describe
from indexmem_edge.bench.quality import needle
from indexmem_edge.bench.quality.arms import FULL_ARM, Arm
from indexmem_edge.bench.report import Report
from indexmem_edge.bench.ruler.anatomy import take_apart
from indexmem_edge.bench.ruler.samples import n_generate
from indexmem_edge.bench.ruler.words import Words
from indexmem_edge.bench.runner import BenchError, Setup
from support.bench_data import invoke
from support.ruler_official import WORDS, Words2Tokens, count


def grid(**changes: Any) -> needle.Grid:
    values: dict[str, Any] = {
        "lengths": (512, 1024),
        "depths": (0, 50, 100),
        "policies": ("knorm", "tova"),
        "ratios": (0.25,),
    }
    return needle.Grid(**{**values, "samples": 2, "base": Setup(), **changes})


@pytest.fixture
def haystack() -> needle.Haystack:
    return needle.Haystack(Words2Tokens(), None, seed=3, words=WORDS)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [0, 25, 50, 75, 100])
def test_the_needle_lies_where_it_should_in_a_text_of_the_length(haystack: needle.Haystack, depth: int) -> None:
    sample = haystack.sample(2048, depth, 0)
    question, mark, prefix = sample.question.partition("?")
    found = take_apart("niah_single_2", sample.context + question + mark, prefix)
    assert found.depths[0] == pytest.approx(depth / 100, abs=0.03)
    assert found.answers == sample.outputs
    assert 2048 - 5 <= count(sample.context + sample.question) + n_generate(needle.TASK) <= 2048
    assert "is: " not in sample.question and sample.n_generate == 32


def test_a_sample_differs_between_depths_in_the_place_alone(haystack: needle.Haystack) -> None:
    a, b, other = (haystack.sample(1024, depth, index) for depth, index in ((0, 0), (100, 0), (0, 1)))
    assert (a.outputs, a.question) == (b.outputs, b.question) != (other.outputs, other.question)
    assert sorted(a.context.split()) == sorted(b.context.split()) and a.context != b.context
    assert a.context.split("\n")[1].split()[:20] != other.context.split("\n")[1].split()[:20]  # begins elsewhere
    again = needle.Haystack(Words2Tokens(), None, seed=3, words=WORDS)  # type: ignore[arg-type]
    assert again.sample(1024, 0, 0) == a


def test_all_arms_run_on_a_sample_before_the_next() -> None:
    jobs = list(grid().jobs())
    assert len(jobs) == len({job.key for job in jobs}) == 2 * 2 * 3 * 3
    assert [job.policy for job in jobs[:3]] == ["full", "knorm", "tova"]
    assert [job.depth for job in jobs[:9:3]] == [0, 50, 100] and [job.sample for job in jobs] == [0] * 18 + [1] * 18


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"depths": (0, 110)}, "0 to 100: found 0, 110"),
        ({"ratios": (25.0,)}, "shares of the context"),
        ({"lengths": ()}, "at least one length"),
        ({"samples": 0}, "at least one length"),
    ],
)
def test_impossible_grids_say_why(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(BenchError, match=match):
        grid(**changes)


def runs() -> list[dict[str, Any]]:
    """The full cache finds all; the policy loses what lies in the middle of the longer text, and every second at 0."""
    out = []
    for length in (512, 1024):
        for depth in (0, 50, 100):
            for arm in (FULL_ARM, Arm("knorm", 0.25)):
                for sample in range(2):
                    lost = arm != FULL_ARM and ((length, depth) == (1024, 50) or (depth == 0 and sample))
                    row = {"length": length, "depth": depth, "sample": sample, **arm._asdict(), "budget": 100}
                    out.append({**row, "score": float(not lost), "nll": 1.0 + 2 * lost, "kv_bytes": 2**20})
    return out


def test_cells_are_means_with_differences_on_the_same_samples() -> None:
    rows = needle.summarise([run for run in runs() if run["policy"] == "full" or run["sample"] or run["depth"]])
    cell = {(row["length"], row["depth"], row["policy"]): row for row in rows}
    assert cell[1024, 50, "knorm"]["score"] == 0 and cell[1024, 50, "knorm"]["score_delta"] == -1
    assert cell[1024, 50, "knorm"]["nll_delta"] == 2 and cell[512, 50, "knorm"]["score_delta"] == 0
    assert (cell[512, 0, "knorm"]["n"], cell[512, 0, "knorm"]["score_delta"]) == (1, -1)  # the sample that both have
    assert "score_delta" not in cell[512, 0, "full"] and cell[512, 0, "full"]["n"] == 2
    said = [str(verdict) for verdict in needle.verdicts(needle.summarise(runs()))]
    assert "full cache: 1.000" in said[0] and "lowest at" not in said[0]
    assert "knorm 25%; lowest at a depth of 0 % (0.500): 0.667" in said[1]


def test_the_map_has_a_panel_per_policy_and_a_number_in_every_cell(tmp_path: Path) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    report = Report("needle", describe("m.gguf", "lib", 1))
    report.rows = needle.summarise(runs())[:-1]  # one cell is not measured yet
    figure = figures.Figure(layout="constrained")
    needle.plot(figure, report)
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["full cache", "knorm 25%"]
    assert [text.get_text() for text in panels[0].texts] == ["1.00"] * 6
    assert len(panels[1].texts) == 5
    assert [tick.get_text() for tick in panels[0].get_yticklabels()] == ["0", "50", "100"]
    figure.savefig(tmp_path / "map.png")
    needle.plot(figures.Figure(), Report("needle", {}))  # nothing was measured yet


def test_it_runs_on_a_tiny_model_and_goes_on_where_it_stopped(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Words, "installed", staticmethod(lambda: WORDS))
    words = ["needle", "-m", tiny("llama")[0], "--lengths", 512, "--policies", "full,streaming", "--budgets", 0.5]
    words += ["-t", 1, "-ub", 128, "--out", tmp_path, "--json"]
    invoke(*words, "--depths", "0,100", "--samples", 1)
    log = tmp_path / "needle.rows.jsonl"
    lines = log.read_text().splitlines()
    assert len(lines) == 2 * 2
    invoke(*words, "--depths", "0,100", "--samples", 2)
    assert log.read_text().splitlines()[:4] == lines and len(log.read_text().splitlines()) == 8
    data = json.loads((tmp_path / "needle.json").read_text())
    assert {(row["depth"], row["policy"]) for row in data["rows"]} == {
        (depth, policy) for depth in (0, 100) for policy in ("full", "streaming")
    }
    assert all(row["n"] == 2 and row["nll"] > 0 and row["kv_bytes"] for row in data["rows"])
    bounded = [row for row in data["rows"] if row["policy"] == "streaming"]
    assert all(row["tokens_seen"] > row["budget"] > 0 for row in bounded)

    (tmp_path / "book.txt").write_text("Another text. It has few words. " * 20)
    invoke(*words, "--depths", "0", "--samples", 1, "--text", tmp_path / "book.txt")
    assert len(log.read_text().splitlines()) == 10  # rows of another text are not taken for these


def test_the_type_of_the_entries_is_told() -> None:
    arm = Arm("knorm", 0.25, cache_type="q8_0")
    run = {"length": 64, "depth": 0, "sample": 0, "score": 1.0, "nll": 0.5, **arm._asdict()}
    (row,) = needle.summarise([run])
    assert row["cache_type"] == "q8_0" and needle.label(needle.arm_of(row)) == "knorm q8_0 25%"
