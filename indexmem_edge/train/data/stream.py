"""The sequences of a training: passages of books, and generated text with questions. Every one follows from its number.

An objective has `samples` distinct sequences, and training goes through all of them again and again, each time in another
order. Sequence and order are functions of seed, split, objective and step alone, so a resumed training sees what it would have seen. They do
not depend on the number of processes either: of the n sequences of a step, those at n positions ("lanes") come from n
disjoint shares of all sequences, and a process always has the same lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from ...errors import TrainingError
from ..model.tokenizer import Tokenizer
from ..options import TrainOptions
from .books import Book, Shelf
from .sample import Sample

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

    def batch(self, step: int, n: int, rank: int = 0, world: int = 1, steps: int = 1, stage: int = 0) -> list[Sample]:
        """What process `rank` of `world` trains on in one of `steps` steps of `n` sequences in all, of objective `stage`."""
        rounds, i = divmod(step, self._size(n, steps, stage) // n)
        found = []
        for lane in _lanes(n, rank, world):
            order = np.random.default_rng([self.options.seed, ORDER, stage, lane, rounds])
            index = int(order.permutation(self._size(n, steps, stage) // n)[i]) * n + lane
            found.append(self._sample(TRAIN, stage, index, self.options.length_of(stage)))
        return found

    def pool(self, n: int, rank: int = 0, world: int = 1, steps: int = 1, stage: int = 0) -> Sequence[Sample]:
        """All sequences that `batch` will ever give this process; each is made when it is looked at."""
        lanes, length = _lanes(n, rank, world), self.options.length_of(stage)
        indices = [i + lane for i in range(0, self._size(n, steps, stage), n) for lane in lanes]
        return _Pool(lambda i: self._sample(TRAIN, stage, i, length), indices)

    def held_out(self) -> list[Sample]:
        """What is measured on: generated text between held-out pages, unless nothing generated is trained on."""
        return [self._sample(HELD_OUT, 0, i, max(self.options.lengths)) for i in range(self.options.eval_samples)]

    def _size(self, n: int, steps: int, stage: int) -> int:
        """Distinct sequences of an objective: a multiple of n."""
        wanted = -(-self.options.samples_of(stage) // n) * n or steps * n
        return min(wanted, steps * n)

    def _sample(self, split: int, stage: int, index: int, length: int) -> Sample:
        rng = np.random.default_rng([self.options.seed, split, stage, index])
        shelf: Shelf = self._shelves[split]  # type: ignore[attr-defined]
        first = self.tokenizer.first
        room, share = length - len(first), self.options.generated
        if rng.random() < (share if split == TRAIN else share > 0):
            made = self.generate(
                self.tokenizer.tokenize, lambda n: shelf.filler(n, rng), room, rng, split == HELD_OUT
            )
        else:
            name, tokens = shelf.passage(room, rng)
            made = Sample(tokens, np.ones(len(tokens), np.float32), len(tokens), name)
        return made.after(first)


def _lanes(n: int, rank: int, world: int) -> range:
    if n % world:
        raise TrainingError(
            f"--batch {n} cannot be divided among {world} processes: expected a multiple of {world}"
        )
    return range(rank, n, world)


class _Pool(Sequence[Sample]):
    """Sequences by their numbers."""

    def __init__(self, make: Callable[[int], Sample], indices: Sequence[int]) -> None:
        self._make, self._indices = make, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Sample]: ...
    def __getitem__(self, i: int | slice) -> Sample | Sequence[Sample]:
        return _Pool(self._make, self._indices[i]) if isinstance(i, slice) else self._make(self._indices[i])

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))
