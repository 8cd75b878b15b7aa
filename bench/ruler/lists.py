"""cwe and fwe: which words occur most often?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from .prompt import Material, Prompt, dice
from .words import letters

ZETA_2 = math.pi**2 / 6
HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often."
)
QUESTION = "Question: What are the 10 most common words in the above list?"
ANSWER = " Answer: The top 10 words that appear most often in the list are:"
CODED = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
CODED_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
CODED_ANSWER = " Answer: According to the coded text above, the three most frequently appeared words are:"


@dataclass(frozen=True)
class Repeats:
    """How often words stand in a list."""

    common: int
    other: int


@dataclass(frozen=True)
class CommonWords:
    """A numbered list of words, ten of which are repeated more often; a worked example comes first.

    The size is the number of the other words. Short contexts have lists with fewer repeats, as the official ones.
    """

    n_common: int = 10
    short: int = 4096  # shorter lengths are short

    @property
    def least(self) -> int:
        return 1

    def build(self, seed: str, size: int, material: Material) -> Prompt:
        short = material.length < self.short
        source = material.words.shuffled(dice(seed, "words"))
        small = Repeats(3, 1) if short else Repeats(10, 3)
        shown, answer = self._list(seed + "/example", source, 10 if short else 30, small)
        asked, outputs = self._list(seed, source, size, Repeats(6, 1) if short else Repeats(30, 3))
        example = f"{HEAD}\n{shown}\n{QUESTION}{ANSWER} " + _numbered(answer)
        return Prompt(f"{example}\n{HEAD}\n{asked}\n{QUESTION}", ANSWER, tuple(outputs))

    def _list(self, seed: str, source: Iterator[str], n_other: int, repeats: Repeats) -> tuple[str, list[str]]:
        common = list(islice(source, self.n_common))
        other = list(islice(source, n_other))
        out = common * repeats.common + other * repeats.other
        dice(seed, "order").shuffle(out)
        return _numbered(out), common


def _numbered(items: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(items, 1))


@dataclass(frozen=True)
class FrequentWords:
    """Coded words whose frequencies fall with the square of their rank; dots are the most frequent, and not asked for.

    The size is the number of words if the distribution had no end; ranks that it gives less than one word have none.
    """

    n_asked: int = 3

    @property
    def least(self) -> int:
        return 200  # from here on, each asked word is more frequent than the next

    def build(self, seed: str, size: int, material: Material) -> Prompt:
        top = size / ZETA_2
        ranks = range(1, math.isqrt(int(top)) + 1)
        names = ["...", *islice(letters(dice(seed, "words"), 6), len(ranks) - 1)]
        out = [name for rank, name in zip(ranks, names) for _ in range(int(top / rank**2))]
        dice(seed, "order").shuffle(out)
        return Prompt(f"{CODED}{' '.join(out)}\n{CODED_QUESTION}", CODED_ANSWER, tuple(names[1 : 1 + self.n_asked]))
