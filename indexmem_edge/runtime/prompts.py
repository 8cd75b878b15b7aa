"""What a chat template makes of messages, for any chat format: the prompt is caught on its way to the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

from .._vendor.llama_cpp import llama_chat_format as chat_format
from .align import common_prefix

if TYPE_CHECKING:
    from ..llama import Llama

Messages = list[dict[str, Any]]
_SYSTEM_ROLES = ("system", "developer")


class _Caught(Exception):
    def __init__(self, prompt: Any) -> None:
        super().__init__()
        self.prompt = prompt


class _Catcher:
    """Stands in for a `Llama` in a chat handler and stops it when it is about to generate."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def create_completion(self, prompt: Any, **_: Any) -> Any:
        raise _Caught(prompt)


def chat_tokens(llm: Llama, messages: Messages, **template: Any) -> Optional[list[int]]:
    """Tokens of the prompt for the next answer, or None if the chat format does not work in tokens."""
    handler = (
        llm.chat_handler
        or llm._chat_handlers.get(llm.chat_format)
        or chat_format.get_chat_completion_handler(llm.chat_format)
    )
    try:
        handler(llama=_Catcher(llm), messages=messages, **template)
    except _Caught as caught:
        return caught.prompt if isinstance(caught.prompt, list) else None
    return None


def _lead(content: Any) -> str:
    """A character that the content does not begin with."""
    return "A" if not (isinstance(content, str) and content.lstrip()[:1] == "A") else "0"


def system_prefix(llm: Llama, messages: Messages, prompt: list[int], **template: Any) -> int:
    """Number of leading tokens of `prompt` that the template makes of the leading system messages.

    Includes a system prompt that the template adds by itself. May include the first tokens of the next message's
    header, which are the same whatever follows.
    """
    n = 0
    while n < len(messages) and messages[n].get("role") in _SYSTEM_ROLES:
        n += 1
    if n == len(messages):
        return 0  # nothing but system messages: no telling where they end
    system = messages[:n]
    probe = {"role": "user", "content": _lead(messages[n].get("content"))}
    for attempt in ([system] if system else []) + [system + [probe]]:
        try:
            rendered = chat_tokens(llm, attempt, **template)
        except Exception:  # templates may refuse a conversation without a user's message
            continue
        if rendered is not None:
            return common_prefix(rendered, prompt)
    return 0


def open_prefix(llm: Llama, messages: Messages, **template: Any) -> Optional[list[int]]:
    """Tokens that stay the same when a new paragraph is added to the last message."""
    ends = []
    for lead in ("A", "0"):
        last = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{lead}"}
        ends.append(chat_tokens(llm, [*messages[:-1], last], **template))
    if ends[0] is None or ends[1] is None:
        return None
    return ends[0][: common_prefix(ends[0], ends[1])]
