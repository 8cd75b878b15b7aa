"""The tokens of a conversation that has grown, without tokenizing again what it began with.

A chat renders and tokenizes all of itself for every turn, which takes a quarter of a second after 100,000 tokens. A tokenizer cuts a
text at control tokens first and then looks at each piece by itself, so behind one that both texts have in the same place the
tokens follow from the text from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import numpy as np
import numpy.typing as npt

from .._vendor.llama_cpp import llama_cpp as llama_lib
from .control import ControlTokens

Tokenize = Callable[[bytes, bool], list[int]]  # text and whether it is the beginning of a prompt

_CONTROL = llama_lib.LLAMA_TOKEN_ATTR_CONTROL
_SHORT = 4096  # bytes that are not worth a thought


class _Tokenized(NamedTuple):
    text: bytes
    tokens: npt.NDArray[np.intc]
    begins: bool  # it is the beginning of a prompt


class Retokenizer:
    """Remembers the last long text and its tokens, control tokens in it being such."""

    def __init__(self, vocab: Any, control: Callable[[], ControlTokens]) -> None:
        self._vocab, self._control = vocab, control
        self._last = _Tokenized(b"", np.empty(0, dtype=np.intc), False)

    def tokens(self, text: bytes, begins: bool, tokenize: Tokenize) -> list[int]:
        """The same as `tokenize(text, begins)`."""
        if len(text) < _SHORT or (begins and llama_lib.llama_vocab_get_add_eos(self._vocab)):
            return tokenize(text, begins)
        found = self._go_on(text, begins, tokenize)
        if found is None:
            found = tokenize(text, begins)
        self._last = _Tokenized(text, np.array(found, dtype=np.intc), begins)
        return found

    def _go_on(self, text: bytes, begins: bool, tokenize: Tokenize) -> Optional[list[int]]:
        last = self._last
        if begins != last.begins or not last.text:
            return None
        # no token that begins before the cut may reach beyond what both texts have
        end = _common_prefix(last.text, text) - self._control().longest
        cut, n = max((self._place(last, token, end) for token in self._recent(last)), default=(-1, 0))
        if cut < _SHORT:
            return None
        return [*last.tokens[:n].tolist(), *tokenize(text[cut:], False)]

    def _recent(self, last: _Tokenized) -> list[int]:
        """The control tokens among the last ones of a text."""
        return [token for token in set(last.tokens[-4096:].tolist()) if llama_lib.llama_vocab_get_attr(self._vocab, token) & _CONTROL]

    def _place(self, last: _Tokenized, token: int, end: int) -> tuple[int, int]:
        """Where in the text a token begins for the last time before `end`, and how many tokens come before it; -1: not to be told."""
        spelled = llama_lib.llama_vocab_get_text(self._vocab, token) or b""
        where: npt.NDArray[np.intp] = np.flatnonzero(last.tokens == token)
        if last.begins and llama_lib.llama_vocab_get_add_bos(self._vocab):
            where = where[where > 0]  # that one is not in the text
        overlaps = any(spelled.endswith(spelled[:n]) for n in range(1, len(spelled)))  # with itself: two are not told apart then
        if len(spelled) < 2 or overlaps or end <= 0 or last.text.count(spelled) != len(where):
            return -1, 0
        cut = last.text.rfind(spelled, 0, end)
        return (cut, int(where[last.text.count(spelled, 0, cut)])) if cut >= 0 else (-1, 0)


def _common_prefix(a: bytes, b: bytes) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n))
    return int(different[0]) if len(different) else n
