"""What the model does for a chat. One `Turns` belongs to one `Llama`, and only the worker's thread calls it.

The cache holds one conversation. Each chat keeps a checkpoint of its own, which has a fixed size however long the chat is, so
that any of them can go on at the cost of a copy: nothing is read again when a person changes tabs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from chats import Document, Message

from indexmem_edge import Cancelled

if TYPE_CHECKING:
    from worker import Job

    from indexmem_edge import Checkpoint, KVStats, Llama


@dataclass(frozen=True)
class Turn:
    """The cache after something has been read or answered. Of a new conversation there is no state."""

    state: Optional[Checkpoint]
    stats: KVStats


class Turns:
    """Args: how answers are sampled, as `create_chat_completion` takes it."""

    def __init__(self, **sampling: Any) -> None:
        self._sampling = sampling
        self._now: Optional[Checkpoint] = None  # the one that is in the cache

    def answer(
        self, llm: Llama, job: Job, state: Optional[Checkpoint], messages: list[Message], piece: Callable[[str, KVStats], None]
    ) -> Turn:
        """Answers the last message; `piece` is given the text as it comes, and the counts of the cache.

        Raises:
            Cancelled: the job was stopped. The cache is what it was.
        """
        self._take_up(llm, job, state)
        for chunk in llm.create_chat_completion(messages, stream=True, **self._sampling):
            if job.stopped:
                llm.cancel()
            if text := chunk["choices"][0]["delta"].get("content"):
                piece(text, llm.kv_stats())
        return self._turn(llm)

    def read(
        self, llm: Llama, job: Job, state: Optional[Checkpoint], messages: list[Message], before: Optional[Document], path: Path
    ) -> tuple[Turn, Document]:
        """Reads a file now, so that a question about it costs only itself.

        Args:
            before: a document that has been read already, and not asked about; the file goes on from there.

        Raises:
            Cancelled: the job was stopped. The cache is what it was.
            OSError, ValueError: see `Document.of`.
        """
        new = Document.of(path)
        document = new if before is None else before.followed_by(new)
        self._take_up(llm, job, state)
        llm.prefill_chat([*messages, {"role": "user", "content": document.text}])  # a message that is still open
        return self._turn(llm), document

    def save(self, llm: Llama, job: Job, state: Optional[Checkpoint], path: Path, extra: Any) -> int:
        """Writes a conversation to a file; returns how many bytes it has."""
        self._take_up(llm, job, state)
        path.parent.mkdir(parents=True, exist_ok=True)
        return llm.save_session(path, extra)

    def open(self, llm: Llama, path: Path) -> tuple[Turn, Any]:
        """Takes up a conversation from a file; returns it with what `save` was given as `extra`.

        Raises:
            SessionError: it is not of this model, or damaged. The cache is what it was.
        """
        extra = llm.load_session(path)
        return self._turn(llm), extra

    def _take_up(self, llm: Llama, job: Job, state: Optional[Checkpoint]) -> None:
        """Makes the cache that of a chat."""
        if job.stopped:
            raise Cancelled("stopped before it began")
        if state is None:
            llm.reset()
        elif state is not self._now:
            llm.restore(state)
        self._now = state

    def _turn(self, llm: Llama) -> Turn:
        self._now = llm.checkpoint() if llm.n_tokens else None
        return Turn(self._now, llm.kv_stats())
