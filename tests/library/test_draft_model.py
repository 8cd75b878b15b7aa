"""`Llama` with a draft model: the same tokens, and no trace of what was guessed wrong, whoever looks and whenever it ends."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexmem_edge import Cancelled, Llama, ModelNotSupported, RequestError, llama_cpp
from indexmem_edge.runtime import drafts
from indexmem_edge.runtime.drafts import Drafts
from support.cancelling import Nodes

LlamaDraftModel = llama_cpp.llama_speculative.LlamaDraftModel
LlamaPromptLookupDecoding = llama_cpp.llama_speculative.LlamaPromptLookupDecoding

TEXT = "The ferry leaves the old harbour at nine and comes back at noon. It carries letters, apples and a brass lantern. "
QUESTION = [{"role": "user", "content": f"Repeat word for word: {TEXT * 3}"}]
# A prompt is read in the same parts each time, and without a budget by an attention that adds up many rows as it does one: otherwise
# logits are rounded in another way, and a near tie becomes another word, with drafts or without.
ALONE: dict[str, Any] = dict(n_threads=1, n_threads_batch=1, verbose=False, flash_attn=True)
OPTIONS: dict[str, Any] = dict(kv_policy="streaming", indexmem="off", kv_window=32, n_ubatch=64, kv_checkpoints=0, **ALONE)
N = 70


class Known(LlamaDraftModel):
    """Guesses what comes after a prompt because it has been told, with mistakes: the i-th draft is right up to `right[i]` tokens."""

    def __init__(self, text: list[int], right: list[int], n: int = 8) -> None:
        self.text, self.right, self.n, self.asked = text, right, n, 0

    def __call__(self, input_ids: np.ndarray, /, **kwargs: Any) -> np.ndarray:
        assert input_ids.tolist() == self.text[: len(input_ids)], "what was guessed wrong is still there"
        right = self.right[self.asked % len(self.right)]
        self.asked += 1
        guess = self.text[len(input_ids) : len(input_ids) + self.n]
        return np.array([t if i < right else t + 1 for i, t in enumerate(guess)], dtype=np.intc)


@pytest.fixture(scope="module", params=[130, 0], ids=["budget", "unbounded"])
def llm(demo_model: Path, request: pytest.FixtureRequest) -> Iterator[Llama]:
    options = {**OPTIONS, "kv_budget": request.param} if request.param else {"n_ctx": 1024, **ALONE}
    with Llama(demo_model, **options) as made:
        yield made


@pytest.fixture(scope="module")
def plain(llm: Llama) -> tuple[list[int], list[int]]:
    """A prompt, and what comes after it without drafts."""
    asked: Any = llm.create_chat_completion(QUESTION, max_tokens=1)
    prompt = llm.input_ids[: asked["usage"]["prompt_tokens"]].tolist()
    llm.reset()
    return prompt, taken(llm, prompt)


def taken(llm: Llama, prompt: list[int], n: int = N) -> list[int]:
    return list(itertools.islice(llm.generate(prompt, temp=0.0, repeat_penalty=1.0), n))


def counts(llm: Llama) -> tuple[Any, ...]:
    stats = llm.kv_stats()
    held = {layer: [h.tolist() for h in heads] for layer, heads in llm.kv_snapshot().items()} if stats.budget else {}
    return stats.tokens_seen, stats.kept, stats.evicted, stats.evictions, stats.turn_generated, held


@pytest.fixture(autouse=True)
def no_draft_model(llm: Llama) -> Iterator[None]:
    llm.reset()
    yield
    llm.draft_model = None


def test_prompt_lookup_changes_no_word(llm: Llama, plain: tuple[list[int], list[int]]) -> None:
    prompt, expected = plain
    llm.draft_model = LlamaPromptLookupDecoding()
    assert taken(llm, prompt) == expected
    if llm.kv_stats().budget:
        assert llm.kv_stats().evictions > 2
    text: Any = llm.create_chat_completion(QUESTION, max_tokens=N, temperature=0.0, repeat_penalty=1.0)
    llm.draft_model = None
    again: Any = llm.create_chat_completion(QUESTION, max_tokens=N, temperature=0.0, repeat_penalty=1.0)
    assert text["choices"][0]["message"] == again["choices"][0]["message"]


@pytest.mark.parametrize("right", [[0], [8], [3, 0, 5, 1, 8, 2, 7, 4, 6]], ids=["all wrong", "all right", "every length"])
def test_drafts_of_any_length(llm: Llama, plain: tuple[list[int], list[int]], right: list[int]) -> None:
    prompt, expected = plain
    assert taken(llm, prompt) == expected
    without = counts(llm)
    llm.reset()
    llm.draft_model = model = Known(prompt + expected, right)  # type: ignore[assignment]
    assert taken(llm, prompt) == expected
    assert model.asked < N / 3 if right == [8] else model.asked > 0
    assert counts(llm) == without and llm.input_ids[: llm.n_tokens].tolist() == (prompt + expected)[:-1]


@pytest.mark.parametrize(
    ("right", "expected"), [([8], [4, 6, 8, 8, 8]), ([0], [4, 3, 2, 1, 1, 1]), ([8, 8, 0, 0, 3], [4, 6, 8, 7, 6, 5, 7, 8])],
    ids=["all right", "all wrong", "some wrong"],
)  # fmt: skip
def test_as_many_drafts_are_checked_as_were_worth_it(
    llm: Llama, plain: tuple[list[int], list[int]], right: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two more after a batch without a wrong one, one less after any other; never more than the model guesses, or there is room for."""
    if llm.kv_stats().budget:
        pytest.skip("what there is room for hides it")
    prompt, text = plain
    checked: list[int] = []
    ask = Drafts.__call__

    def asked(self: Drafts, *args: Any, **kwargs: Any) -> Any:
        drafts = ask(self, *args, **kwargs)
        checked.append(len(drafts))
        return drafts

    monkeypatch.setattr(Drafts, "__call__", asked)
    llm.draft_model = Known(prompt + text, right)  # type: ignore[assignment]
    assert taken(llm, prompt, 45) == text[:45]
    assert checked[: len(expected)] == expected


