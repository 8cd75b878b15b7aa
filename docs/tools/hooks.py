"""Hooks of mkdocs: pages at the root of the repository are part of the site, and so are the plots of bench/results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
AT_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PLOTS = "bench/results"
_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for name, page in AT_ROOT.items():
        files.append(File.generated(config, page, content=_moved((ROOT / name).read_text(encoding="utf-8"), "docs/")))
    for plot in sorted((ROOT / PLOTS).glob("*.png")):
        files.append(File.generated(config, f"plots/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _moved(markdown.replace(f"../{PLOTS}/", "plots/"), "../")


def _moved(text: str, folder: str) -> str:
    """Links as they are in the site, of a page whose links to other pages may begin with `folder`."""

    def link(found: re.Match[str]) -> str:
        target = found[2]
        inside = target.removeprefix(folder)
        target = AT_ROOT.get(inside, inside) if inside.endswith(".md") else target
        return f"{found[1]}{target}{found[3] or ''})"

    return _LINK.sub(link, text)
