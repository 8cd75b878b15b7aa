"""Matching prompts with cached tokens, on a toy vocabulary whose tokens are pieces of text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from indexmem_edge.runtime.align import align, common_prefix

PIECES = ["a", "b", "ab", "ba", "aab", "|", "x", ""]


def text(tokens: list[int]) -> bytes:
    return b"".join(piece(t) for t in tokens)


def piece(token: int) -> bytes:
    return PIECES[token].encode()


def tokenize(data: bytes) -> list[int]:
    return [PIECES.index(chr(c)) for c in data]


def run(cached: list[int], prompt: list[int]) -> list[int]:
    return align(np.array(cached, dtype=np.intc), prompt, piece, tokenize)


tokens = st.lists(st.integers(0, len(PIECES) - 1), max_size=12)


@settings(deadline=None)
@given(tokens, tokens)
def test_the_text_never_changes(cached: list[int], prompt: list[int]) -> None:
    assert text(run(cached, prompt)) == text(prompt)


@settings(deadline=None)
@given(tokens, tokens)
def test_cached_text_is_always_reused(cached: list[int], more: list[int]) -> None:
    """Whatever the tokenizer makes of the same text, the cached tokens come first."""
    prompt = tokenize(text(cached) + text(more))
    result = run(cached, prompt)
    if len(prompt) > common_prefix(cached, prompt):
        assert result[: len(cached)] == cached


@settings(deadline=None)
@given(tokens, tokens)
def test_other_text_is_left_alone(cached: list[int], prompt: list[int]) -> None:
    if not text(prompt).startswith(text(cached)):
        assert run(cached, prompt) == prompt


@pytest.mark.parametrize(
    "cached, prompt, expected",
    [
        ([], [0, 1], [0, 1]),
        ([0, 1], [2, 5], [0, 1, 5]),  # the same text in other tokens
        ([2], [0, 1, 5], [2, 5]),
        ([0], [2, 5], [0, 1, 5]),  # the cache ends inside a token of the prompt
        ([0, 1, 6], [2, 5], [2, 5]),  # another text
        ([0, 1, 5], [0, 1], [0, 1]),  # the prompt is a prefix of the cache
    ],
)
def test_cases(cached: list[int], prompt: list[int], expected: list[int]) -> None:
    assert run(cached, prompt) == expected


def test_a_rest_that_the_tokenizer_would_change_is_not_used() -> None:
    def with_space(data: bytes) -> list[int]:
        return [6, *tokenize(data)]

    assert align(np.array([0], dtype=np.intc), [2, 5], piece, with_space) == [2, 5]


@settings(deadline=None)
@given(tokens, tokens)
def test_common_prefix(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])