@pytest.mark.parametrize("n", [1, 2, 5, 9, 30])
def test_a_stream_that_ends_early_leaves_no_drafts(llm: Llama, plain: tuple[list[int], list[int]], n: int) -> None:
    prompt, expected = plain
    assert taken(llm, prompt, n) == expected[:n]
    without = counts(llm)
    llm.reset()
    llm.draft_model = Known(prompt + expected, [8, 2])  # type: ignore[assignment]
    stream = llm.generate(prompt, temp=0.0, repeat_penalty=1.0)
    assert list(itertools.islice(stream, n)) == expected[:n]
    assert counts(llm) == without  # between two items
    stream.close()
    assert counts(llm) == without
    again = llm.kv_stats().reevaluated
    assert next(llm.generate(prompt + expected[: n - 1], temp=0.0, repeat_penalty=1.0)) == expected[n - 1]
    assert counts(llm)[0] == without[0] and llm.kv_stats().reevaluated == again


def test_who_looks_in_between_finds_no_drafts(llm: Llama, plain: tuple[list[int], list[int]], tmp_path: Path) -> None:
    prompt, expected = plain
    llm.draft_model = Known(prompt + expected, [8])  # type: ignore[assignment]
    stream = llm.generate(prompt, temp=0.0, repeat_penalty=1.0)
    got = [next(stream) for _ in range(4)]
    llm.save_session(tmp_path / "talk.imsess")
    state = llm.save_state()
    assert state.n_tokens == len(prompt) + 3
    got += list(itertools.islice(stream, N - 4))
    assert got == expected
    stream.close()
    llm.load_session(tmp_path / "talk.imsess")
    assert llm.n_tokens == len(prompt) + 3
    assert next(llm.generate((prompt + expected)[: len(prompt) + 3], temp=0.0, repeat_penalty=1.0)) == expected[3]


def test_another_call_finds_no_drafts(llm: Llama, plain: tuple[list[int], list[int]]) -> None:
    prompt, expected = plain
    llm.draft_model = Known(prompt + expected, [8])  # type: ignore[assignment]
    stream = llm.generate(prompt, temp=0.0, repeat_penalty=1.0)
    got = [next(stream) for _ in range(4)]
    llm.eval([expected[3]])
    assert llm.n_tokens == len(prompt) + 4 and got == expected[:4]
    assert llm.input_ids[: llm.n_tokens].tolist() == prompt + expected[:4]


def test_criteria_for_stopping(llm: Llama, plain: tuple[list[int], list[int]]) -> None:
    prompt, expected = plain
    llm.draft_model = LlamaPromptLookupDecoding()
    stop = llama_cpp.StoppingCriteriaList([lambda ids, logits: len(ids) >= len(prompt) + 20])
    stream = llm.generate(prompt, temp=0.0, repeat_penalty=1.0, stopping_criteria=stop)
    found = list(stream)
    assert found == expected[: len(found)] and len(found) >= 18


