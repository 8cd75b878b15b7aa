"""The chat without its terminal: commands, messages of programs, and what is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.cli.chat import Chat
from indexmem_edge.cli.console import Bar
from indexmem_edge.cli.options import RunOptions
from indexmem_edge.cli.sampling import AnswerOptions
from indexmem_edge.errors import IndexMemError
from indexmem_edge.native import find
from support.cancelling import Load, Nodes, load

__all__ = ["load"]  # a fixture

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

Start = Callable[..., Chat]


@pytest.fixture
def start(load: Load) -> Start:
    """start(llm=..., stop=..., quiet=..., **options) -> Chat"""

    def make(llm: Any = None, stop: Any = None, quiet: bool = False, **options: Any) -> Chat:
        given = {"predict": 12, "temp": 0.8, "seed": 7, **options}
        return Chat(llm or load("keydiff", kv_budget=160), RunOptions(**given), AnswerOptions(stop=stop, quiet=quiet))

    return make


def say(chat: Chat, *lines: str) -> list[str]:
    """The contents of all messages after that."""
    for line in lines:
        assert chat._handle(line)
    return [m["content"] for m in chat._conversation.messages]


# commands


def test_another_answer_takes_the_place_of_the_last(start: Start) -> None:
    chat, twin = start(), start()
    first, second, third = (say(chat, line) for line in ("What is the sea?", "/regen", "/Regen"))
    assert len(first) == len(second) == len(third) == 2 and first[0] == second[0] == third[0]
    assert len({first[1], second[1], third[1]}) == 3
    assert say(twin, "What is the sea?", "/regen", "/regen") == third  # a seed was given


def test_with_no_temperature_another_answer_is_the_same(start: Start, capsys: Any) -> None:
    chat = start(temp=0.0)
    assert say(chat, "What is the sea?") == say(chat, "/regen") and "always the same" in capsys.readouterr().err


def test_what_was_evicted_is_evaluated_again_and_said(start: Start, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    drawn: list[tuple[int, int]] = []
    monkeypatch.setattr(Bar, "update", lambda self, done, total: drawn.append((done, total)))
    chat = start(predict=60)
    say(chat, "The tide comes in. " * 20)
    del drawn[:]
    say(chat, "/edit " + "The tide goes out. " * 20)
    stats = chat._llm.kv_stats()
    assert stats.reevaluated > 0 and f"{stats.reevaluated:,} cached tokens had to be evaluated again" in capsys.readouterr().err
    assert len(drawn) > 2 and drawn == sorted(drawn) and drawn[-1] == (stats.turn_evaluated, stats.turn_evaluated)


def test_a_question_is_taken_back_with_its_answer(start: Start, capsys: Any) -> None:
    chat = start()
    before = say(chat, "What is the sea?")
    assert say(chat, "And the land?", "/undo") == before
    assert "taken back; 2 messages are left" in capsys.readouterr().err
    assert say(chat, "/undo") == [] and not chat._failed
    assert say(chat, "/undo") == [] and chat._failed and "ask something first" in capsys.readouterr().err
    assert len(say(chat, "What is the sea?")) == 2


def test_a_document_is_taken_back(start: Start, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.txt").write_text("The keeper is old.")
    chat = start()
    asked = say(chat, f"/read {tmp_path}/a.txt", "Who is old?")
    assert asked[0] == "Document a.txt:\n\nThe keeper is old.\n\nWho is old?"
    assert say(chat, "/undo", "Who is young?")[0].endswith("The keeper is old.\n\nWho is young?")
    assert say(chat, "/undo", "/undo", "Hello")[0] == "Hello"
    assert "the last document is taken back" in capsys.readouterr().err


def test_a_question_is_asked_in_other_words(start: Start, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The keeper is old.")
    chat = start()
    say(chat, "Hello", f"/read {tmp_path}/a.txt", "Who is old?")
    edited = say(chat, "/edit Who\nis young?")
    assert len(edited) == 4 and edited[2] == "Document a.txt:\n\nThe keeper is old.\n\nWho\nis young?"
    assert not chat._failed
    say(chat, "/edit")
    assert chat._failed  # a program has nothing to edit


def test_the_system_prompt_is_set_and_shown(start: Start, capsys: Any) -> None:
    chat = start(system="Be brief.")
    say(chat, "Hello", "/system")
    assert "Be brief." in capsys.readouterr().out
    assert say(chat, "/system Be\nlong.")[0] == "Be\nlong." and "evaluated again" in capsys.readouterr().err
    assert say(chat, "/reset") == ["Be\nlong."]
    assert len(say(chat, "Hello")) == 3 and not chat._failed


@pytest.mark.parametrize("command", ["/regen", "/edit What is the land?"])
def test_an_answer_that_is_stopped_before_its_first_word_keeps_the_old_one(start: Start, capsys: Any, command: str) -> None:
    chat = start()
    said = say(chat, "What is the sea? " * 3)
    with Nodes(chat._llm, stop_after=60):
        assert say(chat, command) == said
    assert "taken back" in capsys.readouterr().err
    assert say(chat, command) != said


def test_leaving(start: Start) -> None:
    chat = start()
    assert not chat._handle("/exit") and not chat._handle("/QUIT") and chat._handle("/quit now") and chat._failed


class Typing:
    """What a person does: types a line, or something that raises."""

    leave = "Ctrl-D leaves"

    def __init__(self, *entries: Any) -> None:
        self._entries = list(entries)

    def read(self, draft: str = "") -> Any:
        entry = self._entries.pop(0) if self._entries else None
        if isinstance(entry, type):
            raise entry
        return entry


@pytest.mark.parametrize("person", [True, False])
def test_ctrl_c_between_two_things_leaves_programs_only(start: Start, monkeypatch: pytest.MonkeyPatch, person: bool) -> None:
    chat = start()
    chat._terminal.interactive = person
    chat._reader = Typing("Hello", KeyboardInterrupt, "And now?", KeyboardInterrupt)
    if person:
        assert chat.run() == 0 and len(chat._conversation.turns) == 4
    else:
        with pytest.raises(KeyboardInterrupt):
            chat.run()
        assert len(chat._conversation.turns) == 2


def test_nobody_reads_the_answers_any_more(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(piece: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    chat = start()
    monkeypatch.setattr(chat._terminal, "stream", stream)
    with pytest.raises(BrokenPipeError):
        chat._handle("Hello")
    assert not chat._failed


def test_a_message_that_begins_with_a_slash(start: Start) -> None:
    assert say(start(), "/home/me/notes.txt: why?")[0] == "/home/me/notes.txt: why?"
    assert say(start(), "//stats")[0] == "/stats"
    chat = start()
    assert say(chat, "/statz") == [] and chat._failed


@pytest.mark.skipif(os.name != "posix", reason="files that are none")
def test_only_files_with_an_end_are_read(start: Start, tmp_path: Path, capsys: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    chat = start()
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder"), ("/dev/zero", "a device")):
        say(chat, f"/read {path}")
        assert f"expected a regular file, found {kind}" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("x" * 2048)
    say(chat, f"/read '{tmp_path}/a.txt'")
    assert "(2.0 KiB)" in capsys.readouterr().err


# messages of programs


def answers(capsys: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_program_sends_roles_and_line_breaks(start: Start, capsys: Any) -> None:
    chat = start(as_json=True)
    system = {"role": "system", "content": "Be\nbrief."}
    user, assistant = {"role": "user", "content": "/stats\nis a word"}, {"role": "assistant", "content": "Yes."}
    say(chat, json.dumps(system), json.dumps([user, assistant]))
    assert answers(capsys) == [] and chat._conversation.messages == [system, user, assistant]
    say(chat, json.dumps({"role": "user", "content": "a\n\nb"}))
    (answer,) = answers(capsys)
    assert chat._conversation.messages[3:] == [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": answer["answer"]},
    ]
    say(chat, json.dumps([assistant, user]), "a line", "/undo", "/undo")
    assert len(answers(capsys)) == 2 and len(chat._conversation.messages) == 5 and not chat._failed


@pytest.mark.parametrize("line", ["{", "[1]", '{"role": "user"}', "/nonsense"])
def test_errors_are_json_and_the_chat_goes_on(start: Start, capsys: Any, line: str) -> None:
    chat = start(as_json=True)
    say(chat, line)
    (error,) = answers(capsys)
    assert set(error) == {"error"} and chat._failed and len(say(chat, "Hello")) == 2


def test_without_json_a_line_is_a_line(start: Start) -> None:
    assert say(start(), '{"role": "user", "content": "x"}')[0] == '{"role": "user", "content": "x"}'


# what is told


@pytest.mark.parametrize(
    "predict, reason",
    [(5, "cut at 5 tokens"), (400, " 256 tokens"), (-1, "-c sets another")],
)
def test_the_reason_of_a_cut_answer_is_the_true_one(start: Start, load: Load, capsys: Any, predict: int, reason: str) -> None:
    chat = start(load("keydiff", n_ctx=256), predict=predict)
    chat._form["logit_bias"] = {2: -100.0}  # the answer has no end of its own
    say(chat, "Hello")
    said = capsys.readouterr().err
    assert reason in said and ("-n sets" in said) is (predict == 5)


def test_an_answer_of_no_tokens_is_a_prompt_that_was_read(start: Start, capsys: Any) -> None:
    chat = start(predict=0, as_json=True)
    say(chat, "Hello")
    (answer,) = answers(capsys)
    assert (answer["answer"], answer["finish_reason"]) == ("", "length")
    assert answer["stats"]["turn_evaluated"] > 5 and answer["stats"]["turn_generated"] == 0
    assert answer["stats"]["tokens_seen"] == answer["stats"]["turn_evaluated"]


def test_an_answer_ends_before_a_text(start: Start, capsys: Any) -> None:
    whole = say(start(temp=0.0), "Hello")[1]
    middle = whole[len(whole) // 2 :][:3]
    assert say(start(temp=0.0, stop=[middle, "never"]), "Hello")[1] == whole[: whole.index(middle)]
    with pytest.raises(IndexMemError, match="--stop is empty"):
        start(stop=[""])


@pytest.mark.parametrize("kind", ["keydiff", "unbounded"])
def test_a_prompt_that_is_read_can_be_watched(load: Load, kind: str) -> None:
    """Whatever call reads it."""
    llm = load(kind)
    tokens, told = [3 + i % 200 for i in range(130)], []
    with llm.watch(lambda done, total: told.append((done, total))):
        llm.create_completion(tokens, max_tokens=8)
        assert told == [(48, 130), (96, 130), (130, 130)]
        llm.create_completion([*tokens[:20], *tokens], max_tokens=2)
        total = llm.kv_stats().turn_evaluated
        assert told[-1] == (total, total) and total >= 130 and len(told) > 5
        del told[:]
    llm.create_completion(tokens[::-1], max_tokens=2)
    assert told == []


def test_a_watcher_may_stop_what_it_watches(load: Load) -> None:
    llm = load("keydiff")
    with pytest.raises(ZeroDivisionError), llm.watch(lambda done, total: 1 // 0):
        llm.prefill(list(range(3, 30)))
    assert llm.prefill(list(range(3, 60))) == 30  # it watches no more, and what was read has been read
