"""Links between the pages of the repository: the file is there, and so is the heading that is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "docs" / "examples" / "README.md"])
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """Without code, in which nothing is a link or a heading."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    text = re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.M)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("[", "").replace("#", ""), text)


def anchors(text: str) -> set[str]:
    """Of headings, as GitHub makes them: small letters, no punctuation, hyphens for spaces, numbers for what comes twice."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(text), flags=re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        base = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        n = 0
        while (name := f"{base}-{n}" if n else base) in found:
            n += 1
        found.add(name)
    return found


def test_anchors() -> None:
    text = "# A `b.c`, d\n## A b\n## A b\n```\n# no heading\n```\n    # none\n### [x](y.md) z's\n"
    assert anchors(text) == {"a-bc-d", "a-b", "a-b-1", "x-zs"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = _LINK.findall(prose(page.read_text(encoding="utf-8")))
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            broken.append(link)
    assert not broken, f"{page.name}: {broken}"


def test_there_are_links_to_check() -> None:
    assert len(PAGES) > 12
    assert sum(len(_LINK.findall(page.read_text(encoding="utf-8"))) for page in PAGES) > 60


def test_every_page_is_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        targets = (link.partition("#")[0] for link in _LINK.findall(prose(page.read_text(encoding="utf-8"))))
        todo += [(page.parent / t).resolve() for t in targets if t and not re.match(r"[a-z]+:", t)]
    assert set(PAGES) <= seen
