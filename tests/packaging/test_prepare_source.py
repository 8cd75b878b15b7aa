"""native/prepare_source.py: where the hunks of a patch go, and what is said when they have moved or have no place."""

from __future__ import annotations

import difflib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "native" / "prepare_source.py"
NAME, TARGET = "0002-x.patch", "llama.cpp/src/x.cpp"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_source", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare_source = load()

LINES = [f"line {i}" for i in range(40)]


def diff(before: list[str], after: list[str], context: int = 1) -> str:
    body = difflib.unified_diff(before, after, "a/src/x.cpp", "b/src/x.cpp", lineterm="", n=context)
    return "\n".join(body) + "\n"


def changed(lines: list[str], **at: str) -> list[str]:
    """Copies of the lines with some replaced: _7="..." is line 7, and "" takes it out."""
    res = [at.get(f"_{i}", line) for i, line in enumerate(lines)]
    return [line for line in res if line]


def apply(patch: str, lines: list[str]) -> tuple[list[str], list[str]]:
    """Lines after the patch, and what it says about hunks that moved."""
    files = {TARGET: "\n".join(lines).encode()}
    moves = prepare_source.apply_patch(NAME, patch, files)
    return files[TARGET].decode().split("\n"), moves


def problem(patch: str, lines: list[str]) -> str:
    files = {TARGET: "\n".join(lines).encode()}
    with pytest.raises(prepare_source.Problem) as caught:
        prepare_source.apply_patch(NAME, patch, files)
    assert files == {TARGET: "\n".join(lines).encode()}, "a patch that failed has changed the file"
    assert "\n" not in str(caught.value)
    return str(caught.value)


EDIT = {"_10": "new 10", "_30": "new 30\nnewer 30"}
AFTER = "\n".join(changed(LINES, **EDIT)).split("\n")
PATCH = diff(LINES, AFTER)


def test_exact() -> None:
    assert apply(PATCH, LINES) == (AFTER, [])


@pytest.mark.parametrize("more", [["a"], ["a", "b", "c", "d", "e"]])
def test_lines_added_before(more: list[str]) -> None:
    n = len(more)
    after, moves = apply(PATCH, more + LINES)
    assert after == more + AFTER
    assert moves == [
        f"{NAME}: hunk at line 10 of src/x.cpp found at {10 + n}",
        f"{NAME}: hunk at line 30 of src/x.cpp found at {30 + n}",
    ]


def test_lines_removed_before() -> None:
    after, moves = apply(PATCH, LINES[3:])
    assert after == AFTER[3:]
    assert [move.split()[-1] for move in moves] == ["7", "27"]


def test_two_hunks_moved_by_different_amounts() -> None:
    between = LINES[:5] + ["a"] + LINES[5:20] + ["b", "c"] + LINES[20:]
    after, moves = apply(PATCH, between)
    assert after == AFTER[:5] + ["a"] + AFTER[5:20] + ["b", "c"] + AFTER[20:]
    assert [move.split()[-1] for move in moves] == ["11", "33"]


def test_only_the_second_moved() -> None:
    after, moves = apply(PATCH, LINES[:20] + ["a"] + LINES[20:])
    assert after == AFTER[:20] + ["a"] + AFTER[20:]
    assert moves == [f"{NAME}: hunk at line 30 of src/x.cpp found at 31"]


def test_a_second_patch_sees_what_the_first_made() -> None:
    files = {TARGET: "\n".join(["a", *LINES]).encode()}
    assert len(prepare_source.apply_patch(NAME, PATCH, files)) == 2
    later = diff(AFTER, changed(AFTER, _20="new 20"))
    assert prepare_source.apply_patch("0003-y.patch", later, files) == [
        "0003-y.patch: hunk at line 20 of src/x.cpp found at 21"
    ]
    assert files[TARGET].decode().split("\n") == ["a", *changed(AFTER, _20="new 20")]


def test_absent() -> None:
    said = problem(PATCH, changed(LINES, _11="another"))
    assert f"{NAME}: {TARGET} line 12: expected 'line 11', found 'another'" in said and "at 0 places" in said


def test_the_file_ends_before() -> None:
    said = problem(PATCH, LINES[:30])
    assert "line 31: expected 'line 30', found the end of the file" in said and "at 0 places" in said


def test_ambiguous() -> None:
    said = problem(PATCH, ["a", *LINES, *LINES])
    assert "expected 'line 9', found 'line 8'" in said and "at 2 places: 11, 51" in said


def test_a_place_that_is_not_the_only_one_is_not_trusted_once_others_moved() -> None:
    twice = LINES[:20] + ["a"] + LINES[20:] + LINES[9:12]
    said = problem(PATCH, twice)
    assert "line 10: other hunks of the file have moved" in said and "at 2 places: 10, 42" in said


def test_the_only_place_is_enough_when_nothing_moved() -> None:
    assert apply(PATCH, LINES + LINES) == (AFTER + LINES, [])  # as it always was: the stated line counts


