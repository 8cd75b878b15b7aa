"""LongBench: its scores by hand, its files as they are handed out, and a run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.bench.longbench import scores
from indexmem_edge.bench.longbench.files import Folder, Sample
from indexmem_edge.bench.longbench.table import table
from indexmem_edge.bench.longbench.tasks import TASKS, task_of
from indexmem_edge.bench.runner import BenchError, Model
from indexmem_edge.bench.text import builtin_text
from support.bench_data import invoke


@pytest.mark.parametrize(
    ("score", "answer", "expected", "value"),
    [
        (scores.qa_f1, "The Eiffel-Tower!", "an eiffeltower", 1.0),  # case, punctuation and articles do not count
        (scores.qa_f1, "red blue red", "red green", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        (scores.qa_f1, "", "red", 0.0),
        (scores.count, "There are 5, no, 7 of 5.", "5", 2 / 3),
        (scores.count, "15", "5", 0.0),  # whole numbers
        (scores.count, "none", "5", 0.0),
        (scores.retrieval, "Paragraph 12", "Paragraph 12", 1.0),
        (scores.retrieval, "12 or 3", "Paragraph 12", 0.5),
        (scores.retrieval_zh, "段落3", "段落3", 1.0),
        (scores.code, "\n\n# what it does\nreturn a\nmore", "return a", 1.0),
        (scores.code, "abcd", "abxd", 0.75),
        (scores.code, "// all\n# comments", "x", 0.0),
    ],
)
def test_scores_by_hand(score: Any, answer: str, expected: str, value: float) -> None:
    assert score(answer, expected, ()) == pytest.approx(value)


def test_names_that_an_answer_gives() -> None:
    classes = ["Number", "Number of people", "Place"]
    assert scores.classification("It is a Number of people", "Number of people", classes) == 1.0  # "Number" is part of it
    assert scores.classification("Number or Place", "Number", classes) == 0.5
    assert scores.classification("Place", "Number", classes) == 0.0
    nested = ["Number of", "Number", "Number of people"]  # both are within the right name; the published loop passes over the second
    assert scores.classification("Number of people", "Number of people", nested) == 0.5


def test_punctuation_of_chinese_words() -> None:
    """As the published scores have it: 》 is left out, 《 is a word."""
    assert [scores._plain_zh(word) for word in ("》", "《", "。", "℃", "Ａ", "A ")] == ["", "《", "", "℃", "ａ", "a"]


def test_summaries_and_chinese_words() -> None:
    pytest.importorskip("rouge")
    assert scores.rouge("the cat sat", "the cat ran") == pytest.approx(2 / 3, abs=1e-6)
    assert scores.rouge("", "the cat ran") == 0.0
    pytest.importorskip("jieba")
    assert scores.qa_f1_zh("北京！", "北京") == 1.0 and scores.qa_f1_zh("北京", "上海") == 0.0
    assert scores.rouge_zh("北京", "北京") == pytest.approx(1.0, abs=1e-6)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge", None)
    with pytest.raises(BenchError, match="package rouge: pip install rouge"):
        scores.rouge("a", "a")


def test_the_best_of_the_expected_answers_and_only_the_first_line() -> None:
    sample = Sample(TASKS["triviaqa"], "text", "Answer:", ("a red fox", "vulpes"), (), 8)
    assert sample.score("\nVulpes\nQuestion: another one") == 1.0
    assert [sample.settled(text) for text in ("\nVulpes", "\nVulpes\n")] == [False, True]
    assert sample.answer == " a red fox"
    open_ended = Sample(TASKS["hotpotqa"], "text", "Answer:\n", ("x",), (), 8)
    assert not open_ended.settled("x\n") and open_ended.answer == "x"
    assert task_of("hotpotqa_e") is TASKS["hotpotqa"]


def longbench(folder: Path, **files: list[dict[str, Any]]) -> Path:
    """A folder in the official form."""
    (folder / "config").mkdir(parents=True)
    prompts = {"hotpotqa": "Read.\n{context}\nNow, {input} Say:", "passage_count": "{context}\n\nHow many? "}
    (folder / "config" / "dataset2prompt.json").write_text(json.dumps(prompts))
    (folder / "config" / "dataset2maxlen.json").write_text(json.dumps({"hotpotqa": 4, "passage_count": 3}))
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(context: str, answers: Any = ("pears",), question: str = "which fruit?") -> dict[str, Any]:
    return {"input": question, "context": context, "answers": list(answers), "all_classes": None, "length": 9, "_id": "x"}


def test_a_prompt_is_cut_in_its_middle_and_asked_at_its_end(tiny: Any, tmp_path: Path) -> None:
    model = Model(tiny("llama")[0])
    text = "{input} first words " + builtin_text(3000) + " last words"  # braces in a text stay as they are
    folder = Folder(longbench(tmp_path, hotpotqa=[row("short {context}"), row(text)]))
    short, long = folder.load(model, 200, "hotpotqa", 5)
    assert short.context == "Read.\nshort {context}" and short.question == "\nNow, which fruit? Say:"
    assert long.context.startswith("Read.\n{input} first") and long.context.endswith("last words")
    n = len(model.tokens(long.context + long.question, bos=True))
    assert 190 <= n <= 205 and long.n_generate == 4
    with pytest.raises(BenchError, match=r"half of 20.*larger --length"):
        folder.load(model, 20, "hotpotqa", 5)
    model.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"input": "a"}', "line 1: expected the fields input, context, answers"),
        ('{"input": "a", "context": "b", "answers": []}', "line 1: expected answers"),
        ('{"input": "a", "context": "b", "answers": [3]}', "line 1: expected answers"),
        ("[]", "line 1: expected the fields"),
    ],
)
def test_files_that_are_not_longbench(tiny: Any, tmp_path: Path, line: str, message: str) -> None:
    folder = longbench(tmp_path)
    (folder / "hotpotqa.jsonl").write_text(line + "\n")
    with pytest.raises(BenchError, match=message):
        Folder(folder).load(None, 100, "hotpotqa", 1)  # type: ignore[arg-type]


def test_folders_that_lack_something(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"no file of LongBench.*hotpotqa.jsonl"):
        Folder(tmp_path)
    folder = longbench(tmp_path / "a", hotpotqa=[row("x")])
    with pytest.raises(BenchError, match="musique; there are hotpotqa"):
        Folder(folder).tasks("hotpotqa,musique")
    (folder / "config" / "dataset2maxlen.json").write_text('{"hotpotqa": "4"}')
    with pytest.raises(BenchError, match="expected an object of tasks with a int each"):
        Folder(folder)
    (folder / "config" / "dataset2maxlen.json").unlink()
    with pytest.raises(BenchError, match="no dataset2maxlen.json"):
        Folder(folder)


def test_a_run_on_a_tiny_model(tiny: Any, tmp_path: Path) -> None:
    rows = [row(builtin_text(1500), ["7"]), row(builtin_text(900), ["7"])]
    data = longbench(tmp_path / "data", hotpotqa=rows, passage_count=rows)
    shared = ["--data", data, "-m", tiny("llama")[0], "--length", 300, "-ub", 64, "-t", 1, "--out", tmp_path]
    shown = invoke("longbench", *shared, "--policies", "streaming", "--budgets", 0.5, "--budget-in", "entries")
    assert "scores of LongBench" in shown.output and "passage_count" in shown.output
    found = json.loads((tmp_path / "longbench.json").read_text())
    assert found["benchmark"] == "longbench" and "as LongBench publishes" in found["meta"]["how"]
    cells = {(r["task"], r["policy"]): r for r in found["rows"]}
    assert set(cells) >= {(t, p) for t in ("hotpotqa", "passage_count") for p in ("full", "streaming")}
    assert all(cells[t, "streaming"]["n"] == 2 for t in ("hotpotqa", "passage_count"))
    singles = [json.loads(line) for line in (tmp_path / "longbench.rows.jsonl").read_text().splitlines()]
    assert len(singles) == 8
    assert all(r["context_tokens"] < 300 for r in singles)
    kept = {r["budget"] / r["context_tokens"] for r in singles if r["policy"] == "streaming"}
    assert all(0.49 < share < 0.51 for share in kept)


def test_the_table_has_points_of_each_task() -> None:
    def one(task: str, policy: str, score: float) -> dict[str, Any]:
        ratio = 1.0 if policy == "full" else 0.25
        return {"task": task, "length": 9, "policy": policy, "ratio": ratio, "memory": "off", "cache_type": "f16", "score": score}

    columns, cells = table([one("a", "full", 0.5), one("b", "full", 0.25), one("a", "streaming", 0.125), one("mean", "full", 1)])
    assert columns == ["arm", "kept", "a", "b", "mean"]
    assert cells == [["full", "all", "50.00", "25.00", "37.50"], ["streaming", "25%", "12.50", "-", "-"]]
