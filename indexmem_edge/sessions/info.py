"""What a session file is of, and what it needs, without loading it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, Optional, Union

from ..options import OPTIONS, minimum_budget
from . import file as sessionfile, match


@dataclass(frozen=True)
class SessionInfo:
    """What `SessionInfo.read` finds in a session file.

    Attributes:
        path: the file.
        bytes: its size.
        tokens: tokens of the conversation.
        model: identity of the model file: what has to be equal.
        model_name: as the model's file calls it, for people; "" if it does not, or the session is of an older release.
        options: what the cache was asked for, by keyword of `Llama`; `kv_budget` 0: none.
        context: what else of the context has to be equal, by keyword.
        sidecar: name of the file of indexer or memory, for people; "" without one.
        sidecar_hash: identity of what is in it: 16 hexadecimal digits, "" without one.
        kept: entries that each KV head has; None: not known, of a session of an older release.
        pinned: tokens of the prefix that stays, likewise.
        least_budget: the smallest `kv_budget` that it loads into with its sinks, window, pinned prefix and memory; the policy evicts
            what is too much. 0: it was saved without a budget.
        whole_budget: the smallest that keeps all that it has; 0: it was saved without a budget.
        background: tokens at the beginning that are of another conversation.
        messages: messages of the chat that saved it; None: it was saved by another program.
        checkpoints: copies of the state that go along.
        checkpoint_bytes: what they take.
        extra: what was given to `save_session`.
        format: version of the file's format.
    """

    path: str
    bytes: int
    tokens: int
    model: str
    model_name: str
    options: dict[str, Any]
    context: dict[str, Any]
    sidecar: str
    sidecar_hash: str
    kept: Optional[int]
    pinned: Optional[int]
    least_budget: int
    whole_budget: int
    background: int
    messages: Optional[int]
    checkpoints: int
    checkpoint_bytes: int
    extra: Any
    format: int

    @classmethod
    def read(cls, path: Union[str, os.PathLike[str]], *, verify: bool = False) -> SessionInfo:
        """Reads what a session file says of itself: a few kilobytes, however large the state is.

        Args:
            verify: read all of the file, too, and compare it with its checksum.

        Raises:
            SessionError: it cannot be read, is not a session file, is of another version, is truncated or, with `verify`, was altered.
        """
        head, extra = sessionfile.look(path, verify)
        header = head.header
        keywords = [option.keyword for option in OPTIONS.values() if option.in_session] + ["memory_slots"]
        options = {name: header[name] for name in keywords if name in header}
        budget, slots = _count(options.get("kv_budget")), _count(options.get("memory_slots"))
        kept, pinned = (_known(header.get(key)) for key in (match.KEPT, match.PINNED))
        least = minimum_budget(_count(options.get("kv_sinks")), pinned or 0, _count(options.get("kv_window")), slots)
        return cls(
            path=os.fspath(path),
            bytes=head.nbytes,
            tokens=head.n_tokens,
            model=_text(header.get("model")),
            model_name=_text(header.get(match.MODEL_NAME)),
            options=options,
            context={name: header[name] for name in (*match.CONTEXT_FIELDS, match.UBATCH, "lora") if header.get(name) is not None},
            sidecar=_text(header.get(match.SIDECAR_NAME)),
            sidecar_hash=_text(header.get("sidecar")),
            kept=kept,
            pinned=pinned,
            least_budget=least if budget else 0,
            whole_budget=max(least, kept + slots if kept is not None else budget) if budget else 0,
            background=_count(header.get(match.BACKGROUND)),
            messages=_messages(extra),
            checkpoints=len(head.checkpoints),
            checkpoint_bytes=head.checkpoint_bytes,
            extra=extra,
            format=head.version,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json.dumps takes, without `extra`."""
        values = asdict(self)
        del values["extra"]
        return values


def _known(value: Any) -> Optional[int]:
    return value if type(value) is int and value >= 0 else None


def _count(value: Any) -> int:
    return _known(value) or 0


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _messages(extra: Any) -> Optional[int]:
    """How many the `extra` of a chat has."""
    listed = extra.get("messages") if isinstance(extra, dict) else None
    return len(listed) if isinstance(listed, list) else None
