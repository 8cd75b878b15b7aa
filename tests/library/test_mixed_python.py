"""`Llama` with models of several kinds of layers: bytes of each part, and what is said when there is no way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import indexmem_edge
from conftest import Tiny
from indexmem_edge import Cancelled, DecodeError, llama_cpp
from indexmem_edge.native import api, find
from support.architectures import BOUNDED, TABLE
from support.cancelling import TOKENS, Nodes, held, logits, same_from_here

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

KINDS = ("qwen35", "falcon-h1", "gemma3", "gpt-oss", "gemma4-shared", "kimi-linear")  # one of each
each = pytest.mark.parametrize("name", KINDS)
NO_WAY = {True: "recurrent layers have no way back", False: "left a window"}
OTHER = [t + 1 for t in TOKENS[::-1]]
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def load(tiny: Tiny) -> Load:
    """load(name, **options) -> Llama"""

    def make(name: str, **options: Any) -> Any:
        given = {"kv_budget": 96, "kv_window": 33, "n_batch": 48, "n_ubatch": 24, **options}
        if given["kv_budget"] is None:
            del given["kv_window"]
        threads = {"n_threads": 1, "n_threads_batch": 1}
        return indexmem_edge.Llama(tiny(name)[0], seed=5, verbose=False, **threads, **given)

    return make


def load_read(load: Load, name: str, n: int, **options: Any) -> Any:
    llm = load(name, **options)
    llm.prefill(TOKENS[:n])
    return llm


def fresh(load: Load, name: str, tokens: list[int], **options: Any) -> np.ndarray:
    llm = load(name, **options)
    llm.prefill(tokens)
    return logits(llm)


@pytest.mark.parametrize("name", [name for name in BOUNDED if name not in ("exaone4", "gemma3n-shared")])
def test_bytes_of_each_part(load: Load, name: str) -> None:
    llm = load(name)
    before = llm.kv_stats()
    llm.prefill(TOKENS[:200])
    stats = llm.kv_stats()
    assert stats.evicted > 0 and stats.kv_bytes > 0
    for part in ("kv_bytes", "window_bytes", "recurrent_bytes"):
        assert getattr(stats, part) == getattr(before, part) == stats.to_dict()[part]
    steps = TABLE[name].steps
    assert (stats.window_bytes > 0, stats.recurrent_bytes > 0) == ("window" in steps, "hybrid" in steps)
    assert ("window caches" in str(stats), "recurrent states" in str(stats)) == ("window" in steps, "hybrid" in steps)
    state = stats.meta_bytes if "recurrent" not in str(stats) else 0
    assert stats.cache_bytes == stats.kv_bytes + stats.window_bytes + stats.recurrent_bytes
    assert stats.cache_bytes <= api.cache_bytes(llm.ctx) <= stats.cache_bytes + stats.meta_bytes + state
    assert f"KV {indexmem_edge.stats.format_bytes(stats.cache_bytes)}" in stats.line()


@pytest.mark.parametrize("name", ["llama", *KINDS])
def test_bytes_without_a_budget(load: Load, tiny: Tiny, name: str) -> None:
    """As large as the context, of recurrent layers as large as one state."""
    config = tiny(name)[1]
    sizes = [load(name, kv_budget=None, n_ctx=n).kv_stats().kv_bytes for n in (512, 1024)]
    with_cache = config.full_layers if name != "llama" and TABLE[name].recurrent else range(config.n_layer - config.shared_layers)
    rows = sum(map(sum, (api.model_rows(load(name).model)[il] for il in with_cache)))
    assert sizes[1] - sizes[0] == 512 * rows * 2
    assert (sizes[0] > 512 * rows * 2) == (name != "llama" and TABLE[name].recurrent)


@each
def test_a_prompt_that_departs(load: Load, name: str) -> None:
    """A tail that can be taken out is; where it cannot, everything is evaluated again, and the reason is said."""
    llm = load(name)
    llm.prefill(TOKENS[:60])
    other = [*TOKENS[:50], *OTHER[:15]]
    llm.prefill(other)
    stats, recurrent = llm.kv_stats(), TABLE[name].recurrent
    assert stats.reevaluated == (2 if recurrent else 0)  # behind the checkpoint
    assert np.allclose(logits(llm), fresh(load, name, other), atol=1e-2)
    if not recurrent:
        llm.prefill(TOKENS[:400])
        llm.prefill([*TOKENS[:390], *OTHER[:20]])
        stats = llm.kv_stats()
        assert stats.reevaluated > 0
    else:
        llm.prefill([*TOKENS[:20], *OTHER[:20]])  # too early
        assert llm.kv_stats().reevaluated == 2 + 20
    assert stats.reevaluated_reason.endswith(NO_WAY[recurrent])


@pytest.mark.parametrize("name", [name for name in KINDS if TABLE[name].recurrent])
def test_another_answer_reads_the_end_of_the_prompt_only(load: Load, name: str) -> None:
    """And so does a next prompt that leaves out what the model thought in its answer."""
    llm = load(name)
    prompt = TOKENS[:300]
    first = [token for _, token in zip(range(20), llm.generate(prompt, temp=0.0))]
    again = [token for _, token in zip(range(20), llm.generate(prompt, temp=0.0))]
    assert first == again and llm.kv_stats().turn_evaluated == 0
    longer = [*prompt, *first[10:], *OTHER[:60]]
    list(zip(range(20), llm.generate(longer, temp=0.0)))
    assert llm.kv_stats().reevaluated <= 64 and llm.kv_stats().turn_evaluated <= 32 + 10 + 60
    llm.prefill([*longer[:-1], 9])
    twin = load(name)
    twin.prefill([*longer[:-1], 9])
    assert np.corrcoef(logits(llm), logits(twin))[0, 1] > 0.9  # other batches have evicted other entries
    assert llm.kv_stats().cancel_bytes > 0
    assert load(name, kv_checkpoints=0)._cache.checkpoints.limit == 0


@each
def test_the_history_is_cut_by_hand(load: Load, name: str) -> None:
    llm = load(name)
    llm.prefill(TOKENS[:300])
    llm.n_tokens = 200
    llm.eval(TOKENS[300:310])
    stats = llm.kv_stats()
    assert (llm.n_tokens, stats.tokens_seen, stats.reevaluated) == (210, 210, 200)
    assert stats.reevaluated_reason.endswith(NO_WAY[TABLE[name].recurrent])


@each
def test_a_cancelled_call_without_a_copy(load: Load, name: str) -> None:
    """Nothing is left, and the next call reads the history again."""
    options: dict[str, Any] = {"kv_cancel": False, "kv_checkpoints": 0}
    llm = load(name, **options)
    for n in (60, 200):  # before something is evicted, and after
        llm.prefill(TOKENS[:n])
        uncancelled = load_read(load, name, n, **options)
        with Nodes(uncancelled) as whole:
            uncancelled.prefill(TOKENS[: n + 96])
        for share in (0.0, 0.35, 0.9):
            with Nodes(llm, stop_after=max(1, int(share * whole.count))) as counted, pytest.raises(Cancelled):
                llm.prefill(TOKENS[: n + 96])
            assert counted.heard
            assert llm._input_ids.tolist() == TOKENS[:n] and llm._cache.length() == 0
            assert llm.kv_stats().reevaluated_reason.startswith("a call was cancelled")
            llm.prefill(TOKENS[:n])
    same_from_here(llm, load_read(load, name, 200, **options), 90)


@each
def test_evaluating_fails_in_the_middle(load: Load, name: str) -> None:
    """Not by a cancel: what has become useless is that of the end of the prompt again, or near it."""
    llm = load(name)
    llm.prefill(TOKENS[:200])

    @llama_cpp.ggml_abort_callback
    def stop(_: Any) -> bool:
        return True

    llama_cpp.llama_set_abort_callback(llm.ctx, stop, None)
    with pytest.raises(DecodeError):
        llm.eval(TOKENS[200:230])
    llm._calls.attach()
    assert llm._input_ids.tolist() == TOKENS[:200]
    llm.eval(TOKENS[200:230])
    stats = llm.kv_stats()
    assert (stats.tokens_seen, stats.reevaluated) == (230, 0)
    assert "interrupted" in stats.reevaluated_reason
    twin = load_read(load, name, 200)
    twin.eval(TOKENS[200:230])
    assert np.array_equal(logits(llm), logits(twin)) and held(llm, False) == held(twin, False)


@pytest.mark.parametrize("name", ["llama", *KINDS, "gemma3-window"])
def test_a_prompt_that_departs_without_a_budget(load: Load, name: str) -> None:
    """llama.cpp's own cache cannot always take tokens out, either."""
    for more in ({}, {"swa_full": False}):
        llm = load(name, kv_budget=None, n_ctx=1024, **more)
        llm.prefill(TOKENS[:400])
        other = [*TOKENS[:100], *OTHER[:20]]
        llm.prefill(other)
        assert np.allclose(logits(llm), fresh(load, name, other, kv_budget=None, n_ctx=1024), atol=1e-2)
