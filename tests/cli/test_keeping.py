"""`--session FILE`: the file follows the conversation, and whatever happens, one that was whole stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.cli import keeping
from indexmem_edge.cli.chat import Chat
from indexmem_edge.cli.keeping import Keeper
from indexmem_edge.cli.options import RunOptions
from indexmem_edge.cli.sampling import AnswerOptions
from indexmem_edge.errors import SessionError
from indexmem_edge.native import find
from indexmem_edge.sessions import file as sessionfile, session
from support.cancelling import Load, Nodes, load
from support.commands import run

__all__ = ["load"]  # a fixture

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "talk.imsess"


class Input:
    """Lines of a program. What is no line is called in its place, with the chat."""

    leave = "their end leaves"

    def __init__(self, chat: Chat, entries: tuple[Any, ...]) -> None:
        self._chat, self._entries = chat, list(entries)

    def read(self, draft: str = "") -> Any:
        while self._entries:
            entry = self._entries.pop(0)
            if isinstance(entry, str):
                return entry
            entry(self._chat)
        return None


@pytest.fixture
def talk(load: Load, path: Path) -> Iterator[Callable[..., Any]]:
    """talk(*lines, kind=..., **options) -> (status, Chat): a whole chat with `--session`"""

    def run(*entries: Any, kind: str = "keydiff", llm: Any = None, **options: Any) -> tuple[int, Chat]:
        with Keeper(str(path)) as keeper:
            given = {"predict": 6, "temp": 0.0, **options}
            chat = Chat(llm or load(kind), RunOptions(**given), AnswerOptions(), keeper=keeper)
            chat._reader = Input(chat, entries)
            return chat.run(), chat

    yield run
    assert not [name for name in os.listdir(path.parent) if name.endswith((".lock", ".tmp"))]


def kept(path: Path) -> list[str]:
    """The contents of the messages in the file."""
    return [m["content"] for m in sessionfile.read(path).extra["messages"]]


def said(chat: Chat) -> list[str]:
    return [m["content"] for m in chat._conversation.messages]


def test_it_goes_on_where_it_ended(talk: Any, path: Path, capsys: Any) -> None:
    _, first = talk("What is the sea? " * 10, "/branch b", "And the land?")
    assert kept(path) == said(first) and path.stat().st_mode & 0o777 == 0o600
    assert "talk.imsess" not in capsys.readouterr().err  # nothing is said of what goes well
    state = first._llm.n_tokens
    status, second = talk()
    assert status == 0 and said(second) == said(first) and list(second._branches) == ["b", "main"]
    assert second._llm.n_tokens == state
    told = capsys.readouterr().err
    assert told == f'note: {path} goes on after {state:,} tokens: 4 messages, "And the land?"\n'


def test_what_has_not_changed_is_not_written(talk: Any, path: Path) -> None:
    talk("Hello")
    before = path.stat()
    talk("/stats", "/branch")
    assert path.stat() == before
    _, chat = talk("/branch b")
    assert path.stat() != before and list(chat._branches) == ["b", "main"]


def test_a_conversation_with_nothing_in_it_makes_no_file(talk: Any, path: Path) -> None:
    assert talk("/stats", "/help", "/system Be brief.", "/nonsense")[0] == 1 and not path.exists()
    talk("Hello", "/reset")
    assert not path.exists()


def test_a_reset_begins_anew_and_the_file_follows(talk: Any, path: Path) -> None:
    talk("Hello", system="Be brief.")
    talk("/reset")
    assert kept(path) == ["Be brief."]
    _, chat = talk("And now?")
    assert len(kept(path)) == 3 and kept(path)[:2] == ["Be brief.", "And now?"]


def test_a_document_and_a_stopped_answer_are_in_it(talk: Any, path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The keeper is old.")
    talk(f"/read {tmp_path}/a.txt")
    assert sessionfile.read(path).extra["document"].endswith("The keeper is old.")
    talk("Who is old?")
    assert kept(path)[0].endswith("Who is old?")


def test_load_and_save_go_on_as_before(talk: Any, path: Path, tmp_path: Path, capsys: Any) -> None:
    talk("One.", f"/save {tmp_path}/one", "Two.")
    _, chat = talk(f"/load {tmp_path}/one")
    assert f"{path} has this conversation from now on" in capsys.readouterr().err
    assert kept(path) == kept(tmp_path / "one") == said(chat) and len(said(chat)) == 2


def test_a_session_as_the_background_of_a_new_conversation(talk: Any, path: Path, tmp_path: Path, capsys: Any) -> None:
    _, old = talk("What is the sea? " * 3, f"/save {tmp_path}/my old talk")
    known = old._llm.n_tokens
    path.unlink()
    load_it = f"/load '{tmp_path}/my old talk' --as-background"
    _, chat = talk("/system Be brief.", "Hello", load_it, "And the land?")
    assert f"my old talk ({known:,} tokens), until /reset" in capsys.readouterr().err
    assert len(said(chat)) == 3 and said(chat)[:2] == ["Be brief.", "And the land?"] == kept(path)[:2]
    assert chat._llm.kv_stats().background == known and list(chat._branches) == ["main"]
    assert talk()[1]._llm.kv_stats().background == known
    assert talk("/reset", "Hello")[1]._llm.kv_stats().background == 0
    path.unlink()
    assert talk(load_it, kind="unbounded")[0] == 1 and "needs a kv_budget" in capsys.readouterr().err


def test_a_session_that_does_not_fit_is_read_again(talk: Any, path: Path, tmp_path: Path, capsys: Any) -> None:
    _, old = talk("What is the sea? " * 3, f"/save {tmp_path}/old")
    path.unlink()
    assert talk(f"/load {tmp_path}/old", kind="unbounded")[0] == 1 and "/load FILE --again in a chat" in capsys.readouterr().err
    status, chat = talk(f"/load {tmp_path}/old --again", kind="unbounded")
    assert status == 0 and said(chat) == said(old) == kept(path) and chat._llm.n_tokens == old._llm.n_tokens
    _, chat = talk("Hello", f"/load {tmp_path}/old --again --as-background", "/stats", kind="unbounded")
    assert len(said(chat)) == len(said(old)) + 2


def test_reading_a_session_again_can_be_stopped(talk: Any, path: Path, tmp_path: Path, load: Load, capsys: Any) -> None:
    _, old = talk("What is the sea? " * 20, f"/save {tmp_path}/old")
    path.unlink()
    llm = load("unbounded")
    with Nodes(llm, stop_after=40):
        status, chat = talk(f"/load {tmp_path}/old --again", llm=llm)
    assert status == 1 and said(chat) == [] and "was not loaded" in capsys.readouterr().err and llm.n_tokens == 0


def test_a_system_prompt_that_is_asked_for_takes_the_place_of_the_one_in_the_file(talk: Any, path: Path, capsys: Any) -> None:
    talk("Hello", system="Be brief.")
    _, chat = talk(system="Be brief.")
    assert "read again" not in capsys.readouterr().err
    _, chat = talk(system="Be long.")
    assert said(chat)[0] == "Be long." and "another system prompt" in capsys.readouterr().err
    assert kept(path)[0] == "Be brief."  # nothing has been said
    talk("And now?", system="Be long.")
    assert kept(path)[0] == "Be long." and len(kept(path)) == 5


def test_a_program_is_kept_too(talk: Any, path: Path) -> None:
    talk('[{"role": "system", "content": "s"}, {"role": "user", "content": "a\\nb"}]', as_json=True)
    assert kept(path)[:2] == ["s", "a\nb"]


# files that are refused


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_a_program(path: Path) -> None:
    data = sessionfile.read(path)
    sessionfile.write(path, sessionfile.SessionData(data.header, data.tokens, {"mine": 1}, data.state))


def of_another_model(path: Path) -> None:
    data = sessionfile.read(path)
    sessionfile.write(path, sessionfile.SessionData({**data.header, "model": "other"}, data.tokens, data.extra, data.state))


@pytest.mark.parametrize("change", [damage, cut, empty, of_a_program, of_another_model], ids=lambda f: f.__name__)
def test_a_file_that_is_refused_stays_as_it_is(talk: Any, path: Path, change: Any) -> None:
    talk("Hello")
    change(path)
    before = path.read_bytes()
    with pytest.raises(SessionError, match=path.name):
        talk("Is anybody there?")
    assert path.read_bytes() == before


def test_a_session_of_a_program_is_not_loaded(talk: Any, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk("Hello")
    data = sessionfile.read(path)
    program = path.with_name("program")
    for extra in (None, [], {"messages": 3}):
        sessionfile.write(program, sessionfile.SessionData(data.header, data.tokens, extra, data.state, data.logits))
        assert talk(f"/load {program}")[0] == 1
        assert "was not saved by a chat: it has no messages" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="files that are none")
def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "no regular file"), (".", "no regular file"), ("none/talk", "no folder")):
        with pytest.raises(SessionError, match=words), Keeper(str(tmp_path / name)):
            pass


def test_two_chats(talk: Any, path: Path) -> None:
    with Keeper(str(path)), pytest.raises(SessionError, match=rf"another chat \(process {os.getpid()}\).*talk.imsess"):
        talk("Hello")
    assert talk("Hello")[0] == 0


# when it is written


def written(chat: Chat) -> None:
    """Waits until the thread that is due has done so."""
    assert chat._keeper is not None and chat._keeper._writer is not None
    chat._keeper._writer.join()


def test_it_is_written_every_few_turns(talk: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_SECONDS", 1e6)
    seen: list[int] = []
    look = lambda chat: seen.append(len(kept(path)) if path.exists() else 0)  # noqa: E731
    talk("1", "2", "3", look, "/stats", "4", written, look, "5", look)
    assert seen == [0, 8, 8] and len(kept(path)) == 10


def test_it_is_written_when_nothing_happens_for_long(talk: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_SECONDS", 0.2)
    talk("1", written, lambda chat: kept(path) == said(chat) or pytest.fail("it is not there"))


def test_writing_takes_a_small_part_of_the_time(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_TURNS", 1)
    waits: list[float] = []

    def look(chat: Chat) -> None:
        assert chat._keeper is not None and chat._keeper._writer is not None
        waits.append(chat._keeper._writer.after)

    monkeypatch.setattr(keeping, "_REST", 1e6)
    talk("1", look, written, "2", look)
    assert waits[0] == 0 and waits[1] > 1


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn is written at once."""
    monkeypatch.setattr(keeping, "_TURNS", 1)
    monkeypatch.setattr(keeping, "_REST", 0)


