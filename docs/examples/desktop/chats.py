"""A chat: what its tab shows, and what a session keeps of it. Only the thread of the window touches one."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from worker import Job

    from indexmem_edge import Checkpoint, KVStats

Message = dict[str, str]  # role and content, as the model takes them


@dataclass(frozen=True)
class Document:
    """What the model reads before a question about it is asked."""

    name: str
    text: str

    @classmethod
    def of(cls, path: Path) -> Document:
        """What is in a file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not a text, or nothing is in it.
        """
        try:
            text = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{path.name} is not a text file: expected text in UTF-8") from None
        if not text:
            raise ValueError(f"{path.name} is empty: there is nothing to ask about")
        return cls(path.name, text)

    def followed_by(self, other: Document) -> Document:
        """Both, as one."""
        return Document(f"{self.name}, {other.name}", f"{self.text}\n\n{other.text}")


@dataclass(eq=False)
class Chat:
    """One conversation.

    Attributes:
        messages: what the model is given.
        documents: those that a question begins with, by the index of its message.
        document: one that has not been asked about yet.
        reading: the name of a file that is being read.
        draft: a question that was not answered, to be put back to where it was typed.
        answer: what has come of the answer in progress.
        job: what the model does for this chat, or is going to do.
        state: the KV cache after the last turn.
        stats: the counts of the cache then.
        kept: the file that it is saved in when the window closes.
        changed: whether there is more than that file has.
    """

    messages: list[Message] = field(default_factory=list)
    documents: dict[int, Document] = field(default_factory=dict)
    document: Optional[Document] = None
    reading: str = ""
    draft: str = ""
    answer: str = ""
    job: Optional[Job] = None
    state: Optional[Checkpoint] = None
    stats: Optional[KVStats] = None
    kept: Optional[Path] = None
    changed: bool = False

    @property
    def title(self) -> str:
        """The beginning of the first question."""
        return textwrap.shorten(self.shown(0), 24, placeholder="…") if self.messages else "New chat"

    @property
    def busy(self) -> bool:
        return self.job is not None

    @property
    def can_regenerate(self) -> bool:
        return not self.busy and bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def ask(self, question: str) -> None:
        """Adds a question, which begins with the document if there is one."""
        content = question
        if self.document is not None:
            self.documents[len(self.messages)] = self.document
            content, self.document = f"{self.document.text}\n\n{question}", None
        self.messages.append({"role": "user", "content": content})
        self.changed = True

    def take_back_question(self) -> None:
        """Makes a draft of the last message, a question; its document waits for the next one."""
        last = len(self.messages) - 1
        self.draft = self.shown(last)
        self.messages.pop()
        self.document = self.documents.pop(last, None)

    def keep_answer(self) -> None:
        """What has come of the answer is the answer."""
        self.messages.append({"role": "assistant", "content": self.answer})
        self.answer = ""

    def shown(self, index: int) -> str:
        """A message as a person typed it: without the text of the document that it begins with."""
        content = self.messages[index]["content"]
        document = self.documents.get(index)
        return content if document is None else content[len(document.text) + 2 :]

    # in a session

    def to_extra(self) -> dict[str, Any]:
        """For `Llama.save_session`: plain values."""
        return {
            "messages": self.messages,
            "documents": {str(index): asdict(document) for index, document in self.documents.items()},
            "document": asdict(self.document) if self.document is not None else None,
            "draft": self.draft,
        }

    @classmethod
    def from_extra(cls, extra: Any) -> Chat:
        """What `to_extra` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            return cls(
                messages=[{"role": str(m["role"]), "content": str(m["content"])} for m in extra["messages"]],
                documents={int(index): Document(**document) for index, document in extra["documents"].items()},
                document=Document(**extra["document"]) if extra["document"] is not None else None,
                draft=str(extra["draft"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError("another program has saved it: there are no messages in it to show") from error
