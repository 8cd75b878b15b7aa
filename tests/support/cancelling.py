"""What the tests of `Llama.cancel()` share: caches of every kind, calls, and a way to stop them after any node."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import llama_cpp
from reference.indexers import random_indexer, write_sidecar

BUDGET, WINDOW, BATCH = 96, 33, 48
SPAN = BUDGET + BATCH // 2 + 40
TOKENS = [3 + (7 * i * i + 5 * i) % 250 for i in range(900)]
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the sea? " * 12}]
KINDS: dict[str, dict[str, Any]] = {
    "streaming": {},
    "keydiff": {"kv_policy": "keydiff"},
    "snapkv": {"kv_policy": "snapkv"},  # keeps a ring of queries
    "ratio": {"kv_policy": "tova", "kv_budget_ratio": 0.5},
    "centroid": {"memory": "centroid", "memory_slots": 16},
    "span": {"kv_policy": "snapkv", "kv_span": SPAN},  # positions are renewed
    "span-centroid": {"memory": "centroid", "memory_slots": 16, "kv_span": SPAN},
    "full": {"kv_policy": "full", "kv_budget": 1000},
    "retention-mlp": {"indexmem": "retention-mlp"},  # tokens wait to be scored
    "pairwise-mean": {"indexmem": "pairwise-mean"},  # and a ring of queries
    "unbounded": {"kv_budget": None, "n_ctx": 1024},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def load(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """load(kind, **options) -> Llama"""
    model, config = tiny("llama")
    folder = tmp_path_factory.mktemp("sidecars")

    def make(kind: str, **options: Any) -> Any:
        given = {"kv_budget": BUDGET, "kv_window": WINDOW, "kv_pin": "auto", "kv_checkpoints": 0, **KINDS[kind], **options}
        if given["kv_budget"] is None:
            del given["kv_window"], given["kv_pin"]
        if "indexmem" in given:
            path = folder / f"{kind}.gguf"
            write_sidecar(path, random_indexer(kind, config.n_layer, config.n_embd, config.n_head_kv, 0))
            given["indexmem"] = path
        threads = {"n_threads": 1, "n_threads_batch": 1}
        return indexmem_edge.Llama(model, n_batch=BATCH, n_ubatch=BATCH // 2, seed=5, verbose=False, **threads, **given)

    return make


class Nodes:
    """Counts the nodes that a `Llama` computes, and cancels after one of them, before anything else can happen."""

    def __init__(self, llm: Any, stop_after: int = 0) -> None:
        self.count, self.heard = 0, False
        self._llm = llm

        @llama_cpp.ggml_abort_callback
        def after_node(_: Any) -> bool:
            self.count += 1
            if self.count == stop_after:
                self.heard = llm.cancel()
            return 0 < stop_after <= self.count

        self._callback = after_node

    def __enter__(self) -> Nodes:
        llama_cpp.llama_set_abort_callback(self._llm.ctx, self._callback, None)
        return self

    def __exit__(self, *_: object) -> None:
        self._llm._calls.attach()


def condition(llm: Any) -> dict[str, Any]:
    """All that a person can find out about a conversation, but not what it cost."""
    stats = llm.kv_stats().to_dict()
    costs = ("evict_seconds", "rebase_seconds", "checkpoints", "compute_bytes", "work_bytes")
    for cost in (*costs, "cancel_bytes", "cancel_device_bytes", "checkpoint_bytes", "checkpoint_device_bytes"):
        del stats[cost]
    stats["fresh"] = llm.n_tokens > 0 and not llm._requires_eval
    found = {"tokens": llm._input_ids.tolist(), "stats": stats, "turn": copy.copy(llm._turn), "seed": llm._seed}
    if llm._cache is not None:
        found |= {"positions": [held(llm, False), held(llm, True)], "wanted": llm._cache.wanted_pin, "native": llm._cache.length()}
    return found


def held(llm: Any, rotary: bool) -> dict[int, list[list[int]]]:
    return {layer: [head.tolist() for head in heads] for layer, heads in llm.kv_snapshot(rotary=rotary).items()}


def logits(llm: Any) -> np.ndarray:
    """After the last token: those that the next one is drawn from."""
    if llm._kept:
        return llm._kept.now()
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


def same_from_here(llm: Any, twin: Any, n: int = 300) -> None:
    """Both go on in the same way, through many evictions: same logits, same entries."""
    for start in range(llm.n_tokens, llm.n_tokens + n, 30):
        more = TOKENS[start + 1 : start + 31]
        for other in (llm, twin):
            other.eval(more[:29])
            other.eval(more[29:])
        assert np.array_equal(logits(llm), logits(twin))
    assert condition(llm)["tokens"] == condition(twin)["tokens"]
    if llm._cache is not None:
        assert condition(llm)["positions"] == condition(twin)["positions"]


def prefill(llm: Any) -> None:
    llm.prefill([*llm._input_ids.tolist(), *TOKENS[400 : 400 + 5 * BATCH]])


def evaluate(llm: Any) -> None:
    llm.eval(TOKENS[400 : 400 + BATCH])


def generate(llm: Any) -> None:
    for _, _ in zip(range(90), llm.generate([*llm._input_ids.tolist(), *TOKENS[400:410]], temp=0.9)):
        pass


def complete(llm: Any) -> None:
    llm.create_completion([*llm._input_ids.tolist(), *TOKENS[400:410]], max_tokens=60, logit_bias={2: -100.0})


def chat(llm: Any) -> None:
    """Another conversation: the cached text is replaced, and the pin set anew."""
    llm.create_chat_completion(QUESTION, max_tokens=40, temperature=0.8, logit_bias={2: -100.0})


def chat_stream(llm: Any) -> None:
    for _ in llm.create_chat_completion(QUESTION, max_tokens=40, temperature=0.8, stream=True):
        pass


def read(llm: Any) -> None:
    llm.prefill_chat(QUESTION)