def test_it_is_copied_while_nothing_changes(talk: Any, path: Path, load: Load, eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, changing, seen = load("keydiff"), threading.Event(), []
    take, add = session.taken, Chat._add

    def taking(*args: Any) -> Any:
        elsewhere = threading.current_thread() is not threading.main_thread()
        seen.append((elsewhere, changing.wait(0.05 if elsewhere else 0)))  # time for the chat to go on, if it would
        return take(*args)

    def adding(chat: Chat, conversation: Any) -> None:
        changing.set()
        add(chat, conversation)
        changing.clear()

    monkeypatch.setattr(session, "taken", taking)
    monkeypatch.setattr(Chat, "_add", adding)
    talk(*map(str, range(8)), llm=llm)
    assert (True, False) in seen and not any(changed for _, changed in seen) and len(kept(path)) == 16


def test_the_chat_goes_on_while_it_is_written(talk: Any, path: Path, eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write, may_write, sizes = sessionfile.write, threading.Event(), []

    def writing(path: Any, data: Any) -> int:
        assert may_write.wait(30)
        sizes.append(len(data.extra["messages"]))
        return write(path, data)

    def write_now(chat: Chat) -> None:
        assert len(said(chat)) == 6 and not path.exists()
        may_write.set()

    monkeypatch.setattr(sessionfile, "write", writing)
    talk("1", copied, "2", "3", write_now)
    assert sizes[0] == 2 and sizes == sorted(sizes) and len(kept(path)) == sizes[-1] == 6  # one at a time, the newest last


def copied(chat: Chat) -> None:
    """Waits until what is to be written has been copied."""
    assert chat._keeper is not None and chat._keeper._writer is not None
    chat._keeper._writer.copied.wait()


# what can go wrong


@pytest.fixture
def full(eager: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """full(True): the disk is full from now on."""
    write = sessionfile.write
    state = [False]

    def writing(path: Any, data: Any) -> int:
        if state[0]:
            raise SessionError(f"cannot save the session to {path}: No space left on device")
        return write(path, data)

    monkeypatch.setattr(sessionfile, "write", writing)
    return lambda now: lambda chat=None: state.__setitem__(0, now)


def test_a_full_disk_is_told_once_and_at_the_end(talk: Any, path: Path, full: Any, capsys: Any) -> None:
    status, chat = talk("1", written, full(True), "2", written, "3", written, "4")
    told = capsys.readouterr().err
    assert status == 1 and len(said(chat)) == 8 and len(kept(path)) == 2
    assert told.count("the chat goes on, and tries again") == 1
    assert told.splitlines()[-1] == f"error: cannot save the session to {path}: No space left on device: the file ends before what was said since"


def test_a_disk_that_has_room_again(talk: Any, path: Path, full: Any, capsys: Any) -> None:
    assert talk(full(True), "1", written, "2", full(False))[0] == 0
    assert len(kept(path)) == 4 and capsys.readouterr().err.count("tries again") == 1


def test_nothing_is_lost_where_nothing_was_said(talk: Any, full: Any) -> None:
    assert talk(full(True), "/stats")[0] == 0


def test_a_folder_that_goes_away(talk: Any, path: Path, tmp_path: Path, capsys: Any) -> None:
    def go(chat: Chat) -> None:
        tmp_path.rename(tmp_path.with_name(tmp_path.name + "-gone"))

    status, chat = talk("1", go)
    tmp_path.with_name(tmp_path.name + "-gone").rename(tmp_path)
    (tmp_path / "talk.imsess.lock").unlink()
    assert status == 1 and "No such file" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("writable", [True, False])
def test_a_folder_in_which_nothing_can_be_made(talk: Any, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, writable: bool) -> None:
    talk("1")
    before = path.read_bytes()

    def refused(target: str) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(keeping, "holding", refused)
    monkeypatch.setattr(os, "access", lambda *_: writable)
    status, chat = talk()
    assert status == 0 and path.read_bytes() == before and len(said(chat)) == 2
    assert ("Permission denied: the chat goes on" in capsys.readouterr().err) is not writable


def test_what_a_crash_has_left_is_removed(talk: Any, path: Path) -> None:
    left = path.with_name(".talk.imsess-abcd_123.tmp")
    others = [path.with_name(name) for name in (".talk.imsess-other-abcd_123.tmp", ".talk-abcd_123.tmp", ".talk.imsess-a.tmp")]
    for file in (left, *others):
        file.write_bytes(b"half")
    talk("1")
    assert not left.exists() and all(file.exists() for file in others)
    for file in others:
        file.unlink()


# a program that is killed

KILLED = """
import os, signal, sys, tempfile
from indexmem_edge.cli import keeping
path, name, when = sys.argv[1:4]
keeping._TURNS, keeping._REST = 1, 0
module = tempfile if name == "mkstemp" else os
step = getattr(module, name)

def dying(*arguments, **keywords):
    if not os.path.exists(path):
        return step(*arguments, **keywords)  # the first time, all goes well
    if when == "after":
        step(*arguments, **keywords)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(module, name, dying)
sys.argv[1:] = ["chat", "--session", path, *sys.argv[4:]]
from indexmem_edge.cli.start import main
main()
"""
STEPS = [("mkstemp", "after"), ("fsync", "before"), ("replace", "before"), ("replace", "after")]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
@pytest.mark.parametrize("step", STEPS, ids="-".join)
def test_killed_while_it_is_written(path: Path, tiny: Any, step: tuple[str, str]) -> None:
    options = ("-m", str(tiny("llama")[0]), "--kv-budget", "160", "-ub", "32", "-t", "1", "-n", "4", "--temp", "0")
    root = str(Path(keeping.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "INDEXMEM_CHECK": "0"}
    command = [sys.executable, "-c", KILLED, str(path), *step, *options]
    killed = subprocess.run(command, input="1\n" * 9, capture_output=True, text=True, env=environment, timeout=100)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = kept(path)
    assert len(before) >= 2 and path.with_name("talk.imsess.lock").exists()
    gone_on = run("chat", "--session", str(path), *options, stdin="2\n", INDEXMEM_CHECK="0")
    assert gone_on.returncode == 0 and f"{len(before)} messages" in gone_on.stderr, gone_on.stderr
    assert kept(path)[:-2] == before and os.listdir(path.parent) == [path.name]


# whoever asks the program to end


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("number", SIGNALS)
def test_asked_to_end_while_it_waits(talk: Any, path: Path, number: int) -> None:
    with pytest.raises(SystemExit) as left:
        talk("Hello", lambda chat: signal.raise_signal(number), "not read any more")
    assert left.value.code == 128 + number and len(kept(path)) == 2
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("number", SIGNALS)
def test_asked_to_end_in_an_answer(talk: Any, path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    pieces: list[str] = []
    with pytest.raises(SystemExit):

        def arrange(chat: Chat) -> None:
            def stream(piece: str) -> None:
                pieces.append(piece)
                if len(pieces) == 3:
                    signal.raise_signal(number)

            monkeypatch.setattr(chat._terminal, "stream", stream)

        talk("Hello", arrange, "What is the sea?", "not read any more", predict=40)
    assert kept(path)[2:] == ["What is the sea?", "".join(pieces)] and len(pieces) == 3


class Asked(Nodes):
    """Asks the program to end, again and again, from a node on."""

    def __init__(self, llm: Any, number: int, node: int) -> None:
        super().__init__(llm)
        cancel = self._callback

        def after_node(data: Any) -> bool:
            cancel(data)
            if self.count >= node:
                signal.raise_signal(number)
            return self.count > node and llm._calls._flag.value != 0

        self._callback = type(self._callback)(after_node)


@pytest.mark.parametrize("number", SIGNALS)
def test_asked_to_end_while_it_reads(talk: Any, path: Path, load: Load, number: int) -> None:
    llm = load("keydiff")
    asked = Asked(llm, number, 40)
    with pytest.raises(SystemExit) as left:
        talk("Hello", lambda chat: asked.__enter__(), "What is the sea? " * 20, "not read any more", llm=llm)
    asked.__exit__()
    assert left.value.code == 128 + number and len(kept(path)) == 2
    assert len(sessionfile.read(path).tokens) == llm.n_tokens < 100


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal")
def test_under_nohup_it_goes_on(talk: Any, path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert talk("1", lambda chat: signal.raise_signal(signal.SIGHUP), "2")[0] == 0 and len(kept(path)) == 4
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_does_not_stop_the_last_save(talk: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = sessionfile.write

    def writing(path: Any, data: Any) -> int:
        for number in (signal.SIGINT, *SIGNALS):
            signal.raise_signal(number)
        return write(path, data)

    monkeypatch.setattr(sessionfile, "write", writing)
    assert talk("1")[0] == 0 and len(kept(path)) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
