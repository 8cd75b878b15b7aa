"""A book as a haystack: its words in order, and where its sentences end, for needles go between sentences."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..runner import BenchError

# a stop, closing quotes or brackets behind it; an initial ("P.F.") and these abbreviations end no sentence
_END = re.compile(r"""[.!?]["'”’)\]_*]*$""")
_NO_END = re.compile(
    r"""^["'“‘(\[_*]*(?:(?:[A-Z]\.)+|(?:Mrs?|Dr|St|Col|Gen|Capt|Prof|Rev|Hon|Jr|Sr|vs|etc|No|Vol)\.)$"""
)


@dataclass(frozen=True)
class Essay:
    words: tuple[str, ...]

    @classmethod
    def of(cls, text: str, name: str = "the text") -> Essay:
        """Line breaks and indents go, as in the official haystacks.

        Raises:
            BenchError: there is no word in it.
        """
        words = tuple(text.split())
        if not words:
            raise BenchError(f"{name} is empty: name a text file with prose in it, such as a book")
        return cls(words)

    @classmethod
    def read(cls, path: Path) -> Essay:
        """
        Raises:
            BenchError: the file cannot be read, or is empty.
        """
        try:
            return cls.of(path.read_text(encoding="utf-8", errors="replace"), path.name)
        except OSError as error:
            raise BenchError(f"cannot read {path}: {error.strerror or error}; name a text file with --text") from None

    @cached_property
    def identity(self) -> str:
        return hashlib.sha256(" ".join(self.words).encode()).hexdigest()[:16]

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Words up to the end of each sentence; the last word ends one in any case."""
        found = [i + 1 for i, word in enumerate(self.words) if _END.search(word) and not _NO_END.match(word)]
        return tuple(found) if found and found[-1] == len(self.words) else (*found, len(self.words))

    def turned(self, share: float) -> Essay:
        """The same book read from another sentence on, `share` (0 to 1) of them later; its beginning follows its end."""
        at = (0, *self.ends)[int(share * len(self.ends))]
        return Essay(self.words[at:] + self.words[:at])

    def take(self, n: int) -> list[str]:
        """The first `n` words; a short book begins again."""
        return list((self.words * -(-n // len(self.words)))[:n])

    def place(self, n: int, depth: float) -> int:
        """How many of the first `n` words come before a needle at `depth` (0 to 1): whole sentences, but for the last."""
        rounds, rest = divmod(n, len(self.words))
        inside = bisect_right(self.ends, rest)
        whole = rounds * len(self.ends) + inside
        cut_off = rest > (self.ends[inside - 1] if inside else 0)  # the last sentence breaks off
        index = int(depth * (whole + cut_off))  # that many sentences before the needle
        if index > whole:
            return n
        rounds, inside = divmod(index, len(self.ends))
        return rounds * len(self.words) + (self.ends[inside - 1] if inside else 0)

    def with_needles(self, n: int, needles: list[tuple[float, str]]) -> str:
        """`n` words, and needles (depth, text) between their sentences."""
        words = self.take(n)
        for place, text in sorted(((self.place(n, d), text) for d, text in needles), key=lambda p: p[0], reverse=True):
            words.insert(place, text)
        return " ".join(words)
