"""Writes the pages of docs/ that are generated: `make pages`. tests/docs/test_pages.py compares them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import api_page
import cli_page
import guide_page

from indexmem_edge.models import page as models_page

DOCS = Path(__file__).resolve().parents[1]
PAGES: dict[str, Callable[[], str]] = {
    "api.md": api_page.page,
    "cli.md": cli_page.page,
    "guide.md": lambda: guide_page.page((DOCS / "guide.md").read_text(encoding="utf-8")),
    "models.md": models_page.page,
}


def main() -> None:
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
