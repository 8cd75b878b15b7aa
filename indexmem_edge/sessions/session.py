"""Saving and loading conversations: what goes into a session file, and what becomes of it when it is loaded."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt

from .._vendor.llama_cpp import llama_cpp as llama_lib
from ..errors import SessionError
from ..native import api
from ..runtime.checkpoints import Checkpoint
from ..runtime.inside import Inside
from ..runtime.kept_logits import Logits
from ..runtime.notices import SESSION
from . import file as sessionfile, match
from .file import SavedCheckpoint, SessionData, State
from .match import Talk

PathLike = Union[str, "os.PathLike[str]"]


def native_state(llm: Inside) -> memoryview:
    """KV state of sequence 0, as the library writes it. It is copied once, which other threads do not have to wait for."""
    size = llama_lib.llama_state_seq_get_size(llm.ctx, 0)
    buffer = np.empty(size, dtype=np.uint8)
    written = llama_lib.llama_state_seq_get_data(llm.ctx, _pointer(buffer), size, 0)
    if written == 0 or written > size:
        raise SessionError(f"the library could not give out the KV state ({written} of {size} bytes)")
    return buffer[:written].data


def _pointer(buffer: npt.NDArray[np.uint8]) -> Any:
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _set_native_state(llm: Inside, state: State, n_tokens: int) -> bool:
    llama_lib.llama_memory_clear(llm.memory, True)
    if not state:
        return n_tokens == 0
    buffer = np.frombuffer(state, dtype=np.uint8)  # only read, so not copied
    read = llama_lib.llama_state_seq_set_data(llm.ctx, _pointer(buffer), len(state), 0)
    return bool(read == len(state) and match.memory_position(llm) == n_tokens)


def taken(talk: Talk, extra: Any = None, checkpoints: Union[bool, int] = False) -> SessionData:
    """What `Llama.save_session` writes, as it is now: it stays that while the conversation goes on."""
    if talk.cache is not None:
        talk.cache.settle()
    tokens = np.array(talk.llm.history, dtype=np.int32)
    state: State = native_state(talk.llm) if len(tokens) else b""
    logits = talk.kept.now()
    kept = tuple(_kept_checkpoints(talk, checkpoints))
    return SessionData(match.header_of(talk), tokens, extra, state, None if logits is None else logits.copy(), kept)


def _kept_checkpoints(talk: Talk, asked: Union[bool, int]) -> Iterator[SavedCheckpoint]:
    """That of a background, and those that were of use last, as many as the bytes allow."""
    if talk.cache is None:
        return
    if (held := talk.cache.background.checkpoint) is not None:
        yield SavedCheckpoint(held.tokens, held.state, held.logits)
    left = talk.cache.checkpoints.nbytes if asked is True else int(asked)
    for made in talk.cache.checkpoints.newest_first():
        if (size := made.nbytes) <= left:
            left -= size
            yield SavedCheckpoint(made.tokens, made.state, made.logits)


def read(talk: Talk, path: PathLike) -> SessionData:
    """A session of this model, whatever its options were.

    Raises:
        SessionError: it is none, or damaged.
    """
    data = sessionfile.read(path)
    match.require_model(talk, os.fspath(path), data)
    if background(data.header) and talk.cache is not None and talk.llm.logits_all:
        raise SessionError(f"{os.fspath(path)} has another session for its background, which needs logits_all to be left out")
    return data


def load(talk: Talk, path: PathLike) -> SessionData:
    """See `Llama.load_session`; the data without the state, which has become that of the cache."""
    name, data = os.fspath(path), read(talk, path)
    match.require_state(talk, name, data.header)
    llm = talk.llm
    if talk.cache is not None:
        talk.cache.settle()
    before_tokens, before_logits = llm.history.copy(), talk.kept.now()
    before_state: State = native_state(llm) if len(before_tokens) else b""
    try:
        with _pin(talk, match.asked_pin(talk, data.header)):
            reason = _refused(talk, data)
            restored = _restored(talk, data) if reason is None else []
    except BaseException:
        _restore(talk, before_state, len(before_tokens), before_logits)
        raise
    if reason is not None:
        _restore(talk, before_state, len(before_tokens), before_logits)
        raise SessionError(f"{name}: the library refused its KV state{reason}; the conversation is as it was")
    llm.tokens[: len(data.tokens)] = data.tokens
    llm.n_tokens = len(data.tokens)
    talk.kept.restore(data.logits)
    talk.turn.begin(llm.n_tokens)
    if talk.cache is not None:
        talk.cache.make_background(background(data.header), restored)
        for made in restored:
            talk.cache.checkpoints.add(made)
    return replace(data, state=b"", checkpoints=())


def background(header: dict[str, Any]) -> int:
    """Tokens at the beginning of a session that are none of the conversation's own."""
    return int(header.get(match.BACKGROUND, 0))


def pinned(header: dict[str, Any]) -> int:
    """Tokens of the prefix that was pinned when a session was saved."""
    found = header.get(match.PINNED, 0)
    return found if type(found) is int and found >= 0 else 0


def pinned_here(talk: Talk, path: PathLike, header: dict[str, Any]) -> int:
    """As many of them as the budget has room for; says so if that is not all."""
    pin, room = pinned(header), talk.options.pin_room()
    if pin > room:
        talk.notices.tell(SESSION, f"{os.fspath(path)}: its first {pin:,} tokens were pinned, kv_budget {talk.options.budget:,} has room for {room:,} of them")
    return min(pin, room)


def tell_changes(talk: Talk, path: PathLike, header: dict[str, Any]) -> None:
    """Says what is different now from what a session was saved with."""
    if changed := match.changes(talk, header):
        talk.notices.tell(SESSION, f"{os.fspath(path)}: {changed}")


@contextlib.contextmanager
def _pin(talk: Talk, pin: Optional[int]) -> Iterator[None]:
    """States that are loaded meanwhile get this pinned prefix."""
    if pin is None:
        yield
        return
    api.set_load_pin(talk.llm.ctx, pin)
    try:
        yield
    finally:
        api.set_load_pin(talk.llm.ctx, None)


def _refused(talk: Talk, data: SessionData) -> Optional[str]:
    """Makes the state of a session that of the cache; why not, or None if it is."""
    if talk.cache is not None:
        api.clear_error()
    if _set_native_state(talk.llm, data.state, len(data.tokens)):
        return None
    said = api.last_error() if talk.cache is not None else ""
    return ": " + said.removeprefix("bounded KV state: ") if said else ""


def _restored(talk: Talk, data: SessionData) -> list[Checkpoint]:
    """The checkpoints of a session, as those of this cache; those that it cannot take up are left out. Each is loaded once, which
    also tells what it can be cut to: the file is not to be trusted with that.
    """
    made: list[Checkpoint] = []
    if talk.cache is None or not data.checkpoints:
        return made
    now: State = native_state(talk.llm) if len(data.tokens) else b""
    try:
        for kept in reversed(data.checkpoints):
            if len(kept.tokens) and _set_native_state(talk.llm, kept.state, len(kept.tokens)):
                one = Checkpoint.of(talk.llm.ctx, kept.tokens.astype(np.intc), kept.logits)
                made += [one] if one is not None else []
    finally:
        if not _set_native_state(talk.llm, now, len(data.tokens)):
            raise SessionError("the library does not take back the state that it has just given out")
    return made


def _restore(talk: Talk, state: State, n_tokens: int, logits: Logits) -> None:
    if not _set_native_state(talk.llm, state, n_tokens):
        talk.llm.public.reset()
        raise SessionError("the session was refused, and the conversation before it could not be restored: it is empty")
    talk.kept.restore(logits)
