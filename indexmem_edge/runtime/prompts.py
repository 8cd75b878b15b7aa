"""What a chat template makes of messages, for any chat format."""

from __future__ import annotations

from typing import Any, Optional

from .align import common_prefix
from .inside import Inside

Messages = list[dict[str, Any]]
_SYSTEM_ROLES = ("system", "developer")


def chat_tokens(llm: Inside, messages: Messages, **template: Any) -> Optional[list[int]]:
    """Tokens of the prompt for the next answer, or None if the chat format does not work in tokens."""
    prompt = llm.prompt_of(messages, **template)
    return prompt if isinstance(prompt, list) else None


def _lead(content: Any) -> str:
    """A character that the content does not begin with."""
    return "A" if not (isinstance(content, str) and content.lstrip()[:1] == "A") else "0"


def system_prefix(llm: Inside, messages: Messages, prompt: list[int], **template: Any) -> int:
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


def open_prefix(llm: Inside, messages: Messages, **template: Any) -> Optional[list[int]]:
    """Tokens that stay the same when a new paragraph is added to the last message."""
    ends = []
    for lead in ("A", "0"):
        last = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{lead}"}
        ends.append(chat_tokens(llm, [*messages[:-1], last], **template))
    if ends[0] is None or ends[1] is None:
        return None
    return ends[0][: common_prefix(ends[0], ends[1])]
