"""What is trained on: sequences of tokens that say where a later question makes an earlier fact matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Sample:
    """One sequence of T tokens.

    `weight[t]` is how much predicting token t + 1 counts: 1 for ordinary text, more where that token answers a question
    about the context. `asked` is the position from which the context is asked about (T for text without questions).
    """

    tokens: npt.NDArray[np.int32]  # [T]
    weight: npt.NDArray[np.float32]  # [T]
    asked: int
    source: str  # a book, or the kind of generated text
    told: tuple[tuple[int, int], ...] = ()  # where a book in the context tells what can be asked for: [first, end) each

    def after(self, first: Sequence[int]) -> Sample:
        """The same text after the tokens that every text of a model begins with."""
        n = len(first)
        return Sample(
            np.concatenate([np.asarray(first, np.int32), self.tokens]),
            np.concatenate([np.ones(n, np.float32), self.weight]),
            self.asked + n,
            self.source,
            tuple((a + n, b + n) for a, b in self.told),
        )
