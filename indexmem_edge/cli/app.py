"""The command `indexmem`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, Optional

import typer
from typing_extensions import Annotated

from .. import __version__
from ..errors import IndexMemError
from .calibrate import calibrate_memory
from .options import RunOptions, fail, one_line_errors, with_run_options
from .streams import make_forgiving
from .serve import serve
from .train import train

app = typer.Typer(
    name="indexmem",
    help="llama.cpp with a KV cache of the size you choose: memory and speed stay the same however long the text gets.",
    epilog="Start with: indexmem chat",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"indexmem-edge {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@with_run_options
def chat(options: RunOptions) -> None:
    """Talk to a model in the terminal.

    Commands inside: /stats /reset /save FILE /load FILE /read FILE /help /exit. Ctrl-C stops an answer, Ctrl-D leaves.
    When standard input is not a terminal, every line is one message, and the answers go to standard output.

    Examples:

    indexmem chat

    indexmem chat -m model.gguf --kv-budget 2048 -sys "You answer in one sentence."

    indexmem chat -m model.gguf --indexmem model.indexmem.gguf

    echo "What is a KV cache?" | indexmem chat --json
    """
    from ..doctor import firststart
    from .chat import Chat

    firststart.require_trial(options.model)
    llm = options.load()
    status = Chat(llm, options).run()
    llm.close()
    raise typer.Exit(status)


@app.command()
@with_run_options
def generate(
    options: RunOptions,
    prompt: Annotated[
        Optional[str], typer.Option("-p", "--prompt", help="Text to continue.", show_default=False)
    ] = None,
    file: Annotated[
        Optional[Path],
        typer.Option("-f", "--file", help="File with the text; `-`: standard input.", show_default=False),
    ] = None,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="Take the text as a message and answer it (implied by --system).")
    ] = False,
) -> None:
    """Continue a text, or answer one message, and exit.

    The text goes to standard output as it is generated, what the cache did to standard error.

    Examples:

    indexmem generate -p "Once upon a time" -n 64

    indexmem generate -f book.txt --kv-budget 1024 --kv-policy snapkv

    indexmem generate --chat -p "Name three rivers." --json
    """
    text = _prompt_text(prompt, file)
    llm = options.load()
    if as_chat or options.system is not None:
        system = [{"role": "system", "content": options.system}] if options.system is not None else []
        messages = [*system, {"role": "user", "content": text}]
        chunks = llm.create_chat_completion(messages, stream=True, **options.sampling())
    else:
        chunks = llm.create_completion(text, stream=True, **options.sampling())
    written, finish = [], None
    for chunk in chunks:
        choice = chunk["choices"][0]
        piece = choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
        written.append(piece)
        finish = choice["finish_reason"] or finish
        if not options.as_json:
            print(piece, end="", flush=True)
    stats = llm.kv_stats()
    if options.as_json:
        print(json.dumps({"text": "".join(written), "finish_reason": finish, "stats": stats.to_dict()}))
    else:
        print(flush=True)
        print(stats, file=sys.stderr)
    llm.close()


def _prompt_text(prompt: Optional[str], file: Optional[Path]) -> str:
    if (prompt is None) == (file is None):
        raise IndexMemError("give the text with either -p TEXT or -f FILE (`-f -` reads standard input)")
    if prompt is not None:
        text = prompt
    else:
        from ..files.textfile import read_standard_input, read_text

        assert file is not None
        text = read_standard_input() if str(file) == "-" else read_text(file)
    if not text.strip():
        raise IndexMemError("the text is empty")
    return text


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A sidecar, or a model.", metavar="FILE", show_default=False)],
    model: Annotated[
        Optional[Path],
        typer.Option("-m", "--model", help="GGUF file that the sidecar has to fit.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check a sidecar, or a model, and say what is in it.

    Of a sidecar: the indexer with its constants, its tensors, where it comes from, and whether the model is the one it
    was trained for. Of a model: its geometry, what its KV cache costs, whether it can be bounded, and the sidecars
    beside it.

    Examples:

    indexmem inspect model.indexmem.gguf -m model.gguf

    indexmem inspect model.gguf --json
    """
    with one_line_errors():
        from . import inspection

        facts = inspection.examine(file, model)
        if as_json:
            print(json.dumps(facts, indent=2))
        else:
            inspection.show(facts)


@app.command()
def doctor(
    model: Annotated[
        Optional[Path],
        typer.Option(
            "-m", "--model", help="GGUF file to run, in place of the demo model.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say which library, backends and models are in use, what is wrong, and how to mend it.

    A few tokens are decoded in another process, without and with a budget, until entries have been evicted and positions
    renewed, so that a crash is reported, too.

    The exit status is 1 if something is wrong.
    """
    from .doctor import examine, report

    findings = examine(model)
    report(findings, as_json)
    raise typer.Exit(0 if all(f.status != "wrong" for f in findings) else 1)


app.command("train", no_args_is_help=True)(train)
app.command("serve", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.command("calibrate-memory", no_args_is_help=True)(calibrate_memory)


def _add_bench() -> None:
    """`indexmem bench`, where the benchmarks are installed and the library is there to run them."""
    if importlib.util.find_spec("indexmem_edge.bench") is None:
        return
    try:
        from indexmem_edge.bench.cli.app import app as bench_app  # type: ignore[import-not-found]
    except (ImportError, IndexMemError) as error:
        why = str(error)

        @app.command("bench", help=f"Not available: {why}")
        def unavailable() -> Any:
            fail(IndexMemError(f"the benchmarks are not available: {why}"))

        return
    app.add_typer(bench_app, name="bench")


_add_bench()


def main() -> None:
    """Runs the command line."""
    make_forgiving()
    app()


if __name__ == "__main__":
    main()
