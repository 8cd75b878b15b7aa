"""The command `indexmem-convert`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import typer

from indexmem_edge import __version__
from indexmem_edge.cli.console import Bar, console
from indexmem_edge.cli.options import one_line_errors
from indexmem_edge.cli.streams import make_forgiving
from indexmem_edge.errors import ConvertError
from indexmem_edge.files.atomic import check_target, same_file
from indexmem_edge.files.untrusted import check_text

from .basemodel import read_base_model
from .checkpoint import write_checkpoint
from .formats import FORMATS, read_source
from .model import UNKNOWN, Checkpoint
from .report import notes, print_summary, to_dict
from .sidecar import read_sidecar
from .sources import ReadOptions
from .writer import OUTTYPES, write_sidecar

app = typer.Typer(
    name="indexmem-convert",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_SOURCE, _BASE, _FILE, _OUTPUT = "Source", "Base model", "File", "Output"


def _option(panel: str, default: Any, *names: str, help: str, **more: Any) -> Any:
    shown = isinstance(default, str)
    return typer.Option(default, *names, help=help, rich_help_panel=panel, show_default=shown, **more)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"indexmem-edge {__version__}")
        raise typer.Exit()


@app.command(no_args_is_help=True)
def convert(
    sources: list[Path] = typer.Argument(
        ..., metavar="SOURCE...", help="Checkpoint: a file, a folder, or files that belong together."
    ),
    out: Optional[Path] = _option(_FILE, None, "-o", "--out", help="Sidecar to write, FILE.indexmem.gguf."),
    export: Optional[Path] = _option(
        _FILE, None, "--export", help="Instead: write the sidecar SOURCE as a safetensors checkpoint."
    ),
    outtype: str = _option(_FILE, "f16", "--outtype", help=f"Type of the matrices: {', '.join(OUTTYPES)}."),
    force: bool = _option(_FILE, False, "--force", help="Overwrite a file that is there."),
    model: Optional[Path] = _option(
        _BASE, None, "-m", "--model", help="GGUF file of the base model: checks geometry, adds a fingerprint."
    ),
    arch: Optional[str] = _option(_BASE, None, "--arch", help="Its architecture, without --model."),
    no_fingerprint: bool = _option(
        _BASE, False, "--no-fingerprint", help="Leave the fingerprint out, so that fine-tunes may use the file."
    ),
    format: Optional[str] = _option(_SOURCE, None, "--format", help=f"Not detected but this: {', '.join(FORMATS)}."),
    kv_heads: Optional[int] = _option(_SOURCE, None, "--kv-heads", min=1, help="KV heads, for v1 without --model."),
    reduce: Optional[str] = _option(
        _SOURCE, None, "--reduce", help="v1: mean (as released) or max (as in the paper) over queries."
    ),
    query_count: Optional[int] = _option(
        _SOURCE, None, "--query-count", help="v1: latest queries to reduce over, 128 as released."
    ),
    name: Optional[str] = _option(_FILE, None, "--name", help="Name of the sidecar, for people."),
    trained_on: Optional[str] = _option(_FILE, None, "--trained-on", help="Data it was trained on, for people."),
    sinks: Optional[int] = _option(_FILE, None, "--sinks", min=0, help="Sinks it was trained with."),
    window: Optional[int] = _option(_FILE, None, "--window", min=0, help="Window it was trained with."),
    budget: Optional[int] = _option(_FILE, None, "--budget", min=1, help="Budget it was trained with."),
    score: Optional[list[str]] = _option(
        _FILE, None, "--score", metavar="NAME=NUMBER", help="What was measured with it, for people; may be repeated."
    ),
    as_json: bool = _option(_OUTPUT, False, "--json", help="Print the summary as JSON."),
    version: bool = _option(
        _OUTPUT, False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Turn a trained indexer or memory into a sidecar that the runtime can load.

    Reads native and legacy IndexMem++ checkpoints, IndexMem v1, KVzap, Fast-KVzip and this project's own. Sources are
    not trusted: nothing in them is executed, and everything is checked.

    Examples:

    indexmem-convert final.pt --model Qwen3-4B-Q4_K_M.gguf --out Qwen3-4B.indexmem.gguf

    indexmem-convert indexer.pt memory.pt --kv-heads 8 --arch qwen3 --out v1.indexmem.gguf

    indexmem-convert --export back.safetensors Qwen3-4B.indexmem.gguf
    """
    with one_line_errors():
        if (out is None) == (export is None):
            raise ConvertError("say what to write: --out FILE.indexmem.gguf, or --export FILE.safetensors of a sidecar")
        target = out or export
        assert target is not None
        check_target(target, force)  # before minutes are spent on reading
        if any(path.resolve() == target.resolve() for path in (*sources, *([model] if model else []))):
            raise ConvertError(f"{target} is to be read as well: name another file to write")
        if export is not None:
            _export(sources, export, force, as_json)
            return
        if outtype not in OUTTYPES:
            raise ConvertError(f"--outtype {outtype!r}: expected {', '.join(OUTTYPES)}")
        base = read_base_model(model, not no_fingerprint) if model else None
        checkpoint = read_source(sources, ReadOptions(base, kv_heads, reduce, query_count), format)
        _keep_companions(sources, target, checkpoint)
        defaults = {"sinks": sinks, "window": window, "budget": budget}
        checkpoint = _describe(checkpoint, arch, name, trained_on, {k: v for k, v in defaults.items() if v is not None})
        checkpoint = replace(checkpoint, scores={**checkpoint.scores, **_scores(score or [])}).validated()
        if no_fingerprint:
            checkpoint = replace(checkpoint, fingerprint=None)
        _note(notes(checkpoint))
        with Bar("writing tensors", wanted=not as_json) as bar:
            written = write_sidecar(target, checkpoint, outtype, force, bar.update)
        if as_json:
            print(json.dumps(to_dict(checkpoint, written, outtype), indent=1))
        else:
            print_summary(console(width_in_pipes=140), checkpoint, written, outtype)


