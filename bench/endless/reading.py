"""Long text to read: books one after the other, begun at a place of its own for every sample."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

from ..runner import Model
from ..text import TokenStream, builtin_text, read_text

GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, keep apart, however many they are
SENTENCE_ENDS = (b".", b"!", b"?", b'."', b'!"', b'?"')
FAR = 400  # tokens that a sentence may go on for


class Books:
    """The tokens of all books in a circle.

    Args:
        least: tokens that are wanted at a time; made-up text is made as long as that.
    """

    def __init__(self, model: Model, paths: Sequence[Path], seed: int = 0, least: int = 0):
        self.model = model
        self.names = [path.name for path in paths] or ["sentences made up on the spot"]
        texts = [read_text(path) for path in paths]
        texts = texts or [builtin_text(max(400_000, 6 * least))]
        self.tokens = [token for text in texts for token in model.tokens(text)]
        self.identity = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
        self._turn = random.Random(seed).random() if seed else 0.0
        self._ends = {token for token in set(self.tokens) if model.piece(token).rstrip().endswith(SENTENCE_ENDS)}

    def passage(self, sample: int, n: int) -> list[int]:
        """`n` tokens, whole sentences to begin with, and from the start again if there are not so many."""
        start = int((self._turn + sample * GOLDEN) % 1 * len(self.tokens))
        return TokenStream(self.tokens, self.sentence_end(self.tokens, start) if start else 0).take(n)

    def sentence_end(self, tokens: Sequence[int], at: int) -> int:
        """The first place from `at` on where a sentence has ended; `at` itself if none ends nearby."""
        for i in range(max(at, 1), min(at + FAR, len(tokens)) + 1):
            if tokens[i - 1] in self._ends:
                return i
        return min(at, len(tokens))

    def repeated(self, n: int) -> str | None:
        """What to say of a text of `n` tokens that is longer than the books."""
        if n <= len(self.tokens):
            return None
        return f"the text has {len(self.tokens)} tokens and is read {n / len(self.tokens):.1f} times"
