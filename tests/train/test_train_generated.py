"""Generated text: what is asked has been said, answers are marked, lengths are kept, and numbers decide everything."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("torch")

from indexmem_edge.train.data import words
from indexmem_edge.train.data.generated import ANSWER_WEIGHT, KINDS, _Draft, generate
from indexmem_edge.train.data.relations import RELATIONS
from indexmem_edge.train.data.told import _HAVING, told


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def text_of(tokens: np.ndarray) -> str:  # type: ignore[type-arg]
    return bytes(tokens.astype(np.uint8)).decode()


def make(kind: str, seed: int, length: int = 3000, held_out: bool = False):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    return KINDS[kind][0](_Draft(tokenize, lambda n: tokenize("lorem ipsum. " * n)[:n], length, rng, held_out), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_in_the_context_and_weigh_more(kind: str) -> None:
    for seed in range(12):
        sample = make(kind, seed)
        assert sample.tokens.shape == sample.weight.shape and len(sample.tokens) <= 3000
        assert 0 < sample.asked < len(sample.tokens)
        context = text_of(sample.tokens[: sample.asked])
        heavy = np.flatnonzero(sample.weight > 1) + 1  # a weight is of the token after it
        assert len(heavy) and heavy.min() > sample.asked and heavy.max() <= len(sample.tokens)
        runs = np.split(heavy, np.flatnonzero(np.diff(heavy) > 1) + 1)
        for run in runs:
            answer = text_of(sample.tokens[run[run < len(sample.tokens)]]).strip(" \n.")
            for part in re.split(", | and | ", answer) if kind in ("frequent", "assignments", "several") else [answer]:
                assert part in context, f"{kind} {seed}: {part!r} is asked for and was not said"


@pytest.mark.parametrize("length", [200, 700, 2048])
def test_samples_fit_their_length_and_follow_from_the_generator(length: int) -> None:
    def once(seed: int, held_out: bool = False):  # type: ignore[no-untyped-def]
        return generate(tokenize, lambda n: tokenize("x" * n), length, np.random.default_rng(seed), held_out)

    kinds = set()
    for seed in range(40):
        a, b = once(seed), once(seed)
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.weight, b.weight)
        assert len(a.tokens) <= length
        kinds.add(a.source)
    assert kinds == set(KINDS) or length <= 700
    assert not np.array_equal(once(0).tokens, once(1).tokens)


def test_held_out_samples_are_worded_otherwise() -> None:
    seen = {text_of(make("facts_in_chat", seed).tokens[-60:]).split("\n")[-2:][0][:16] for seed in range(60)}
    other = {text_of(make("facts_in_chat", seed, held_out=True).tokens) for seed in range(20)}
    assert all("You said that it is" in text for text in other) and not any("You said that it is" in text for text in seen)


def test_what_is_told_in_passing_is_held_out_in_words_of_its_own() -> None:
    families = [*_HAVING, *(relation.family for relation in RELATIONS)]
    last = [(as_pattern(family.tellings[-1]), as_pattern(family.askings[-1])) for family in families]
    for held_out in (False, True):
        rng = np.random.default_rng(3)
        for fact in (fact for _ in range(60) for fact in told(3, rng, held_out)):
            assert fact.value in fact.telling and fact.value not in fact.asking
            matches = [(bool(telling.fullmatch(fact.telling)), bool(asking.fullmatch(fact.asking))) for telling, asking in last]
            assert (True, True) in matches if held_out else all(match == (False, False) for match in matches), fact


def as_pattern(wording: str) -> re.Pattern[str]:
    pieces = re.split(r"\{\w+\}", wording)
    return re.compile(".+".join(map(re.escape, pieces)), re.IGNORECASE | re.DOTALL)


def test_the_most_frequent_words_are_counted() -> None:
    for seed in range(6):
        sample = make("frequent", seed)
        context, rest = text_of(sample.tokens[: sample.asked]), text_of(sample.tokens[sample.asked :])
        answer = re.split(r"are:|Answer:|list are:", rest)[-1].strip().split(", ")
        found = re.findall(r"[a-z-]+", context)
        counts = [found.count(word) for word in answer]
        assert counts == sorted(counts, reverse=True) and counts[-1] > 0


def test_repeated_passages_are_repeated_word_by_word() -> None:
    rng = np.random.default_rng(5)
    book = bytes(rng.integers(97, 123, 100_000).astype(np.uint8)).decode()

    def filler(n: int) -> list[int]:
        i = int(rng.integers(0, len(book) - n))
        return tokenize(book[i : i + n])

    sample = KINDS["repetition"][0](_Draft(tokenize, filler, 2000, rng, False), "repetition")
    passage = text_of(sample.tokens[sample.asked :]).split("\n")[2]
    assert len(passage) >= 100 and passage in text_of(sample.tokens[: sample.asked])
    assert 1 < sample.weight.max() < ANSWER_WEIGHT  # long as they are, they do not drown the rest


def test_words_and_numbers_have_the_size_asked_for() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 3, 9):
        drawn = [words.digits(rng, n) for _ in range(50)]
        assert all(len(d) == n and d.isdigit() and d[0] != "0" for d in drawn)
        assert all(re.fullmatch(f"[0-9a-f]{{{n}}}", words.hexadecimal(rng, n)) for _ in range(20))
    assert all(re.fullmatch("[a-z]+", words.invented(rng, 3)) for _ in range(200))
    assert len({words.key(rng) for _ in range(400)}) > 350
