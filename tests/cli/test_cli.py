"""The command line as a person and as a program use it. Everything runs in a new process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import indexmem_edge
from indexmem_edge.native import find
from support.commands import one_error, run

needs_library = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")






@pytest.mark.parametrize(
    "command, words",
    [
        ((), ("chat", "generate", "inspect", "doctor")),
        (("chat",), ("--kv-budget", "--ctx-size", "-ctk", "--indexmem", "--memory", "/read FILE", "indexmem chat")),
        (("generate",), ("--prompt", "--file", "--kv-budget-ratio", "--memory-slots", "-ngl")),
        (("inspect",), ("FILE", "--model", "--json", "indexmem inspect")),
        (("doctor",), ("--model", "--json")),
    ],
)
def test_help(command: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.returncode == 0
    for word in words:
        assert word in result.stdout


def test_version() -> None:
    for flag in ("--version", "-V"):
        assert run(flag).stdout.strip() == f"indexmem-edge {indexmem_edge.__version__}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(shell: str) -> None:
    code = "import sys; from indexmem_edge.cli.app import app; app(prog_name='indexmem')"
    root = str(Path(indexmem_edge.__file__).parents[1])

    def ask(**variables: str) -> str:
        given = {**os.environ, "PYTHONPATH": root, **variables}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given, timeout=60)
        return result.stdout

    assert "_INDEXMEM_COMPLETE" in ask(_INDEXMEM_COMPLETE=f"source_{shell}")
    asked = {
        "bash": {"COMP_WORDS": "indexmem ge", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "indexmem ge"},
        "fish": {"_TYPER_COMPLETE_ARGS": "indexmem ge", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    assert "generate" in ask(_INDEXMEM_COMPLETE=f"complete_{shell}", **asked)


def test_a_program_imports_nothing_of_the_command_line() -> None:
    code = (
        "import sys; from indexmem_edge import Llama; "
        "assert not {'typer', 'rich', 'click', 'prompt_toolkit', 'indexmem_edge.cli'} & set(sys.modules)"
    )
    root = str(Path(indexmem_edge.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_convert_is_a_command_too(tmp_path: Path) -> None:
    pytest.importorskip("indexmem_edge.convert")
    assert "convert" in run("--help").stdout
    for arguments in (("convert", "--help"), ("convert", "-h"), ("convert",)):
        assert "--outtype" in run(*arguments).stdout
    found = run("convert", "no.pt", "-o", str(tmp_path / "x.gguf"), "--outtype", "q8_0", "--json")
    one_error(found, "no.pt", "No such file")


@needs_library
def test_the_gpu_is_measured_where_there_is_one() -> None:
    pytest.importorskip("indexmem_edge.bench")
    assert "gpu" in run("bench", "--help").stdout
    for command in ("check", "speed"):
        assert "--threads" in run("bench", "gpu", command, "--help").stdout
    from indexmem_edge import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        one_error(run("bench", "gpu", "check"), "no GPU")
        one_error(run("bench", "gpu", "speed", "--geometry", "demo"), "no GPU")


@needs_library
@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--kv-budget", "100"), ("too small", "133")),
        (("--kv-budget", "1024", "--kv-pin", "1000"), ("too small", "1129")),
        (("--kv-pin", "some"), ("kv_pin", "auto")),
        (("--kv-policy", "nonsense"), ("nonsense", "snapkv", "streaming")),
        (("-ctk", "q9_9"), ("q9_9", "q8_0")),
        (("-m", "no/such.gguf"), ("does not exist", "no/such.gguf")),
        (("-m", "."), ("folder",)),
        (("-m", __file__), ("not a GGUF model",)),
    ],
)
def test_bad_options_are_one_line(demo_model: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    one_error(run("chat", *arguments), *words)


@needs_library
def test_damaged_models_are_one_line(tmp_path: Path, demo_model: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with open(demo_model, "rb") as file:
        cut.write_bytes(file.read(3_000_000))
    one_error(run("generate", "-p", "x", "-m", str(cut)), "cannot load the model")
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
    one_error(run("generate", "-p", "x", "-m", str(junk)), "cannot load the model")


def test_generate_wants_exactly_one_text(tmp_path: Path) -> None:
    one_error(run("generate"), "-p", "-f")
    one_error(run("generate", "-p", "a", "-f", "b"), "-p", "-f")
    one_error(run("generate", "-p", "  "), "empty")
    one_error(run("generate", "-f", str(tmp_path / "none")), "No such file")
    (tmp_path / "binary").write_bytes(b"a\0b")
    one_error(run("generate", "-f", str(tmp_path / "binary")), "not a text file")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    one_error(run("generate", "-f", str(tmp_path / "latin")), "UTF-8")


def test_no_library_is_one_line_and_the_doctor_still_speaks(tmp_path: Path, demo_model: Path) -> None:
    one_error(run("chat", INDEXMEM_LIB_PATH=str(tmp_path)), "libllama", "INDEXMEM_LIB_PATH")
    result = run("doctor", "--json", INDEXMEM_LIB_PATH=str(tmp_path))
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert not report["ok"] and any(f["status"] == "wrong" and "libllama" in f["found"] for f in report["findings"])


@needs_library
def test_a_variant_that_is_not_there_is_one_line() -> None:
    one_error(run("chat", INDEXMEM_CPU_VARIANT="nonsense"), "INDEXMEM_CPU_VARIANT", "'nonsense'")


@needs_library
def test_another_llama_cpp_is_left_alone(demo_model: Path, tmp_path: Path) -> None:
    """One of any release may be in the environment, with a variable that names its library."""
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise SystemExit('imported')\n")
    program = (
        "import os, sys\n"
        "before = dict(os.environ)\n"
        "from indexmem_edge import Llama, llama_cpp\n"
        "llm = Llama(sys.argv[1], kv_budget=160, kv_window=32, verbose=False)\n"
        "assert before == dict(os.environ) and 'llama_cpp' not in sys.modules and issubclass(Llama, llama_cpp.Llama)\n"
    )
    root = str(Path(indexmem_edge.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", program, str(demo_model)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root]), "LLAMA_CPP_LIB_PATH": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr


@needs_library
def test_doctor_is_content(demo_model: Path) -> None:
    result = run("doctor", "-m", str(demo_model))
    assert result.returncode == 0, result.stdout
    for word in ("0.3.36", "libllama", "CPU", "streaming", "fast_kvzip", "a bounded cache is possible"):
        assert word in result.stdout
    lines, names = result.stdout.splitlines(), ("snapkv", "fast_kvzip", "centroid")
    about = {name: [line for line in lines if name in line] for name in names}
    assert all(len(lines) == 1 for lines in about.values()) and about["snapkv"][0].startswith("policies: ")
    assert "processors; built for" in result.stdout or re.search("processors; variant (?!indexmem)", result.stdout)


@needs_library
def test_doctor_explains_what_there_is_to_choose_from(demo_model: Path) -> None:
    text = run("doctor", "-v").stdout
    for name in (*indexmem_edge.policies(), *indexmem_edge.indexers()):
        assert sum(line.startswith(f"  {name} ") for line in text.splitlines()) == 1
    report = json.loads(run("doctor", "--json").stdout)
    assert report["policies"] == indexmem_edge.policies() and report["indexers"] == indexmem_edge.indexers()
    assert {"policy", "indexer", "memory"}.isdisjoint(finding["name"] for finding in report["findings"])


FLAGS = ("--kv-budget", "192", "--kv-window", "32", "-n", "4", "--temp", "0", "-t", "1")


@needs_library
def test_chat_answers_every_line_and_ends(demo_model: Path) -> None:
    result = run("chat", *FLAGS, stdin="Hello\n\nWhat is 2+2?")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip().splitlines()) >= 2
    assert "Traceback" not in result.stderr


@needs_library
def test_chat_json_shows_that_turns_reuse_the_cache(demo_model: Path) -> None:
    result = run("chat", *FLAGS, "--json", stdin="Tell me about the sea.\nGo on.\nGo on.\n")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == 3 and all(a["answer"] for a in answers)
    for before, after in zip(answers, answers[1:]):
        assert after["stats"]["turn_reused"] == before["stats"]["tokens_seen"]
        assert after["stats"]["turn_evaluated"] < 30 and after["stats"]["reevaluated"] == 0


@needs_library
def test_a_program_talks_in_json(demo_model: Path) -> None:
    messages = [{"role": "system", "content": "Be\nbrief."}, {"role": "user", "content": "/read this:\n\nthe sea"}]
    lines = [json.dumps(messages), "Go on.", "{", "/stats", json.dumps({"role": "user", "content": "And?"})]
    result = run("chat", *FLAGS, "--json", stdin="\n".join(lines) + "\n")
    first, second, error, stats, third = (json.loads(line) for line in result.stdout.splitlines())
    assert first["answer"] and second["answer"] and third["answer"] and "JSON" in error["error"]
    assert stats["stats"]["tokens_seen"] == second["stats"]["tokens_seen"] < third["stats"]["tokens_seen"]
    assert first["stats"]["pin"] > 5 and result.returncode == 1


@needs_library
def test_chat_says_when_it_drops_and_never_grows(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "book.txt").write_text("The lighthouse keeper counted the ships. " * 100)
    result = run("chat", *FLAGS, "--json", stdin=f"Hello\n/read {tmp_path}/book.txt\nWhat did the keeper do?\n")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["stats"]["evicted"] == 0 and second["stats"]["evicted"] > 400
    assert second["stats"]["kept"] <= 192 and second["stats"]["kv_bytes"] == first["stats"]["kv_bytes"]
    assert second["stats"]["turn_evaluated"] < 30  # the document was evaluated by /read
    assert result.stderr.count("budget of 192 is reached") == 1


@needs_library
def test_a_session_continues_in_another_process(tmp_path: Path, demo_model: Path) -> None:
    path = tmp_path / "chat session"
    saved = run("chat", *FLAGS, "--json", stdin=f"Tell me about the sea.\n/save {path}\n")
    assert saved.returncode == 0, saved.stderr
    before = json.loads(saved.stdout)["stats"]["tokens_seen"]
    result = run("chat", *FLAGS, "--json", stdin=f"/load {path}\nGo on.\n")
    stats = json.loads(result.stdout)["stats"]
    assert stats["turn_reused"] == before and stats["reevaluated"] == 0


@needs_library
def test_bad_chat_commands_are_one_line_each_and_the_chat_goes_on(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(100))
    lines = ["/nonsense", "/read", f"/read {tmp_path}/none", f"/read {tmp_path}/binary", f"/load {tmp_path}/binary"]
    lines += [f"/save {tmp_path}", "Hello"]
    result = run("chat", *FLAGS, stdin="\n".join(lines) + "\n")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 6 and "Traceback" not in result.stderr
    assert result.stdout.strip() and result.returncode == 1
    assert sorted(os.listdir(tmp_path)) == ["binary"]


@needs_library
def test_generate_streams_text_and_keeps_figures_apart(demo_model: Path) -> None:
    result = run("generate", *FLAGS, "-p", "The capital of France is")
    assert result.returncode == 0 and "Paris" in result.stdout and "tokens seen" in result.stderr
    as_json = run("generate", *FLAGS, "-f", "-", "--json", stdin="The capital of France is")
    answer: dict[str, Any] = json.loads(as_json.stdout)
    assert answer["text"].strip() == result.stdout.strip() and answer["stats"]["kept"] > 5


@needs_library
def test_the_budget_of_full_runs_out_with_one_line(demo_model: Path) -> None:
    result = run("generate", *FLAGS, "--kv-policy", "full", "-p", "word " * 300)
    one_error(result, "192", "`full` never evicts")


@needs_library
def test_without_a_budget_a_long_text_is_refused_with_advice(demo_model: Path) -> None:
    one_error(run("generate", "--kv-budget", "0", "-c", "256", "-p", "word " * 300), "exceed", "--kv-budget")
