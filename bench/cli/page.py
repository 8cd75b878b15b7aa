"""The command `indexmem bench report`: all results of a model on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from indexmem_edge.errors import IndexMemError

from .options import fail


def one_page(
    folder: Path = typer.Argument(Path("bench/results"), exists=True, file_okay=False, help="Folder with results, as --out named it."),
    model: Optional[str] = typer.Option(
        None, "-m", "--model", help="A part of the model's name, where the folder has results of several.", show_default=False
    ),
    out: Path = typer.Option(Path("report.html"), "--out", help="The page to write."),
) -> None:
    """Put all results of a model on one page, with their pictures: an HTML file that needs nothing beside it."""
    from indexmem_edge.files.atomic import replacing

    from ..page import collect, page

    try:
        name, found = collect(folder, model)
        with replacing(out, force=True) as draft:
            Path(draft).write_text(page(name, found, folder), encoding="utf-8")
    except IndexMemError as error:
        fail(error)
    print(f"wrote {out}: {len(found)} results of {name}")
