"""Bytes of tokens, for whoever asks for those of an answer after each of its tokens, as llama_cpp does."""

from __future__ import annotations

from collections.abc import Sequence

from .inside import Inside, token_piece

STRIDE = 64  # tokens by which a text has to grow before it is kept


class Spelled:
    """What the tokens of one model are in bytes. Of the longest text of late the beginning is kept, and only what is behind it is put
    together anew.
    """

    def __init__(self, llm: Inside) -> None:
        self._llm = llm
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._kept: tuple[list[int], bool, bytes] = [], False, b""  # replaced as a whole: several threads may ask

    def piece(self, token: int, special: bool) -> bytes:
        """The bytes of one token; those of a control token if `special`."""
        piece = self._pieces.get((token, special))
        if piece is None:
            piece = self._pieces[(token, special)] = token_piece(self._llm.vocab, token, special)
        return piece

    def of(self, tokens: Sequence[int], special: bool) -> bytes:
        """The bytes of all of them."""
        tokens = tokens if isinstance(tokens, list) else list(tokens)
        beginning, how, text = self._kept
        n = len(beginning)
        if how != special or len(tokens) < n or tokens[:n] != beginning:
            n, text = 0, b""
        found = text + b"".join([self.piece(token, special) for token in tokens[n:]])
        if len(tokens) >= n + STRIDE:
            self._kept = tokens.copy(), special, found
        return found
