"""`indexmem doctor` and the first start of the chat try the library out in another process, which may die of it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import LibraryError
from indexmem_edge.doctor import firststart, machine, trial
from indexmem_edge.native import find
from support.commands import one_error, run

needs_library = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")
on_posix = pytest.mark.skipif(os.name != "posix", reason="a shell that kills itself")

PARTS = 'echo \'{"part": "loading it"}\'; echo \'{"part": "decoding without a budget"}\'; '


def pretend(monkeypatch: Any, script: str) -> None:
    """The process is a shell script."""
    monkeypatch.setattr(trial, "command", lambda model: ["sh", "-c", script])


# the process and how it ends


@needs_library
def test_the_demo_model_runs(demo_model: Path) -> None:
    outcome = trial.try_out(demo_model)
    assert outcome.kind == "ok" and "the same without and with a budget" in outcome.text


@needs_library
@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_any_model_runs(tiny: Tiny, arch: str) -> None:
    assert trial.try_out(tiny(arch)[0]).kind == "ok"


@needs_library
def test_a_model_that_cannot_have_a_budget_runs_without(tiny: Tiny) -> None:
    outcome = trial.try_out(tiny("bloom")[0])
    assert outcome.kind == "ok" and "it cannot have a budget" in outcome.text


@needs_library
def test_a_damaged_model_is_not_the_library_s_fault(tmp_path: Path) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
    outcome = trial.try_out(tmp_path / "junk.gguf")
    assert outcome.kind == "failed" and "loading it: cannot load the model" in outcome.text


@needs_library
def test_logits_that_are_not_numbers_are_wrong(tiny: Tiny, tmp_path: Path) -> None:
    from tiny.models import write_model

    config = write_model(tmp_path / "a.gguf", "llama", seed=3)
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    norm = config.weights["output_norm.weight"].astype("<f4").tobytes()
    at = data.index(norm)
    data[at : at + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "a.gguf").write_bytes(data)
    outcome = trial.try_out(tmp_path / "a.gguf")
    assert outcome.kind == "wrong" and "decoding without a budget: 320 of 320 logits are not finite" in outcome.text


@on_posix
@pytest.mark.parametrize("name", ["SEGV", "ILL", "ABRT", "BUS"])
def test_a_crash_is_told_with_all_that_helps(monkeypatch: Any, tmp_path: Path, name: str) -> None:
    pretend(monkeypatch, PARTS + f"echo 'GGML_ASSERT(n <= n_found) failed' >&2; kill -{name} $$")
    outcome = trial.try_out(tmp_path / "model.gguf")
    assert outcome.kind == "died" and "\n" not in outcome.text
    for words in (
        "model.gguf, decoding without a budget ended with SIG" + name,
        machine.describe_cpu(),
        "make clean && make",
        "INDEXMEM_CPU_VARIANT",
    ):
        assert words in outcome.text
    assert ("GGML_ASSERT" in outcome.text) == (name == "ABRT")


@on_posix
def test_a_crash_before_the_first_word(monkeypatch: Any, tmp_path: Path) -> None:
    pretend(monkeypatch, "kill -ILL $$")
    assert "starting Python ended with SIGILL" in trial.try_out(tmp_path / "model.gguf").text


def test_deaths_on_windows() -> None:
    assert trial.death(0xC000001D) == "illegal instruction" and trial.death(0xC0000005) == "access violation"
    assert trial.death(0xC1234567) == "exception 0xC1234567" and trial.death(1) is None and trial.death(0) is None


@on_posix
def test_a_process_that_hangs_is_given_up(monkeypatch: Any, tmp_path: Path) -> None:
    pretend(monkeypatch, PARTS + "exec sleep 600")
    outcome = trial.try_out(tmp_path / "model.gguf", 2.0)
    assert outcome.kind == "late" and "decoding without a budget did not end within 2 s" in outcome.text


@on_posix
def test_a_process_that_fails_otherwise(monkeypatch: Any, tmp_path: Path) -> None:
    pretend(monkeypatch, PARTS + "echo 'ImportError: no numpy' >&2; exit 3")
    outcome = trial.try_out(tmp_path / "model.gguf")
    assert outcome.kind == "failed" and "exit status 3, ImportError: no numpy" in outcome.text


@needs_library
def test_answers_may_differ_where_it_is_a_toss_up() -> None:
    from indexmem_edge.doctor.selfcheck import difference

    sure, unsure = np.array([0.0, 10.0, 20.0], np.float32), np.array([0.0, 19.9, 20.0], np.float32)
    assert difference([(2, sure), (1, sure)], [(2, sure), (1, sure)]) is None
    assert difference([(2, unsure)], [(1, unsure)]) is None
    found = difference([(2, sure), (2, sure)], [(2, sure), (1, sure)])
    assert found is not None and "token 1 of the answer is 1 without a budget, and 2" in found


def test_the_cpu_is_described_whatever_there_is(monkeypatch: Any) -> None:
    assert len(machine.describe_cpu()) > 5
    monkeypatch.setattr(machine, "_linux", lambda: 1 / 0)
    monkeypatch.setattr(machine, "_darwin", lambda: 1 / 0)
    monkeypatch.setattr(machine, "_other", lambda: 1 / 0)
    machine.cpu.cache_clear()
    assert "features unknown" in machine.describe_cpu()
    machine.cpu.cache_clear()


@needs_library
def test_the_doctor_reports_it(demo_model: Path, tiny: Tiny) -> None:
    for arguments, name in (((), demo_model.name), (("-m", str(tiny("llama")[0])), tiny("llama")[0].name)):
        findings = json.loads(run("doctor", "--json", *arguments).stdout)["findings"]
        assert [f["status"] for f in findings if f["name"] == "trial"] == ["ok"]
        assert name in next(f["found"] for f in findings if f["name"] == "trial")


@needs_library
@on_posix
def test_the_doctor_reports_a_crash(monkeypatch: Any, demo_model: Path) -> None:
    from indexmem_edge.cli.doctor import examine

    pretend(monkeypatch, PARTS + "kill -SEGV $$")
    finding = examine()[-1]
    assert (finding.name, finding.status) == ("trial", "wrong") and "SIGSEGV" in finding.found


# the first start


@pytest.fixture
def start(monkeypatch: Any, tmp_path: Path) -> Any:
    """A cache of its own, a library of one file, and a model; start() is the number of trials of a start."""
    trials: list[Path] = []
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libllama.so").write_bytes(b"code")
    (tmp_path / "model.gguf").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(firststart, "cache_dir", lambda: tmp_path / "cache" / "indexmem-edge")
    monkeypatch.setattr(find, "library_dir", lambda: tmp_path / "lib")
    monkeypatch.setattr(firststart, "_model_to_try", lambda model: model)
    ended = ["ok"]

    def try_out(model: Path, patience: float) -> trial.Outcome:
        trials.append(model)
        return trial.Outcome(ended[0], "what the doctor would say")

    monkeypatch.setattr(trial, "try_out", try_out)

    def once(kind: str = "ok") -> int:
        ended[0] = kind
        before = len(trials)
        firststart.require_trial(tmp_path / "model.gguf")
        return len(trials) - before

    return once


def stamps(folder: Path) -> list[Path]:
    return list((folder / "cache" / "indexmem-edge").iterdir())


def test_once_per_build_and_cpu(start: Any, tmp_path: Path, monkeypatch: Any) -> None:
    assert [start(), start(), start()] == [1, 0, 0]
    (tmp_path / "lib" / "libllama.so").write_bytes(b"other code")
    assert [start(), start()] == [1, 0]
    monkeypatch.setattr(firststart, "cpu", lambda: ("another CPU", ()))
    assert [start(), start()] == [1, 0]
    monkeypatch.setenv("INDEXMEM_CPU_VARIANT", "haswell")
    assert [start(), start()] == [1, 0]
    assert len(stamps(tmp_path)) == 4


def test_a_damaged_stamp_is_no_stamp(start: Any, tmp_path: Path) -> None:
    start()
    for damage in (b"", b"\xff\xfe", b"0" * 64):
        stamps(tmp_path)[0].write_bytes(damage)
        assert [start(), start()] == [1, 0]


def test_a_cache_that_cannot_be_written_does_no_harm(start: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert [start(), start()] == [1, 1]


@pytest.mark.parametrize("kind", ["died", "wrong"])
def test_a_crash_stops_the_start_every_time(start: Any, monkeypatch: Any, kind: str) -> None:
    for _ in range(2):
        with pytest.raises(LibraryError, match="what the doctor would say.*INDEXMEM_CHECK=0"):
            start(kind)
    monkeypatch.setenv("INDEXMEM_CHECK", "0")
    assert start(kind) == 0


@pytest.mark.parametrize("kind", ["late", "failed"])
def test_what_may_be_the_model_s_fault_does_not(start: Any, kind: str) -> None:
    assert [start(kind), start(kind), start(), start()] == [1, 1, 1, 0]


def test_without_a_model_there_is_nothing_to_try(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(firststart, "demo_model", lambda: (_ for _ in ()).throw(firststart.DemoModelMissing()))
    assert firststart._model_to_try(None) is None and firststart._model_to_try(tmp_path / "none.gguf") is None
    (tmp_path / "model.gguf").write_bytes(b"")
    assert firststart._model_to_try(tmp_path / "model.gguf") == tmp_path / "model.gguf"


FLAGS = ("--kv-budget", "192", "--kv-window", "32", "-n", "4", "--temp", "0", "-t", "1")


@needs_library
def test_the_chat_starts_and_remembers(demo_model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        result = run("chat", *FLAGS, "--json", stdin="Hello\n", XDG_CACHE_HOME=str(tmp_path))
        assert result.returncode == 0 and json.loads(result.stdout)["answer"]
        assert "trying" not in result.stderr
    if sys.platform == "linux":
        assert len(list((tmp_path / "indexmem-edge").glob("tried-*"))) == 1


@needs_library
@on_posix
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
def test_the_chat_says_what_the_doctor_would_say(demo_model: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """The process that is started is a real one, and dies of a real signal: it is not this Python that starts it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'doctor.selfcheck' in ' '.join(sys.orig_argv):\n"
        "    print('{\"part\": \"decoding with a budget\"}', flush=True)\n"
        f"    os.kill(os.getpid(), {int(signal.SIGSEGV)})\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = run_with_path(path, "chat", *FLAGS, *flags, stdin="Hello\n", XDG_CACHE_HOME=str(tmp_path / "cache"))
    one_error(result, "SIGSEGV", "decoding with a budget", "make clean", "INDEXMEM_CHECK=0")
    assert not (tmp_path / "cache").exists()


def run_with_path(path: str, *arguments: str, **options: str) -> Any:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path
    try:
        return run(*arguments, **options)
    finally:
        os.environ["PYTHONPATH"] = before or ""