def test_beyond_an_earlier_hunk() -> None:
    said = problem(PATCH, LINES[25:] + LINES[:25])
    assert "line 30: the lines of the hunk are at 5, before those of an earlier hunk" in said


def test_added_lines_without_context_cannot_move() -> None:
    added = diff(LINES, LINES[:10] + ["new"] + LINES[10:], context=0)
    assert apply(added, LINES) == (LINES[:10] + ["new"] + LINES[10:], [])
    both = added + "@@ -20,2 +21,1 @@\n line 19\n-line 20\n"
    assert apply(both, LINES) == (LINES[:10] + ["new"] + LINES[10:20] + LINES[21:], [])
    assert "no line says where the hunk belongs" in problem(both, LINES[:15] + ["a"] + LINES[15:])


def test_other_bytes_stay() -> None:
    mixed = [line + "\r" if i % 2 else line for i, line in enumerate(LINES)]
    mixed[20] = "caf\udce9"  # a byte that is not UTF-8
    raw = "\n".join(mixed).encode("utf-8", "surrogateescape")
    files = {TARGET: b"\r\n" + raw}
    moves = prepare_source.apply_patch(NAME, diff(mixed, changed(mixed, _30="new 30")), files)
    assert len(moves) == 1
    assert files[TARGET] == b"\r\n" + raw.replace(b"line 30\n", b"new 30\n")


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (PATCH.replace("-10,3", "-10,4"), "the hunk ends before the counts"),
        (PATCH.replace("+30,4", "+31,4"), "do not follow from the hunks before it"),
        (PATCH + "+ more\n", "is outside of every hunk"),
        ("text\n", "holds no hunk"),
        ("--- a/src/y.cpp\n+++ b/src/y.cpp\n" + PATCH.split("\n", 2)[2], "not among the prepared sources"),
        (PATCH.replace("+++ b/src/x.cpp", "+++ /dev/null"), "creates or deletes a file"),
    ],
)
def test_damaged_patches(patch: str, said: str) -> None:
    assert said in problem(patch, LINES)


def run(folder: Path, lines: list[str]) -> subprocess.CompletedProcess[str]:
    """The script itself, on a source tree and a patch."""
    source, patches = folder / "source", folder / "patches"
    for name, text in {"ggml/CMakeLists.txt": "", "src/llama.cpp": "", "src/x.cpp": "\n".join(lines)}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    patches.mkdir(exist_ok=True)
    (patches / NAME).write_text(PATCH)
    command = [sys.executable, str(SCRIPT), "--check", "--source", str(source), "--patches", str(patches)]
    return subprocess.run(command, capture_output=True, text=True)


def test_check(tmp_path: Path) -> None:
    exact = run(tmp_path, LINES)
    assert (exact.returncode, exact.stdout) == (0, "1 patches apply exactly\n")

    moved = run(tmp_path, ["a", *LINES])
    assert moved.returncode == 0
    assert moved.stdout.splitlines() == [
        f"prepare_source: {NAME}: hunk at line 10 of src/x.cpp found at 11",
        f"prepare_source: {NAME}: hunk at line 30 of src/x.cpp found at 31",
        "1 patches apply, 2 of their hunks at other lines",
    ]

    absent = run(tmp_path, changed(LINES, _30="another"))
    assert absent.returncode != 0 and absent.stdout == ""
    assert absent.stderr.startswith(f"prepare_source: {NAME}: {TARGET} line 31: expected 'line 30', found 'another'")


def test_imports_of_itself_are_relative_from_where_they_are() -> None:
    files = {
        "python/llama_cpp/llama.py": b"import llama_cpp.llama_types as types\nfrom llama_cpp.llama_types import List\n",
        "python/llama_cpp/server/app.py": b"import llama_cpp\nimport llama_cpp.llama_types as types\nfrom llama_cpp.server.model import (\n",
    }
    prepare_source.rename_python(files)
    assert files["python/llama_cpp/llama.py"] == b"from . import llama_types as types\nfrom .llama_types import List\n"
    expected = b"from ... import llama_cpp\nfrom .. import llama_types as types\nfrom ..server.model import (\n"
    assert files["python/llama_cpp/server/app.py"] == expected


def test_a_llama_cpp_tree_alone_has_no_python_side() -> None:
    files = {TARGET: b"as it is\n"}
    assert prepare_source.apply_patch(NAME, PATCH.replace("/src/x.cpp", "/python/llama_cpp/x.py"), files) == []
    assert files == {TARGET: b"as it is\n"}


def test_a_patch_can_be_of_the_python_side() -> None:
    target = "python/llama_cpp/server/x.py"
    files = {target: "\n".join(LINES).encode()}
    prepare_source.apply_patch(NAME, PATCH.replace("/src/x.cpp", f"/{target}"), files)
    assert files[target].decode().split("\n") == AFTER
