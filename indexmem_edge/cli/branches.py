"""Versions of a conversation that one can go to by their names, as in git."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Optional

from ..errors import BudgetError, ContextError, IndexMemError
from ..runtime.checkpoints import default_limit
from .conversation import Conversation

if TYPE_CHECKING:
    from ..llama import Llama
    from ..runtime.checkpoints import Checkpoint

MAIN = "main"  # the name of a conversation that nobody has named
_LONGEST = 64  # characters of a name


@dataclass(frozen=True)
class Branches:
    """A value that is never changed.

    Attributes:
        current: the name of the branch that the chat is on. It ends where the conversation does.
        left: where the others end, by name.
    """

    current: str = MAIN
    left: Mapping[str, Conversation] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name == self.current or name in self.left

    def __iter__(self) -> Iterator[str]:
        """All names, in order."""
        return iter(sorted({self.current, *self.left}))

    def begun(self, name: str, conversation: Conversation) -> Branches:
        """With another one, that ends here.

        Raises:
            IndexMemError: it cannot be called that.
        """
        if len(name) > _LONGEST or not name.isprintable() or name.startswith("-"):
            raise IndexMemError(
                f"a branch cannot be called {name[:_LONGEST]!r}: give it at most {_LONGEST} printable characters, of which "
                "the first is no dash"
            )
        return replace(self, left={**self.left, name: conversation})

    def gone_to(self, name: str, conversation: Conversation) -> Branches:
        """On another one; the present one ends with this conversation."""
        left = {**self.left, self.current: conversation}
        del left[name]
        return Branches(name, left)

    def without(self, name: str) -> Branches:
        """Without one.

        Raises:
            IndexMemError: there is none of that name, or the chat is on it.
        """
        if name == self.current:
            raise IndexMemError(f"the chat is on {name}: go to another branch first")
        if name not in self.left:
            raise IndexMemError(f"there is no branch {name!r}: choose from {', '.join(self)}")
        return replace(self, left={other: talk for other, talk in self.left.items() if other != name})

    # kept in a session

    def to_dict(self) -> dict[str, Any]:
        """For JSON: entries beside those of the conversation."""
        if not self.left and self.current == MAIN:
            return {}
        return {"branch": self.current, "branches": {name: talk.to_dict() for name, talk in self.left.items()}}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Branches:
        """What `to_dict` made. Of what was made by something else, what can be understood."""
        current, branches = value.get("branch"), value.get("branches")
        if not isinstance(current, str) or not isinstance(branches, dict):
            return cls()
        found = {name: Conversation.from_dict(talk) for name, talk in branches.items() if name != current}
        return cls(current, {name: talk for name, talk in found.items() if talk is not None})


Content = tuple[Conversation, Branches]  # of a chat: what a session of it is about


def extra_of(content: Content) -> dict[str, Any]:
    """What goes with the state into the session of a chat, for JSON."""
    conversation, branches = content
    return {**conversation.to_dict(), **branches.to_dict()}


def content_of(extra: Any) -> Optional[Content]:
    """What `extra_of` made; None if it is something else."""
    conversation = Conversation.from_dict(extra)
    return None if conversation is None else (conversation, Branches.from_dict(extra))


class Copies:
    """Copies of the state at the ends of branches that were left, so that who comes back reads nothing again.

    They may take as much as checkpoints do unless told otherwise. Of branches that were left longest ago, the text is all that remains then.
    """

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._kept: dict[str, Checkpoint] = {}  # the one that was made last is the last

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(kept.nbytes for kept in self._kept.values())

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def take(self, name: str) -> None:
        """Copies the state as it is, for a branch that ends here. Without a budget there is none."""
        self._kept.pop(name, None)
        try:
            made = self._llm.checkpoint()
        except (BudgetError, ContextError):  # nothing is there yet, or no memory for it: then it is read again
            return
        self._kept[name] = made
        while self.nbytes > default_limit(made.nbytes):
            del self._kept[next(iter(self._kept))]

    def go_to(self, name: str, here: str) -> None:
        """Copies the state for the branch that ends `here`, and makes it what it was at the end of another, if there is a copy, which is
        dropped: that branch goes on.
        """
        kept: Optional[Checkpoint] = self._kept.pop(name, None)  # before the other needs its room
        try:
            self.take(here)
        except BaseException:
            if kept is not None:
                self._kept[name] = kept
            raise
        if kept is not None:
            self._llm.restore(kept)

    def drop(self, name: str) -> None:
        """Forgets that of a branch, if there is one."""
        self._kept.pop(name, None)

    def clear(self) -> None:
        """Forgets them all."""
        self._kept.clear()
