"""Saving and loading conversations: which state goes into a session file, and when a file is accepted."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import numpy as np

from .._vendor.llama_cpp import llama_cpp as llama_lib
from ..errors import SessionError
from ..files.modelfile import fingerprint
from ..native import api
from ..native.find import LLAMA_CPP_PYTHON_VERSION
from ..options import CacheOptions
from ..runtime.cache import BoundedCache, Turn
from ..runtime.inside import Inside
from ..runtime.kept_logits import KeptLogits, Logits
from . import file as sessionfile

_CONTEXT_FIELDS = (
    "type_k",
    "type_v",
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
)


_SIDECAR_NAME = "sidecar file"  # for people: what counts is the hash
_REBASES = "rebases"  # times that positions were renewed; missing: saved before they were


@dataclass
class Talk:
    """The conversation that a `Llama` is in: what is saved, and what a loaded one takes the place of."""

    llm: Inside
    options: CacheOptions
    cache: Optional[BoundedCache]
    turn: Turn
    kept: KeptLogits
    identity: dict[str, Any] = field(default_factory=dict)  # computed when it is first asked for


def identity(talk: Talk) -> dict[str, Any]:
    """All that must be equal for the KV state of one `Llama` to have meaning in another, by name."""
    if not talk.identity:
        llm = talk.llm.public
        talk.identity = {
            "llama.cpp": f"of llama-cpp-python {LLAMA_CPP_PYTHON_VERSION}",
            "model": fingerprint(llm.model_path),
            "lora": [fingerprint(llm.lora_path), llm.lora_scale] if llm.lora_path else None,
            "sidecar": sidecar_hash(talk),
            **talk.options.fixed_for_state(),
            "memory_slots": api.get_stats(llm.ctx).memory_slots if talk.cache is not None else 0,
            **{name: getattr(llm.context_params, name) for name in _CONTEXT_FIELDS},
            "rope_factors": _rope_factors(talk),
        }
    return talk.identity


def _rope_factors(talk: Talk) -> Optional[str]:
    """Which rotary factors keys are rotated with, in models that have some for short and others for long texts."""
    metadata = talk.llm.public.metadata
    of = f"{metadata.get('general.architecture')}.rope.scaling."
    original = int(metadata.get(of + "original_context_length", 0))
    if original == 0 or metadata.get(of + "type") in ("none", "linear", "yarn"):
        return None
    span = api.get_stats(talk.llm.ctx).span if talk.cache is not None else 0
    return "short" if (span or talk.llm.n_ctx) <= original else "long"


def sidecar_hash(talk: Talk) -> str:
    """What ranks and memory of the cached entries were made with: 16 hexadecimal digits, "" without a sidecar."""
    found = api.get_stats(talk.llm.ctx).sidecar_hash if talk.cache is not None else 0
    return f"{found:016x}" if found else ""


def native_state(llm: Inside) -> bytes:
    """KV state of sequence 0, as the library writes it."""
    size = llama_lib.llama_state_seq_get_size(llm.ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    written = llama_lib.llama_state_seq_get_data(llm.ctx, buffer, size, 0)
    if written == 0 or written > size:
        raise SessionError(f"the library could not give out the KV state ({written} of {size} bytes)")
    return ctypes.string_at(buffer, written)


def _set_native_state(llm: Inside, state: bytes, n_tokens: int) -> bool:
    memory = llm.memory
    llama_lib.llama_memory_clear(memory, True)
    if not state:
        return n_tokens == 0
    buffer = ctypes.cast(ctypes.c_char_p(state), ctypes.POINTER(ctypes.c_uint8))  # only read, so not copied
    read = llama_lib.llama_state_seq_set_data(llm.ctx, buffer, len(state), 0)
    return bool(read == len(state) and llama_lib.llama_memory_seq_pos_max(memory, 0) + 1 == n_tokens)


def _rebases(talk: Talk) -> int:
    return int(api.get_stats(talk.llm.ctx).n_rebases) if talk.cache is not None else 0


def save(talk: Talk, path: Union[str, os.PathLike[str]], extra: Any = None) -> int:
    """See `Llama.save_session`."""
    if talk.cache is not None:
        talk.cache.settle()
    tokens = np.array(talk.llm.history, dtype=np.int32)
    state = native_state(talk.llm) if len(tokens) else b""
    sidecar = os.path.basename(talk.options.sidecar or "")
    header = {**identity(talk), _SIDECAR_NAME: sidecar, _REBASES: _rebases(talk)}
    return sessionfile.write(path, sessionfile.SessionData(header, tokens, extra, state, talk.kept.now()))


def load(talk: Talk, path: Union[str, os.PathLike[str]]) -> Any:
    """See `Llama.load_session`."""
    data = sessionfile.read(path)
    _require_match(talk, os.fspath(path), data)
    llm = talk.llm
    if talk.cache is not None:
        talk.cache.settle()
    before_tokens, before_logits = llm.history.copy(), talk.kept.now()
    before_state = native_state(llm) if len(before_tokens) else b""
    try:
        accepted = _set_native_state(llm, data.state, len(data.tokens))
    except BaseException:
        _restore(talk, before_state, len(before_tokens), before_logits)
        raise
    if not accepted:
        _restore(talk, before_state, len(before_tokens), before_logits)
        raise SessionError(f"{os.fspath(path)}: the library refused its KV state; the conversation is as it was")
    llm.tokens[: len(data.tokens)] = data.tokens
    llm.n_tokens = len(data.tokens)
    talk.kept.restore(data.logits)
    talk.turn.begin(llm.n_tokens)
    return data.extra


def _restore(talk: Talk, state: bytes, n_tokens: int, logits: Logits) -> None:
    if not _set_native_state(talk.llm, state, n_tokens):
        talk.llm.public.reset()
        raise SessionError("the session was refused, and the conversation before it could not be restored: it is empty")
    talk.kept.restore(logits)


def _require_match(talk: Talk, name: str, data: sessionfile.SessionData) -> None:
    ours = identity(talk)
    for key, value in ours.items():
        found = data.header.get(key)
        if found == value:
            continue
        if key == "sidecar":
            if found is None and value == "":
                continue  # saved before there were sidecars
            raise SessionError(
                f"{name} was saved with {_sidecar(found, data.header.get(_SIDECAR_NAME))}, this one has "
                f"{_sidecar(value, os.path.basename(talk.options.sidecar or ''))}: "
                + (
                    "name that one with --indexmem FILE (indexmem= in Python)"
                    if found
                    else 'leave it out with --indexmem off (indexmem="off" in Python)'
                )
            )
        if found is None and (key == "rope_factors" or (key, value) in (("memory", "off"), ("memory_slots", 0))):
            continue  # saved before that was written down
        if key == "model":
            path = talk.llm.public.model_path
            raise SessionError(f"{name} was saved with another model file than {path}: load it with that one")
        raise SessionError(
            f"{name} was saved with {key} = {_shown(found)}, this one has {_shown(value)}: "
            f"open the model with the options it was saved with"
        )
    if data.header.get(_REBASES):
        _require_span(talk, name)
    n, n_vocab, n_ctx = len(data.tokens), talk.llm.n_vocab, talk.llm.n_ctx
    if n and not (0 <= int(data.tokens.min()) and int(data.tokens.max()) < n_vocab):
        raise SessionError(f"{name} is damaged: it has token ids outside the vocabulary of {n_vocab}")
    if data.logits is not None and (n == 0 or len(data.logits) != n_vocab):
        raise SessionError(f"{name} is damaged: it has logits of {len(data.logits)} tokens, and the vocabulary {n_vocab}")
    if n >= n_ctx:
        raise SessionError(f"{name} holds {n:,} tokens and n_ctx is {n_ctx:,}: give Llama a larger n_ctx")


def _require_span(talk: Talk, name: str) -> None:
    """Positions that have been renewed can only go on being renewed: the text has outgrown them."""
    if talk.cache is None or api.get_stats(talk.llm.ctx).span > 0:
        return
    why = api.span_reason(talk.llm.ctx)
    mend = f"this one has none, because {why}" if why else "leave --kv-span 0 (kv_span=0 in Python) out"
    raise SessionError(f"{name} was saved after its positions had been renewed, and needs a span to go on: {mend}")


def _sidecar(identity: Any, file: Any) -> str:
    return f"the sidecar {_shown(file or '')} ({_shown(identity)})" if identity else "no sidecar"


def _shown(value: Any) -> str:
    return repr(value)[:80]
