"""Which sessions go on in a `Llama`, and what is said of those that were saved with other options.

Keys are turned by the model and the context, so these have to be the same. What the cache was asked for may differ as far as the
library can take its state up: it decides, and says why not. What can be said beforehand in words of options is said here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

from .._vendor.llama_cpp import llama_cpp as llama_lib
from ..errors import SessionError
from ..files.modelfile import fingerprint
from ..native import api
from ..native.find import LLAMA_CPP_PYTHON_VERSION
from ..options import OPTIONS, CacheOptions
from ..runtime.cache import BoundedCache, Turn
from ..runtime.choice import INDEXER_POLICY, MEMORY_OFF
from ..runtime.inside import Inside
from ..runtime.kept_logits import KeptLogits
from ..runtime.notices import Notices
from .file import SessionData

CONTEXT_FIELDS = (
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

# keys of a header beside the names of options and of fields of the context
MODEL_NAME = "model name"  # for people
SIDECAR_NAME = "sidecar file"  # for people: what counts is the hash
REBASES = "rebases"  # times that positions were renewed; missing: saved before they were
KEPT = "kept"  # entries per KV head; missing, like the next two: saved before that was written down
PINNED = "pinned prefix"  # of the state, whatever was asked for
UBATCH = "n_ubatch"
BACKGROUND = "background"  # tokens at the beginning that are none of the conversation's own

AGAIN = "or have its text evaluated again: /load FILE --again in a chat, load_session(..., again=True) in Python"
CHOSEN = "one chosen from the budget"


@dataclass
class Talk:
    """The conversation that a `Llama` is in: what is saved, and what a loaded one takes the place of."""

    llm: Inside
    options: CacheOptions
    cache: Optional[BoundedCache]
    turn: Turn
    kept: KeptLogits
    notices: Notices
    loaded: Callable[[], str]  # fingerprint of the model: by now another file may lie there
    identity: dict[str, Any] = field(default_factory=dict)  # computed when it is first asked for


def identity(talk: Talk) -> dict[str, Any]:
    """All that must be equal for the KV state of one `Llama` to have meaning in another, by name."""
    if not talk.identity:
        llm = talk.llm.public
        talk.identity = {
            "llama.cpp": f"of llama-cpp-python {LLAMA_CPP_PYTHON_VERSION}",
            "model": talk.loaded() or fingerprint(llm.model_path),
            "lora": [fingerprint(llm.lora_path), llm.lora_scale] if llm.lora_path else None,
            **{name: getattr(llm.context_params, name) for name in CONTEXT_FIELDS},
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


def asked(talk: Talk) -> dict[str, Any]:
    """What the cache was asked for, by keyword, as far as a session says it."""
    slots = api.get_stats(talk.llm.ctx).memory_slots if talk.cache is not None else 0
    return {**talk.options.for_session(), "memory_slots": slots, "sidecar": sidecar_hash(talk)}


def header_of(talk: Talk) -> dict[str, Any]:
    """The header of a session of this conversation."""
    native = api.get_stats(talk.llm.ctx) if talk.cache is not None else None
    return {
        **identity(talk),
        **asked(talk),
        MODEL_NAME: str(talk.llm.public.metadata.get("general.name") or ""),
        SIDECAR_NAME: os.path.basename(talk.options.sidecar or ""),
        UBATCH: int(talk.llm.public.context_params.n_ubatch),
        REBASES: int(native.n_rebases) if native else 0,
        KEPT: int(native.n_kept) if native else talk.llm.n_tokens,
        PINNED: int(native.pin) if native else 0,
        BACKGROUND: len(talk.cache.background.tokens) if talk.cache is not None else 0,
    }


def require_model(talk: Talk, name: str, data: SessionData) -> None:
    """Raises SessionError unless the tokens of a session are those of this model, and fit into it."""
    ours, found = identity(talk)["model"], data.header.get("model")
    if ours != found:
        path = talk.llm.public.model_path
        raise SessionError(f"{name} was saved with another model file than {path}: load it with that one")
    n, n_vocab, n_ctx = len(data.tokens), talk.llm.n_vocab, talk.llm.n_ctx
    for tokens in (data.tokens, *(kept.tokens for kept in data.checkpoints)):
        if len(tokens) and not (0 <= int(tokens.min()) and int(tokens.max()) < n_vocab):
            raise SessionError(f"{name} is damaged: it has token ids outside the vocabulary of {n_vocab}")
    for logits, length in ((data.logits, n), *((kept.logits, len(kept.tokens)) for kept in data.checkpoints)):
        if logits is not None and (length == 0 or len(logits) != n_vocab):
            raise SessionError(f"{name} is damaged: it has logits of {len(logits)} tokens, and the vocabulary {n_vocab}")
    if n >= n_ctx:
        raise SessionError(f"{name} holds {n:,} tokens and n_ctx is {n_ctx:,}: give Llama a larger n_ctx")
    background = data.header.get(BACKGROUND, 0)
    if type(background) is not int or not 0 <= background <= n:
        raise SessionError(f"{name} is damaged: its background has {_shown(background)} of {n:,} tokens")


def require_state(talk: Talk, name: str, header: dict[str, Any]) -> None:
    """Raises SessionError if the state of a session has no meaning here, whatever is in it."""
    for key, value in identity(talk).items():
        found = header.get(key)
        if found == value or (found is None and key == "rope_factors"):  # saved before that was written down
            continue
        raise SessionError(
            f"{name} was saved with {key} = {_shown(found)}, this one has {_shown(value)}: "
            f"open the model with the options it was saved with, {AGAIN}"
        )
    budget = header.get("kv_budget") or 0
    if (talk.cache is None) != (budget == 0):
        what = f"kv_budget = {_shown(budget)}" if budget else "no kv_budget"
        ours = f"has kv_budget = {talk.options.budget:,}" if talk.cache is not None else "has none"
        raise SessionError(
            f"{name} was saved with {what}, this one {ours}, and the caches of both are laid out differently: "
            f"open the model {'with' if budget else 'without'} one, {AGAIN}"
        )
    if talk.cache is not None:
        _require_sidecar(talk, name, header)
    if header.get(REBASES):
        _require_span(talk, name)


def _require_sidecar(talk: Talk, name: str, header: dict[str, Any]) -> None:
    """An indexer ranks by scores of its own, and a memory with weights reads what these have written."""
    ours, found = sidecar_hash(talk), header.get("sidecar") or ""
    if not ours or ours == found:
        return
    options, policy = talk.options, header.get("kv_policy")
    this = _sidecar(ours, os.path.basename(options.sidecar or ""))
    if options.policy == INDEXER_POLICY and policy != INDEXER_POLICY:
        raise SessionError(
            f"{name} was saved with kv_policy = {_shown(policy)}, without the scores by which {this} ranks: leave it out with "
            f'--indexmem off (indexmem="off" in Python), {AGAIN}'
        )
    reads = options.memory not in (MEMORY_OFF, "centroid") and header.get("memory") == options.memory
    if options.policy == INDEXER_POLICY or reads:
        raise SessionError(
            f"{name} was saved with {_sidecar(found, header.get(SIDECAR_NAME))}, this one has {this}: "
            f"name that one with --indexmem FILE (indexmem= in Python), {AGAIN}"
        )


def _require_span(talk: Talk, name: str) -> None:
    """Positions that have been renewed can only go on being renewed: the text has outgrown them."""
    if talk.cache is None or api.get_stats(talk.llm.ctx).span > 0:
        return
    why = api.span_reason(talk.llm.ctx)
    mend = f"this one has none, because {why}" if why else "leave --kv-span 0 (kv_span=0 in Python) out"
    raise SessionError(f"{name} was saved after its positions had been renewed, and needs a span to go on: {mend}")


def asked_pin(talk: Talk, header: dict[str, Any]) -> Optional[int]:
    """The pinned prefix that a state is to get here; None: the one that it has."""
    if talk.options.auto_pin or header.get("kv_pin", talk.options.pin) == talk.options.pin:
        return None
    return talk.options.fixed_pin


def changes(talk: Talk, header: dict[str, Any]) -> str:
    """What is different now, for people; "" if nothing is that matters to them."""
    if talk.cache is None:
        return ""
    ours, native = asked(talk), api.get_stats(talk.llm.ctx)
    names = [option.keyword for option in OPTIONS.values() if option.keyword in ours and option.keyword not in ("kv_evict_step", "kv_seed")]
    other = [name for name in names if name in header and header[name] != ours[name]]
    if not other:
        return ""
    text = f"saved with {_list(other, header)}, continuing with {_list(other, ours, named=False)}"
    kept = header.get(KEPT)
    left = kept - native.n_kept if type(kept) is int else 0
    facts = [f"{left:,} entries per head were evicted"] if left > 0 else []
    if header.get("kv_policy") == INDEXER_POLICY != talk.options.policy:
        facts.append(f"the scores of {_plain(header.get(SIDECAR_NAME) or 'its sidecar')} are left out")
    if header.get("memory", MEMORY_OFF) != MEMORY_OFF and talk.options.memory == MEMORY_OFF:
        facts.append(f"the memory `{_plain(header['memory'])}` is forgotten")
    elif header.get("memory", MEMORY_OFF) == MEMORY_OFF and talk.options.memory != MEMORY_OFF:
        facts.append(f"the memory `{talk.options.memory}` begins empty")
    if (pin := asked_pin(talk, header)) is not None and native.pin < pin:
        facts.append(f"of the pinned prefix of {pin:,} tokens {native.pin:,} are still there")
    return text + (": " + ", ".join(facts) if facts else "")


def _list(names: list[str], values: dict[str, Any], named: bool = True) -> str:
    parts = [(f"{name} " if named else "") + (CHOSEN if _chosen(name, values[name]) else _plain(values[name])) for name in names]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _chosen(name: str, value: Any) -> bool:
    return name == OPTIONS["window"].keyword and type(value) is int and value == 0


def _plain(value: Any) -> str:
    """For a sentence; what could drive a terminal is escaped."""
    if type(value) is int:
        return f"{value:,}" if abs(value) < 1 << 64 else "a huge number"
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 80 else _shown(value)


def _sidecar(identity: Any, file: Any) -> str:
    return f"the sidecar {_shown(file or '')} ({_shown(identity)})" if identity else "no sidecar"


def _shown(value: Any) -> str:
    return repr(value)[:80]


def memory_position(llm: Inside) -> int:
    """Tokens that the native cache has seen."""
    return int(llama_lib.llama_memory_seq_pos_max(llm.memory, 0)) + 1
