"""Text to feed: a file, or words strung together so that a benchmark runs without any file."""

from __future__ import annotations

import random
from pathlib import Path

from .runner import BenchError

# fmt: off
_SUBJECTS = [
    "the miller", "a tall stranger", "our ferryman", "the schoolmaster", "her youngest brother", "the captain",
    "an old gardener", "the clerk",
]
_VERBS = [
    "carried", "remembered", "mended", "sold", "forgot", "painted", "borrowed", "described", "hid", "found",
]
_OBJECTS = [
    "a brass lantern", "the torn map", "three letters", "a basket of pears", "the church key",
    "an unfinished song", "the grey mare", "a broken clock",
]
_PLACES = [
    "by the river", "behind the mill", "on the road to town", "under the walnut tree", "in the empty hall",
    "near the harbour", "at the edge of the wood",
]
_TIMES = [
    "before dawn", "on a wet evening", "that winter", "without a word", "as the bells rang",
    "when nobody was looking", "for the second time",
]
# fmt: on


def builtin_text(n_chars: int, seed: int = 0) -> str:
    """Plain sentences of a fixed grammar, the same for the same seed."""
    rng, parts, size = random.Random(seed), [], 0
    while size < n_chars:
        bits = [rng.choice(group) for group in (_SUBJECTS, _VERBS, _OBJECTS, _PLACES, _TIMES)]
        sentence = f"{' '.join(bits).capitalize()}. " + ("\n\n" if rng.random() < 0.1 else "")
        parts.append(sentence)
        size += len(sentence)
    return "".join(parts)[:n_chars]


def read_text(path: Path | None, n_chars: int = 400_000) -> str:
    """The text of a file, or one that is made up.

    Raises:
        BenchError: the file cannot be read, or holds nothing.
    """
    if path is None:
        return builtin_text(n_chars)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror or error}") from None
    if not text.strip():
        raise BenchError(f"{path} holds no text")
    return text


class TokenStream:
    """An endless run of tokens: the text over and over."""

    def __init__(self, tokens: list[int], start: int = 0):
        if not tokens:
            raise ValueError("the text holds no token")
        self.tokens, self.next = tokens, start

    def take(self, n: int) -> list[int]:
        out: list[int] = []
        while len(out) < n:
            at = self.next % len(self.tokens)
            part = self.tokens[at : at + n - len(out)]
            out += part
            self.next += len(part)
        return out
