"""The sequences of a training: passages of books, and generated text with questions. Every one follows from its number.

There are `samples` distinct sequences, and training goes through all of them again and again, each time in another order.
Sequence and order are functions of seed, split and step alone, so a resumed training sees what it would have seen. They do
not depend on the number of processes either: of the n sequences of a step, those at n positions ("lanes") come from n
disjoint shares of all sequences, and a process always has the same lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from ..errors import TrainingError
from .books import Book, Shelf
from .options import TrainOptions
from .sample import Sample
from .tokenizer import Tokenizer

Tokenize = Callable[[str], list[int]]
Generate = Callable[[Tokenize, Callable[[int], list[int]], int, np.random.Generator, bool], Sample]

TRAIN, HELD_OUT, ORDER = range(3)  # what the random numbers are for


@dataclass(frozen=True)
class Data:
    """Sequences out of books and a generator.

    Raises:
        TrainingError: there is too little text.
    """

    books: Sequence[Book]
    tokenizer: Tokenizer
    generate: Generate
    options: TrainOptions

    def __post_init__(self) -> None:
        train = Shelf([(book.name, book.train) for book in self.books])
        held_out = Shelf([(book.name, book.held_out) for book in self.books])
        object.__setattr__(self, "_shelves", {TRAIN: train, HELD_OUT: held_out})
        longest, share = max(self.options.lengths), self.options.held_out
        found = f"it has {train.total + held_out.total:,} tokens, of which"
        if train.total < longest:
            raise TrainingError(
                f"the text is too short: {found} {train.total:,} are to train on, and a sequence has {longest:,}. Give "
                "more --text, or a smaller --length"
            )
        if held_out.total < longest:
            raise TrainingError(
                f"too little of the text is held out: {found} {share:.0%}, {held_out.total:,}, are to measure on, and a sequence "
                f"has {longest:,}. Give more --text, a larger --held-out, or a smaller --length"
            )

    def batch(self, step: int, n: int, rank: int = 0, world: int = 1, steps: int = 1) -> list[Sample]:
        """What process `rank` of `world` trains on in one of `steps` steps that have `n` sequences in all."""
        phases = self._phases(n, steps)
        phase = next(p for p in phases if step < p.end)
        rounds, i = divmod(step - phase.start, phase.size // n)
        found = []
        for lane in _lanes(n, rank, world):
            order = np.random.default_rng([self.options.seed, ORDER, phase.number, lane, rounds])
            found.append(self._sample(TRAIN, phase, int(order.permutation(phase.size // n)[i]) * n + lane))
        return found

    def pool(self, n: int, rank: int = 0, world: int = 1, steps: int = 1) -> Sequence[Sample]:
        """All sequences that `batch` will ever give this process; each is made when it is looked at."""
        lanes = _lanes(n, rank, world)
        return _Pool(self, [(p, i + lane) for p in self._phases(n, steps) for i in range(0, p.size, n) for lane in lanes])

    def held_out(self) -> list[Sample]:
        """What is measured on: generated text between held-out pages, unless nothing generated is trained on."""
        phase = _Phase(0, 0, 0, self.options.eval_samples, max(self.options.lengths))
        return [self._sample(HELD_OUT, phase, i) for i in range(phase.size)]

    def _phases(self, n: int, steps: int) -> list[_Phase]:
        """The steps of each length, and how many distinct sequences there are for them: a multiple of n."""
        lengths = self.options.lengths
        edges = [steps * i // len(lengths) for i in range(len(lengths) + 1)]
        phases = []
        for number, (start, end, length) in enumerate(zip(edges, edges[1:], lengths)):
            every_step = (end - start) * n
            wanted = -(-self.options.samples // len(lengths) // n) * n or every_step
            phases.append(_Phase(number, start, end, min(wanted, every_step), length))
        return [p for p in phases if p.end > p.start]

    def _sample(self, split: int, phase: _Phase, index: int) -> Sample:
        rng = np.random.default_rng([self.options.seed, split, phase.number, index])
        shelf: Shelf = self._shelves[split]  # type: ignore[attr-defined]
        first = self.tokenizer.first
        room, share = phase.length - len(first), self.options.generated
        if rng.random() < (share if split == TRAIN else share > 0):
            made = self.generate(
                self.tokenizer.tokenize, lambda n: shelf.filler(n, rng), room, rng, split == HELD_OUT
            )
        else:
            name, tokens = shelf.passage(room, rng)
            made = Sample(tokens, np.ones(len(tokens), np.float32), len(tokens), name)
        return Sample(
            np.concatenate([np.asarray(first, np.int32), made.tokens]),
            np.concatenate([np.ones(len(first), np.float32), made.weight]),
            made.asked + len(first),
            made.source,
        )


@dataclass(frozen=True)
class _Phase:
    """Steps from `start` to `end` with sequences of one length."""

    number: int
    start: int
    end: int
    size: int  # distinct sequences
    length: int


def _lanes(n: int, rank: int, world: int) -> range:
    if n % world:
        raise TrainingError(
            f"--batch {n} cannot be divided among {world} processes: expected a multiple of {world}"
        )
    return range(rank, n, world)


class _Pool(Sequence[Sample]):
    """Sequences by their numbers."""

    def __init__(self, data: Data, keys: Sequence[tuple[_Phase, int]]) -> None:
        self._data, self._keys = data, keys

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Sample]: ...
    def __getitem__(self, i: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(i, slice):
            return _Pool(self._data, self._keys[i])
        return self._data._sample(TRAIN, *self._keys[i])

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))
