"""Bytes of tokens: the same as one by one, and not all of an answer again after each of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexmem_edge import Llama
from indexmem_edge.runtime import spelled


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> Iterator[Llama]:
    with Llama(str(demo_model), kv_budget=64, kv_window=16, n_ctx=256, n_threads=1, verbose=False) as made:
        yield made


def test_an_answer_that_grows_costs_what_is_new(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [0]

    def piece(self: Any, token: int, special: bool) -> bytes:
        asked[0] += 1
        return b"x"

    monkeypatch.setattr(spelled.Spelled, "piece", piece)
    answer: list[int] = []
    for n in range(1, 1500):
        answer.append(300 + n)
        assert llm.detokenize(answer) == b"x" * n
        llm.detokenize(answer[-2:])  # what has not been sent yet
    assert asked[0] < 1500 * (spelled.STRIDE + 3)


def test_texts_that_change_anywhere(llm: Llama) -> None:
    """Begun again, cut, with another token in the middle, with control tokens and without."""
    rng = np.random.default_rng(5)
    text = [int(t) for t in rng.integers(0, 2000, 400)]

    def plain(tokens: list[int], special: bool) -> bytes:
        found = b"".join(llm._spelled.piece(token, special) for token in tokens)
        return found[1:] if tokens[:1] == [llm.token_bos()] and found[:1] == b" " else found

    for _ in range(300):
        n, special = int(rng.integers(0, len(text) + 1)), bool(rng.integers(2))
        if rng.random() < 0.2:
            text[int(rng.integers(len(text)))] = int(rng.integers(2000))
        assert llm.detokenize(text[:n], special=special) == plain(text[:n], special)
    assert llm.detokenize(tuple(text)) == plain(text, False)  # type: ignore[arg-type]
