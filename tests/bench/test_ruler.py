"""RULER samples made here: built like the official ones, as long as they can be, with one answer, the same every time."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from indexmem_edge.bench import ruler
from indexmem_edge.bench.ruler import compare, generate
from indexmem_edge.bench.ruler.anatomy import solve, take_apart
from indexmem_edge.bench.ruler.essay import Essay
from indexmem_edge.bench.ruler.needles import DEPTHS, ESSAY, NOISE, Needles
from indexmem_edge.bench.ruler.prompt import Material, Prompt, dice, largest
from indexmem_edge.bench.ruler.samples import n_generate, rows, write
from indexmem_edge.bench.ruler.words import Words
from indexmem_edge.bench.runner import BenchError
from indexmem_edge.bench.text import builtin_text
from support.bench_data import invoke
from support.ruler_official import CWE_PARTS, PARTS, TEMPLATES, WORDS, Words2Tokens, count

ESSAY_TEXT = Essay.of(builtin_text(60_000))
MADE_UP = sorted(set(generate.TASKS) - set(generate.NEEDS_QUESTIONS))  # those with questions: test_ruler_questions.py
TASKS = st.sampled_from(MADE_UP)
LENGTHS = st.integers(900, 3000) | st.integers(4096, 5000)
SEEDS = st.integers(0, 2**32)
PROPERTY = settings(max_examples=25, deadline=None)


def made(task: str, length: int = 1500, seed: int = 0, index: int = 0) -> dict[str, Any]:
    return generate.make(task, index, seed, Material(length, WORDS, ESSAY_TEXT), count)


@pytest.mark.parametrize("length", [1500, 4096])
@pytest.mark.parametrize("task", MADE_UP)
def test_samples_are_built_like_the_official_ones(task: str, length: int) -> None:
    row = made(task, length)
    found = take_apart(task, row["input"], row["answer_prefix"])
    assert found.template == TEMPLATES[task]
    assert found.parts == (CWE_PARTS[length < 4096] if task == "cwe" else PARTS[task])


@PROPERTY
@given(task=TASKS, length=LENGTHS, seed=SEEDS)
def test_the_length_is_kept_and_nearly_reached(task: str, length: int, seed: int) -> None:
    row = made(task, length, seed)
    assert row["length"] == count(row["input"] + row["answer_prefix"]) + n_generate(task)
    longest_step = 40  # tokens of a line of UUIDs, or of the other words of cwe, thrice
    assert length - longest_step <= row["length"] <= length


@PROPERTY
@given(task=TASKS, length=LENGTHS, seed=SEEDS)
def test_what_is_expected_is_the_one_right_answer_and_stands_in_the_context(task: str, length: int, seed: int) -> None:
    row = made(task, length, seed)
    context, question = ruler.split_question(row["input"])
    assert sorted(take_apart(task, row["input"], row["answer_prefix"]).answers) == sorted(row["outputs"])
    assert len(set(row["outputs"])) == len(row["outputs"])
    for text in row["outputs"]:
        assert text in context and text not in question + row["answer_prefix"]
    if task.startswith("niah"):
        needles = [piece.split(" is: ") for piece in context.split("special magic ")[2:] if " is: " in piece]
        values = [rest.split(".")[0] for _, rest in needles]
        keys = [key.split(" for ")[1] for key, _ in needles]
        assert len(set(values)) == len(values), "a value tells its needle"
        assert task == "niah_multivalue" or len(set(keys)) == len(keys), "no key is told twice"
        assert row["token_position_answer"] == count(context.split(f"{row['outputs'][0]}.")[0])


@PROPERTY
@given(task=st.sampled_from(["cwe", "fwe"]), length=LENGTHS, seed=SEEDS)
def test_the_most_frequent_words_are_more_frequent_than_all_others(task: str, length: int, seed: int) -> None:
    row = made(task, length, seed)
    last = row["input"].split("\n")[-2].split("coded words. ")[-1]
    counts = Counter(word for word in last.split() if not word.rstrip(".").isdigit() and word.strip("."))
    assert min(counts[word] for word in row["outputs"]) > max(
        n for word, n in counts.items() if word not in row["outputs"]
    )


@PROPERTY
@given(task=TASKS, seed=SEEDS, index=st.integers(0, 9))
def test_the_seed_and_the_index_decide(task: str, seed: int, index: int) -> None:
    row = made(task, seed=seed, index=index)
    assert made(task, seed=seed, index=index) == row
    assert (
        made(task, seed=seed + 1, index=index)["input"]
        != row["input"]
        != made(task, seed=seed, index=index + 1)["input"]
    )


def test_chains_of_other_values_are_no_part_of_the_answer() -> None:
    said = [("A", "1"), ("X", "2"), ("B", "A"), ("Y", "X"), ("C", "B")]
    assert (solve(said, "1"), solve(said, "2"), solve(said, "3")) == (["A", "B", "C"], ["X", "Y"], [])


@settings(deadline=None)
@given(steps=st.lists(st.integers(1, 9), min_size=1, max_size=20), room=st.integers(1, 900), least=st.integers(1, 5))
def test_the_largest_that_fits_is_found(steps: list[int], room: int, least: int) -> None:
    sizes = [0, *accumulate(islice(cycle(steps), 2000))]
    calls = 0

    def build(size: int) -> Prompt:
        nonlocal calls
        calls += 1
        return Prompt("x" * sizes[size], "", ())

    if sizes[least] > room:
        with pytest.raises(BenchError, match=f"{sizes[least]} tokens, {room} are allowed"):
            largest(build, len, room, least)
        return
    prompt, n = largest(build, len, room, least)
    assert n == len(prompt.text) == max(size for size in sizes if size <= room)
    assert calls < 30


def test_needles_lie_between_sentences_at_their_depths() -> None:
    essay = Essay.of('One is here. Mr. P.F. Two said "so!" Three\nhas    more. Four breaks off')
    assert essay.ends == (3, 8, 11, 14)
    assert [essay.place(13, depth) for depth in (0, 0.25, 0.5, 0.99, 1)] == [0, 3, 8, 11, 13]
    assert [essay.place(17, depth) for depth in (0.8, 1)] == [14, 17]  # the text begins again after 14 words
    assert essay.with_needles(4, [(0, "A"), (1, "Z")]) == "A One is here. Mr. Z"
    assert essay.turned(0.5).words[:2] == ("Three", "has") and len(essay.turned(0.99).words) == 14
    with pytest.raises(BenchError, match="empty"):
        Essay.of(" \n")


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_can_be_put_at_a_depth(depth: float) -> None:
    prompt = Needles(ESSAY, depth=depth).build("seed", 2000, Material(4096, WORDS, ESSAY_TEXT))
    (found,) = take_apart("niah_single_2", prompt.input, prompt.answer_prefix).depths
    assert abs(found - depth) < 0.03


def test_needles_reach_every_depth() -> None:
    task = generate.TASKS["niah_single_2"]
    material = Material(4096, WORDS, ESSAY_TEXT)
    depths = []
    for seed in range(120):
        prompt = task.build(str(seed), 1000, material)
        depths += take_apart("niah_single_2", prompt.input, prompt.answer_prefix).depths
    assert compare.distance(depths, [i / (DEPTHS - 1) for i in range(DEPTHS)]) < 0.2  # 1.95 / sqrt(120): one in 1000


def test_words_are_given_once_and_pairs_follow_them() -> None:
    n = len({*WORDS.adjectives, *WORDS.nouns, *WORDS.verbs})
    found = [word for word, _ in zip(WORDS.shuffled(dice("s", "words")), range(n + 50))]
    assert len(set(found)) == n + 50 and all("-" in word for word in found[n:])
    with pytest.raises(BenchError, match="1 keys and has no more"):
        list(Words(("a",), ("b",), (), "none").keys(dice("s", "keys")))


def test_the_installed_words_have_no_spaces_and_their_absence_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wonderwords")
    Words.installed.cache_clear()
    words = Words.installed()
    assert len(words.nouns) > 5000 and len(words.adjectives) > 500 and len(words.verbs) > 500
    assert not any(" " in word for word in (*words.nouns, *words.adjectives, *words.verbs))
    Words.installed.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(BenchError, match="pip install wonderwords"):
        Words.installed()


def order(tmp_path: Path, **changes: Any) -> generate.Order:
    (tmp_path / "book.txt").write_text(builtin_text(20_000))
    values: dict[str, Any] = {
        "lengths": [1200],
        "tasks": ["vt", "niah_multikey_1"],
        "samples": 2,
        "text": tmp_path / "book.txt",
    }
    return generate.Order.of(**{**values, **changes})


def test_files_are_the_same_for_the_same_seed_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    model = Words2Tokens()
    folder, name = generate.generate(model, order(tmp_path), words=WORDS)
    files = sorted(folder.rglob("*.gz"))
    assert [str(path.relative_to(folder)) for path in files] == ["1200/niah_multikey_1.jsonl.gz", "1200/vt.jsonl.gz"]
    stamps = [path.stat().st_mtime_ns for path in files]
    assert generate.generate(model, order(tmp_path), words=WORDS) == (folder, name)
    assert [path.stat().st_mtime_ns for path in files] == stamps
    generate.generate(model, order(tmp_path), tmp_path / "again", WORDS)
    again = sorted((tmp_path / "again").rglob("*.gz"))
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files]
    assert generate.generate(model, order(tmp_path, seed=1), words=WORDS)[1] != name
    (tmp_path / "other.txt").write_text(builtin_text(20_000, seed=1))
    assert generate.generate(model, order(tmp_path, text=tmp_path / "other.txt"), words=WORDS)[1] != name
    more = generate.generate(model, order(tmp_path, samples=3), words=WORDS)
    assert more[1] == name and rows(more[0], 1200, "vt", 2) == rows(folder, 1200, "vt")
    assert ruler.load(folder, 1200, "vt", 1)[0].outputs == tuple(rows(folder, 1200, "vt")[0]["outputs"])


def test_orders_that_cannot_be_carried_out_say_why(tmp_path: Path) -> None:
    essays = {"niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"}
    assert set(generate.Order.of([64], None, 1).tasks) == set(MADE_UP) - essays
    for changes, match in (
        ({"tasks": ["qa_3"]}, "unknown task qa_3: choose from niah_single_1"),
        ({"text": None}, "niah_multikey_1: the haystack is an essay; name a text file with --text"),
        ({"samples": 0}, "above 0"),
        ({"lengths": []}, "above 0"),
    ):
        with pytest.raises(BenchError, match=match):
            order(tmp_path, **changes)
    with pytest.raises(BenchError, match=r"vt at 200 tokens: the smallest sample has \d+ tokens, 170 are allowed"):
        generate.generate(Words2Tokens(), order(tmp_path, lengths=[200]), tmp_path / "out", WORDS)
    with pytest.raises(BenchError, match="missing.txt"):
        generate.generate(Words2Tokens(), order(tmp_path, text=tmp_path / "missing.txt"), tmp_path / "out", WORDS)


def check(task: str, change: Any) -> list[str]:
    """What is said of samples that were changed."""
    group = [made(task, seed=seed) for seed in range(6)]
    return compare.compare_task(task, 1500, [change(dict(row)) for row in group], group, count).problems


def edit(old: str, new: str) -> Any:
    return lambda row: {**row, "input": row["input"].replace(old, new)}


@pytest.mark.parametrize("task", MADE_UP)
def test_samples_are_found_to_be_built_like_themselves(task: str) -> None:
    assert check(task, lambda row: row) == []


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("niah_single_1", edit("Make sure", "Be sure"), "template: expected"),
        ("niah_single_1", edit(NOISE, NOISE + " "), "template: expected '"),
        ("niah_multikey_1", edit("One of the", "Some of the"), "parts: expected"),
        (
            "niah_single_2",
            lambda row: {**row, "outputs": ["1234567"]},
            "6 of 6 ours have outputs that are not the answer",
        ),
        ("niah_single_2", lambda row: {**row, "token_position_answer": 3}, "wrong position"),
        ("vt", lambda row: {**row, "outputs": row["outputs"][:4]}, "not the answer"),
        ("vt", edit(" \n", "\n"), "template"),
        ("cwe", edit("2. ", "3. "), "not a sample of cwe"),
        ("fwe", edit("...", "... ..."), "another law"),
        ("fwe", lambda row: {**row, "length": 1100}, "lengths 1100 to 1100 where 1500 were asked for"),
        ("fwe", lambda row: {**row, "length": 1501}, "wrong length"),
        ("vt", lambda row: {**row, "input": "What?"}, "not a sample of vt"),
    ],
)
def test_samples_that_are_built_otherwise_are_found(task: str, change: Any, said: str) -> None:
    assert said in "; ".join(check(task, change))


def test_depths_that_are_always_the_same_are_found() -> None:
    group = [made("niah_single_2", seed=seed) for seed in range(20)]
    material = Material(1500, WORDS, ESSAY_TEXT)
    early = []
    for seed in range(20):
        prompt = Needles(ESSAY, depth=0.0).build(str(seed), 1200, material)
        early.append(generate.row_of("niah_single_2", seed, prompt, count(prompt.text), count))
    problems = compare.compare_task("niah_single_2", 1500, early, group, count).problems
    assert any("depths differ by" in problem for problem in problems)


def test_the_command_makes_samples_and_checks_them(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from indexmem_edge.bench.cli.app import app

    monkeypatch.setattr(Words, "installed", staticmethod(lambda: WORDS))
    words = ["ruler", "-m", tiny("llama")[0], "--lengths", 3000, "--tasks", "niah_single_1,vt", "--samples", 3]
    assert "niah_single_1" in invoke(*words, "--out", tmp_path / "one").output
    assert invoke(*words, "--seed", 1, "--out", tmp_path / "two", "--json").output.strip() == str(tmp_path / "two")
    assert "2 of 2 built alike" in invoke(*words, "--out", tmp_path / "one", "--check", tmp_path / "two").output
    changed = [{**row, "answer_prefix": " It is"} for row in rows(tmp_path / "two", 3000, "vt")]
    write(tmp_path / "two", 3000, "vt", changed)
    words += ["--out", tmp_path / "one", "--check", tmp_path / "two"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 1 and "1 of 2 built alike" in result.output


def test_quality_makes_its_samples_itself(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from indexmem_edge.bench.cli.app import app

    monkeypatch.setattr(Words, "installed", staticmethod(lambda: WORDS))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    words = ["quality", "-m", tiny("llama")[0], "--lengths", 768, "--samples", 1, "--full-only", "-t", 1, "-ub", 128]
    words += ["--out", tmp_path / "out", "--json", "--tasks"]
    invoke(*words, "niah_single_1")
    invoke(*words, "niah_single_1", "--seed", 1)  # other samples: the rows of the first are not taken for theirs
    lines = (tmp_path / "out" / "quality.rows.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(" samples " in line for line in lines)
    result = CliRunner().invoke(app, [str(word) for word in [*words, "niah_single_2"]])
    assert result.exit_code == 1 and "--text" in result.output
