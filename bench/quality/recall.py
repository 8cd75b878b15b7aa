"""Which tokens of a text repeat a word from far back: there a cache that has lost something must guess.

Most tokens of a text follow from the last sentences, which every policy keeps. A name that was last met a thousand tokens
ago does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

RECENT = 256  # tokens within which a word is not far back
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def recalled(pieces: Sequence[bytes], n_context: int, recent: int = RECENT) -> np.ndarray:
    """Which of the tokens from `n_context` on belong to a word that the context has, but not the `recent` tokens before it.

    Args:
        pieces: bytes of each token, of context and continuation.

    Returns:
        bool [len(pieces) - n_context]. Upper and lower case are the same word.
    """
    data = b"".join(pieces)
    text = data.decode("utf-8", "surrogateescape")  # a character that is cut in two stays what it was
    sizes = [len(c.encode("utf-8", "surrogateescape")) for c in text]
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # byte at which each character begins
    owner = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])  # token of each byte
    marked = np.zeros(len(pieces) - n_context, bool)
    last: dict[str, int] = {}  # token with which a word ended
    in_context: set[str] = set()
    for match in _WORD.finditer(text):
        word = match.group().lower()
        first, end = int(owner[starts[match.start()]]), int(owner[starts[match.end()] - 1])
        if end < n_context:
            in_context.add(word)
        elif word in in_context and first - last[word] > recent:
            marked[max(first - n_context, 0) : end - n_context + 1] = True
        last[word] = end
    return marked
