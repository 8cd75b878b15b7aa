"""What llama_cpp answers, with numbers that JSON can hold, and the log-probabilities of a prompt that is repeated."""

from __future__ import annotations

from typing import Any, Callable, Optional

import numpy as np
import numpy.typing as npt


def plain(value: Any) -> Any:
    """The same with numbers of Python in place of NumPy's."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def log_probabilities(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Of every token of the vocabulary, row by row, in the dtype of the logits."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def echoed(
    choice: dict[str, Any],
    tokens: list[int],
    scores: npt.NDArray[np.single],
    piece: Callable[[int], str],
    text: str,
    offset: int,
    top: Optional[int],
) -> dict[str, Any]:
    """A choice of a completion with the prompt before it, as OpenAI's `echo` has it.

    Args:
        choice: of the completion alone.
        tokens: those of the prompt.
        scores: row i holds the logits after token i.
        piece: text of a token.
        text: of the prompt.
        offset: where, according to `choice`, the text of the completion begins.
        top: number of the most probable tokens that are named at each place; None: no log-probabilities.
    """
    found = {**choice, "text": text + choice["text"]}
    after = choice["logprobs"]
    if top is None or after is None:
        return found
    names = [piece(token) for token in tokens]
    probable = log_probabilities(scores[: max(len(tokens) - 1, 0)])
    n_first = min(len(names), 1)  # before which nothing comes
    own: list[Optional[float]] = [None] * n_first
    best: list[Optional[dict[str, float]]] = [None] * n_first
    for row, token, name in zip(probable, tokens[1:], names[1:], strict=True):
        order = np.argsort(row)[::-1][:top]
        own.append(float(row[token]))
        best.append({**{piece(int(i)): float(row[i]) for i in order}, name: float(row[token])})
    starts = np.concatenate([[0], np.cumsum([len(name) for name in names])])[: len(names)].tolist()
    moved = [start - offset + len(text) for start in after["text_offset"]]
    found["logprobs"] = {
        "tokens": names + after["tokens"],
        "text_offset": starts + moved,
        "token_logprobs": own + after["token_logprobs"],
        "top_logprobs": best + after["top_logprobs"],
    }
    return found
