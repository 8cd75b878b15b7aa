"""`indexmem pull`: fetches a model and its sidecars, and says what to type."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Optional

import typer
from typing_extensions import Annotated

from .fit import shell_line
from .options import one_line_errors
from .terminal import printable


def pull(
    name: Annotated[
        str, typer.Argument(help="owner/repo, owner/repo:QUANT or owner/repo/FILE.gguf.", metavar="NAME", show_default=False)
    ],
    folder: Annotated[
        Optional[Path],
        typer.Option(
            "--to", metavar="FOLDER", help="Where the files go.", show_default="the cache that programs share; HF_HOME moves it",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch what is there already, and replace files of the same name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Fetch a model from the hub, all of its files if it has several, and sidecars for it, which are put beside it.

    Without QUANT it is Q4_K_M, else Q8_0, else the first that there is. What is there already is not fetched again, and what
    was interrupted goes on. The files are checked before they are used. The path goes to standard output.

    Needs the package huggingface_hub (the extra `pull`), and a network. Models that are not for everybody need a token: `hf auth
    login`, or HF_TOKEN.

    Examples:

    indexmem pull owner/model-GGUF

    indexmem pull owner/model-GGUF:Q8_0 --to models

    indexmem pull owner/model-GGUF/model-Q6_K.gguf
    """
    with one_line_errors():
        from ..models import pull as pulling

        wanted = pulling.parse_name(name)
        found = pulling.pull(wanted, folder, force=force, bars=not as_json and sys.stderr.isatty())
        start = ("indexmem", "chat", "-m", found.path)
        if as_json:
            print(json.dumps({
                "path": found.path, "files": list(found.files), "sidecars": list(found.sidecars), "problems": list(found.problems),
                "command": list(start),
            }, indent=2))  # fmt: skip
            return
        print(printable(found.path))
        for problem in found.problems:
            print(f"note: {printable(problem)}", file=sys.stderr)
        for sidecar in found.sidecars:
            print(f"note: the sidecar {printable(Path(sidecar).name)} is beside it", file=sys.stderr)
        print(f"\nTalk to it, or see what fits:\n\n    {shell_line(start)}\n    {shell_line(('indexmem', 'fit', found.path))}", file=sys.stderr)
