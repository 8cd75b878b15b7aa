"""What every task builds, and the largest of it that fits a length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Protocol

from ..runner import BenchError
from .essay import Essay
from .words import Words

if TYPE_CHECKING:
    from .questions import Questions

Count = Callable[[str], int]  # tokens of a text


@dataclass(frozen=True)
class Prompt:
    input: str  # the question is its last line
    answer_prefix: str
    outputs: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.input + self.answer_prefix


@dataclass(frozen=True)
class Material:
    """What samples of a length are built from."""

    length: int  # tokens, those to generate included
    words: Words
    essay: Essay | None = None
    questions: Mapping[str, Questions] = field(default_factory=dict)  # by the form of their file


class Task(Protocol):
    """One of RULER's tasks. Its samples have a size: lines, words or so, whatever makes them longer one by one."""

    @property
    def least(self) -> int: ...

    def build(self, seed: str, size: int, material: Material) -> Prompt:
        """The same arguments give the same prompt; a larger size, with the same seed, the same answers."""
        ...


def dice(seed: str, purpose: str) -> Random:
    """A generator for one purpose: what is drawn for another does not change what it gives.

    Strings seed alike in every version of Python and on every machine.
    """
    return Random(f"{seed}/{purpose}")


def largest(build: Callable[[int], Prompt], count: Count, room: int, least: int) -> tuple[Prompt, int]:
    """The prompt of the largest size with at most `room` tokens, and its tokens.

    Tokens grow with the size nearly in proportion, so that a few guesses between the bounds find it; only what was
    counted and fits is returned.

    Raises:
        BenchError: not even the size `least` fits.
    """

    def tokens(size: int) -> tuple[Prompt, int]:
        prompt = build(size)
        return prompt, count(prompt.text)

    best, fitting = tokens(least)
    if fitting > room:
        raise BenchError(f"the smallest sample has {fitting} tokens, {room} are allowed: choose a larger length")
    low, high, step = least, least, max(least, 8)
    over = 0  # tokens at `high`
    while high == low:  # upwards until one does not fit, to where it would end by the last step
        prompt, n = tokens(low + step)
        if n > room:
            high, over = low + step, n
        else:
            rate = (n - fitting) / step
            best, fitting, low, high = prompt, n, low + step, low + step
            step = max(step, int((room - n) / rate) + 1 if rate > 0 else 2 * step)
    turn = 0
    while high - low > 1:
        turn += 1
        share = 0.5 if turn % 3 == 0 else (room - fitting) / (over - fitting)  # halved now and then: no creeping
        size = min(max(low + int(share * (high - low)), low + 1), high - 1)
        prompt, n = tokens(size)
        if n > room:
            high, over = size, n
        else:
            best, fitting, low = prompt, n, size
    return best, fitting
