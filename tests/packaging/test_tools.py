"""The tools of `make check`: pinned once, and the same in the hook before a commit."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_versions_are_pinned_and_the_same() -> None:
    pinned = dict(re.findall(r"(ruff|mypy|mkdocs)==(\d+(?:\.\d+)+)", MAKEFILE))
    assert set(pinned) == {"ruff", "mypy", "mkdocs"} and re.search(r"^PYINSTALLER := \d", MAKEFILE, flags=re.M)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert dict(re.findall(r"(\w+)==([\d.]+)", hooks)) == {"ruff": pinned["ruff"]}


def test_continuous_integration_checks() -> None:
    assert re.search(r"^test: setup check", MAKEFILE, flags=re.M)
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("make test")


def test_every_target_of_the_makefile_is_explained_at_its_top() -> None:
    told = set(re.findall(r"^# make ([\w-]+)", MAKEFILE, flags=re.M))
    phony = set(re.search(r"^\.PHONY:((?:.*\\\n)*.*)$", MAKEFILE, flags=re.M)[1].replace("\\", "").split())  # type: ignore[index]
    assert phony - told == {"setup", "sanitize-address", "sanitize-thread"} and told <= phony