def test_a_model_of_its_own_with_a_budget(llm: Llama, demo_model: Path, plain: tuple[list[int], list[int]]) -> None:
    prompt, expected = plain

    class Small(LlamaDraftModel):
        def __init__(self) -> None:
            self.llm = Llama(demo_model, **{**OPTIONS, "kv_budget": 130})
            self.accepted = 0

        def __call__(self, input_ids: np.ndarray, /, **kwargs: Any) -> np.ndarray:
            guess = taken(self.llm, input_ids.tolist(), 5)
            return np.array(guess, dtype=np.intc)

    small = Small()
    with small.llm:
        llm.draft_model = small
        assert taken(llm, prompt, 30) == expected[:30]
        assert small.llm.kv_stats().evicted > 0


def test_what_cannot_be_a_draft_model(llm: Llama) -> None:
    with pytest.raises(RequestError, match="draft_model"):
        llm.draft_model = object()  # type: ignore[assignment]
    assert llm.draft_model is None


def test_it_is_pickled_with_the_rest(demo_model: Path) -> None:
    with Llama(demo_model, kv_budget=160, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=3), **OPTIONS) as llm:
        with pickle.loads(pickle.dumps(llm)) as copy:
            assert copy.draft_model.model.num_pred_tokens == 3


def test_with_logits_of_all_tokens(demo_model: Path) -> None:
    with Llama(demo_model, kv_budget=160, logits_all=True, n_ctx=512, draft_model=LlamaPromptLookupDecoding(), **OPTIONS) as llm:
        answer: Any = llm.create_completion(TEXT * 2, max_tokens=20, temperature=0.0, logprobs=1)
        assert len(answer["choices"][0]["logprobs"]["tokens"]) >= 10
        n = llm.n_tokens
        assert llm.kv_stats().tokens_seen == n and np.isfinite(llm.scores[:n]).all()


def test_recurrent_models_have_no_way_back(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from indexmem_edge.runtime import drafts

    monkeypatch.setattr(drafts.llama_lib, "llama_model_is_hybrid", lambda model: True)
    with pytest.raises(ModelNotSupported, match="recurrent"):
        Llama(demo_model, kv_budget=160, draft_model=LlamaPromptLookupDecoding(), **OPTIONS)


def test_an_answer_with_drafts_can_be_cancelled(llm: Llama, plain: tuple[list[int], list[int]]) -> None:
    """While drafts are checked, too: the call has never happened."""
    prompt, after = plain
    llm.draft_model = Known(prompt + after, right=[8])
    llm.prefill(prompt)
    before = llm.n_tokens, llm.input_ids[: llm.n_tokens].tolist()
    for stop_after in (1, 40):  # nodes
        with Nodes(llm, stop_after), pytest.raises(Cancelled):
            llm.create_completion(prompt, max_tokens=N, temperature=0.0, repeat_penalty=1.0)
        assert (llm.n_tokens, llm.input_ids[: llm.n_tokens].tolist()) == before
    llm.draft_model = Known(prompt + after, right=[8])
    assert taken(llm, prompt) == after
    llm.draft_model = None


def test_of_a_long_text_the_end_is_looked_through(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what compares all that it is given; a draft model of one's own gets all."""
    seen: list[int] = []

    class Lookup(LlamaPromptLookupDecoding):  # type: ignore[misc]
        def __call__(self, input_ids: np.ndarray, /, **kwargs: Any) -> np.ndarray:
            seen.append(len(input_ids))
            return super().__call__(input_ids, **kwargs)

    class Own(LlamaDraftModel):
        def __call__(self, input_ids: np.ndarray, /, **kwargs: Any) -> np.ndarray:
            seen.append(len(input_ids))
            return np.empty(0, np.intc)

    monkeypatch.setattr(drafts, "LOOK", 40)
    for model, least, most in ((Lookup(), 40, 40), (Own(), 101, 103)):
        llm.reset()
        seen.clear()
        llm.draft_model = model  # type: ignore[assignment]
        stream = llm.generate(list(range(300, 400)), temp=0.0)
        next(stream), next(stream)
        stream.close()
        assert seen and least <= min(seen) and max(seen) <= most
    llm.draft_model = None
