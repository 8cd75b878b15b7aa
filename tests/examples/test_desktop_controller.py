"""docs/examples/desktop without its window: what a person wants is done by the demo model, and the view is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge import Llama
from indexmem_edge.native import find
from support.examples import desktop

if find.library_file() is None:
    pytest.skip("the native library has not been built", allow_module_level=True)

chats = desktop("chats")
controller = desktop("controller")

DOCUMENT = "The lighthouse of Port Elden is painted green. Its keeper is called Maren Holt. " * 20
PATIENCE = 60.0  # seconds, until a test that waits for something gives up


class Seen:
    """A view that remembers."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.told: list[str] = []
        self.errors: list[str] = []
        self.read: list[tuple[int, int]] = []
        self.shown: list[Any] = []
        self.gone = False
        self.on_piece: Callable[[Any], None] = lambda chat: None

    def added(self, chat: Any) -> None:
        self.shown.append(chat)

    def removed(self, chat: Any) -> None:
        self.shown.remove(chat)

    def show(self, chat: Any) -> None:
        assert chat in self.shown

    def piece(self, chat: Any, text: str) -> None:
        assert chat.answer.endswith(text)
        self.pieces.append(text)
        self.on_piece(chat)

    def progress(self, chat: Any, done: int, total: int) -> None:
        self.read.append((done, total))

    def tell(self, text: str, error: bool = False) -> None:
        (self.errors if error else self.told).append(text)

    def closed(self) -> None:
        self.gone = True


