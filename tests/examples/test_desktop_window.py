"""docs/examples/desktop as a person uses it: a real window on a display of its own, a real model behind it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import indexmem_edge
from indexmem_edge import Llama
from indexmem_edge.native import find
from support.display import virtual_display
from support.examples import EXAMPLES, desktop

tkinter = pytest.importorskip("tkinter", reason="Python is without tkinter: apt install python3-tk (Debian)")
if find.library_file() is None:
    pytest.skip("the native library has not been built", allow_module_level=True)

PATIENCE = 60.0  # seconds, until a test that waits for something gives up
ROOTS: list[Any] = []  # of closed windows: Tk aborts when another thread's garbage collector frees it, so nothing does
DOCUMENT = "The lighthouse of Port Elden is painted green. Its keeper is called Maren Holt. " * 20


class Person:
    """Looks at a window and uses it. The program runs in its own main loop, which is left to see what came of it."""

    def __init__(self, window: Any) -> None:
        self.window, self.root = window, window.root
        self.open = True
        ROOTS.append(self.root)
        self.root.bind("<Destroy>", self._gone)
        self.errors: list[str] = []
        tell = window.tell

        def told(text: str, error: bool = False) -> None:
            self.errors += [text] if error else []
            tell(text, error)

        window.tell = told

    def _gone(self, event: Any) -> None:
        if event.widget is self.root:
            self.open = False

    def until(self, what: Callable[[], object]) -> None:
        """Lets the window live until something is so."""
        end = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < end, (self.errors, self.window.status["text"] if self.open else "closed")
            self.root.dooneevent()

    @property
    def tab(self) -> Any:
        return self.window.tab(self.window.chat)

    @property
    def said(self) -> str:
        return str(self.tab.said.get("1.0", "end-1c"))

    def type(self, text: str) -> None:
        self.tab.entry.insert("end", text)
        self.tab.entry.focus_force()
        self.root.update()
        self.tab.entry.event_generate("<Return>")

    def idle(self) -> None:
        self.until(lambda: not self.window.chat.busy)

    def listed(self, name: object) -> str:
        """A list of this alone, as Tcl writes it."""
        return str(self.root.tk.call("format", "%s", (str(name),)))

    def look_at(self, tab: int) -> None:
        self.window.notebook.select(tab)
        self.root.update()

    def leave(self) -> None:
        self.window.close()
        self.until(lambda: not self.open)


@pytest.fixture(scope="module")
def display() -> Iterator[str]:
    with virtual_display() as name:
        yield name


@pytest.fixture()
def start(display: str, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Person]]:
    monkeypatch.setenv("DISPLAY", display)
    people: list[Person] = []

    def begin(**sampling: Any) -> Person:
        window = desktop("window").Window(
            lambda warn: Llama(demo_model, kv_budget=256, n_ubatch=64, kv_warn=warn, verbose=False, seed=1),
            tmp_path / "kept",
            **{"max_tokens": 12, "temperature": 0.0, **sampling},
        )
        window.start()
        people.append(Person(window))
        return people[-1]

    yield begin
    for person in people:
        if person.open:
            person.leave()


def test_a_conversation(start: Callable[[], Person], tmp_path: Path) -> None:
    person = start()
    person.look_at(0)
    assert person.tab.stop.instate(["disabled"])

    person.type("Name a river in Africa.")
    person.until(lambda: person.window.chat.answer)
    assert person.tab.send.instate(["disabled"]) and person.tab.stop.instate(["!disabled"])
    assert person.said.startswith("You\nName a river in Africa.\n\nModel\n")
    assert person.said.endswith(person.window.chat.answer)
    person.idle()
    answer = person.window.chat.messages[-1]["content"]
    assert person.said == f"You\nName a river in Africa.\n\nModel\n{answer}"
    assert "last question:" in person.window.meter.text and person.tab.typed == ""

    person.tab.regenerate.invoke()
    assert not person.said.endswith(answer)
    person.idle()
    assert person.said.endswith(answer)

    person.look_at(1)
    assert person.said == "" and person.window.meter.text == "the cache is empty"
    person.type("Hello.")
    person.idle()
    person.look_at(0)
    assert person.said.endswith(answer)
    person.type("And in Europe?")
    person.idle()
    assert person.window.chat.stats.turn_evaluated < 30
    assert f"{person.window.chat.stats.turn_evaluated} tokens read" in person.window.meter.text
    assert person.errors == []


def test_stop(start: Callable[..., Person]) -> None:
    person = start(max_tokens=1000)
    person.type("Count to a thousand.")
    person.until(lambda: len(person.window.chat.answer) > 5)
    person.tab.stop.invoke()
    person.idle()
    assert person.window.status["text"] == "stopped"
    assert 5 < len(person.window.chat.messages[-1]["content"]) < 1000
    assert person.tab.stop.instate(["disabled"]) and person.tab.send.instate(["!disabled"])


def test_escape_before_the_answer_gives_the_question_back(start: Callable[..., Person]) -> None:
    person = start(max_tokens=1000)
    person.type("A question. " * 200)
    assert person.tab.typed == ""
    person.tab.entry.event_generate("<Escape>")
    person.idle()
    assert person.tab.typed == ("A question. " * 200).strip() and person.said == ""


def test_a_document_that_is_dropped(start: Callable[[], Person], tmp_path: Path) -> None:
    person = start()
    path = tmp_path / "port {elden}.txt"
    path.write_text(DOCUMENT, encoding="utf-8")
    person.window.dropped(person.listed(path))
    assert "reading port {elden}.txt" in person.tab.document["text"]
    person.until(lambda: person.tab.progress.winfo_ismapped())
    person.idle()
    assert not person.tab.progress.winfo_ismapped()
    assert person.tab.document["text"] == "port {elden}.txt: ask about it"
    person.type("Who is the keeper?")
    person.idle()
    assert person.said.startswith("You\n[port {elden}.txt]\nWho is the keeper?\n")
    assert f"{person.window.chat.stats.evicted} evicted" in person.window.meter.text
    assert person.window.chat.stats.evicted > 0
    assert person.window.chat.stats.turn_evaluated < 40


def test_a_drop_arrives(start: Callable[[], Person], tmp_path: Path) -> None:
    pytest.importorskip("tkinterdnd2", reason="there is no tkinterdnd2: pip install tkinterdnd2")
    person = start()
    path = tmp_path / "port {elden}.txt"
    path.write_text(DOCUMENT[:200], encoding="utf-8")
    script = str(person.root.tk.call("bind", ".", "<<Drop>>"))
    values = {"%W": ".", "%X": "0", "%Y": "0", "%A": "copy", "%D": person.listed(person.listed(path))}
    script = re.sub(r"\{?(%[A-Za-z]+)\}?", lambda found: str(values.get(found[1], "{}")), script)
    assert person.root.tk.eval(script) == "copy"  # as the extension does when a file is let go above the window
    person.idle()
    assert person.tab.document["text"].startswith("port {elden}.txt") and person.errors == []


def test_save_and_open(start: Callable[[], Person], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    person = start()
    person.type("My name is Ada.")
    person.idle()
    said = person.said
    dialogs = desktop("window").filedialog
    for name in ("asksaveasfilename", "askopenfilename"):
        monkeypatch.setattr(dialogs, name, lambda **_: str(tmp_path / "ada.imsess"))
    person.window._choose_name()
    person.idle()
    assert person.window.status["text"].startswith("saved as ada.imsess")
    person.window._choose_session()
    person.until(lambda: len(person.window.notebook.tabs()) == 3)
    assert person.said == said
    person.type("What is my name?")
    person.idle()
    assert person.window.chat.stats.turn_evaluated < 30 and person.errors == []
    person.window.dropped(person.listed(tmp_path / "ada.imsess"))  # which is no document
    person.until(lambda: len(person.window.notebook.tabs()) == 4)
    assert person.said == said and person.window.notebook.tab("current", "text") == "My name is Ada."


def test_closing_while_it_answers_and_coming_back(start: Callable[..., Person], tmp_path: Path) -> None:
    person = start(max_tokens=1000)
    person.type("Count to a thousand.")
    person.until(lambda: len(person.window.chat.answer) > 5)
    chat = person.window.chat
    person.leave()
    assert chat.messages[-1]["role"] == "assistant"

    again = start()
    again.until(lambda: len(again.window.notebook.tabs()) == 2)
    again.look_at(0)
    assert again.said.endswith(chat.messages[-1]["content"])


def test_errors_are_shown(start: Callable[[], Person], tmp_path: Path) -> None:
    person = start()
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff\xfe")
    person.window.dropped(person.listed(tmp_path / "picture.txt"))
    person.idle()
    assert "picture.txt is not a text file" in person.window.status["text"]
    assert str(person.window.status["foreground"]) == "#b00020"

    def broken() -> None:
        raise RuntimeError("a mistake of the program")

    person.root.after(1, broken)
    person.until(lambda: "a mistake of the program" in person.window.status["text"])
    person.type("Hello.")
    person.idle()
    assert person.said.startswith("You\nHello.\n\nModel\n")


def test_return_sends_and_shift_return_makes_a_line(start: Callable[[], Person]) -> None:
    person = start()
    person.tab.entry.insert("end", "One")
    person.tab.entry.focus_force()
    person.root.update()
    person.tab.entry.event_generate("<Shift-Return>")
    person.tab.entry.insert("end", "two")
    assert person.tab.typed == "One\ntwo"
    person.type("")
    person.idle()
    assert person.said.startswith("You\nOne\ntwo\n")


def test_a_tab_that_is_closed(start: Callable[[], Person]) -> None:
    person = start()
    person.type("Count to a hundred.")
    person.window.controller.remove(person.window.chat)
    person.until(lambda: len(person.window.notebook.tabs()) == 2)
    person.type("Hello.")
    person.idle()
    assert person.errors == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says which files a process has mapped")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_program(display: str, demo_model: Path, tmp_path: Path, number: int) -> None:
    roots = [str(Path(indexmem_edge.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "DISPLAY": display, "PYTHONPATH": os.pathsep.join(filter(None, roots))}
    command = [sys.executable, str(EXAMPLES / "desktop" / "app.py"), "-m", str(demo_model), "--folder", str(tmp_path)]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    end = time.monotonic() + PATIENCE
    while demo_model.name not in Path(f"/proc/{program.pid}/maps").read_text():
        assert program.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    program.send_signal(number)
    assert program.communicate(timeout=PATIENCE)[1] == ""
    assert program.returncode == 0 and list(tmp_path.iterdir()) == []
