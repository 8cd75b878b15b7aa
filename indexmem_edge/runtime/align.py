"""Matching a prompt with the tokens that are already in the cache. Pure functions, no model."""

from __future__ import annotations

from typing import Callable, Sequence

import numpy as np
import numpy.typing as npt

Tokens = Sequence[int]


def common_prefix(a: npt.ArrayLike, b: npt.ArrayLike) -> int:
    """Number of leading tokens that are equal."""
    x, y = np.asarray(a, dtype=np.intc), np.asarray(b, dtype=np.intc)
    n = min(len(x), len(y))
    different = np.flatnonzero(x[:n] != y[:n])
    return int(different[0]) if len(different) else n


def align(
    cached: npt.NDArray[np.intc],
    prompt: list[int],
    piece: Callable[[int], bytes],
    tokenize: Callable[[bytes], list[int]],
) -> list[int]:
    """Spells `prompt` with the tokens of the cache wherever the text is the same.

    A chat renders and tokenises the whole conversation for every turn, and the tokenizer may cut the model's own answer
    into other tokens than the model generated. If the text of `cached` is a prefix of the text of `prompt`, the result
    is `cached` followed by the tokens of the remaining text; otherwise it is `prompt`, unchanged. Only tokens after
    the first difference are turned into text.
    """
    same = common_prefix(cached, prompt)
    if same == len(cached) or same == len(prompt):
        return prompt
    tail = b"".join(piece(int(token)) for token in cached[same:])
    at = 0
    for j in range(same, len(prompt)):
        if at == len(tail):
            return [*cached.tolist(), *prompt[j:]]
        text = piece(prompt[j])
        if tail.startswith(text, at):
            at += len(text)
            continue
        if not text.startswith(tail[at:]):
            return prompt  # the text itself differs
        rest = text[len(tail) - at :]  # the cache ends inside this token
        extra = tokenize(rest)
        if b"".join(piece(token) for token in extra) != rest:
            return prompt
        return [*cached.tolist(), *extra, *prompt[j + 1 :]]
    return list(cached.tolist()) if at == len(tail) else prompt