def _describe(
    c: Checkpoint, arch: Optional[str], name: Optional[str], trained_on: Optional[str], defaults: dict[str, int]
) -> Checkpoint:
    """What a person adds to a checkpoint."""
    if arch is not None and c.architecture not in (UNKNOWN, check_text("--arch", arch)):
        raise ConvertError(f"--arch {arch!r}: this is for architecture {c.architecture!r}")
    return replace(
        c,
        architecture=arch or c.architecture,
        name=name or c.name,
        defaults={**c.defaults, **defaults},
        provenance=replace(c.provenance, trained_on=trained_on or c.provenance.trained_on),
    ).validated()


def _scores(given: list[str]) -> dict[str, float]:
    scores = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            scores[name] = float(number)
        except ValueError:
            raise ConvertError(f"--score {text!r}: expected NAME=NUMBER") from None
    return scores


def _keep_companions(sources: list[Path], target: Path, checkpoint: Checkpoint) -> None:
    """A file that was found in a folder, or beside the one that was named, is not overwritten either."""
    read = [folder / name for source in sources for folder in (source, source.parent) for name in checkpoint.provenance.source_files]
    if any(same_file(path, target) for path in read):
        raise ConvertError(f"{target} was read as well: name another file to write")


def _export(sources: list[Path], target: Path, force: bool, as_json: bool) -> None:
    if len(sources) != 1:
        raise ConvertError(f"--export takes one sidecar, found {len(sources)} files")
    sidecar = read_sidecar(sources[0])
    size = write_checkpoint(target, sidecar.checkpoint, force)
    _note(sidecar.checkpoint.warnings())
    types = sorted(set(sidecar.types.values()))
    if as_json:
        print(json.dumps({"file": str(target), "bytes": size, "tensors": len(sidecar.tensors), "types": types}))
    else:
        print(f"{target}: {size:,} bytes, {len(sidecar.tensors)} tensors in F32 (in the sidecar: {', '.join(types)})")


def _note(lines: list[str]) -> None:
    err = console(error=True)
    for line in lines:
        err.print(f"note: {line}", markup=False)


def main() -> None:
    """Runs the command line."""
    make_forgiving()
    app()


if __name__ == "__main__":
    main()
