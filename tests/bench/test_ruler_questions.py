"""RULER's questions about documents, made of small files in the forms of SQuAD and HotpotQA."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.bench import ruler
from indexmem_edge.bench.ruler import generate
from indexmem_edge.bench.ruler.prompt import Material
from indexmem_edge.bench.ruler.questions import HOTPOTQA, SQUAD, Questions
from indexmem_edge.bench.runner import BenchError
from support.bench_data import invoke
from support.ruler_official import WORDS, count


def squad(folder: Path) -> Path:
    """Five articles of four paragraphs with a question each; the last of an article has no answer."""

    def paragraph(a: int, p: int) -> dict[str, Any]:
        text = f"Article {a} says in part {p} that the tower number {a}{p} has {a * 10 + p} steps and a bell."
        answers = [{"text": f"{a * 10 + p}"}, {"text": f"{a * 10 + p}"}, {"text": f"{a * 10 + p} steps"}]
        question = {"question": f"How many steps has\ntower {a}{p}?", "answers": answers}
        return {"context": text, "qas": [question if p < 3 else {**question, "is_impossible": True}]}

    data = {"data": [{"title": f"{a}", "paragraphs": [paragraph(a, p) for p in range(4)]} for a in range(1, 6)]}
    (folder / "squad.json").write_text(json.dumps(data))
    return folder / "squad.json"


def hotpotqa(folder: Path) -> Path:
    def row(n: int) -> dict[str, Any]:
        context = [[f"Town {n}.{i}", [f"Town {n}.{i} lies at river {i}.", " It is old."]] for i in range(3)]
        return {"question": f"Where does town {n}.1 lie?", "answer": "at river 1", "context": context}

    (folder / "hotpot.json").write_text(json.dumps([row(n) for n in range(8)]))
    return folder / "hotpot.json"


@pytest.fixture
def material(tmp_path: Path) -> Material:
    files = {SQUAD: Questions.read(squad(tmp_path), SQUAD), HOTPOTQA: Questions.read(hotpotqa(tmp_path), HOTPOTQA)}
    return Material(500, WORDS, None, files)


def test_what_files_hold(material: Material) -> None:
    of_squad, of_hotpot = material.questions[SQUAD], material.questions[HOTPOTQA]
    assert len(of_squad.documents) == 20 and len(of_squad.asked) == 15  # what cannot be answered is not asked
    first = of_squad.asked[0]
    assert first.question == "How many steps has tower 10?" and first.answers == ("10", "10 steps")
    assert first.own == (0,) and first.near == (1, 2, 3)
    assert len(of_hotpot.documents) == 24 and of_hotpot.documents[0] == "Town 0.0\nTown 0.0 lies at river 0. It is old."
    assert of_hotpot.asked[1].own == (3, 4, 5) and of_hotpot.asked[1].near == ()


@pytest.mark.parametrize(("task", "form"), [("qa_1", SQUAD), ("qa_2", HOTPOTQA)])
@pytest.mark.parametrize("index", range(4))
def test_a_sample_holds_the_documents_that_answer_and_as_many_others_as_fit(
    material: Material, task: str, form: str, index: int
) -> None:
    row = generate.make(task, index, 3, material, count)
    assert row == generate.make(task, index, 3, material, count)
    context, question = ruler.split_question(row["input"])
    assert question.startswith("Question: ") and row["answer_prefix"] == " Answer:"
    asked = next(q for q in material.questions[form].asked if question == f"Question: {q.question}")
    shown = re.split(r"\n\n(?=Document \d+:\n)", context.split("documents.\n\n", 1)[1])
    assert [part.split(":")[0] for part in shown] == [f"Document {n}" for n in range(1, len(shown) + 1)]
    texts = [part.split("\n", 1)[1].split("\n\n")[0] for part in shown]
    assert all(material.questions[form].documents[i] in texts for i in asked.own)
    near = {material.questions[form].documents[i] for i in asked.near}
    assert near <= set(texts)  # what misleads comes before what does not
    assert row["outputs"] == list(asked.answers) and row["length"] <= 500
    longest = max(count(f"\n\nDocument 10:\n{text}") for text in material.questions[form].documents)
    assert row["length"] > 500 - longest - 2


def test_documents_are_shown_again_where_there_are_too_few(tmp_path: Path) -> None:
    files = {HOTPOTQA: Questions.read(hotpotqa(tmp_path), HOTPOTQA)}
    row = generate.make("qa_2", 0, 0, Material(3000, WORDS, None, files), count)
    assert 2900 < row["length"] <= 3000 and row["input"].count("Document ") > 24


def test_one_of_the_answers_is_enough() -> None:
    sample = ruler.Sample("qa_1", 0, "text\n", "Question: x Answer:", ("Paris", "city of Paris"))
    assert (sample.score(" It is paris."), sample.score("Rome"), sample.answer, sample.n_generate) == (1.0, 0.0, " Paris", 32)
    assert sample.settled("Paris") and not sample.settled("Par")


@pytest.mark.parametrize("form", [SQUAD, HOTPOTQA])
@pytest.mark.parametrize("content", ["{", "{}", "[1]", '[{"question": "a"}]', '{"data": [{"paragraphs": [{"context": 5}]}]}'])
def test_other_files_are_refused(tmp_path: Path, form: str, content: str) -> None:
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(BenchError, match=rf"file.json: expected a file of {form}"):
        Questions.read(tmp_path / "file.json", form)


def test_a_file_without_an_answer_and_a_task_without_a_file(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("[]")
    with pytest.raises(BenchError, match="nothing is asked"):
        Questions.read(tmp_path / "file.json", HOTPOTQA)
    with pytest.raises(BenchError, match="qa_2: its questions come from a file of hotpotqa; name one with --hotpotqa"):
        generate.Order.of([500], ["qa_2"], 1)
    with pytest.raises(BenchError, match="need a file of them"):
        generate.make("qa_1", 0, 0, Material(500, WORDS), count)


def test_the_command_makes_them(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("wonderwords")
    out = tmp_path / "ruler"
    options = ["-m", tiny("llama")[0], "--lengths", 2048, "--samples", 2, "--out", out]
    invoke("ruler", *options, "--squad", squad(tmp_path), "--tasks", "qa_1")
    assert [len(ruler.load(out, 2048, "qa_1", 5)), ruler.tasks(out, 2048)] == [2, ["qa_1"]]
