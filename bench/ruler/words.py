"""What samples are made of: words of the English language from the package wonderwords, keys of them, numbers and UUIDs."""

from __future__ import annotations

import importlib.metadata
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from ..runner import BenchError


@dataclass(frozen=True)
class Words:
    """Lists of words without spaces, sorted."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    source: str  # who made them, and which version: other lists make other samples

    @staticmethod
    @cache
    def installed() -> Words:
        """The lists of wonderwords, which the official generators use, too.

        Raises:
            BenchError: wonderwords is not installed.
        """
        try:
            from wonderwords import RandomWord
        except ImportError:
            raise BenchError(
                "the words of RULER tasks come from the package wonderwords, which is not installed: "
                "pip install wonderwords"
            ) from None
        lists = RandomWord(enhanced_prefixes=False)

        def of(kind: str) -> tuple[str, ...]:
            return tuple(lists.filter(include_categories=[kind], exclude_with_spaces=True))

        version = importlib.metadata.version("wonderwords")
        return Words(of("adjective"), of("noun"), of("verb"), f"wonderwords {version}")

    def keys(self, rng: Random) -> Iterator[str]:
        """Pairs `adjective-noun`, none of them twice.

        Raises:
            BenchError: all pairs were given.
        """
        given: set[str] = set()
        for _ in range(len(self.adjectives) * len(self.nouns) * 64):
            key = f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"
            if key not in given:
                given.add(key)
                yield key
        raise BenchError(f"{self.source} gave {len(given)} keys and has no more: choose a smaller length")

    def shuffled(self, rng: Random) -> Iterator[str]:
        """Every word of the lists once; then pairs of them, so that any length can be filled."""
        words = sorted({*self.adjectives, *self.nouns, *self.verbs})
        rng.shuffle(words)
        yield from words
        single = set(words)  # some words look like a pair: arch-rival
        yield from (key for key in self.keys(rng) if key not in single)


def numbers(rng: Random) -> Iterator[str]:
    """Numbers of seven digits, none of them twice."""
    return _distinct(lambda: str(rng.randint(1_000_000, 9_999_999)))


def uuids(rng: Random) -> Iterator[str]:
    """UUIDs of version 4."""
    return _distinct(lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)))


def letters(rng: Random, n: int, alphabet: str = string.ascii_lowercase) -> Iterator[str]:
    """Strings of `n` letters, none of them twice."""
    return _distinct(lambda: "".join(rng.choices(alphabet, k=n)))


def _distinct(draw: Callable[[], str]) -> Iterator[str]:
    given: set[str] = set()
    while True:
        value = draw()
        if value not in given:
            given.add(value)
            yield value
