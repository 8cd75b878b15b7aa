"""The text of a training: what is held out, what a batch depends on, and what too little of it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny

pytest.importorskip("torch")

from indexmem_edge import IndexMemError
from indexmem_edge.errors import TrainingError
from indexmem_edge.native import find
from indexmem_edge.train.data.books import Book, Shelf, books_digest, find_books, read_books
from indexmem_edge.train.data.stream import Data
from indexmem_edge.train.model.tokenizer import Tokenizer, open_tokenizer
from indexmem_edge.train.options import TrainOptions
from support.training import small_options, stub_generate

LENGTH = 64


def numbered(sizes: tuple[int, ...] = (1000, 500, 30), share: float = 0.2) -> list[Book]:
    """Books whose tokens are all different."""
    ends = np.cumsum([0, *sizes])
    books = []
    for i, n in enumerate(sizes):
        tokens, cut = np.arange(ends[i], ends[i + 1], dtype=np.int32), n - round(share * n)
        books.append(Book(f"b{i}", tokens[:cut], tokens[cut:]))
    return books


def data_of(books: list[Book], first: tuple[int, ...] = (9999,), **more: Any) -> Data:
    options = replace(small_options(Path("m"), Path("/nowhere"), **{"texts": (Path("t"),), **more}))
    return Data(books, Tokenizer(lambda text: [7] * len(text), first), stub_generate, options)


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x.tokens, y.tokens) and np.array_equal(x.weight, y.weight) and (x.asked, x.source) == (y.asked, y.source)
        for x, y in zip(a, b)
    )


def test_books_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.TXT", "ignored.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    found = find_books([tmp_path / "b.txt", tmp_path])
    assert [p.name for p in found] == ["b.txt", "a.md", "c.TXT"]
    assert books_digest(found) != books_digest(found[::-1])
    with pytest.raises(TrainingError, match=r"no .txt or .md files in .*empty"):
        (tmp_path / "empty").mkdir()
        find_books([tmp_path / "empty"])
    with pytest.raises(TrainingError, match="there is no text at"):
        find_books([tmp_path / "missing"])


def test_held_out_text_is_the_end_of_each_book(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 90 + "y" * 10)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    books = read_books([tmp_path / "a.txt"], lambda text: [ord(c) for c in text], 0.1)
    assert books[0].train.tolist() == [ord("x")] * 90 and books[0].held_out.tolist() == [ord("y")] * 10
    with pytest.raises(IndexMemError, match="b.txt is not UTF-8"):
        read_books([tmp_path / "b.txt"], lambda text: [], 0.1)


def test_nothing_held_out_is_trained_on_and_nothing_else_is_left_out() -> None:
    books = numbered((300, 200, 30))
    data = data_of(books, samples=(0,), generated=0.5)
    held = {int(t) for book in books for t in book.held_out}
    seen = {int(t) for step in range(1000) for s in data.batch(step, 2, steps=1000) for t in s.tokens}
    assert not seen & held and {int(t) for b in books for t in b.train} <= seen
    held = {int(t) for book in numbered() for t in book.held_out}
    measured = {int(t) for s in data_of(numbered(), eval_samples=50).held_out() for t in s.tokens}
    assert measured - {7, 9999} <= held


def test_a_batch_follows_from_its_numbers() -> None:
    a, b = data_of(numbered()), data_of(numbered())
    b.batch(3, 4, steps=9), b.held_out(), list(b.pool(4, steps=9))  # what was asked before does not matter
    for step in range(9):
        assert same(a.batch(step, 4, steps=9), b.batch(step, 4, steps=9))
    assert same(a.held_out(), b.held_out())
    other = data_of(numbered(), seed=1)
    assert not same(a.batch(0, 4, steps=9), other.batch(0, 4, steps=9))


def test_every_sequence_comes_once_before_any_comes_again() -> None:
    data = data_of(numbered(), samples=(12,), generated=0.0)
    key = lambda s: s.tokens.tobytes()  # noqa: E731
    pool = {key(s) for s in data.pool(4, steps=6)}
    rounds = [[key(s) for step in (first, first + 1, first + 2) for s in data.batch(step, 4, steps=6)] for first in (0, 3)]
    assert len(pool) == 12 and set(rounds[0]) == set(rounds[1]) == pool and rounds[0] != rounds[1]


def test_the_number_of_processes_does_not_change_what_a_step_sees() -> None:
    data = data_of(numbered(), samples=(12,))
    for step in range(6):
        whole = data.batch(step, 4, steps=6)
        shares = [data.batch(step, 4, rank, 2, 6) for rank in range(2)]
        assert same(whole[0::2], shares[0]) and same(whole[1::2], shares[1])
    pools = [{s.tokens.tobytes() for s in data.pool(4, rank, 2, 6)} for rank in range(2)]
    for rank in range(2):  # a process trains on what it has prepared
        assert {s.tokens.tobytes() for step in range(6) for s in data.batch(step, 4, rank, 2, 6)} <= pools[rank]
    assert not pools[0] & pools[1] and len(data.pool(4, steps=6)) == 12
    with pytest.raises(TrainingError, match="--batch 4 cannot be divided among 3 processes"):
        data.batch(0, 4, 0, 3, 6)


def test_objectives_have_sequences_of_their_own() -> None:
    data = data_of(numbered(), objective=("follow", "follow"), lengths=(32, LENGTH), samples=(4, 0))
    lengths = [{len(s.tokens) for step in range(5) for s in data.batch(step, 2, steps=5, stage=i)} for i in range(2)]
    assert lengths == [{32}, {LENGTH}]
    assert [len(data.pool(2, steps=5, stage=i)) for i in range(2)] == [4, 10]
    assert not same(data.batch(0, 2, steps=5), data_of(numbered()).batch(0, 2, steps=5, stage=1))
    assert {len(s.tokens) for s in data.held_out()} == {LENGTH}


def test_every_sequence_begins_as_the_model_wants() -> None:
    for generated in (0.0, 1.0):
        data = data_of(numbered(), first=(1, 2), generated=generated)
        for sample in [*data.batch(0, 4, steps=4), *data.held_out()]:
            assert sample.tokens[:2].tolist() == [1, 2] and len(sample.tokens) == len(sample.weight) == LENGTH
            assert sample.tokens.dtype == np.int32 and sample.weight.dtype == np.float32
            assert sample.asked == (LENGTH - 1 + 2 - 2 if generated else LENGTH)
    held = data_of(numbered(), generated=0.0).held_out()
    assert all(not s.source.startswith("stub") for s in held)


def test_a_passage_goes_on_in_the_next_book() -> None:
    shelf = Shelf([("a", np.arange(3, dtype=np.int32)), ("b", np.arange(3, 5, dtype=np.int32))])
    rng = np.random.default_rng(0)
    found = {tuple(shelf.filler(4, rng)) for _ in range(100)}
    assert found == {tuple((start + i) % 5 for i in range(4)) for start in range(5)}
    assert shelf.filler(0, rng) == []


def test_too_little_text_says_the_numbers() -> None:
    with pytest.raises(TrainingError, match="too short: it has 60 tokens, of which 48 .* a sequence has 64"):
        data_of(numbered((60,)))
    with pytest.raises(TrainingError, match="it has 100 tokens, of which 20%, 20, are to measure on.*has 64"):
        data_of(numbered((100,)), held_out=0.2)
    with pytest.raises(TrainingError, match="5 tokens of book text are needed at once, found 4"):
        Shelf([("a", np.arange(4, dtype=np.int32))]).filler(5, np.random.default_rng(0))


@pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")
def test_the_tokenizer_is_that_of_the_model(tiny: Tiny) -> None:
    path, _ = tiny("llama")
    with open_tokenizer(path) as tokenizer:
        assert tokenizer.first == (1,)
        assert tokenizer.tokenize("ab") == [3 + ord("a"), 3 + ord("b")] and tokenizer.tokenize("") == []


@pytest.mark.parametrize(
    "given, words",
    [
        ({"steps": (1, 2, 3)}, "--steps has 3 values for 1 objectives"),
        ({"kind": "best"}, "--kind 'best': expected one of retention, kvzap, pairwise"),
        ({"lengths": (10,)}, "--length of at least 12"),
        ({"batch": 0}, "--batch must be from 1"),
        ({"lr": (0.0,)}, "--lr must be"),
        ({"held_out": 1.0}, "--held-out must be"),
        ({"generated": 2.0}, "--generated must be"),
        ({"budgets": (512.0,)}, "--budget must be a share"),
        ({"texts": ()}, "--text"),
        ({"memory": "deep"}, "--memory 'deep'"),
    ],
)
def test_impossible_options(given: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        small_options(Path("m"), Path("/nowhere"), **{"texts": (Path("t"),), **given}).checked()


def test_options_survive_json() -> None:
    import json

    given = small_options(Path("/m"), Path("/nowhere"), texts=(Path("/t"),), objective=("a", "b"), steps=(3, 4))
    options = given.checked()
    assert options.run == Path("/nowhere/out.indexmem.train")
    assert TrainOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    assert given.checked().objective == ("a", "b") and (options.steps_of(1), options.lr_of(1)) == (4, 1e-2)
    assert replace(given, objective=(), kind="pairwise", memory="residual", steps=(3,)).checked().objective == (
        "pooled-kl",
        "residual-mse",
    )
    with pytest.raises(TrainingError, match="unknown option 'wings'"):
        TrainOptions.from_dict({"wings": 2})
