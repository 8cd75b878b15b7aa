"""llama.cpp's own cache, which keeps everything, driven and counted like a bounded one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np

from .._vendor.llama_cpp import llama_cpp as llama_lib
from ..errors import DecodeError, LibraryError
from ..native import api
from ..stats import KVStats
from .align import common_prefix
from .cache import Turn, common_counts
from .inside import Inside


def stats(llm: Inside, turn: Turn) -> KVStats:
    """The counts of `BoundedCache.stats` for llama.cpp's own cache, which keeps everything."""
    n = llm.n_tokens - llm.unsure
    return KVStats(
        policy="unbounded",
        budget=0,
        tokens_seen=n,
        kept=n,
        evicted=0,
        kv_bytes=_bytes(llm),
        slots=llm.n_ctx,
        **common_counts(llm, turn, n, n, 0, "only a cache with a kv_budget renews them"),
    )


def _bytes(llm: Inside) -> Optional[int]:
    """Keys, values and states of llama.cpp's own cache; None if somebody's own library does not say."""
    try:
        return api.cache_bytes(llm.ctx)
    except LibraryError:
        return None


def make_room(llm: Inside) -> None:
    """llama.cpp rounds n_ctx up, and llama_cpp lets a history become as long, but not the arrays that it keeps it in."""
    if len(llm.tokens) < llm.n_ctx:
        llm.tokens = np.empty(llm.n_ctx, dtype=np.intc)
        if llm.logits_all:
            llm.scores = np.empty((llm.n_ctx, llm.n_vocab), dtype=np.single)


def evaluate_drafts(llm: Inside, tokens: Sequence[int]) -> None:
    """Evaluates a token and the drafts behind it, with the logits after each: llama_cpp keeps those of a whole text for that."""
    past, end = llm.n_tokens, llm.n_tokens + len(tokens)
    if code := llm.decode(tokens, past, every=True):
        raise DecodeError(f"evaluating {len(tokens):,} tokens after {past:,} failed with code {code}")
    llm.tokens[past:end] = tokens
    llm.n_tokens, llm.fresh = end, True


def rewind(llm: Inside, target: int) -> None:
    """Takes the tokens from `target` on out of llama.cpp's own cache; if that cannot be done exactly, empties it."""
    memory, n_swa = llm.memory, llama_lib.llama_model_n_swa(llm.model)
    first = llama_lib.llama_memory_seq_pos_min(memory, 0)  # layers with a window may have overwritten what it needs
    exact = n_swa == 0 or first <= max(0, target - n_swa)
    if not exact or not llama_lib.llama_memory_seq_rm(memory, 0, target, -1):
        target = 0
        llama_lib.llama_memory_clear(memory, True)
    llm.fresh = llm.fresh and target == llm.n_tokens
    llm.n_tokens = target


def reuse(llm: Inside, turn: Turn, tokens: Sequence[int]) -> list[int]:
    """Like `BoundedCache.reuse`, for llama.cpp's own cache."""
    if len(tokens) > llm.n_ctx:
        raise DecodeError(
            f"the prompt has {len(tokens):,} tokens and n_ctx is {llm.n_ctx:,}: raise n_ctx, or use kv_budget"
        )
    prompt = list(tokens)
    rewind(llm, min(common_prefix(llm.history, prompt), max(len(prompt) - 1, 0)))
    turn.begin(len(prompt), len(prompt) - llm.n_tokens)
    return prompt[llm.n_tokens :]
