"""Control tokens in texts of people: there they are text. `<|im_end|>` in a document must not end the message.

A tokenizer that knows control tokens finds them anywhere in a rendered prompt, whoever wrote them. So each one in a content
is broken up by a private marker before the template is rendered; what is still whole afterwards is the template's own, and
the pieces with a marker are tokenized as text. A conversation without any is rendered as it always was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

from .._vendor.llama_cpp import llama_cpp as llama_lib

Tokenize = Callable[[bytes, bool], list[int]]  # text and whether control tokens in it are such

_CONTROL = llama_lib.LLAMA_TOKEN_ATTR_CONTROL | llama_lib.LLAMA_TOKEN_ATTR_UNKNOWN  # what a tokenizer skips in plain text
_LSTRIP, _RSTRIP = llama_lib.LLAMA_TOKEN_ATTR_LSTRIP, llama_lib.LLAMA_TOKEN_ATTR_RSTRIP
_SPACE = " \t\n\r\v\f"
_FIRST_MARKER = 7074513926041853  # digits: no template changes them, be it trimming, upper case or JSON
VISIBLE = " "  # in place of a marker, where a template does not give that back


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of a vocabulary."""

    pattern: re.Pattern[str]  # any of them, the longest first
    strips: dict[str, int]  # flags of those that take white space beside them away
    spelled: dict[int, bytes]  # bytes that stand for them where tokens are compared as text: no text has these
    longest: int  # bytes of the longest token that texts are cut at, before their pieces are looked at

    @classmethod
    def of(cls, vocab: Any) -> ControlTokens:
        """Those of llama.cpp's vocabulary."""
        found, longest = {}, 0
        for token in range(llama_lib.llama_vocab_n_tokens(vocab)):
            attributes = llama_lib.llama_vocab_get_attr(vocab, token)
            if attributes & (_CONTROL | llama_lib.LLAMA_TOKEN_ATTR_USER_DEFINED):
                text = llama_lib.llama_vocab_get_text(vocab, token) or b""
                longest = max(longest, len(text))
                if attributes & _CONTROL:
                    found[text.decode("utf-8", "replace")] = token, attributes
        return cls.of_texts(found, longest)

    @classmethod
    def of_texts(cls, found: dict[str, tuple[int, int]], longest: int) -> ControlTokens:
        """Those with these texts: token and attributes of each."""
        texts = sorted((text for text in found if len(text) > 1), key=len, reverse=True)  # one letter cannot be broken up
        pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        strips = {text: found[text][1] & (_LSTRIP | _RSTRIP) for text in texts}
        return cls(pattern, strips, {token: b"\xff%d\xff" % token for token, _ in found.values()}, longest)

    def broken(self, value: Any, by: str) -> Any:
        """The same text, list or mapping, with `by` put into every control token in its texts."""
        if isinstance(value, str):
            while self.pattern.search(value):  # broken up, one may leave another
                value = self.pattern.sub(lambda found: found[0][0] + by + found[0][1:], value)
            return value
        if isinstance(value, dict):
            return {key: self.broken(part, by) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.broken(part, by) for part in value]
        return value

    def tokens(self, text: str, marker: str, add_bos: bool, tokenize: Tokenize, vocab: Any) -> list[int]:
        """Tokens of a rendered prompt: control tokens that are whole, and text with and without the marker."""
        first = [llama_lib.llama_vocab_bos(vocab)] if add_bos and llama_lib.llama_vocab_get_add_bos(vocab) else []
        last = [llama_lib.llama_vocab_eos(vocab)] if add_bos and llama_lib.llama_vocab_get_add_eos(vocab) else []
        return [*first, *self.pieces_to_tokens(text, marker, tokenize), *last]

    def pieces_to_tokens(self, text: str, marker: str, tokenize: Tokenize) -> list[int]:
        """The same without what a tokenizer puts around a prompt."""
        out: list[int] = []
        whole: list[str] = []  # up to here without a marker: cut by the tokenizer itself
        for piece, before, after in self._pieces(text):
            if marker not in piece:
                whole.append(piece)
                continue
            out += tokenize("".join(whole).encode(), True) if whole else []
            whole.clear()
            plain = piece.replace(marker, "")
            plain = plain.lstrip(_SPACE) if before & _RSTRIP else plain
            plain = plain.rstrip(_SPACE) if after & _LSTRIP else plain
            out += tokenize(plain.encode(), False) if plain else []
        return out + (tokenize("".join(whole).encode(), True) if whole else [])

    def _pieces(self, text: str) -> Iterator[tuple[str, int, int]]:
        """Control tokens and what is between them, each with the flags of its neighbours."""
        at, before = 0, 0
        for found in self.pattern.finditer(text):
            yield text[at : found.start()], before, self.strips[found[0]]
            yield found[0], 0, 0
            at, before = found.end(), self.strips[found[0]]
        yield text[at:], before, 0


def marker_for(messages: Any) -> str:
    """Digits that are nowhere in the messages."""
    text, number = json.dumps(messages, default=str, ensure_ascii=False), _FIRST_MARKER
    while str(number) in text:
        number += 1
    return str(number)


def came_back(marked: str, marker: str, expected: int, plain: Optional[str]) -> bool:
    """Whether a rendering with markers can be used: they are all there, or it is otherwise the plain rendering."""
    return marked.count(marker) == expected or marked.replace(marker, "") == plain


def count(value: Any, marker: str) -> int:
    """How often a marker is in the texts of a value."""
    if isinstance(value, str):
        return value.count(marker)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(count(part, marker) for part in parts)
