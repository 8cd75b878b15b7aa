"""What docs/troubleshooting.md quotes is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = sorted(set(re.findall(r"(?<![*\w])\*(?![ *])([^*\n]+)(?<! )\*(?![*\w])", PAGE)))
NOT_OURS = {"Illegal instruction", "Segmentation fault", "unknown model architecture"}  # of the shell and of llama.cpp


def said() -> str:
    """All text of the code, strings that are written in pieces put together."""
    folders = ("indexmem_edge", "convert", "native/src", "native/loader")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".cpp", ".h")]
    files += [ROOT / "Makefile", ROOT / "native" / "prepare_source.py"]
    text = "\n".join(p.read_text(encoding="utf-8") for p in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


@pytest.mark.parametrize("quoted", [q for q in QUOTED if q not in NOT_OURS])
def test_messages_are_said(quoted: str) -> None:
    pattern = re.escape(quoted).replace(r"\ N\ ", r" \S+ ")
    assert re.search(pattern, said(), flags=re.IGNORECASE), f"nothing says {quoted!r}"


def test_messages_are_quoted() -> None:
    assert len(QUOTED) > 10 and set(QUOTED) >= NOT_OURS
