"""`indexmem_edge.Llama` around the bounded cache: what is reused, re-evaluated, pinned, refused and survived."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import indexmem_edge
from indexmem_edge import BudgetError, BudgetExhausted, DecodeError, PolicyError, RequestError
from indexmem_edge.native import find

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

BUDGET, WINDOW = 160, 32
LONG = "The tide comes in and the tide goes out, and the old boat waits. " * 20
SYSTEM = {"role": "system", "content": "You are an old sailor who answers in one short sentence."}


def load(model: Path, **options: Any) -> Any:
    defaults = {"kv_budget": BUDGET, "kv_window": WINDOW, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    return indexmem_edge.Llama(str(model), **{**defaults, **options})


@pytest.fixture(scope="module")
def shared(demo_model: Path) -> Any:
    return load(demo_model, kv_pin="auto")


@pytest.fixture
def llm(shared: Any) -> Any:
    shared.reset()
    shared._cache.checkpoints.clear()
    return shared


def take(llm: Any, tokens: list[int], n: int = 4) -> list[int]:
    return [token for _, token in zip(range(n), llm.generate(tokens, temp=0.0))]


def say(llm: Any, messages: list[dict[str, Any]], n: int = 6) -> dict[str, Any]:
    answer = llm.create_chat_completion(messages, max_tokens=n, temperature=0.0)
    message: dict[str, Any] = answer["choices"][0]["message"]
    return message


@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"kv_budget": 32}, BudgetError, "at least 37"),
        ({"kv_budget": 100, "kv_pin": 90}, BudgetError, "at least 123"),
        ({"kv_budget": -1}, BudgetError, "from 0 to"),
        ({"kv_budget": "many"}, BudgetError, "whole number"),
        ({"kv_window": 1.5}, BudgetError, "kv_window"),
        ({"kv_pin": "maybe"}, BudgetError, "auto"),
        ({"kv_policy": "best"}, PolicyError, "expected, full, indexer, keydiff, knorm, random, snapkv, streaming, tova"),
        ({"embedding": True}, BudgetError, "embedding"),
        ({"flash_attn": False}, BudgetError, "flash_attn"),
        ({"draft_model": object()}, RequestError, "draft_model"),
    ],
)
def test_impossible_options(demo_model: Path, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        load(demo_model, **options)
    assert isinstance(caught.value, ValueError)


def test_n_ctx_is_only_logical(llm: Any) -> None:
    assert llm.n_ctx() == 1 << 21 and llm.context_params.n_ctx == 1 << 21
    assert llm.kv_stats().slots < 1 << 12 and llm._batch.n_seq_max == 1


def test_a_prompt_that_grows_costs_only_what_is_new(llm: Any) -> None:
    prompt = llm.tokenize(LONG.encode())
    assert llm.prefill(prompt) == len(prompt)
    more = prompt + llm.tokenize(b" And then")
    assert llm.prefill(more) == len(more) - len(prompt)
    stats = llm.kv_stats()
    assert (stats.turn_reused, stats.tokens_seen) == (len(prompt), len(more))
    assert stats.kept <= BUDGET and stats.kept + stats.evicted == stats.tokens_seen


def test_an_edit_before_anything_was_evicted_is_taken_back_exactly(llm: Any) -> None:
    before = llm.kv_stats().reevaluated
    prompt = llm.tokenize(LONG.encode())[:60]
    expected = take(llm, [*prompt[:50], 100, 200])
    llm.reset()
    llm.prefill(prompt)
    assert take(llm, [*prompt[:50], 100, 200]) == expected
    assert llm.kv_stats().turn_evaluated == 2 and llm.kv_stats().reevaluated == before


def test_an_edit_of_evicted_text_is_evaluated_again_and_said(llm: Any) -> None:
    before = llm.kv_stats().reevaluated
    prompt = llm.tokenize(LONG.encode())
    edited = [*prompt[:20], 100, *prompt[20:]]
    expected = take(llm, edited)
    llm.reset()
    llm._cache.checkpoints.clear()
    llm.prefill(prompt)
    assert take(llm, edited) == expected
    stats = llm.kv_stats()
    assert stats.turn_evaluated == len(edited) and stats.reevaluated == before + 20
    assert "token 20" in stats.reevaluated_reason


def test_the_same_prompt_again_samples_the_same(llm: Any) -> None:
    prompt = llm.tokenize(LONG.encode())
    first = take(llm, prompt, 1)
    assert take(llm, prompt, 1) == first and llm.kv_stats().turn_evaluated == 0


def test_history_moved_by_hand_is_repaired(llm: Any) -> None:
    prompt = llm.tokenize(LONG.encode())
    llm.prefill(prompt)
    llm.n_tokens = 200
    llm.eval([100])
    assert llm.kv_stats().tokens_seen == 201 and llm._input_ids.tolist() == [*prompt[:200], 100]
    llm._ctx.kv_cache_clear()
    llm.eval([101])
    assert llm.kv_stats().tokens_seen == 202


def test_chat_turns_reuse_the_cache_through_evictions(llm: Any) -> None:
    messages, before = [SYSTEM], llm.kv_stats().reevaluated
    for question in ("What is the sea?", "And the wind?", "And the stars?", "And the moon?", "And the boat?"):
        seen = llm.kv_stats().tokens_seen
        messages.append({"role": "user", "content": question})
        messages.append(say(llm, messages, 24))
        assert llm.kv_stats().turn_reused == seen
    stats = llm.kv_stats()
    assert stats.evicted > 0 and stats.reevaluated == before


def test_an_answer_in_other_tokens_than_the_tokenizer_would_cut(llm: Any) -> None:
    """The model's own spelling stays in the cache."""
    messages = [SYSTEM, {"role": "user", "content": "Spell it."}]
    llm.create_chat_completion(messages, max_tokens=1)
    spelled = [llm.tokenize(letter.encode(), add_bos=False)[0] for letter in "seashore"]
    llm.eval(spelled)
    seen = llm.n_tokens
    text = llm.detokenize(llm._input_ids.tolist(), special=True).decode()
    answer = text.rpartition("<|im_start|>assistant\n")[2]
    say(llm, [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "Thanks"}])
    assert llm.kv_stats().turn_reused == seen


