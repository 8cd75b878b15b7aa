"""The messages of a chat, and the ways back: a value that is never changed, so that what fails has not happened."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Optional

from ..errors import IndexMemError

Message = dict[str, Any]
_SHOWN = 48  # characters of a question, for who has to recognise it
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """A system prompt, the messages after it, and a document that has been read but not asked about yet."""

    system: Optional[str] = None
    turns: tuple[Message, ...] = ()
    document: str = ""  # the beginning of the next question
    marks: tuple[tuple[int, str], ...] = ()  # (len(turns), document) before each thing that can be taken back

    @property
    def messages(self) -> list[Message]:
        """What the model is given."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, *self.turns]

    @property
    def open_messages(self) -> list[Message]:
        """What the model is given of the next question already: the document at its beginning."""
        return [*self.messages, {"role": "user", "content": self.document}]

    @property
    def is_open(self) -> bool:
        """Whether an answer is due."""
        return bool(self.turns) and self.turns[-1]["role"] in ("user", "tool")

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been said or read."""
        return not self.turns and not self.document

    @property
    def question(self) -> str:
        """The last one, without the document that it is about.

        Raises:
            IndexMemError: there is none.
        """
        last = self._last_question()
        return str(self.turns[last]["content"])[len(self._lead(last)) :]

    @property
    def summary(self) -> str:
        """In a few words: how many messages, and how the last question begins."""
        asked = any(m["role"] == "user" for m in self.turns)
        words = " ".join(self.question.split()) if asked else ""
        words = f', "{words[:_SHOWN]}{"..." if len(words) > _SHOWN else ""}"' if words else ""
        return f"{len(self.messages):,} messages{words}"

    # forward

    def asked(self, question: str) -> Conversation:
        """With a question at its end."""
        return self.added([{"role": "user", "content": question}])

    def added(self, messages: list[Message]) -> Conversation:
        """With some messages at its end. A system message at the beginning is the system prompt; what has been read
        becomes part of the first question.
        """
        from ..runtime.requests import check_text

        system, document, turns = self.system, self.document, list(self.turns)
        for message in messages:
            if message["role"] == "system" and not turns:
                system = message["content"]
                check_text(system, "the system prompt")
                continue
            if message["role"] == "user" and document:
                message, document = {**message, "content": f"{document}\n\n{message['content']}"}, ""
            turns.append(message)
        if len(turns) == len(self.turns):
            return replace(self, system=system)  # of which there is nothing to take back
        return replace(self, system=system, turns=tuple(turns), document=document, marks=self._marked())

    def answered(self, answer: str) -> Conversation:
        """With the answer at its end."""
        return replace(self, turns=(*self.turns, {"role": "assistant", "content": answer}))

    def read(self, document: str) -> Conversation:
        """With a document that the next question is about."""
        both = f"{self.document}\n\n{document}" if self.document else document
        return replace(self, document=both, marks=self._marked())

    def with_system(self, prompt: str) -> Conversation:
        """With another system prompt."""
        return replace(self, system=prompt)

    # back

    def unanswered(self) -> Conversation:
        """Without the last answer.

        Raises:
            IndexMemError: there is none.
        """
        if not self.turns or self.turns[-1]["role"] != "assistant":
            raise IndexMemError("there is no answer yet: ask something first")
        return replace(self, turns=self.turns[:-1])

    def edited(self, question: str) -> Conversation:
        """With other words for the last question, and without what came after it.

        Raises:
            IndexMemError: there is none.
        """
        last = self._last_question()
        message = {**self.turns[last], "content": self._lead(last) + question}
        return replace(self, turns=(*self.turns[:last], message))

    def undone(self) -> Conversation:
        """Without what came last: a question with its answer, or a document.

        Raises:
            IndexMemError: there is nothing.
        """
        if self.marks:
            n, document = self.marks[-1]
            return replace(self, turns=self.turns[:n], document=document, marks=self.marks[:-1])
        if self.document:
            return replace(self, document="")
        return replace(self, turns=self.turns[: self._last_question()])

    # kept in a session

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"messages": self.messages, "document": self.document, "marks": self.marks}

    @classmethod
    def from_dict(cls, value: Any) -> Optional[Conversation]:
        """What `to_dict` made; None if it is something else."""
        if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
            return None
        messages = value["messages"]
        if not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
        ):
            return None
        loaded = cls(document=str(value.get("document") or ""))
        if messages and messages[0]["role"] == "system":
            loaded, messages = replace(loaded, system=messages[0]["content"]), messages[1:]
        return replace(loaded, turns=tuple(messages), marks=_marks(value.get("marks"), len(messages)))

    def _marked(self) -> tuple[tuple[int, str], ...]:
        return (*self.marks, (len(self.turns), self.document))

    def _last_question(self) -> int:
        for i in range(len(self.turns) - 1, -1, -1):
            if self.turns[i]["role"] == "user":
                return i
        raise IndexMemError("there is no question yet: ask something first")

    def _lead(self, turn: int) -> str:
        """The document at the beginning of a question."""
        document = next((document for n, document in reversed(self.marks) if n <= turn), "")
        lead = f"{document}\n\n" if document else ""
        return lead if str(self.turns[turn]["content"]).startswith(lead) else ""


def _marks(value: Any, n_turns: int) -> tuple[tuple[int, str], ...]:
    """Those of a session, which may be of another version or from elsewhere: all of them, or none."""
    try:
        marks = tuple((int(n), str(document)) for n, document in value or ())
    except (TypeError, ValueError):
        return ()
    return marks if all(0 <= n <= n_turns for n, _ in marks) else ()


def messages_of_json(line: str) -> list[Message]:
    """The messages of a line of JSON: an object with `role` and `content`, or a list of such.

    Raises:
        IndexMemError: it is something else.
    """
    try:
        value = json.loads(line)
    except ValueError as error:
        raise IndexMemError(f"the line begins like JSON and is none ({error}): expected {_FORM}") from None
    messages = value if isinstance(value, list) else [value]
    if not messages:
        raise IndexMemError(f"the list of messages is empty: expected {_FORM}")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise IndexMemError(f"{json.dumps(message)[:80]} is no message: expected {_FORM}")
    return messages


_FORM = f'{{"role": ..., "content": "..."}} with a role of {", ".join(ROLES)}, or a list of such'
