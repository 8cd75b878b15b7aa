"""`Llama` with models of several kinds of layers: what a person does with it gives what a fresh one would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import Cancelled
from indexmem_edge.native import find
from support.cancelling import TOKENS, Nodes, chat, condition, generate, logits
from support.each_architecture import bounded_layers
from support.mixed import KINDS

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

each_kind = pytest.mark.parametrize("name", KINDS)
BUDGET = 96


def read_on(llm: Any) -> None:
    """More than a window holds."""
    llm.prefill([*llm._input_ids.tolist(), *TOKENS[300:700]])


CALLS = (read_on, generate, chat)


def load(tiny: Tiny, name: str, **options: Any) -> Any:
    defaults = dict(
        kv_budget=BUDGET, kv_window=33, kv_pin="auto", n_batch=48, n_ubatch=24, n_threads=1, n_threads_batch=1
    )
    return indexmem_edge.Llama(tiny(name)[0], verbose=False, seed=5, **{**defaults, **options})


def answer(llm: Any, prompt: list[int], n: int = 6) -> list[int]:
    return [token for _, token in zip(range(n), llm.generate(prompt, temp=0.0))]


def close(llm: Any, other: Any) -> None:
    """Windows lie elsewhere, and some tokens were evaluated in other batches: halfs are added in another order."""
    assert np.abs(logits(llm) - logits(other)).max() < 0.05 * logits(other).std()


@each_kind
def test_a_long_conversation(tiny: Tiny, name: str) -> None:
    """Turns that grow, an edit of the last, an answer again: each as a `Llama` gives it that has seen nothing else."""
    llm, fresh = load(tiny, name), load(tiny, name)
    edited = [*TOKENS[:85], 7, 8, 9]
    for prompt in (TOKENS[:40], TOKENS[:90], edited, edited, TOKENS[:30], [9, *TOKENS[:400]]):
        llm.prefill(prompt)
        fresh.reset()
        fresh.prefill(prompt)
        close(llm, fresh)
        answer(llm, prompt)
    stats = llm.kv_stats()
    assert stats.kept <= BUDGET and stats.kept + stats.evicted == stats.tokens_seen == llm.n_tokens


@each_kind
def test_what_is_told_of_the_cache(tiny: Tiny, name: str) -> None:
    llm, config = load(tiny, name), tiny(name)[1]
    llm.prefill(TOKENS[:300])
    assert [il for il, heads in llm.kv_snapshot().items() if heads] == bounded_layers(config)
    before = llm.kv_stats()
    llm.prefill(TOKENS[:600])
    after = llm.kv_stats()
    assert (before.kv_bytes, before.meta_bytes) == (after.kv_bytes, after.meta_bytes), "fixed"
    assert after.tokens_seen == 600 and after.kept <= BUDGET


@each_kind
@pytest.mark.parametrize("n", [50, 400])
def test_a_session_file(tiny: Tiny, name: str, n: int, tmp_path: Path) -> None:
    llm, twin = load(tiny, name), load(tiny, name)
    llm.prefill(TOKENS[:n])
    llm.save_session(tmp_path / "chat.session", extra={"n": n})
    twin.prefill(TOKENS[100:150])
    assert twin.load_session(tmp_path / "chat.session") == {"n": n}
    for start in range(n, n + 200, 25):
        for x in (llm, twin):
            x.eval(TOKENS[start : start + 25])
        assert np.abs(logits(llm) - logits(twin)).max() < 0.05 * logits(twin).std()


@each_kind
@pytest.mark.parametrize("seen,budget", [(40, 96), (300, 96), (300, 700)])
def test_a_cancelled_call_never_was(tiny: Tiny, name: str, seen: int, budget: int) -> None:
    """The last budget has room for all of it: then it is recurrent states and windows alone that cannot go back."""
    for call in CALLS:
        llm, twin, whole = (load(tiny, name, kv_budget=budget) for _ in range(3))
        for x in (llm, twin):
            x.prefill(TOKENS[:seen])
        before = condition(twin)
        whole.prefill(TOKENS[:seen])
        with Nodes(whole) as counter:
            call(whole)
        for share in (0.0, 0.8):
            with Nodes(llm, stop_after=1 + int(share * counter.count)) as nodes, pytest.raises(Cancelled):
                call(llm)
            assert nodes.heard
            assert condition(llm) == before
        for start in range(seen, seen + 200, 25):
            for x in (llm, twin):
                x.eval(TOKENS[start : start + 25])
            close(llm, twin)
        assert condition(llm) == condition(twin)
