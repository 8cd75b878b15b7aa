"""Tools that the chat format does not tell the model of: said once, instead of an answer as if there were none."""

from __future__ import annotations

import warnings
from typing import Any

from .inside import Inside
from .prompts import ChatPrompts


class Tools:
    """What is known of the chat formats of one `Llama`."""

    def __init__(self, inside: Inside, prompts: ChatPrompts) -> None:
        self._inside, self._prompts = inside, prompts
        self._read: dict[Any, bool] = {}  # by chat format

    def warn(self, given: dict[str, Any], stacklevel: int) -> None:
        """Once for each chat format that says nothing of tools. For the one that is named in tool_choice a grammar makes up."""
        llm = self._inside.public
        kind = (llm.chat_format, llm.chat_handler)
        if not given.get("tools") or given["tool_choice"] not in (None, "auto") or kind in self._read:
            return
        self._read[kind] = self._tells_of_tools(given)
        if not self._read[kind]:
            warnings.warn(
                f"the chat format {llm.chat_format!r} of this model knows no tools: the model will not hear of them. Name the "
                "one to be called in tool_choice, describe them in the system message, or take another chat_format",
                RuntimeWarning,
                stacklevel=stacklevel + 1,
            )

    def _tells_of_tools(self, given: dict[str, Any]) -> bool:
        """Whether the prompt is another with them; True if there is no telling."""
        messages = given["messages"]
        try:
            told = self._prompts.prompt_of(messages, tools=given["tools"], tool_choice=given["tool_choice"])
            return told is None or bool(told != self._prompts.prompt_of(messages))
        except Exception:  # the template refuses the messages, and will say so
            return True
