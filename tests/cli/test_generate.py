"""`indexmem generate`, and what it has in common with the chat: forms of answers, quiet, encodings. In new processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import indexmem_edge
from indexmem_edge.cli.sampling import AnswerOptions
from indexmem_edge.errors import IndexMemError
from indexmem_edge.files.textfile import argument_text, read_text
from indexmem_edge.native import find
from support.commands import one_error, run

needs_library = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")
FLAGS = ("--kv-budget", "192", "--kv-window", "32", "--temp", "0", "-t", "1")
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False}


@needs_library
@pytest.mark.usefixtures("demo_model")
def test_quiet_is_the_text_and_nothing_else() -> None:
    result = run("generate", *FLAGS, "-n", "4", "-q", "-p", "The capital of France is")
    assert result.returncode == 0 and "Paris" in result.stdout and result.stderr == ""
    chat = run("chat", *FLAGS, "-n", "40", "-q", stdin="Hello\n")
    assert chat.returncode == 0 and len(chat.stdout.splitlines()) >= 1
    assert all(line.startswith("note: ") for line in chat.stderr.splitlines())


@needs_library
@pytest.mark.usefixtures("demo_model")
def test_an_answer_of_no_tokens() -> None:
    result = run("generate", *FLAGS, "-n", "0", "--json", "-p", "The capital of France is")
    answer: dict[str, Any] = json.loads(result.stdout)
    assert (answer["text"], answer["finish_reason"]) == ("", "length")
    assert answer["stats"]["tokens_seen"] == answer["stats"]["turn_evaluated"] > 3


@needs_library
@pytest.mark.usefixtures("demo_model")
def test_guesses_change_no_word() -> None:
    flags = ("generate", *FLAGS, "--json", "-n", "40", "--repeat-penalty", "1", "-p", "The ferry comes back at noon with letters and apples. " * 16)
    plain, guessed = (json.loads(run(*flags, *more).stdout) for more in ((), ("--draft-lookup", "8")))
    assert plain["text"] == guessed["text"] and plain["stats"]["evictions"] > 1
    for name in ("tokens_seen", "kept", "evicted", "evictions"):
        assert plain["stats"][name] == guessed["stats"][name], name


@needs_library
@pytest.mark.usefixtures("demo_model")
def test_an_answer_ends_before_a_text() -> None:
    flags = ("generate", *FLAGS, "-q", "-n", "12", "-p", "A B C D E")
    whole = run(*flags).stdout
    assert " G H" in whole
    assert run(*flags, "--stop", " I", "--stop", " H").stdout == whole[: whole.index(" H")] + "\n"


@needs_library
@pytest.mark.usefixtures("demo_model")
def test_an_answer_has_the_form_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "yes.gbnf").write_text('root ::= "yes" | "no"\n')
    result = run("generate", *FLAGS, "-q", "--chat", "-p", "Is the sea dry?", "--grammar", str(tmp_path / "yes.gbnf"))
    assert result.stdout.strip() in ("yes", "no")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    for schema in (str(tmp_path / "schema.json"), f" {json.dumps(SCHEMA)}"):
        chat = run("chat", *FLAGS, "-n", "60", "-q", "--json", "--json-schema", schema, stdin="How old is the sea?\n")
        answer = json.loads(json.loads(chat.stdout)["answer"])
        assert set(answer) == {"age"} and isinstance(answer["age"], int)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"grammar": Path("no/such.gbnf")}, ("no/such.gbnf", "No such file")),
        ({"json_schema": "no/such.json"}, ("no/such.json", "No such file")),
        ({"json_schema": '{"type": '}, ("--json-schema is not JSON",)),
        ({"json_schema": '{"type": "nonsense"}'}, ("--json-schema cannot be made into a grammar",)),
        ({"json_schema": "{}", "grammar": Path("a")}, ("--grammar and --json-schema", "one of them")),
        ({"stop": [""]}, ("--stop is empty",)),
        ({"stop": ["caf\udce9"]}, ("--stop is not UTF-8",)),
    ],
)
@needs_library
def test_forms_that_cannot_be(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(IndexMemError) as error:
        AnswerOptions(**options).keywords()
    for word in words:
        assert word in str(error.value)


@needs_library
@pytest.mark.usefixtures("demo_model")
def test_what_is_wrong_with_a_form_is_said_before_the_model_is_loaded() -> None:
    for command in (("chat",), ("generate", "-p", "x")):
        one_error(run(*command, "-m", "no/such.gguf", "--json-schema", "[]"), "No such file", "[]")


# encodings


def raw(*arguments: bytes, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    root = str(Path(indexmem_edge.__file__).parents[1])
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), **environment}
    command = [os.fsencode(sys.executable), b"-m", b"indexmem_edge", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=300, cwd=root, env=variables)


@pytest.mark.skipif(os.name != "posix", reason="arguments are bytes")
@needs_library
@pytest.mark.usefixtures("demo_model")
def test_what_is_not_utf_8_is_one_line() -> None:
    latin = "café".encode("latin-1")
    for command in (
        [b"generate", b"-p", latin],
        [b"generate", b"-f", b"-"],
        [b"generate", b"-p", b"x", b"-sys", latin],
        [b"chat", b"-sys", latin],
    ):
        result = raw(*command, b"-t", b"1", stdin=latin)
        lines = result.stderr.decode().splitlines()
        assert result.returncode == 1 and len(lines) == 1 and "not UTF-8" in lines[0] and result.stdout == b""
    chat = raw(b"chat", b"-t", b"1", b"-n", b"2", b"-q", stdin=latin + b"\n")
    assert chat.returncode == 0 and chat.stdout.strip()


@pytest.mark.skipif(os.name != "posix", reason="arguments are bytes")
@needs_library
@pytest.mark.usefixtures("demo_model")
@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
    ],
    ids=["C", "C, no UTF-8", "cp1252"],
)
def test_a_console_without_unicode_shows_what_it_can(locale: dict[str, str]) -> None:
    """It reads the same text as others, and never stops."""
    command = [b"generate", b"-t", b"1", b"-n", b"3", b"--temp", b"0", b"--json", b"-p", "日本語 ☃ é".encode()]
    result, usual = raw(*command, **locale), raw(*command)
    assert result.returncode == 0, result.stderr.decode()
    assert json.loads(result.stdout)["text"] == json.loads(usual.stdout)["text"]
    shown = raw(*(part for part in command if part != b"--json"), **locale)
    assert shown.returncode == 0 and b"Traceback" not in shown.stderr


def test_marks_of_another_locale_are_undone() -> None:
    assert argument_text("-p", "é".encode().decode("ascii", "surrogateescape")) == "é"
    assert argument_text("-p", "é ☃") == "é ☃"
    with pytest.raises(IndexMemError, match="the text of -p is not UTF-8"):
        argument_text("-p", b"\xe9".decode("ascii", "surrogateescape"))


@pytest.mark.skipif(os.name != "posix", reason="files that are none")
def test_a_text_may_come_through_a_pipe_of_the_shell(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", f"printf 'the text' > '{tmp_path}/pipe'"])
    assert read_text(tmp_path / "pipe", pipes=True) == "the text" and writer.wait(60) == 0
    for path in ("/dev/zero", tmp_path):
        with pytest.raises(IndexMemError, match="expected a regular file"):
            read_text(path, pipes=True)
