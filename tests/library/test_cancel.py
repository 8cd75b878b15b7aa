"""`Llama.cancel()`: the call in progress stops, and the conversation is bit for bit what it was before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import indexmem_edge
from indexmem_edge import Cancelled
from indexmem_edge.native import find
from support.cancelling import (
    KINDS,
    TOKENS,
    Load,
    Nodes,
    chat,
    chat_stream,
    complete,
    condition,
    each_kind,
    evaluate,
    generate,
    load,
    prefill,
    read,
    same_from_here,
)  # fmt: skip

__all__ = ["load"]  # a fixture

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

APPENDING = [evaluate, prefill, generate, complete]
REPLACING = [chat, chat_stream, read]


@each_kind
@pytest.mark.parametrize("n_before", [0, 40, 300], ids=lambda n: f"after{n}")
@pytest.mark.parametrize("work", APPENDING, ids=lambda work: work.__name__)
def test_whatever_is_stopped_anywhere_has_not_happened(load: Load, kind: str, work: Any, n_before: int) -> None:
    llm, twin, uncancelled = load(kind), load(kind), load(kind)
    for other in (llm, twin, uncancelled):
        other.prefill(TOKENS[:n_before])
    before = condition(llm)
    with Nodes(uncancelled) as whole:
        work(uncancelled)
    for share in (0.0, 0.35, 0.7, 1.0):
        with Nodes(llm, stop_after=max(1, int(share * whole.count))) as nodes, pytest.raises(Cancelled) as caught:
            work(llm)
        assert nodes.heard and "as it was before" in str(caught.value)
        assert nodes.count == max(1, int(share * whole.count))  # not one node more
        assert condition(llm) == before
    same_from_here(llm, twin)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unbounded"])
@pytest.mark.parametrize("n_before", [0, 40, 300], ids=lambda n: f"after{n}")
@pytest.mark.parametrize("work", REPLACING, ids=lambda work: work.__name__)
def test_a_stopped_call_gives_back_the_text_that_it_replaced(load: Load, kind: str, work: Any, n_before: int) -> None:
    test_whatever_is_stopped_anywhere_has_not_happened(load, kind, work, n_before)


@each_kind
def test_nothing_is_printed_by_a_call_that_is_stopped(load: Load, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    llm = load(kind)
    capfd.readouterr()
    with Nodes(llm, stop_after=3), pytest.raises(Cancelled):
        prefill(llm)
    assert capfd.readouterr() == ("", "")


def test_the_demo_model_with_its_indexer(demo_model: Path) -> None:
    """An answer that was cancelled and asked for again is the answer of a program that never cancelled."""
    from indexmem_edge.models.demo import demo_sidecar

    threads = {"n_threads": 1, "n_threads_batch": 1}
    options = {"kv_budget": 256, "kv_window": 32, "kv_pin": "auto", "indexmem": demo_sidecar(), "seed": 3, **threads}
    llm, twin = (indexmem_edge.Llama(demo_model, verbose=False, **options) for _ in range(2))
    messages = [{"role": "system", "content": "You are a sailor."}]
    messages.append({"role": "user", "content": "The tide comes in. " * 60})
    for other in (llm, twin):
        answer = other.create_chat_completion(messages, max_tokens=4, temperature=0.0)["choices"][0]["message"]
    messages += [answer, {"role": "user", "content": "And what does the wind do, when the tide has gone out again?"}]
    before = condition(llm)
    assert before["stats"]["evicted"] > 0
    for chunks in (1, 6):
        stream = llm.create_chat_completion(messages, max_tokens=40, temperature=0.7, stream=True)
        assert [next(stream) for _ in range(chunks)] and llm.cancel()
        with pytest.raises(Cancelled):
            next(stream)
        assert condition(llm) == before
    said = [other.create_chat_completion(messages, max_tokens=40, temperature=0.7)["choices"] for other in (llm, twin)]
    assert said[0] == said[1] and condition(llm)["positions"] == condition(twin)["positions"]


@each_kind
@pytest.mark.parametrize("options", [{"temp": 0.0}, {"temp": 0.9, "repeat_penalty": 1.3}], ids=["greedy", "drawn"])
def test_a_prompt_that_has_been_read_is_not_read_again(load: Load, kind: str, options: dict[str, Any]) -> None:
    """The logits after its last token are gone with the cancelled answer, and have been kept."""
    llm, twin = load(kind), load(kind)
    for other in (llm, twin):
        other.prefill(TOKENS[:300])
    for nodes in (1, 900):
        with Nodes(llm, stop_after=nodes), pytest.raises(Cancelled):
            list(zip(range(200), llm.generate(TOKENS[:300], **options)))
    answers = [[token for token, _ in zip(other.generate(TOKENS[:300], **options), range(30))] for other in (llm, twin)]
    assert answers[0] == answers[1] and len(set(answers[0])) > 3
    stats = llm.kv_stats()
    assert (stats.reevaluated, stats.turn_evaluated) == (0, twin.kv_stats().turn_evaluated)
