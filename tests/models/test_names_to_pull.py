"""Which files a name means, and that neither it nor what a repository says leads out of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexmem_edge.errors import ConvertError, DownloadError
from indexmem_edge.files.gguffile import GGUFFile
from indexmem_edge.models.pull import Name, choose, choose_sidecars, is_safe, parse_name
from tiny.gguf_copy import copy_model
from tiny.models import write_model

FILES = [
    ".gitattributes", "README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-IQ4_XS.gguf", "m-BF16.gguf", "mmproj-m-F16.gguf",
    "m.indexmem.gguf", "big/m-F16-00001-of-00002.gguf", "big/m-F16-00002-of-00002.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    "text, name",
    [
        ("o/m", Name("o/m")),
        ("Org-1/model.v2-GGUF:q4_k_m", Name("Org-1/model.v2-GGUF", quant="q4_k_m")),
        ("o/m/m-Q8_0.gguf", Name("o/m", file="m-Q8_0.gguf")),
        ("o/m/big/m-00001-of-00002.GGUF", Name("o/m", file="big/m-00001-of-00002.GGUF")),
    ],
)
def test_names(text: str, name: Name) -> None:
    assert parse_name(text) == name


@pytest.mark.parametrize(
    "text",
    ["", "m", "o/", "/m", "/o/m", "o//m", "../o/m", "o/..", "o/../m.gguf", "o/m/../x.gguf", "o/m/./x.gguf", "o/m/..gguf", "o/m:", "o/m:../x",
     "o/m:Q4/x", "o/m/x.gguf:Q8_0", "o/m/x.bin", "o/m/", "C:\\m.gguf", "o\\m/x", "o/m\0", "o/m\n", "~/m", "-o/m", ".o/m", "o/m?x=1", "o/m#x",
     "o/%2e%2e/x.gguf", "ö/m", "o/" + "m" * 100],
)  # fmt: skip
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(DownloadError, match="is not the name of a model: expected owner/repo"):
        parse_name(text)


@pytest.mark.parametrize("path", ["a.gguf", "big/a-b_c.gguf", "ä b.gguf"])
def test_safe(path: str) -> None:
    assert is_safe(path)


@pytest.mark.parametrize("path", ["", "/a.gguf", "../a.gguf", "x/../../a.gguf", "x/./a.gguf", "x//a.gguf", "..\\a.gguf", "C:a.gguf", "a\n.gguf", "a\x1b.gguf", "a\u202e.gguf"])
def test_unsafe_and_never_chosen(path: str) -> None:
    assert not is_safe(path)
    with pytest.raises(DownloadError, match="no GGUF file"):
        choose(Name("o/m"), [path])
    assert choose_sidecars("m.gguf", [path.replace(".gguf", ".indexmem.gguf")]) == [] or not path


@pytest.mark.parametrize(
    "name, files",
    [
        (Name("o/m"), ["m-Q4_K_M.gguf"]),
        (Name("o/m", quant="q8_0"), ["m-Q8_0.gguf"]),
        (Name("o/m", quant="F16"), FILES[-2:]),  # neither BF16 nor what is for images
        (Name("o/m", quant="BF16"), ["m-BF16.gguf"]),
        (Name("o/m", file="big/m-F16-00002-of-00002.gguf"), FILES[-2:]),
        (Name("o/m", file="mmproj-m-F16.gguf"), ["mmproj-m-F16.gguf"]),
    ],
)
def test_choice(name: Name, files: list[str]) -> None:
    assert choose(name, FILES) == files


def test_choice_without_the_usual_ones() -> None:
    assert choose(Name("o/m"), ["b-Q8_0.gguf", "a-Q2_K.gguf"]) == ["b-Q8_0.gguf"]
    assert choose(Name("o/m"), ["b.gguf", "a.gguf"]) == ["a.gguf"]


@pytest.mark.parametrize(
    "name, files, words",
    [
        (Name("o/m", quant="Q4_0"), FILES, "no file of Q4_0: it has .*'m-BF16.gguf'"),
        (Name("o/m", quant="XS"), FILES, "no file of XS"),
        (Name("o/m", file="x.gguf"), FILES, "has no file x.gguf"),
        (Name("o/m", file="m.indexmem.gguf"), FILES, "has no file m.indexmem.gguf"),
        (Name("o/m", quant="Q8_0"), ["a-Q8_0.gguf", "b-Q8_0.gguf"], "2 files of Q8_0: name one of 'a-Q8_0.gguf', 'b-Q8_0.gguf'"),
        (Name("o/m"), ["model.safetensors", "README.md"], "no GGUF file of a model"),
        (Name("o/m"), [], "no GGUF file of a model"),
        (Name("o/m"), ["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"], "one of 3 files, and the repository lacks 1 of them"),
        (Name("o/m"), ["m-00001-of-99999.gguf"], "lacks 99998 of them"),
    ],
)
def test_no_choice(name: Name, files: list[str], words: str) -> None:
    with pytest.raises(DownloadError, match=words):
        choose(name, files)


def test_sidecars_are_those_of_the_models_name_or_all() -> None:
    there = ["a.indexmem.gguf", "m.indexmem.gguf", "side/m-Q8_0-better.indexmem.gguf", "m.gguf"]
    assert choose_sidecars("m-Q8_0.gguf", there) == there[1:3]
    assert choose_sidecars("other.gguf", there) == there[:3]
    assert len(choose_sidecars("other.gguf", [f"{i}.indexmem.gguf" for i in range(100)])) == 8


def test_a_file_that_lacks_its_end_is_found_out(tmp_path: Path) -> None:
    config = write_model(tmp_path / "m.gguf", "llama", tensor_type="Q8_0")
    whole = (tmp_path / "m.gguf").read_bytes()
    with GGUFFile(tmp_path / "m.gguf") as file:
        file.check_whole()
        assert len(file.tensors) == len(config.weights)
    for missing in (64, 5000, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:-missing])
        with pytest.raises(ConvertError, match="truncated"), GGUFFile(tmp_path / "cut.gguf") as file:
            file.check_whole()
    first = copy_model(tmp_path / "m.gguf", tmp_path / "s.gguf", per_file=7)
    for part in first.parent.glob("s-*.gguf"):
        with GGUFFile(part) as file:
            file.check_whole()
