"""llama.cpp's server with a bounded cache: turns cost themselves, whatever the client does to the history."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.serving import SERVER, Server, serving

pytestmark = pytest.mark.skipif(SERVER is None, reason="the server has not been built (make server)")

BUDGET = 192
SYSTEM = {"role": "system", "content": "You are a clerk. The code is 7781."}
README = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
LONG = {"role": "user", "content": README[:3000] + "\nSummarise this in one sentence."}
SHORT = {"role": "user", "content": "Name a river."}


def evaluated(answer: dict[str, Any]) -> int:
    return int(answer["timings"]["prompt_n"])


def said(answer: dict[str, Any]) -> dict[str, Any]:
    return dict(answer["choices"][0]["message"])


def kv(server: Server, slot: int = 0) -> dict[str, Any]:
    return dict(server.get("/slots")[slot]["kv"])


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("slots")
    options = ("--kv-budget", BUDGET, "--kv-window", 48, "-np", 2, "-ub", 64, "-b", 256, "--metrics", "--slots")
    with serving(demo_model, *options, "--slot-save-path", folder) as running:
        yield running


def test_a_conversation_and_what_people_do_to_it(server: Server) -> None:
    first = server.chat([SYSTEM, LONG], id_slot=0)
    assert evaluated(first) > 3 * BUDGET and kv(server)["evicted"] > 0
    pin = kv(server)["pin"]
    assert 10 < pin < 40
    again = server.chat([SYSTEM, LONG], id_slot=0)  # regenerate
    assert evaluated(again) <= 64 and said(again) == said(first)
    history = [SYSTEM, LONG, said(first), SHORT]
    second = server.chat(history, id_slot=0)
    assert evaluated(second) <= 64
    edited = server.chat([SYSTEM, LONG, said(first), {"role": "user", "content": "Name a fish."}], id_slot=0)
    assert evaluated(edited) <= 64
    other_answer = [SYSTEM, LONG, {"role": "assistant", "content": "I would rather not."}, SHORT]  # as a template that drops a thought
    assert evaluated(server.chat(other_answer, id_slot=0)) <= 128
    state = kv(server)
    assert state["pin"] == pin and state["kept"] <= BUDGET and state["kept"] + state["evicted"] == state["seen"]


def test_a_system_prompt_without_room_is_refused(server: Server) -> None:
    """And not evicted without a word."""
    long = {"role": "system", "content": "You are a clerk. " * 60}
    status, text = server.ask("/v1/chat/completions", {"messages": [long, SHORT], "max_tokens": 1, "id_slot": 0})
    error = json.loads(text)["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and "can be pinned" in error["message"] and "--kv-budget" in error["message"]
    assert f"at most {BUDGET - 48 - 1} " in error["message"]
    assert said(server.chat([SYSTEM, SHORT], id_slot=0, max_tokens=4))["content"], "the slot goes on"


def test_another_conversation_has_a_prefix_of_its_own(demo_model: Path) -> None:
    with serving(demo_model, "--kv-budget", BUDGET, "--kv-window", 48, "-np", 1, "--cache-ram", 0, "--slots") as running:
        running.chat([SYSTEM, SHORT], id_slot=0, max_tokens=1)
        assert kv(running)["pin"] > 10
        running.chat([SHORT], id_slot=0, max_tokens=1)
        assert kv(running)["pin"] < 10


def test_turns_do_not_grow(server: Server) -> None:
    """A template that drops the reasoning of earlier answers: each prompt departs where the last answer began."""
    history, counts = [SYSTEM, LONG], []
    for turn in range(6):
        answer = said(server.chat(history, id_slot=0, max_tokens=20))
        history += [{"role": "assistant", "content": answer["content"][-8:]}, {"role": "user", "content": f"And number {turn}?"}]
        counts.append(evaluated(server.chat(history, id_slot=0, max_tokens=1)))
    assert max(counts) <= 64 + 20


def test_conversations_do_not_mix(server: Server) -> None:
    def talk(name: str) -> list[str]:
        history: list[dict[str, Any]] = [{"role": "system", "content": f"Your name is {name}."}]
        for i in range(4):
            history.append({"role": "user", "content": f"{README[i * 500 : i * 500 + 500]}\nWhat is your name?"})
            history.append(said(server.chat(history, max_tokens=8)))
        return [m["content"] for m in history[2::2]]

    names = ["Rosa", "Emil", "Kim", "Ada"]  # more than there are slots
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(talk, names))
    for name, told in zip(names, answers):
        assert not any(other in text for other in names if other != name for text in told)
    for slot in (0, 1):
        assert kv(server, slot)["kept"] <= BUDGET


def test_slots_are_saved_and_come_back(server: Server) -> None:
    first = server.chat([SYSTEM, LONG], id_slot=0)
    history = [SYSTEM, LONG, said(first), SHORT]
    status, text = server.ask("/slots/0?action=save", {"filename": "talk.bin"})
    assert status == 200, text
    expected = server.chat(history, id_slot=0)
    assert server.ask("/slots/1?action=restore", {"filename": "talk.bin"})[0] == 200
    restored = server.chat(history, id_slot=1)
    assert evaluated(restored) <= 64 and said(restored) == said(expected)
    assert server.ask("/slots/1?action=restore", {"filename": "none.bin"})[0] == 400
    assert evaluated(server.chat([SYSTEM, SHORT], id_slot=1)) > 0


def test_figures(server: Server) -> None:
    server.chat([SYSTEM, LONG], id_slot=0)
    props = server.get("/props")["kv"]
    assert props["budget"] == BUDGET and props["policy"] == "streaming"
    status, text = server.ask("/metrics")
    values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    slots = server.get("/slots")
    assert status == 200
    assert values["llamacpp:kv_kept"] == sum(slot["kv"]["kept"] for slot in slots)
    assert values["llamacpp:kv_evicted"] == sum(slot["kv"]["evicted"] for slot in slots) > 0
    assert values["llamacpp:kv_bytes"] == slots[0]["kv"]["bytes"]


REPEATED = "The ferry leaves the old harbour at nine and comes back at noon with letters and apples. " * 14
DRAFTS: dict[str, tuple[Any, ...]] = {
    "model that keeps all": ("--spec-type", "draft-simple", "--model-draft", "MODEL", "-c", 4096),
    "model with a budget": ("--spec-type", "draft-simple", "--model-draft", "MODEL", "--kv-budget-draft", 192),
    "ngrams": ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", 3, "--spec-ngram-simple-size-m", 8),
}


def test_a_draft_changes_no_word(demo_model: Path) -> None:
    """Two conversations at once, each of which evicts while it answers."""
    options = ("--kv-budget", BUDGET, "--kv-window", 48, "-np", 2, "-ub", 64)

    def answers(*draft: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        with serving(demo_model, *options, *(demo_model if word == "MODEL" else word for word in draft)) as drafting:
            def ask(slot: int) -> Any:
                status, text = drafting.ask(
                    "/completion", {"prompt": REPEATED[slot * 40 :], "n_predict": 60, "temperature": 0, "id_slot": slot, "ignore_eos": True}
                )
                assert status == 200, text
                return json.loads(text)

            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                told = list(pool.map(ask, (0, 1)))
            return told, [kv(drafting, slot) for slot in (0, 1)]

    expected, held = answers()
    assert all(state["evictions"] > 2 for state in held)
    for name, draft in DRAFTS.items():
        told, state = answers(*draft)
        assert [one["content"] for one in told] == [one["content"] for one in expected], name
        assert all(one["timings"]["draft_n_accepted"] > 10 for one in told), name
        # how a prompt is cut into ubatches, and so its evictions, depends on what else is read at that moment
        assert [{**one, "evictions": None} for one in state] == [{**one, "evictions": None} for one in held], name


def test_a_draft_model_that_has_evicted_more_goes_back_as_well(demo_model: Path) -> None:
    """Its cache is smaller than that of the model, which has evicted nothing yet and could go back to where two chats part."""
    options = ("--kv-budget", 2048, "--kv-budget-draft", BUDGET, "-np", 1, "-ub", 64, "--spec-type", "draft-simple")
    question = {"role": "user", "content": README[:2400] + "\nSummarise this in one sentence."}
    with serving(demo_model, *options, "--model-draft", demo_model) as drafting, serving(demo_model, "--kv-budget", 2048, "-np", 1, "-ub", 64) as plain:
        for other in (SHORT, {"role": "user", "content": "Name a fish."}):
            for history in ([SYSTEM, question], [SYSTEM, other], [SYSTEM, question, {"role": "assistant", "content": "No."}, other]):
                told, expected = (said(server.chat(history, max_tokens=24, cache_prompt=False)) for server in (drafting, plain))
                assert said(drafting.chat(history, max_tokens=24))["content"] and kv(drafting)["evicted"] == 0 and told == expected
        assert drafting.process.poll() is None, drafting.said[-3000:]


def test_drafts_over_a_recurrent_state_evict_nothing(tiny: Any) -> None:
    """It goes back by snapshots, or a copy of it is put back; what was evicted meanwhile would stay away."""
    model, _ = tiny("lfm2")
    options = ("--kv-budget", 48, "--kv-window", 8, "-np", 1, "-ub", 16, "--no-jinja", "--chat-template", "chatml")
    body = {"prompt": [7, 8, 9, 10, 11, 12] * 8, "n_predict": 160, "temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
    body |= {"logit_bias": [[7, 60], [8, 60]]}  # so that it repeats itself

    def answer(*draft: Any) -> tuple[list[int], dict[str, Any], int]:
        with serving(model, *options, *draft) as running:
            status, text = running.ask("/completion", body)
            assert status == 200, text
            found = json.loads(text)
            return found["tokens"], kv(running), found["timings"].get("draft_n_accepted", 0)

    tokens, held, _ = answer()
    drafted, state, accepted = answer("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", 1, "--spec-ngram-simple-size-m", 6)
    assert accepted > 10 and held["evictions"] > 3
    assert drafted == tokens and state == held


def test_figures_are_told_while_it_answers(demo_model: Path) -> None:
    """By another thread than the one that the cache belongs to."""
    with serving(demo_model, "--kv-budget", BUDGET, "--kv-window", 48, "-np", 2, "-ub", 64, "--metrics", "--slots") as running:
        ended, asked = threading.Event(), [0]

        def watch() -> None:
            while not ended.is_set():
                slots = json.loads(running.ask("/slots")[1])
                assert all(slot["kv"]["kept"] <= slot["kv"]["seen"] for slot in slots)
                assert "llamacpp:kv_kept" in running.ask("/metrics")[1]
                asked[0] += 1

        def talk(slot: int) -> dict[str, Any]:
            body = {"prompt": REPEATED, "n_predict": 120, "temperature": 0, "id_slot": slot, "ignore_eos": True}
            return dict(json.loads(running.ask("/completion", body)[1]))

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            watchers = [pool.submit(watch) for _ in range(4)]
            told = [found.result() for found in [pool.submit(talk, slot) for slot in (0, 1)]]
            ended.set()
            for watcher in watchers:
                watcher.result()
        assert running.process.poll() is None and asked[0] > 10
        for slot, answer in enumerate(told):
            assert kv(running, slot)["seen"] == answer["timings"]["prompt_n"] + answer["timings"]["predicted_n"] - 1


def test_figures_are_there_while_it_sleeps(demo_model: Path) -> None:
    def of_the_cache(sleepy: Server) -> list[str]:
        return [line for line in sleepy.ask("/metrics")[1].splitlines() if line.startswith("llamacpp:kv_")]

    with serving(demo_model, "--kv-budget", BUDGET, "-np", 1, "--metrics", "--sleep-idle-seconds", 1) as sleepy:
        sleepy.chat([SYSTEM, SHORT])
        awake = of_the_cache(sleepy)
        end = time.monotonic() + 30
        while not sleepy.get("/props")["is_sleeping"]:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert of_the_cache(sleepy) == awake and len(awake) == 5
        assert said(sleepy.chat([SYSTEM, SHORT]))["content"] and len(of_the_cache(sleepy)) == 5


def test_length_has_no_limit(server: Server) -> None:
    assert server.get("/props")["default_generation_settings"]["n_ctx"] >= 1 << 21


def test_bad_requests_hurt_nobody(server: Server) -> None:
    status, _ = server.ask("/v1/chat/completions", b'{"messages": [')
    assert status == 400 or status == 500
    assert server.ask("/v1/chat/completions", {"messages": "nobody"})[0] == 400
    assert server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": "many"})[0] >= 400
    assert said(server.chat([SYSTEM, SHORT]))["content"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--kv-budget", "10"), ("budget",)),
        (("--kv-budget", "many"), ("--kv-budget", "whole number", "many")),
        (("--kv-budget", "512", "--kv-policy", "nonsense"), ("nonsense",)),
        (("--kv-policy", "keydiff"), ("need a --kv-budget",)),
        (("--kv-budget", "512", "--indexmem", __file__), ("not a GGUF file",)),
        (("--kv-budget", "512", "-fa", "off"), ("flash attention",)),
        (("--kv-budget", "512", "--spec-type", "draft-simple", "--model-draft", "MODEL"), ("draft model", "--kv-budget-draft", "-c")),
        (("--kv-budget", "512", "--kv-budget-draft", "512"), ("--model-draft",)),
        (("--kv-budget", "512", "--spec-type", "draft-simple", "--model-draft", "MODEL", "--kv-budget-draft", "9"), ("budget of 9", "too small")),
    ],
)
def test_impossible_options_are_refused(demo_model: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    command = [str(SERVER), "-m", str(demo_model), "--port", "1", *(str(demo_model) if a == "MODEL" else a for a in arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    output = ended.stdout + ended.stderr
    assert ended.returncode != 0
    for word in words:
        assert word in output, output[-2000:]


def test_without_a_budget_it_is_the_server_it_was(demo_model: Path) -> None:
    with serving(demo_model, "-np", 1, "-c", 2048, "--slots") as plain:
        answer = plain.chat([SYSTEM, SHORT])
        assert plain.get("/slots")[0]["kv"] is None and plain.get("/props")["kv"] is None
        assert said(answer)["content"]
        status, text = plain.ask("/completion", {"prompt": "The capital of France is", "n_predict": 3, "temperature": 0})
        assert status == 200 and "Paris" in json.loads(text)["content"]
