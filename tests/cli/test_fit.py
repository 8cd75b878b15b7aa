"""`indexmem fit`: the table for people, JSON for programs, the command that it advises, and errors in one line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Tiny
from indexmem_edge.cli.amounts import parsed_bytes
from indexmem_edge.cli.fit import _measured, facts, shell_line, show
from indexmem_edge.errors import BudgetError
from indexmem_edge.models.advice import advise
from indexmem_edge.models.fit import Fit, Memory, Row, fit
from indexmem_edge.native import find
from support.commands import one_error, run
from tiny.models import REFUSED

needs_library = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")
GIB = 1 << 30


@pytest.mark.parametrize(
    "text, size",
    [("8G", 8 * GIB), ("8GiB", 8 * GIB), ("8gb", 8 * GIB), ("512M", 512 << 20), ("1.5G", 3 << 29), (" 7 G ", 7 * GIB), ("4096", 4096), ("0", 0), ("2T", 2 << 40), ("64k", 65536)],
)
def test_amounts(text: str, size: int) -> None:
    assert parsed_bytes("--memory", text) == size


@pytest.mark.parametrize("text", ["", "G", "-8G", "8X", "8 GG", "1e9", "0x10", "8G 2", "lots", "9" * 30, "٨G", "nan", "inf"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(BudgetError, match="--memory must be an amount of memory such as 8G, 8GiB or 512M, found"):
        parsed_bytes("--memory", text)


def test_a_line_that_a_shell_takes_as_it_was_meant() -> None:
    words = ("indexmem", "chat", "-m", "/a b/it's.gguf")
    assert shlex.split(shell_line(words, "linux")) == list(words)
    assert shell_line(words, "win32") == 'indexmem chat -m "/a b/it\'s.gguf"'


@needs_library
def test_the_advice_can_be_typed(tiny: Tiny) -> None:
    path = tiny("llama")[0]
    result = run("fit", str(path), "--memory", "2G", "--seconds", "30", "--json")
    assert result.returncode == 0 and result.stderr == ""
    found = json.loads(result.stdout)
    row = found["rows"][found["advice"]["row"]]
    assert row["fits"] and row["cache_type"] == "f16" and row["exact_tokens"] == row["budget"]
    assert row["budget"] in (1024, 2048, 4096 - 512)  # the largest that is not slow: what that is was measured
    assert row["bytes"]["total"] == sum(size for part, size in row["bytes"].items() if part != "total")
    assert row["speed"]["write"] > 0 and row["speed"]["read"] > 0
    assert found["memory"] == {"usable": 2 * GIB, "free": None, "reserve": 0}
    command = found["advice"]["command"]
    assert command[0] == "indexmem" and command[command.index("--kv-budget") + 1] == str(row["budget"])
    answer = run(*command[1:], "-n", "2", "--json", stdin="Hello\n")
    assert answer.returncode == 0
    stats = json.loads(answer.stdout)["stats"]
    assert stats["budget"] == row["budget"]
    assert stats["kv_bytes"] + stats["meta_bytes"] == row["bytes"]["cache"]


@needs_library
def test_the_table(tiny: Tiny) -> None:
    path = tiny("llama")[0]
    result = run("fit", str(path), "--no-measure")
    assert result.returncode == 0 and result.stderr == ""
    for words in ("are free, ", "are left to others", "trained for 4,096 tokens", "f16", "q8_0", "q4_0", "1,024", "none", "yes", "Advised: f16, a budget of 3,584"):
        assert words in result.stdout
    assert "write/s" not in result.stdout
    last = result.stdout.splitlines()[-1].strip()
    assert last == f"indexmem chat -m {path} --kv-budget 3584"


@needs_library
def test_speeds_are_only_said_of_what_was_measured(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    from indexmem_edge.models.fit import with_speeds

    found = fit(tiny("llama")[0], Memory(2 * GIB))
    (found,) = with_speeds(found, (found.rows[0],), 30)
    show(found, advise(found))
    lines = capsys.readouterr().out.splitlines()
    assert [("full" in line) for line in lines if " yes " in line] == [True] + [False] * (len(found.rows) - 1)
    assert any("tokens per second on" in line for line in lines)
    assert [row["speed"] is None for row in facts(found, advise(found))["rows"]] == [False] + [True] * (len(found.rows) - 1)


@needs_library
def test_who_has_waited_long_enough_gets_what_there_is(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from indexmem_edge.models import fit as fitting

    def stopped(found: Fit, rows: tuple[Row, ...], *_: Any) -> Iterator[Fit]:
        yield next(fitted(found, rows, 30))
        raise KeyboardInterrupt

    fitted = fitting.with_speeds
    monkeypatch.setattr(fitting, "with_speeds", stopped)
    found = _measured(fit(tiny("llama")[0], Memory(2 * GIB)), 60, True)
    assert sum(row.speed is not None for row in found.rows) == 1
    assert capsys.readouterr().err == "note: stopped measuring\n"


@needs_library
def test_no_time_is_said(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    found = _measured(fit(tiny("llama")[0], Memory(2 * GIB)), 1e-9, True)
    assert all(row.speed is None for row in found.rows) and "nothing was measured" in capsys.readouterr().err


@needs_library
@pytest.mark.parametrize("arch", REFUSED)
def test_models_without_a_budget(tiny: Tiny, arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = fit(tiny(arch)[0], Memory(4 * GIB))
    show(found, advise(found))
    out = capsys.readouterr().out
    assert "budget   none possible: " in out and (arch in out or "encoder" in out)


@needs_library
def test_what_does_not_fit(tiny: Tiny) -> None:
    result = run("fit", str(tiny("llama")[0]), "--memory", "30M")
    assert result.returncode == 0 and "Nothing to advise: it does not fit: with " in result.stdout
    assert "more than there is" in result.stdout and "indexmem chat" not in result.stdout
    advice = json.loads(run("fit", str(tiny("llama")[0]), "--memory", "30M", "--json").stdout)["advice"]
    assert advice["row"] is None and advice["short_by"] > 0 and advice["command"] == []


def test_errors(tiny: Tiny, tmp_path: Path) -> None:
    one_error(run("fit", str(tmp_path / "none.gguf")), "does not exist")
    one_error(run("fit", str(tiny("llama")[0]), "--memory", "lots"), "--memory must be an amount of memory such as 8G", "lots")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    one_error(run("fit", str(tmp_path / "x.gguf"), "--memory", "1G"), "x.gguf")


@needs_library
def test_checkpoints_of_the_chat(tiny: Tiny) -> None:
    usual = ("chat", "-m", str(tiny("llama")[0]), "--kv-budget", "256", "-n", "40", "--json")
    lines = "".join(f"{'word ' * 60}{i}\n" for i in range(3))

    def copies(*more: str) -> int:
        result = run(*usual, *more, stdin=lines)
        return int(json.loads(result.stdout.splitlines()[-1])["stats"]["checkpoints"])

    assert copies() > 0 and copies("--kv-checkpoints", "0") == 0
    one_error(run(*usual, "--kv-checkpoints", "some", stdin=lines), "--kv-checkpoints must be an amount")
