"""Words from far back, on texts small enough to see."""

from __future__ import annotations

import pytest

from indexmem_edge.bench.quality.recall import recalled


def marked(context: str, continuation: str, recent: int = 3) -> list[str]:
    """Tokens are what has a | between; those of the continuation that are marked."""
    pieces = [part.encode() for part in (context + "|" + continuation).split("|")]
    n_context = context.count("|") + 1
    return [p.decode() for p, yes in zip(pieces[n_context:], recalled(pieces, n_context, recent)) if yes]


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("Anna| went| a| b| c", " anna| went| home", [" anna", " went"]),  # both, six tokens ago
        ("a| b| c| Anna", " Anna| slept", []),  # just now
        ("a| b| c", " new| words| d| e| new", []),  # far back, but never in the context
        ("An|na| a| b| c", " An|na|'s| hat", []),  # another word: Anna's
        ("An|na| a| b| c", " An|na|, as| said", [" An", "na"]),  # all tokens of the word
        ("Anna| a| b| c| An", "na| d", ["na"]),  # only what is scored
        ("Anna| a| b| c", " Anna| x| Anna", [" Anna"]),  # the second is near the first
        ("1985| a| b| c", " 1985", []),  # numbers are no words
    ],
)
def test_words_of_the_context_that_are_not_recent(context: str, continuation: str, expected: list[str]) -> None:
    assert marked(context, continuation) == expected


def test_characters_cut_in_two_and_bytes_that_are_none() -> None:
    pieces = [b"caf", b"\xc3", b"\xa9", b" a", b" b", b" c", b" caf", b"\xc3", b"\xa9", b"\xff", b" x"]
    assert recalled(pieces, 6, 3).tolist() == [True, True, True, False, False]