def test_the_system_prompt_is_pinned(llm: Any) -> None:
    say(llm, [SYSTEM, {"role": "user", "content": LONG}])
    pin = llm.kv_stats().pin
    text = llm.detokenize(llm._input_ids[:pin].tolist(), special=True).decode()
    assert SYSTEM["content"] in text and "tide" not in text
    heads = [head for layer in llm.kv_snapshot().values() for head in layer]
    assert all(np.array_equal(head[:pin], np.arange(pin)) for head in heads)
    assert llm.kv_stats().evicted > 0
    say(llm, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    assert llm.kv_stats().pin < pin  # a new conversation, a new pin


def test_a_system_prompt_without_room_names_the_numbers(llm: Any) -> None:
    with pytest.raises(BudgetError, match=r"kv_budget 160 .* the system prompt of \d+"):
        say(llm, [{"role": "system", "content": LONG}, {"role": "user", "content": "Hello"}])


def test_snapshot_and_stats_agree(llm: Any) -> None:
    llm.prefill(llm.tokenize(LONG.encode()))
    stats, snapshot = llm.kv_stats(), llm.kv_snapshot()
    assert set(snapshot) == set(range(30)) and all(len(heads) == 3 for heads in snapshot.values())
    for heads in snapshot.values():
        for held in heads:
            assert held.dtype == np.int32 and np.all(np.diff(held) > 0)
            assert held[:4].tolist() == [0, 1, 2, 3] and held[-1] == stats.tokens_seen - 1
    kept = sorted(len(held) for heads in snapshot.values() for held in heads)
    assert kept == sorted(layers.kept for layers in stats.layers for _ in range(layers.heads))
    assert stats.kept == -(-sum(kept) // len(kept))
    assert stats.to_dict()["kept"] == stats.kept and "evicted" in str(stats)


def test_a_document_read_ahead_costs_nothing_when_asked_about(llm: Any) -> None:
    document = {"role": "user", "content": LONG}
    calls: list[tuple[int, int]] = []
    n = llm.prefill_chat([SYSTEM, document], lambda done, total: calls.append((done, total)))
    assert n > 300 and calls[-1] == (n, n)
    say(llm, [SYSTEM, {"role": "user", "content": f"{LONG}\n\nWhat does the boat do?"}])
    assert llm.kv_stats().turn_evaluated < 25


def test_json_mode_and_streaming(llm: Any) -> None:
    messages = [{"role": "user", "content": "A cat as JSON"}]
    answer = llm.create_chat_completion(messages, response_format={"type": "json_object"}, max_tokens=4)
    assert answer["choices"][0]["message"]["content"].lstrip().startswith("{")
    whole = say(llm, messages, 8)["content"]
    pieces = llm.create_chat_completion(messages, max_tokens=8, temperature=0.0, stream=True)
    assert "".join(p["choices"][0]["delta"].get("content") or "" for p in pieces) == whole


def test_an_interrupt_leaves_a_cache_that_can_go_on(llm: Any) -> None:
    prompt = llm.tokenize(LONG.encode()) * 4

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = llm.kv_stats().reevaluated
    with pytest.raises(KeyboardInterrupt):
        llm.prefill(prompt, stop)
    assert 0 < llm.n_tokens < len(prompt) and llm.kv_stats().tokens_seen == llm.n_tokens
    reached = llm.n_tokens
    assert llm.prefill(prompt) == len(prompt) - reached and llm.kv_stats().reevaluated == before


def test_full_runs_out_and_stays_usable(demo_model: Path) -> None:
    llm = load(demo_model, kv_policy="full")
    prompt = llm.tokenize(LONG.encode())
    llm.prefill(prompt[:100])
    with pytest.raises(BudgetExhausted, match="`full` never evicts"):
        llm.prefill(prompt)
    assert llm.n_tokens == 100 and llm.kv_stats().kept == 100
    llm.eval(prompt[100:120])
    assert llm.kv_stats().kept == 120


def test_logits_all_keeps_as_many_as_n_ctx(demo_model: Path) -> None:
    llm = load(demo_model, logits_all=True, n_ctx=256)
    answer = llm.create_completion("The capital of France is", max_tokens=2, logprobs=1, temperature=0.0)
    assert answer["choices"][0]["logprobs"]["tokens"][0] == " Paris"
    with pytest.raises(DecodeError, match="n_ctx is 256"):
        llm.eval([100] * 256)


def test_states_and_pickles(llm: Any) -> None:
    prompt = llm.tokenize(LONG.encode())
    llm.prefill(prompt)
    state = llm.save_state()
    assert len(state.input_ids) == len(prompt) and len(llm.input_ids) == 1 << 21
    expected = take(llm, [*prompt, 100])
    llm.load_state(state)
    assert take(llm, [*prompt, 100]) == expected and len(llm.input_ids) == 1 << 21
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.kv_options == llm.kv_options and copy.n_ctx() == llm.n_ctx()


def test_without_a_budget_nothing_is_different(demo_model: Path) -> None:
    llm = load(demo_model, kv_budget=None, kv_window=None, n_ctx=512)
    answer = llm.create_completion("The capital of France is", max_tokens=2, temperature=0.0)
    assert "Paris" in answer["choices"][0]["text"]
    stats = llm.kv_stats()
    assert (
        stats.policy == "unbounded" and stats.budget_now == 0 and stats.evicted == 0 and stats.kept == stats.tokens_seen
    )
    assert stats.kv_bytes == 512 * 30 * 2 * 3 * 64 * 2
    with pytest.raises(BudgetError, match="kv_budget"):
        llm.kv_snapshot()
