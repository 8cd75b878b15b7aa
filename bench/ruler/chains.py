"""vt: which variables have this value? Each was assigned the one before; a worked example comes first."""

from __future__ import annotations

import string
from dataclasses import dataclass
from itertools import islice
from random import Random

from . import words
from .needles import NOISE, among
from .prompt import Material, Prompt, dice

HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text."
# lines of noise before each statement of the example and after the last: the same in every sample
EXAMPLE_NOISE = (0, 3, 1, 1, 7, 2)


def statements(names: list[str], value: str) -> list[str]:
    later = [f"VAR {name} = VAR {before} " for before, name in zip(names, names[1:])]  # ends with a space
    return [f"VAR {names[0]} = {value}", *later]


def ask(value: str, n: int) -> tuple[str, str]:
    """The question, and the beginning of its answer."""
    return (
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        f" Answer: According to the chain(s) of variable assignment in the text above, {n} variables are assigned "
        f"the value {value}, they are: ",
    )


@dataclass(frozen=True)
class Chain:
    """The size is the number of lines of noise that the chain is spread over."""

    hops: int = 4

    @property
    def least(self) -> int:
        return self.hops + 1

    def build(self, seed: str, size: int, material: Material) -> Prompt:
        rng, n = dice(seed, "chain"), self.hops + 1
        example_value, value = (str(v) for v in rng.sample(range(10_000, 100_000), 2))
        example = self._example(rng, example_value)
        names = list(islice(words.letters(rng, 5, string.ascii_uppercase), n))
        lines = among([NOISE] * size, statements(names, value), dice(seed, "places"))
        question, prefix = ask(value, n)
        return Prompt(f"{example}\n\n{HEAD}\n\n" + "\n".join([*lines, question]), prefix, tuple(names))

    def _example(self, rng: Random, value: str) -> str:
        names = list(islice(words.letters(rng, 3, string.ascii_uppercase), self.hops + 1))
        *before, after = EXAMPLE_NOISE
        lines = [line for n, said in zip(before, statements(names, value)) for line in [*[NOISE] * n, said]]
        question, prefix = ask(value, len(names))
        return f"{HEAD}\n\n" + "\n".join([*lines, *[NOISE] * after, f"{question}{prefix} {' '.join(names)}"])
