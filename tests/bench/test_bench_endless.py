"""The endless conversation: texts, questions and arms by themselves, and the whole command on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexmem_edge.bench.endless import (
    facts as endless_facts,
    far as endless_far,
    run as endless,
    summary as endless_summary,
    table as endless_table,
    talk as endless_talk,
)
from indexmem_edge.bench.endless.arms import EndlessArm, ShiftingSystem, arms_of, open_system, setup_of, spans_of
from indexmem_edge.bench.endless.reading import Books
from indexmem_edge.bench.quality.arms import Sidecars
from indexmem_edge.bench.report import Report
from indexmem_edge.bench.runner import BenchError, Model, Setup, System
from indexmem_edge.bench.stats import wilson
from indexmem_edge.bench.text import builtin_text
from support.bench_data import invoke

BASE = Setup(threads=1, ubatch=32, cache_type="f32", window=32, flash=False)  # exact enough to compare


@pytest.fixture
def model(tiny: Any) -> Any:
    model = Model(tiny("llama")[0])
    yield model
    model.close()


def test_a_shift_keeps_sinks_and_the_newer_half_and_moves_it_up(tiny: Any) -> None:
    """In a model of one layer a key knows nothing of its past, so what is left is as good as never having read the rest."""
    model = Model(tiny("llama", n_layer=1)[0])
    text = model.tokens(builtin_text(2000))[:300]
    with open_system(model, BASE, EndlessArm("shift"), Sidecars(), 256) as system:
        assert isinstance(system, ShiftingSystem)
        system.feed(text[:256])
        assert (system.used, system.shifts) == (256, 0)
        system.feed(text[256:300], last_logits=True)
        assert (system.used, system.shifts, system.seen) == (256 - 126 + 44, 1, 300)
        assert system.stats()["kept"] == system.used and system.stats()["evicted"] == 126
        shifted = system.logits
    with System(model, replace(BASE, n_ctx=256)) as fresh:
        fresh.feed(text[:4] + text[130:], last_logits=True)
        np.testing.assert_allclose(shifted, fresh.logits, atol=1e-4)
    model.close()


@pytest.mark.parametrize("arm", [EndlessArm("shift"), EndlessArm("streaming", 0), EndlessArm("keydiff", 512)])
def test_a_question_does_not_disturb_the_reading(model: Model, arm: EndlessArm) -> None:
    base = BASE if arm.policy == "shift" else replace(BASE, flash=True)
    text = model.tokens(builtin_text(4000))[:900]
    fact = endless_facts.facts(1, "x")[0]
    found = []
    for asked in (False, True):
        with open_system(model, base, arm, Sidecars(), 256) as system:
            system.feed(text[:700])
            if asked:
                answer = endless_facts._answer(system, fact)
                assert answer["nll"] > 0 and system.seen == 700
            system.feed(text[700:], last_logits=True)
            found.append(system.logits)
    np.testing.assert_allclose(*found, atol=1e-4)  # a state is put back into other cells: sums run in another order


def test_a_shift_that_has_no_room_says_so(model: Model) -> None:
    with open_system(model, Setup(threads=1, sinks=255), EndlessArm("shift"), Sidecars(), 256) as system:
        with pytest.raises(BenchError, match="cannot be shifted: choose a larger budget"):
            system.feed(list(range(3, 263)))


def test_arms_and_spans() -> None:
    assert spans_of("trained,0,4096,0") == [None, 0, 4096]
    for wrong in ("all", "-1", ""):
        with pytest.raises(BenchError):
            spans_of(wrong)
    arms = arms_of(["streaming", "shift"], [None, 0])
    assert [arm.name for arm in arms] == ["shift", "streaming, span trained", "streaming, span off"]
    setup = setup_of(Setup(ubatch=512), arms[0], Sidecars(), 1024)
    assert (setup.budget, setup.n_ctx, setup.ubatch) == (0, 1024, 128)
    assert setup_of(Setup(), EndlessArm("keydiff", 4096), Sidecars(), 1024).span == 4096


def test_no_two_facts_are_about_a_person_and_no_question_has_the_answer() -> None:
    found = endless_facts.facts(300, "seed")
    assert found == endless_facts.facts(300, "seed") != endless_facts.facts(300, "other")
    assert found[:20] == endless_facts.facts(20, "seed")
    who = [_person(fact.question) for fact in found]
    assert len(set(who)) == 300 and None not in who
    for fact, name in zip(found, who):
        assert _person(fact.telling) == name
        assert endless_facts.has(fact.telling, fact.value) and not endless_facts.has(fact.question, fact.value)
        assert fact.question.strip() + " " + fact.value in fact.telling  # asked for in the words that it was told in
    n = len(endless_facts.KINDS)
    assert all(len({fact.kind for fact in found[i : i + n]}) == n for i in range(0, 300 - n, n))


def _person(text: str) -> str | None:
    words = text.replace(",", " ").replace(".", " ").replace("?", " ").split()
    pairs = zip(words, words[1:])
    return next((f"{a} {b}" for a, b in pairs if a in endless_facts._FIRST and b in endless_facts._LAST), None)


@pytest.mark.parametrize(
    ("text", "value", "found"),
    [
        ("It is 123.", "123", True),
        ("It is 1234.", "123", False),
        ("It is 1234 or 123", "123", True),
        ("in mantua", "Mantua", True),
        ("a bakery", "baker", False),
        ("", "baker", False),
    ],
)
def test_a_value_is_found_as_a_whole(text: str, value: str, found: bool) -> None:
    assert endless_facts.has(text, value) is found


def test_a_story_is_the_passage_with_facts_at_ends_of_sentences(model: Model, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(builtin_text(30_000))
    books = Books(model, [tmp_path / "book.txt"])
    told = endless_facts.story(books, 6000, 500, 700, (100, 2000), 0, 1)
    assert told == endless_facts.story(books, 6000, 500, 700, (100, 2000), 0, 1)
    assert len(told.told) == len(told.facts) == len(range(500, 5900, 700))
    rest, at = [], len(model.tokens("", bos=True))
    for place, fact in zip(told.told, told.facts):
        words = model.tokens(" " + fact.telling)
        assert told.tokens[place : place + len(words)] == words
        assert model.text(told.tokens[place - 1 : place]) in ".!?" and abs(place - (500 + 700 * told.told.index(place))) < 400
        rest, at = rest + told.tokens[at:place], place + len(words)
    rest += told.tokens[at:]
    assert rest == books.passage(1, 6000)[: len(rest)] and len(told.tokens) == 6000
    assert [ask.after for ask in told.asks] == sorted(ask.after for ask in told.asks)
    for ask in told.asks:
        since = ask.after - told.told[ask.fact] - len(model.tokens(" " + told.facts[ask.fact].telling))
        assert ask.distance <= since < ask.distance + 400 and ask.after <= len(told.tokens)
    assert {ask.distance for ask in told.asks} == {100, 2000}


def test_samples_begin_elsewhere_and_short_text_is_said_to_repeat(model: Model, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(builtin_text(5_000))
    books = Books(model, [tmp_path / "book.txt"])
    total = len(books.tokens)
    assert books.passage(0, 50) != books.passage(1, 50) != books.passage(2, 50)
    assert books.passage(0, total + 10)[total:] == books.tokens[:10]
    assert books.repeated(total) is None and "2.0 times" in (books.repeated(2 * total) or "")
    assert Books(model, [tmp_path / "book.txt"], seed=5).passage(0, 50) != books.passage(0, 50)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(BenchError, match=r"empty\.txt holds no text"):
        Books(model, [tmp_path / "empty.txt"])


def test_answers_of_the_script_follow_from_what_was_read(model: Model, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(builtin_text(100_000))
    books = Books(model, [tmp_path / "book.txt"])
    turns = endless_talk.script(books, 24, 400, 0, 0)
    assert turns == endless_talk.script(books, 24, 400, 0, 0) != endless_talk.script(books, 24, 400, 1, 0)
    assert {turn.kind for turn in turns} == set(endless_talk.KINDS)
    shown = [turn.user.rpartition("\n\n")[0] for turn in turns]
    book = " ".join(books.model.text(books.tokens).split())
    for i, turn in enumerate(turns):
        asked = turn.user.rpartition("\n\n")[2]
        if turn.kind == endless_talk.BACK:
            begin = asked.split('"')[1]
            assert turn.back >= endless_talk.NEAR and f"{begin} {turn.answer}" in shown[i - turn.back]
        elif turn.kind == endless_talk.GO_ON:
            assert turn.answer not in shown[i] and f"{shown[i].split('. ')[-1]} {turn.answer}" in book
        elif turn.kind == endless_talk.NEXT:
            assert f"{asked.split(chr(34))[1]} {turn.answer}" in shown[i]
        else:
            assert turn.answer in shown[i] and turn.answer.startswith(asked.split('"')[1])
    with pytest.raises(BenchError, match="too few sentences of 6 to 60 words for 400 turns"):
        (tmp_path / "short.txt").write_text("No end of this")
        endless_talk.script(Books(model, [tmp_path / "short.txt"]), 400, 300, 0, 0)


def test_the_template_gives_a_conversation_turn_by_turn(model: Model) -> None:
    template = endless_talk.Template(model)
    said = template.say("user", "Hello", True) + template.say("assistant", "Good day", False) + template.say("user", "x", True)
    assert said == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nGood day<|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )


def test_wilson_is_honest_at_the_ends() -> None:
    share, low, high = wilson(0, 10)
    assert share == low == 0 and high == pytest.approx(0.2775, abs=1e-3)
    assert wilson(10, 10)[2] == 1
    share, low, high = wilson(8, 10)
    assert share == 0.8 and (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-3)


def logged() -> list[dict[str, Any]]:
    """The shift, and the indexer with its span and without: 4 windows of 1024, 3 facts at 2 distances, 16 turns."""
    out = []
    for policy, span, worse in (("shift", "-", 0.0), ("indexer", "trained", -0.1), ("indexer", "off", 2.0)):
        common = {"budget": 64, "policy": policy, "span": span, "sample": 0, "rebases": 0, "prefill_tps": 1.0}
        out.append({**common, "part": "nll", "nll": [3.0, 3.1, 3.2 + worse, 3.3 + worse]})
        answers = [
            {"fact": i, "kind": "town" if i else "debt", "distance": d, "nll": 1.0 + worse, "text": ""}
            | {"found": policy != "shift" and (d == 8192 or i < 2)}
            for i in range(3)
            for d in (8192, 65536)
        ]
        out.append({**common, "part": "facts", "answers": answers})
        turns = [
            {"turn": i, "kind": "copy" if i % 4 else "back", "nll": 1.0 + worse + (i % 4 == 0), "tokens_seen": i}
            for i in range(1, 17)
        ]
        out.append({**common, "part": "talk", "turns": turns})
    return out


def report_of(rows: list[dict[str, Any]]) -> Report:
    report = Report(
        "endless", {"trained_length": 2048, "per": 2048, "model": "m.gguf", "threads": 1, "cpu": "c", "text_repeated": None}
    )
    endless_summary.fill(report, rows, 2048, 1024)
    return report


def test_rows_are_compared_with_the_shift_and_goals_hold_for_the_default_span() -> None:
    report = report_of(logged())
    nll = {(row["policy"], row["span"], row["tokens_seen"]): row for row in report.rows}
    assert nll["shift", "-", 4096]["nll"] == pytest.approx(3.25) and "nll_delta" not in nll["shift", "-", 4096]
    assert nll["indexer", "trained", 4096]["nll_delta"] == pytest.approx(-0.1)
    assert nll["indexer", "off", 2048]["nll_delta"] == pytest.approx(0.0)
    assert len(report.extra["fine"]) == 12
    assert not any("fact" in row for rows in report.extra.values() for row in rows), "single answers stay in the log"
    facts = {(row["policy"], row["span"], row["distance"]): row for row in report.extra["facts"]}
    far = facts["indexer", "trained", 65536]
    assert far["found"] == pytest.approx(2 / 3) and far["found_near"] == 1.0 and far["n"] == 3
    assert facts["shift", "-", 65536]["found"] == 0
    talk = [row for row in report.extra["talk"] if row["span"] == "trained"]
    assert [row["turns"] for row in talk] == list(range(2, 17, 2))
    assert talk[-1]["nll"] == pytest.approx(0.9) and talk[-1]["nll_back"] == pytest.approx(1.9)
    judged = {verdict.name: verdict.ok for verdict in report.verdicts if verdict.ok is not None}
    assert list(judged.values()) == [True, False]  # the likelihood is not above the shift's; two of three facts are too few
    assert all("span trained" in name for name in judged)


def test_tables_have_an_arm_a_line_and_the_plot_a_panel_a_part() -> None:
    report = report_of(logged())
    tables = endless_table.tables(report)
    assert [columns for _, columns, _ in tables] == [
        ["arm", "2K", "4K"], ["arm", "8K", "64K"], ["arm", "debt", "town"], ["arm", *map(str, range(2, 17, 2))],
    ]  # fmt: skip
    assert tables[1][2][1][:1] == ["indexer 64, span trained"] and tables[1][2][1][2].startswith("0.67 [0.21, 0.94] 2/3 (0.90)")
    assert [cells[1:] for cells in tables[2][2]] == [["0/2", "0/4"], ["2/2", "3/4"], ["2/2", "3/4"]]
    figures = pytest.importorskip("matplotlib.figure")
    figure = figures.Figure()
    endless_table.plot(figure, report)
    assert [len(axis.get_lines()) for axis in figure.axes] == [4, 3, 3]
    endless_table.plot(figures.Figure(), report_of([]))  # nothing was measured yet


def test_impossible_plans_say_why() -> None:
    usual: dict[str, Any] = {"parts": ("nll",), "budgets": (64,), "arms": (EndlessArm("shift"),), "base": Setup()}
    for changes, match in (
        ({"parts": ("nll", "speed")}, "unknown part 'speed'"),
        ({"budgets": (8,)}, "budgets of 64 or more"),
        ({"per": 1500}, "a multiple of it"),
        ({"parts": ("facts",), "tokens": 4096, "distances": (8192,)}, "no fact can be asked for"),
        ({"parts": ("far",), "tokens": 4096}, "reads at least 20480 tokens"),
    ):
        with pytest.raises(BenchError, match=match):
            endless.Plan(**{**usual, **changes})


def test_it_runs_on_a_tiny_model_and_goes_on_where_it_stopped(tiny: Any, tmp_path: Path) -> None:
    words = ["endless", "-m", tiny("llama", n_ctx_train=1024)[0], "--budgets", 128, "-t", 1, "-ub", 64]
    words += ["--out", tmp_path, "--json"]
    words += ["--tokens", 4096, "--per", 2048, "--distances", "256,1024", "--fact-every", 500, "--turns", 8, "--turn-tokens", 400]
    invoke(*words, "--arms", "streaming,shift", "--parts", "nll,facts")
    log = tmp_path / "endless.rows.jsonl"
    lines = log.read_text().splitlines()
    assert [json.loads(line)["key"].split("/")[0] for line in lines] == ["nll"] * 3 + ["facts"] * 3
    invoke(*words, "--arms", "streaming,shift")
    assert log.read_text().splitlines()[:6] == lines and len(log.read_text().splitlines()) == 6 + 3 + 1
    data = json.loads((tmp_path / "endless.json").read_text())
    arms = {(row["policy"], row["span"]): row for row in data["rows"]}
    assert set(arms) == {("shift", "-"), ("streaming", "trained"), ("streaming", "off")}
    assert arms["streaming", "trained"]["rebases"] > 0 == arms["streaming", "off"]["rebases"]
    assert (arms["streaming", "trained"]["span_in_force"], arms["streaming", "off"]["span_in_force"]) == (1024, 0)
    assert {row["tokens_seen"] for row in data["rows"]} == {2048, 4096} and all(row["nll"] > 0 for row in data["rows"])
    assert {row["n"] for row in data["facts"] if row["distance"] == 256} == {len(range(2000, 4096 - 256, 500))}
    assert len(data["fine"]) == 12 and len(data["talk"]) == 24
    (cost,) = data["cost"]
    assert cost["rebases"] >= 6 and cost["span_in_force"] == 1024 and 0 < cost["decode_share"] and cost["slowest_ms"] > 0
    invoke(*words, "--arms", "streaming,shift", "--parts", "nll", "--seed", 1)
    assert len(log.read_text().splitlines()) == 10 + 3  # rows of another seed are not taken for these


def test_the_end_of_a_text_is_scored_beside_its_beginning(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endless_far, "PASSAGE", 256)
    monkeypatch.setattr(endless_far, "LEAST", 1280)
    words = ["endless", "-m", tiny("llama", n_ctx_train=512)[0], "--budgets", 128, "-t", 1, "-ub", 64, "--out", tmp_path]
    words += ["--parts", "far", "--arms", "streaming", "--kv-span", "trained", "--per", 1024, "--json", "--tokens"]
    invoke(*words, 1280)
    invoke(*words, 4096)
    runs = [json.loads(line) for line in (tmp_path / "endless.rows.jsonl").read_text().splitlines()]
    assert runs[0]["far"][0] == pytest.approx(runs[0]["near"][0], abs=1e-3)  # the same tokens in both
    assert runs[1]["rebases"] > 5 and runs[1]["finite"] and not runs[1]["grown"] and len(runs[1]["near"]) == 4
    data = json.loads((tmp_path / "endless.json").read_text())
    (row,) = data["far"]
    assert row["far_delta"] == pytest.approx(np.mean(runs[1]["far"]) - np.mean(runs[1]["near"]), abs=1e-5)
    (verdict,) = [verdict for verdict in data["verdicts"] if "near the beginning" in verdict["name"]]
    assert verdict["value"] == pytest.approx(row["far_delta"], abs=1e-5) and "the same bytes" in verdict["name"]


def test_a_model_that_cannot_have_a_span_says_why(tiny: Any, tmp_path: Path) -> None:
    words = ["endless", "-m", tiny("llama", n_ctx_train=128)[0], "--budgets", 128, "-t", 1, "-ub", 64, "--out", tmp_path]
    said = invoke(*words, "--parts", "nll", "--tokens", 1024, "--per", 1024, "--arms", "streaming", "--kv-span", "trained").output
    data = json.loads((tmp_path / "endless.json").read_text())
    (reason,) = data["meta"]["without_span"]
    assert "128" in reason and f"none is in force, {reason}"[:40] in said
    assert data["rows"][0]["span_in_force"] == 0 == data["rows"][0]["rebases"]


def test_a_last_window_that_is_cut_off_says_how_far_it_was_read() -> None:
    common = {"budget": 64, "policy": "indexer", "span": "trained", "sample": 0, "rebases": 0, "prefill_tps": 1.0}
    run = {**common, "nll": [3.0, 3.1, 3.2], "tokens": 2500}
    rows = endless_summary.nll_rows({(64, "indexer", "trained"): {0: run}}, 2048, 1024)
    assert [(row["tokens_from"], row["tokens_seen"], row["nll"]) for row in rows] == [(0, 2048, pytest.approx(3.05)), (2048, 2500, 3.2)]