class Person:
    """Uses a controller, and waits for what comes of it."""

    def __init__(self, load: Any, folder: Path, **sampling: Any) -> None:
        self.view = Seen()
        self.does = controller.Controller(load, self.view, folder, **sampling)
        self.does.begin()

    def until(self, what: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < end, (self.view.told, self.view.errors)
            self.does.poll()
            time.sleep(0.002)

    def idle(self) -> None:
        self.until(lambda: not any(chat.busy for chat in self.does.chats))

    def ask(self, chat: Any, question: str) -> str:
        self.does.send(chat, question)
        self.idle()
        return str(chat.messages[-1]["content"])

    def leave(self) -> None:
        self.does.close()
        self.until(lambda: self.view.gone)


@pytest.fixture()
def load(demo_model: Path) -> Callable[[Any], Llama]:
    return lambda warn: Llama(demo_model, kv_budget=256, n_ubatch=64, kv_warn=warn, verbose=False, seed=1)


@pytest.fixture()
def person(load: Any, tmp_path: Path) -> Iterator[Person]:
    someone = Person(load, tmp_path / "kept", max_tokens=12, temperature=0.0)
    yield someone
    if not someone.view.gone:
        someone.leave()


def test_an_answer_streams_and_the_next_turn_costs_itself(person: Person) -> None:
    first, second = person.does.chats
    answer = person.ask(first, "Name a river in Africa.")
    assert answer == "".join(person.view.pieces) and len(person.view.pieces) > 3
    assert first.stats.tokens_seen > 0 and first.stats.turn_generated > 0
    person.ask(second, "My name is Grace.")
    person.ask(first, "And one in Europe?")
    assert first.stats.turn_evaluated < 30 < first.stats.turn_reused
    person.ask(second, "What is my name?")
    assert second.stats.turn_evaluated < 30 < second.stats.turn_reused
    assert [m["role"] for m in second.messages] == ["user", "assistant"] * 2
    assert person.view.errors == []


def test_each_of_two_chats_is_answered_as_if_it_were_alone(person: Person, load: Any, tmp_path: Path) -> None:
    alone = Person(load, tmp_path / "other", max_tokens=12, temperature=0.0)
    questions = ["Name a river.", "And a lake?", "And a sea?"]
    expected = [alone.ask(alone.does.chats[0], question) for question in questions]
    alone.leave()
    first, second = person.does.chats
    answers = []
    for question in questions:
        answers.append(person.ask(first, question))
        person.ask(second, f"Translate into French: {question}")
    assert answers == expected


def test_a_chat_waits_for_the_answer_of_another(person: Person) -> None:
    first, second = person.does.chats
    person.does.send(first, "Count to ten.")
    person.does.send(second, "Name a colour.")
    assert first.busy and second.busy
    person.idle()
    assert [len(chat.messages) for chat in (first, second)] == [2, 2]


def test_one_that_waits_can_be_stopped_before_its_turn(person: Person) -> None:
    first, second = person.does.chats
    person.does.send(first, "Count to ten.")
    person.does.send(second, "Name a colour.")
    person.does.stop(second)
    person.idle()
    assert len(first.messages) == 2
    assert second.messages == [] and second.draft == "Name a colour."


def test_what_has_come_of_an_answer_that_is_stopped_stays(person: Person) -> None:
    chat = person.does.chats[0]
    person.view.on_piece = person.does.stop
    answer = person.ask(chat, "Count to a hundred.")
    assert answer and not chat.answer and "stopped" in person.view.told
    person.view.on_piece = lambda chat: None
    person.ask(chat, "Go on.")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_another_answer_costs_next_to_nothing(person: Person) -> None:
    chat = person.does.chats[0]
    first = person.ask(chat, "Name a river. " + DOCUMENT[:200])
    person.does.regenerate(chat)
    assert chat.busy and len(chat.messages) == 1
    person.idle()
    assert chat.messages[-1]["content"] == first  # nothing is left to chance at temperature 0
    assert chat.stats.turn_evaluated < 20


def test_an_answer_that_was_to_be_another_is_back_when_that_is_stopped_at_once(person: Person) -> None:
    chat = person.does.chats[0]
    first = person.ask(chat, "Name a river.")
    person.does.regenerate(chat)
    person.does.stop(chat)
    person.idle()
    assert len(chat.messages) == 2 and chat.messages[-1]["content"].startswith(first[:1])


def test_a_document_is_read_once_and_then_asked_about(person: Person, tmp_path: Path) -> None:
    chat = person.does.chats[0]
    (tmp_path / "port.txt").write_text(DOCUMENT, encoding="utf-8")
    person.does.read(chat, tmp_path / "port.txt")
    person.idle()
    done, total = person.view.read[-1]
    assert done == total > 200 and chat.stats.evicted > 0
    assert chat.document.name == "port.txt" and not chat.messages
    person.ask(chat, "Who is the keeper?")
    assert chat.stats.turn_evaluated < 40
    assert chat.shown(0) == "Who is the keeper?" and chat.messages[0]["content"].startswith(DOCUMENT.strip())
    assert chat.document is None and chat.title == "Who is the keeper?"
    assert any("drop" in text for text in person.view.told)  # what the cache warns of


def test_a_document_that_is_stopped_has_not_been_read(person: Person, tmp_path: Path) -> None:
    chat = person.does.chats[0]
    person.ask(chat, "Hello.")
    (tmp_path / "long.txt").write_text(DOCUMENT * 20, encoding="utf-8")
    person.does.read(chat, tmp_path / "long.txt")
    person.until(lambda: person.view.read)
    person.does.stop(chat)
    person.idle()
    assert chat.document is None and person.view.errors == []
    person.ask(chat, "And now?")
    assert chat.stats.turn_evaluated < 30


@pytest.mark.parametrize("content, reason", [(b"\xff\xfe\x00bin", "is not a text file"), (b" \n", "is empty"), (None, "No such file")])
def test_what_cannot_be_read_is_said(person: Person, tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    person.does.read(person.does.chats[0], tmp_path / "file")
    person.idle()
    assert [reason in error for error in person.view.errors] == [True]
    assert person.view.errors[0].startswith("file")
    assert person.does.chats[0].document is None and not person.does.chats[0].changed


def test_a_saved_chat_goes_on_in_a_tab_of_its_own(person: Person, tmp_path: Path) -> None:
    chat = person.does.chats[0]
    person.ask(chat, "My name is Ada.")
    person.does.save(chat, tmp_path / "ada.imsess")
    person.idle()
    person.ask(person.does.chats[1], "Something else.")
    person.does.open(tmp_path / "ada.imsess")
    person.until(lambda: len(person.does.chats) == 3)
    opened = person.does.chats[2]
    assert opened.messages == chat.messages
    assert person.ask(opened, "What is my name?") == person.ask(chat, "What is my name?")
    assert opened.stats.turn_evaluated < 30


def test_what_is_no_chat_is_refused_with_the_reason(person: Person, tmp_path: Path, load: Any) -> None:
    (tmp_path / "not.imsess").write_bytes(b"something else")
    with load(None) as other:
        other.create_completion("Once", max_tokens=2)
        other.save_session(tmp_path / "foreign.imsess", extra={"title": "?"})
    for name in ("not", "foreign"):
        person.does.open(tmp_path / f"{name}.imsess")
    person.until(lambda: len(person.view.errors) == 2)
    assert "not.imsess" in person.view.errors[0]
    assert "foreign.imsess" in person.view.errors[1] and "another program" in person.view.errors[1]
    assert len(person.does.chats) == 2


def test_closing_in_the_middle_of_an_answer_keeps_everything(load: Any, tmp_path: Path) -> None:
    before = Person(load, tmp_path, max_tokens=1000, temperature=0.0)
    first, second = before.does.chats
    before.does.send(first, "Count to a thousand.")
    before.does.send(second, "Name a colour.")
    before.until(lambda: before.view.pieces)
    before.leave()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["001.imsess", "002.imsess"]

    after = Person(load, tmp_path, max_tokens=4, temperature=0.0)
    after.until(lambda: len(after.does.chats) == 2)
    assert [chat.messages for chat in after.does.chats] == [first.messages, []]
    assert after.does.chats[1].draft == "Name a colour."
    after.does.remove(after.does.chats[1])
    after.ask(after.does.chats[0], "Go on.")
    after.leave()
    assert [path.name for path in tmp_path.iterdir()] == ["001.imsess"]


def test_a_chat_that_cannot_be_saved_keeps_the_window_open_once(person: Person, tmp_path: Path) -> None:
    for chat in person.does.chats:
        person.ask(chat, "Hello.")
    first, second = person.does.chats
    first.kept = tmp_path / "folder.imsess"
    first.kept.mkdir()
    person.does.close()
    person.until(lambda: not person.does.closing)
    person.idle()
    assert not person.view.gone and person.view.errors[-1].startswith("Hello. was not saved")
    assert "saved" not in person.view.told[-1]  # of the other one, which would hide the error
    assert first.changed and not second.changed and second.kept.exists()
    person.leave()


def test_it_tries_again_after_the_next_turn(person: Person, tmp_path: Path) -> None:
    chat = person.does.chats[0]
    person.ask(chat, "Hello.")
    chat.kept = tmp_path / "folder.imsess"
    chat.kept.mkdir()
    person.does.close()
    person.until(lambda: not person.does.closing)
    chat.kept.rmdir()
    person.ask(chat, "Go on.")
    person.leave()
    assert chat.kept.is_file() and not chat.changed


def test_a_model_that_cannot_be_loaded_is_said_and_the_window_closes(tmp_path: Path) -> None:
    person = Person(lambda warn: Llama(tmp_path / "none.gguf", kv_budget=256, kv_warn=warn), tmp_path)
    person.until(lambda: person.view.errors)
    assert "none.gguf" in person.view.errors[0]
    person.does.send(person.does.chats[0], "Hello?")
    person.idle()
    assert person.does.chats[0].draft == "Hello?" and len(person.view.errors) == 2
    person.leave()


def test_two_documents_are_one_before_the_question(person: Person, tmp_path: Path) -> None:
    chat = person.does.chats[0]
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"This is text {name}.")
        person.does.read(chat, tmp_path / name)
        person.idle()
    assert chat.document == chats.Document("one, two", "This is text one.\n\nThis is text two.")
    assert chat.stats.turn_evaluated < 20  # the first is not read again
