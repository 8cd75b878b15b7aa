"""An answer, or the rest of a text, piece by piece: what is read for it is shown, and can be stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Optional

from .console import Bar
from .interrupt import ctrl_c_cancels

if TYPE_CHECKING:
    from ..llama import Llama

Piece = tuple[str, Optional[str]]  # text, and in the last one the reason for the end


def pieces(llm: Llama, begin: Callable[[], Iterator[Any]], bar: Bar) -> Iterator[Piece]:
    """The pieces of a completion as they come. The first comes when all that is new has been read, which may take long.

    Args:
        begin: makes the completion's stream of chunks.

    Raises:
        Cancelled: Ctrl-C before the first piece: nothing has happened.
        KeyboardInterrupt: Ctrl-C after it.
    """
    with bar, ctrl_c_cancels(llm), llm.watch(bar.update):
        chunks = begin()
        first = next(chunks, None)
    if first is None:
        return
    yield _piece(first)
    for chunk in chunks:
        yield _piece(chunk)


def _piece(chunk: Any) -> Piece:
    choice = chunk["choices"][0]
    text = choice["delta"].get("content") if "delta" in choice else choice["text"]
    return text or "", choice["finish_reason"]
