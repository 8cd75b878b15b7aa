"""After a state or a session was loaded, and when a prompt is asked again: the library's logits are of another text."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexmem_edge import SessionError, llama_cpp
from indexmem_edge.native import find
from indexmem_edge.sessions import file as sessionfile
from support.cancelling import TOKENS, Load, condition, load

__all__ = ["load"]  # a fixture

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

each = pytest.mark.parametrize("kind", ["keydiff", "span-centroid", "retention-mlp", "full", "unbounded"])
DRAWN = {"temp": 0.9, "repeat_penalty": 1.3, "top_k": 20}


def restore(llm: Any, how: str, folder: Path, change: Any) -> None:
    """Keeps the conversation, does something else, and takes it up again."""
    if how == "session":
        llm.save_session(folder / "talk")
        change()
        llm.load_session(folder / "talk")
        return
    state = llm.save_state()
    change()
    llm.load_state(pickle.loads(pickle.dumps(state)) if how == "pickled state" else state)


hows = pytest.mark.parametrize("how", ["state", "pickled state", "session"])


@each
@hows
@pytest.mark.parametrize("options", [{"temp": 0.0}, DRAWN], ids=["greedy", "drawn"])
def test_sampling_goes_on_where_it_was(load: Load, kind: str, how: str, options: dict[str, Any], tmp_path: Path) -> None:
    llm = load(kind)
    llm.eval(TOKENS[:300])
    expected = [llm.sample(**options) for _ in range(3)]
    restore(llm, how, tmp_path, lambda: llm.eval(TOKENS[500:560]))
    assert [llm.sample(**options) for _ in range(3)] == expected
    llm.eval([expected[0]])
    again = llm.sample(**options)
    twin = load(kind)
    twin.eval(TOKENS[:300])
    twin.eval([expected[0]])
    assert twin.sample(**options) == again


@each
@hows
def test_the_very_same_prompt_is_not_evaluated_again(load: Load, kind: str, how: str, tmp_path: Path) -> None:
    llm, twin, fresh = load(kind), load(kind), load(kind)
    for other in (llm, twin):
        other.prefill(TOKENS[:300])
    expected = [token for token, _ in zip(twin.generate(TOKENS[:300], temp=0.0), range(20))]
    restore(llm, how, tmp_path, llm.reset)
    if how == "session":
        fresh.load_session(tmp_path / "talk")  # as in another process
    for other in (llm, fresh) if how == "session" else (llm,):
        before = other.kv_stats().reevaluated
        assert [token for token, _ in zip(other.generate(TOKENS[:300], temp=0.0), range(20))] == expected
        assert other.kv_stats().turn_evaluated == 0 and other.kv_stats().reevaluated == before


@each
def test_a_conversation_that_was_never_continued_is_restored_without_logits(load: Load, kind: str, tmp_path: Path) -> None:
    llm = load(kind)
    restore(llm, "session", tmp_path, lambda: llm.prefill(TOKENS[:100]))
    assert llm.n_tokens == 0 and sessionfile.read(tmp_path / "talk").logits is None
    restore(llm, "state", tmp_path, lambda: llm.prefill(TOKENS[:100]))
    assert llm.prefill(TOKENS[:50]) == 50


def older(path: Path) -> None:
    """Makes a session file one of the first version."""
    data = sessionfile.read(path)
    tokens = data.tokens.astype("<i4").tobytes()
    sizes = {"n_tokens": len(data.tokens), "extra_bytes": 4, "state_bytes": len(data.state)}
    header = json.dumps({**data.header, **sizes}).encode()
    body = struct.pack("<8sII", sessionfile.MAGIC, 1, len(header)) + header + tokens + b"null" + data.state
    path.write_bytes(body + hashlib.sha256(body).digest())


@each
def test_older_sessions_and_states_still_load(load: Load, kind: str, tmp_path: Path) -> None:
    """They have no logits: what has to be is evaluated again, and nothing is sampled from those of another text."""
    llm = load(kind)
    llm.eval(TOKENS[:300])
    expected, positions = llm.sample(temp=0.0), condition(llm).get("positions")
    llm.save_session(tmp_path / "talk")
    older(tmp_path / "talk")
    state = llm.save_state()
    del state.__dict__["logits"]
    for back in (lambda: llm.load_session(tmp_path / "talk"), lambda: llm.load_state(state)):
        llm.eval(TOKENS[500:560])
        back()
        assert llm.n_tokens == 300 and condition(llm).get("positions") == positions
        assert llm.prefill([*TOKENS[:300], 7]) == 1  # going on costs what is new
        back()
        assert llm.sample(temp=0.0) == expected and llm.n_tokens == 300


def test_logits_of_another_vocabulary_are_refused(load: Load, tmp_path: Path) -> None:
    llm = load("keydiff")
    llm.prefill(TOKENS[:100])
    llm.save_session(tmp_path / "talk")
    data = sessionfile.read(tmp_path / "talk")
    assert data.logits is not None
    wrong = sessionfile.SessionData(data.header, data.tokens, None, data.state, data.logits[:-1])
    sessionfile.write(tmp_path / "talk", wrong)
    before = condition(llm)
    with pytest.raises(SessionError, match="logits"):
        llm.load_session(tmp_path / "talk")
    assert condition(llm) == before


@each
def test_a_prompt_that_is_asked_twice_in_a_row(load: Load, kind: str) -> None:
    """The best of several answers: the first is taken out, and of the prompt at most its last token evaluated again."""
    llm, twin = (load(kind, kv_checkpoints=None) for _ in range(2))
    for prompt, seed in ((TOKENS[:60], 1), (TOKENS[:60], 2), (TOKENS[100:700], 1), (TOKENS[100:700], 2)):
        llm.set_seed(seed)
        twin.reset()
        twin.set_seed(seed)
        answers = [[token for token, _ in zip(other.generate(prompt, **DRAWN), range(40))] for other in (llm, twin)]
        assert answers[0] == answers[1]
        if seed == 2:
            assert llm.kv_stats().turn_evaluated <= 1


@each
def test_a_next_prompt_without_what_the_model_thought(load: Load, kind: str) -> None:
    """It departs where the answer begins: what is evaluated is what it says instead, every time."""
    llm, prompt = load(kind, kv_checkpoints=None), TOKENS[100:400]
    for turn in range(4):
        answer = [token for token, _ in zip(llm.generate(prompt, **DRAWN), range(40))]
        prompt = [*prompt, *answer[30:], *TOKENS[500 + 20 * turn : 520 + 20 * turn]]
        llm.prefill(prompt)
        stats = llm.kv_stats()
        assert stats.turn_evaluated <= 30 and stats.reevaluated <= turn + 1  # a token that both begin with by chance
        prompt = [*prompt, 9]


def test_without_copies_it_is_read_again(load: Load) -> None:
    llm = load("keydiff", kv_checkpoints=0)
    for evaluated in (300, 300):
        assert len(list(zip(llm.generate(TOKENS[:300], **DRAWN), range(60)))) == 60
        assert (llm.kv_stats().turn_evaluated, llm.kv_stats().checkpoint_bytes) == (evaluated, 0)


@pytest.mark.parametrize("kind", ["keydiff", "unbounded"])
@hows
def test_what_is_probable_after_a_restored_prompt(load: Load, kind: str, how: str, tmp_path: Path) -> None:
    """With all logits kept, those that a completion reads are not what lies in the array."""
    llm = load(kind, logits_all=True, n_ctx=1024)
    ask = {"max_tokens": 3, "temperature": 0.0, "logprobs": 2, "logit_bias": {2: -100.0}}
    expected = llm.create_completion(TOKENS[:200], **ask, echo=True)["choices"]
    alone = llm.create_completion(TOKENS[:200], **ask)["choices"]
    llm.reset()
    llm.prefill(TOKENS[:200])

    def other() -> None:
        llm.reset()
        llm.prefill(TOKENS[400:800])

    restore(llm, how, tmp_path, other)
    for options, wanted in (({}, alone), ({"echo": True}, expected)):
        found = llm.create_completion(TOKENS[:200], **ask, **options)["choices"]
        assert found[0]["text"] == wanted[0]["text"]
        probable = [np.array(c[0]["logprobs"]["token_logprobs"], dtype=float) for c in (found, wanted)]
        np.testing.assert_allclose(probable[0], probable[1], atol=0.02)


def test_ram_caches_restore_logits(load: Load) -> None:
    llm, twin = load("keydiff"), load("keydiff")
    llm.set_cache(llama_cpp.LlamaRAMCache())
    for start in (0, 300, 0, 300):
        twin.reset()
        ask = {"prompt": TOKENS[start : start + 200], "max_tokens": 5, "temperature": 0.0}
        assert llm.create_completion(**ask)["choices"] == twin.create_completion(**ask)["choices"]
