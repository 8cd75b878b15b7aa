"""An answer, or the rest of a text, piece by piece: what is read for it is shown, and can be stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Optional

from .console import Bar
from .interrupt import ctrl_c_cancels

if TYPE_CHECKING:
    from ..llama import Llama
    from ..stats import KVStats

Piece = tuple[str, Optional[str]]  # text, and in the last one the reason for the end


def pieces(llm: Llama, begin: Callable[[], Iterator[Any]], predict: int, bar: Bar) -> Iterator[Piece]:
    """The pieces of a completion as they come. The first comes when all that is new has been read, which may take long.

    Args:
        begin: makes the completion's stream of chunks.
        predict: tokens at most, as in `--predict`; with 0 the text is read, and nothing comes of it.

    Raises:
        Cancelled: Ctrl-C before the first piece: nothing has happened.
        KeyboardInterrupt: Ctrl-C after it.
    """
    with bar, ctrl_c_cancels(llm), llm.watch(bar.update):
        chunks = begin()
        first = next(chunks, None)
    if first is None:
        return
    if predict == 0:
        chunks.close()  # type: ignore[attr-defined]
        yield "", "length"
        return
    yield _piece(first)
    for chunk in chunks:
        yield _piece(chunk)


def _piece(chunk: Any) -> Piece:
    choice = chunk["choices"][0]
    text = choice["delta"].get("content") if "delta" in choice else choice["text"]
    return text or "", choice["finish_reason"]


def is_full(stats: KVStats, predict: int) -> bool:
    """Of an answer that ended for its length: whether that was the largest length of all, and not `--predict`."""
    room = stats.n_ctx - stats.turn_evaluated - stats.turn_reused
    return predict < 0 or predict > room


def cut_by(finish: Optional[str], stats: KVStats, predict: int) -> dict[str, str]:
    """For programs: the option that cut an answer whose `finish_reason` is "length"."""
    if finish != "length":
        return {}
    return {"cut_by": "ctx-size" if is_full(stats, predict) else "predict"}


def why_cut(stats: KVStats, predict: int) -> str:
    """What to say of an answer that ended for its length."""
    if is_full(stats, predict):
        return f"the answer was cut where all of it reached {stats.n_ctx:,} tokens, the largest length: -c sets another" + (
            ", which costs no memory with a budget" if stats.budget else ""
        )
    return f"the answer was cut at {predict:,} tokens: -n sets another limit"
