"""niah_*: one sentence or several, hidden in a haystack, tell the special magic numbers of some keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from random import Random

from ..runner import BenchError
from . import words
from .prompt import Material, Prompt, dice
from .words import Words

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = 40  # needles in an essay lie at one of so many depths, from its beginning to its end
ESSAY, LINES, NEEDLES = "essay", "noise", "needles"


def needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind}s for {key} is: {value}."


def ask(kind: str, keys: list[str], n_answers: int) -> tuple[str, str, str]:
    """What stands before the haystack, the question after it, and the beginning of the answer."""
    asked = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + f", and {keys[-1]}"
    if n_answers == 1:
        some, what, ask_for, are = f"A special magic {kind} is", kind, f"What is the special magic {kind}", "is"
    else:
        some, what, are = f"Some special magic {kind}s are", f"{kind}s", "are"
        ask_for = f"What are all the special magic {kind}s"
    head = (
        f"{some} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {what} afterwards."
    )
    about = f"for {asked} mentioned in the provided text"
    return head, f"{ask_for} {about}?", f" The special magic {what} {about} {are}"


@dataclass(frozen=True)
class Needles:
    """A task of this family.

    The size is that of the haystack: words of an essay, else lines. The official generators step through sizes so
    coarsely that some of their samples stop at less than half of the length; these fill it up to a line or a word.
    """

    haystack: str
    kind: str = "number"  # of the values
    key_kind: str = "words"
    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1  # keys that are asked for
    depth: float | None = None  # (0 to 1) of the needles in an essay; None: drawn, each another

    @property
    def least(self) -> int:
        return {ESSAY: 20, LINES: self.keys * self.values, NEEDLES: 1}[self.haystack]

    def _draw(self, kind: str, rng: Random, lists: Words) -> Iterator[str]:
        return {"number": words.numbers, "uuid": words.uuids, "words": lists.keys}[kind](rng)

    def build(self, seed: str, size: int, material: Material) -> Prompt:
        keys = self._draw(self.key_kind, dice(seed, "keys"), material.words)
        values = self._draw(self.kind, dice(seed, "values"), material.words)
        told = [(key, list(islice(values, self.values))) for key in islice(keys, self.keys)]
        asked = dice(seed, "asked").sample(told, self.queries)
        lines = [needle(self.kind, key, value) for key, of_key in told for value in of_key]
        dice(seed, "order").shuffle(lines)
        # keys and values go on: those of other needles are none of the above
        more = (needle(self.kind, key, value) for key, value in zip(keys, values))
        outputs = tuple(chain.from_iterable(of_key for _, of_key in asked))
        head, question, prefix = ask(self.kind, [key for key, _ in asked], len(outputs))
        context = self._hide(lines, seed, size, material, more)
        return Prompt(f"{head}\n{context}\n{question}", prefix, outputs)

    def _hide(self, lines: list[str], seed: str, size: int, material: Material, more: Iterator[str]) -> str:
        rng = dice(seed, "places")
        if self.haystack == ESSAY:
            if material.essay is None:
                raise BenchError("needles in an essay need a text: name a file with prose in it with --text")
            depths = [d / (DEPTHS - 1) for d in rng.sample(range(DEPTHS), len(lines))]
            if self.depth is not None:
                depths = [self.depth] * len(lines)
            return material.essay.with_needles(size, list(zip(depths, lines)))
        hay = [NOISE] * size if self.haystack == LINES else list(islice(more, size))
        return "\n".join(among(hay, lines, rng))


def among(hay: list[str], lines: list[str], rng: Random) -> list[str]:
    """Lines before lines of the hay: no two of them neighbours, none at the end."""
    places = rng.sample(range(len(hay)), len(lines))
    places.sort()
    out, last = [], 0
    for place, line in zip(places, lines):
        out += [*hay[last:place], line]
        last = place
    return out + hay[last:]
