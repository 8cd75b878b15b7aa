"""Sessions in a `Llama` with other options: what is said, what is refused with what to do, and what a file says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import CacheWarning, Cancelled, Llama, SessionError, SessionInfo
from indexmem_edge.native import find
from indexmem_edge.sessions.file import SavedCheckpoint, SessionData, read, write

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

TOKENS = [3 + (7 * i) % 250 for i in range(1200)]
Make = Callable[..., Llama]


@pytest.fixture
def make(tiny: Tiny) -> Iterator[Make]:
    made: list[Llama] = []

    def new(arch: str = "llama", **options: Any) -> Llama:
        defaults = dict(kv_budget=96, kv_window=16, n_ubatch=32, n_threads=1, n_threads_batch=1, verbose=False, kv_warn=lambda _: None)
        made.append(Llama(tiny(arch)[0], **{**defaults, **options}))
        return made[-1]

    yield new
    for llm in made:
        llm.close()


def told(llm: Llama) -> list[str]:
    """What the `Llama` says of sessions from now on."""
    said: list[str] = []

    def hook(warning: CacheWarning) -> None:
        if warning.kind == "session":
            said.append(str(warning))

    llm.kv_warn = hook
    return said


def drawn(llm: Llama, prompt: list[int], n: int = 8) -> list[int]:
    return [token for _, token in zip(range(n), llm.generate(prompt, temp=0.0))]


def test_a_smaller_budget_evicts_and_says_so(make: Make, tmp_path: Path) -> None:
    large, small = make(), make(kv_budget=48, kv_window=8)
    large.prefill(TOKENS[:200])
    large.save_session(tmp_path / "s", extra={"a": 1})
    said = told(small)
    assert small.load_session(tmp_path / "s") == {"a": 1}
    assert said == [
        f"{tmp_path / 's'}: saved with kv_budget 96 and kv_window 16, continuing with 48 and 8: "
        f"{large.kv_stats().kept - 48} entries per head were evicted"
    ]
    assert small.kv_stats().kept == 48 and small.n_tokens == 200
    for theirs, ours in zip(large.kv_snapshot()[1], small.kv_snapshot()[1]):
        assert set(ours) < set(theirs) and set(range(192, 200)) <= set(ours)
    assert small.prefill(TOKENS[:210]) == 10 and small.kv_stats().reevaluated == 0


def test_a_window_that_nobody_chose_is_named_in_words(make: Make, tmp_path: Path) -> None:
    given, left = make(kv_budget=160), make(kv_budget=160, kv_window=None)
    given.prefill(TOKENS[:100])
    given.save_session(tmp_path / "s")
    said = told(left)
    left.load_session(tmp_path / "s")
    assert len(said) == 1 and "saved with kv_window 16, continuing with one chosen from the budget" in said[0]


def test_same_options_say_nothing_and_give_the_same_bytes(make: Make, tmp_path: Path) -> None:
    first, second = make(), make()
    first.prefill(TOKENS[:200])
    first.save_session(tmp_path / "a")
    said = told(second)
    second.load_session(tmp_path / "a")
    second.save_session(tmp_path / "b")
    assert said == [] and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert drawn(first, TOKENS[:230]) == drawn(second, TOKENS[:230])


def test_there_and_back_in_a_larger_one(make: Make, tmp_path: Path) -> None:
    small, large = make(), make(kv_budget=256, kv_policy="keydiff")
    small.prefill(TOKENS[:200])
    small.save_session(tmp_path / "s")
    large.load_session(tmp_path / "s")
    np.testing.assert_equal(large.kv_snapshot(), small.kv_snapshot())
    assert large.prefill(TOKENS[:300]) == 100 and large.kv_stats().kept == small.kv_stats().kept + 100


def test_a_pin_that_this_one_asks_for(make: Make, tmp_path: Path) -> None:
    pinned, other, free = make(kv_pin=20), make(kv_pin=40), make(kv_pin=0)
    pinned.prefill(TOKENS[:50])
    pinned.save_session(tmp_path / "whole")
    pinned.prefill(TOKENS[:300])
    pinned.save_session(tmp_path / "evicted")
    said = told(other)
    for name, pins in (("whole", (40, 0)), ("evicted", (20, 0))):
        for llm, pin in zip((other, free), pins):
            llm.load_session(tmp_path / name)
            assert llm.kv_stats().pin == pin
    assert "of the pinned prefix of 40 tokens 20 are still there" in said[-1] and "still there" not in said[0]
    automatic = make(kv_pin="auto")
    automatic.load_session(tmp_path / "evicted")
    assert automatic.kv_stats().pin == 20, "that of the session"
    with pytest.raises(SessionError, match=r"pinned prefix of 20 tokens needs a budget of at least 37"):
        make(kv_budget=36).load_session(tmp_path / "evicted")


def test_memories_come_and_go(make: Make, tmp_path: Path) -> None:
    with_one, without = make(memory="centroid", memory_slots=8), make()
    for llm, other, words in (
        (with_one, without, "the memory `centroid` is forgotten"),
        (without, with_one, "the memory `centroid` begins empty"),
    ):
        llm.reset()
        llm.prefill(TOKENS[:300])
        llm.save_session(tmp_path / "s")
        said = told(other)
        other.load_session(tmp_path / "s")
        assert words in said[0]
        assert other.prefill(TOKENS[:320]) == 20
    with_one.save_session(tmp_path / "s")
    with pytest.raises(SessionError, match="a memory 'centroid' of 8 slots, this context has 'centroid' of 9"):
        make(memory="centroid", memory_slots=9).load_session(tmp_path / "s")


def test_a_window_model_and_a_smaller_ubatch(make: Make, tmp_path: Path) -> None:
    large, small = make("gemma3", n_ubatch=128, kv_window=20), make("gemma3", n_ubatch=16, kv_window=20)
    large.prefill(TOKENS[:300])
    large.save_session(tmp_path / "s")
    small.load_session(tmp_path / "s")
    assert small.prefill(TOKENS[:310]) == 10


@pytest.mark.parametrize("options", [{"kv_budget": None, "kv_window": None, "n_ctx": 1024}, {"kv_policy": "tova", "kv_budget": 60}, {"type_k": 1}])
def test_what_is_refused_can_be_read_again(make: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    """With the options of now, as if it had been said to this one."""
    old, new, straight = make(type_k=0, type_v=0), make(**{"type_v": 0, "type_k": 0} | options), make(**{"type_v": 0, "type_k": 0} | options)
    old.prefill(TOKENS[:200])
    old.save_session(tmp_path / "s", extra=5)
    new.prefill(TOKENS[630:730])
    with pytest.raises(SessionError, match="again=True|another policy"):
        new.load_session(tmp_path / "s")
    assert new.n_tokens == 100 and new.prefill(TOKENS[630:735]) == 5
    assert new.load_session(tmp_path / "s", again=True) == 5
    straight.prefill(TOKENS[:200])
    assert new.kv_stats().kept == straight.kv_stats().kept and new.n_tokens == 200
    assert drawn(new, TOKENS[:220]) == drawn(straight, TOKENS[:220])


def test_a_budget_reads_what_was_saved_without_one(make: Make, tmp_path: Path) -> None:
    plain, bounded = make(kv_budget=None, kv_window=None, n_ctx=1024), make()
    plain.prefill(TOKENS[:200])
    plain.save_session(tmp_path / "s")
    with pytest.raises(SessionError, match=r"saved with no kv_budget, this one has kv_budget = 96.* again=True"):
        bounded.load_session(tmp_path / "s")
    bounded.load_session(tmp_path / "s", again=True)
    assert bounded.kv_stats().kept <= 96 and bounded.n_tokens == 200
    assert SessionInfo.read(tmp_path / "s").least_budget == 0


def test_a_longer_pin_is_read_again_as_far_as_there_is_room(make: Make, tmp_path: Path) -> None:
    told: list[Any] = []
    old, new = make(kv_budget=300, kv_pin="auto"), make(kv_budget=96, kv_pin="auto", kv_warn=told.append)
    old._cache.wanted_pin = 200
    old.prefill(TOKENS[:400])
    assert old.kv_stats().pin == 200
    old.save_session(tmp_path / "s")
    new.prefill(TOKENS[630:730])
    assert new.load_session(tmp_path / "s", again=True) is None
    stats = new.kv_stats()
    assert new.n_tokens == 400 and stats.kept <= 96 and stats.sinks < stats.pin == new.kv_options.pin_room() < 200
    assert new.prefill(TOKENS[:410]) == 10
    assert any(f"its first 200 tokens were pinned, kv_budget 96 has room for {stats.pin} of them" in str(note) for note in told)


def test_reading_again_can_be_cancelled(make: Make, tmp_path: Path) -> None:
    old, new = make(), make(n_batch=32)
    old.prefill(TOKENS[:400])
    old.save_session(tmp_path / "s")
    new.prefill(TOKENS[630:730])
    before = new.kv_snapshot()
    with new.watch(lambda done, total: done > 100 and new.cancel()):
        with pytest.raises(Cancelled):
            new.load_session(tmp_path / "s", again=True)
    assert new.n_tokens == 100
    np.testing.assert_equal(new.kv_snapshot(), before)


# what a file says


def test_a_file_says_what_it_needs(make: Make, tmp_path: Path) -> None:
    llm = make(memory="centroid", memory_slots=8, kv_pin=20, kv_policy="keydiff")
    llm.prefill(TOKENS[:200])
    n = llm.save_session(tmp_path / "s", extra={"messages": [{"role": "user", "content": "Hello"}]}, checkpoints=True)
    info = SessionInfo.read(tmp_path / "s", verify=True)
    assert (info.bytes, info.tokens, info.messages, info.format) == (n, 200, 1, 3)
    assert info.options["kv_budget"] == 96 and info.options["kv_policy"] == "keydiff" and info.options["kv_pin"] == 20
    assert info.kept == llm.kv_stats().kept and info.pinned == 20
    assert info.least_budget == 20 + 16 + 8 + 1 and info.whole_budget == info.kept + 8
    assert info.checkpoints == llm.kv_stats().checkpoints > 0 and info.checkpoint_bytes > 1000
    assert info.extra["messages"] and "extra" not in info.to_dict()
    assert info.model == SessionInfo.read(tmp_path / "s").model != ""
    for budget in (info.least_budget, info.whole_budget):
        other = make(memory="centroid", memory_slots=8, kv_budget=budget)
        other.load_session(tmp_path / "s")
        assert (other.kv_stats().kept == info.kept) == (budget == info.whole_budget)
    with pytest.raises(SessionError, match=f"at least {info.least_budget}"):
        make(memory="centroid", memory_slots=8, kv_budget=info.least_budget - 1).load_session(tmp_path / "s")


def test_damage_is_found_where_it_is_looked_for(make: Make, tmp_path: Path) -> None:
    llm = make()
    llm.prefill(TOKENS[:100])
    llm.save_session(tmp_path / "s")
    whole = bytearray((tmp_path / "s").read_bytes())
    whole[-40] ^= 1
    (tmp_path / "s").write_bytes(whole)
    assert SessionInfo.read(tmp_path / "s").tokens == 100
    for damaged in (lambda: SessionInfo.read(tmp_path / "s", verify=True), lambda: llm.load_session(tmp_path / "s")):
        with pytest.raises(SessionError, match="checksum"):
            damaged()
    (tmp_path / "s").write_bytes(whole[:-1])
    with pytest.raises(SessionError, match="truncated"):
        SessionInfo.read(tmp_path / "s")
    with pytest.raises(SessionError, match="No such file"):
        SessionInfo.read(tmp_path / "none")


def test_older_files_say_what_they_can(make: Make, tmp_path: Path) -> None:
    llm = make()
    llm.prefill(TOKENS[:100])
    llm.save_session(tmp_path / "s")
    data = read(tmp_path / "s")
    header = {k: v for k, v in data.header.items() if k not in ("kept", "pinned prefix", "n_ubatch", "background", "model name", "kv_pin")}
    write(tmp_path / "old", SessionData(header, data.tokens, data.extra, data.state))
    info = SessionInfo.read(tmp_path / "old")
    assert info.kept is None and info.pinned is None and info.whole_budget == 96 and info.messages is None
    other = make(kv_budget=60)
    said = told(other)
    other.load_session(tmp_path / "old")
    assert said == [f"{tmp_path / 'old'}: saved with kv_budget 96, continuing with 60"] and other.kv_stats().kept == 60


@pytest.mark.parametrize("value", ["x", None, [1], {"a": 1}, -5, 10**30, True, "\x1b[2J"], ids=repr)
@pytest.mark.parametrize("key", ["kept", "pinned prefix", "kv_pin", "kv_window", "memory", "sidecar file", "sidecar", "rebases", "background", "kv_budget"])
def test_a_header_of_any_values(make: Make, tmp_path: Path, key: str, value: Any) -> None:
    """Is refused in our words, or changes what is said, and nothing else."""
    llm = make()
    llm.prefill(TOKENS[:100])
    llm.save_session(tmp_path / "s")
    data = read(tmp_path / "s")
    write(tmp_path / "s", SessionData({**data.header, key: value}, data.tokens, None, data.state, data.logits))
    assert SessionInfo.read(tmp_path / "s").tokens == 100
    said = told(llm)
    try:
        llm.load_session(tmp_path / "s")
    except SessionError as error:
        said.append(str(error))
    assert llm.n_tokens == 100 and llm.prefill(TOKENS[:110]) == 10
    assert all(line.isprintable() for line in said)


# checkpoints


def test_checkpoints_go_along(make: Make, tmp_path: Path) -> None:
    """Another answer, an edit of the last message and a branch cost what is new, in another process, too."""
    first, second = make(), make()
    first.prefill(TOKENS[:300])
    answers = [drawn(first, TOKENS[:300], 60)]
    longer = TOKENS[:300] + answers[0] + TOKENS[700:760]
    answers.append(drawn(first, longer, 60))
    plain = first.save_session(tmp_path / "plain")
    whole = first.save_session(tmp_path / "s", checkpoints=True)
    some = first.save_session(tmp_path / "some", checkpoints=(whole - plain) // 2)
    assert plain < some < whole and SessionInfo.read(tmp_path / "plain").checkpoints == 0
    assert 0 < SessionInfo.read(tmp_path / "some").checkpoints < SessionInfo.read(tmp_path / "s").checkpoints

    second.load_session(tmp_path / "s")
    for prompt, n in ((longer, 1), (longer[:-20] + TOKENS[900:920], 40), (TOKENS[:300], 1), (TOKENS[:300] + TOKENS[800:810], 10)):
        second.prefill(prompt)
        assert second.kv_stats().turn_evaluated <= n + 32, "and a ubatch at most"
    assert drawn(second, longer, 60) == answers[1]
    without = make()
    without.load_session(tmp_path / "plain")
    without.prefill(longer[:-20] + TOKENS[900:920])
    assert without.kv_stats().turn_evaluated > 300


def test_checkpoints_fit_another_budget(make: Make, tmp_path: Path) -> None:
    first, small = make(), make(kv_budget=48)
    first.prefill(TOKENS[:300])
    drawn(first, TOKENS[:300], 60)
    first.save_session(tmp_path / "s", checkpoints=True)
    small.load_session(tmp_path / "s")
    small.prefill(TOKENS[:300] + TOKENS[900:920])
    assert small.kv_stats().turn_evaluated <= 20 + 32 and small.kv_stats().kept <= 48


def test_checkpoints_that_lie_are_left_out(make: Make, tmp_path: Path) -> None:
    llm = make()
    llm.prefill(TOKENS[:200])
    llm.save_session(tmp_path / "s")
    good = read(tmp_path / "s")
    lies = (
        SavedCheckpoint(good.tokens[:150], good.state),
        SavedCheckpoint(good.tokens, good.state[:-1]),
        SavedCheckpoint(good.tokens, b""),
        SavedCheckpoint(good.tokens[:0], good.state),
        SavedCheckpoint(good.tokens, good.state, good.logits),
    )
    write(tmp_path / "lies", SessionData(good.header, good.tokens, None, good.state, good.logits, lies))
    other = make()
    other.load_session(tmp_path / "lies")
    assert other.kv_stats().checkpoints == 1 and other.n_tokens == 200
    assert drawn(other, TOKENS[:210]) == drawn(llm, TOKENS[:210])
    for damaged in ([TOKENS[0] + 10**6] * 5, [-1] * 5):
        write(tmp_path / "bad", SessionData(good.header, good.tokens, None, good.state, None, (SavedCheckpoint(np.array(damaged, np.int32), good.state),)))
        with pytest.raises(SessionError, match="outside the vocabulary"):
            other.load_session(tmp_path / "bad")


@pytest.mark.parametrize("sizes", [[1], "x", None, [[1, 2, 3]], [[0, -1, 3, 0]], [[201, 0, 3, 0]], [[0, 2**62, 0, 0]], [[0, 0, 0, 0]] * 5000], ids=str)
def test_impossible_sizes_of_checkpoints(make: Make, tmp_path: Path, sizes: Any) -> None:
    import hashlib
    import json
    import struct

    header = json.dumps({"n_tokens": 0, "extra_bytes": 4, "state_bytes": 0, "n_logits": 0, "checkpoints": sizes}).encode()
    body = struct.pack("<8sII", b"IMEMSESS", 3, len(header)) + header + b"null"
    (tmp_path / "x").write_bytes(body + hashlib.sha256(body).digest())
    with pytest.raises(SessionError, match="damaged"):
        read(tmp_path / "x")
    with pytest.raises(SessionError, match="damaged"):
        SessionInfo.read(tmp_path / "x")
