"""The command `indexmem`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any, Optional

import typer
from typing_extensions import Annotated

from .. import __version__
from ..errors import IndexMemError
from .calibrate import calibrate_memory
from .calibrate_budgets import calibrate_budgets
from .collect import collecting
from .fit import fit
from .options import RunOptions, fail, one_line_errors, with_run_options
from .pull import pull
from .sampling import AnswerOptions
from .serve import serve
from .streams import make_forgiving
from .train import train

app = typer.Typer(
    name="indexmem",
    help="llama.cpp with a KV cache of the size you choose: memory and speed stay the same however long the text gets.",
    epilog="Start with: indexmem chat",
    no_args_is_help=True,
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
        bool, typer.Option("-V", "--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@with_run_options
@collecting(AnswerOptions, "form")
def chat(
    options: RunOptions,
    form: AnswerOptions,
    session: Annotated[
        Optional[Path],
        typer.Option(
            "--session", metavar="FILE", show_default=False, rich_help_panel="Output",
            help="Keep the conversation in this file, KV cache included: it goes on there, and is saved as it grows and at the end.",
        ),
    ] = None,
    no_history: Annotated[
        bool,
        typer.Option(
            "--no-history", help="Do not keep what is typed for the next chat; INDEXMEM_HISTORY=0 neither.",
            rich_help_panel="Output",
        ),
    ] = False,
) -> None:
    """Talk to a model in the terminal.

    Commands inside: /read FILE /stats /regen /edit [TEXT] /undo /branch [NAME] /system [TEXT] /reset /save FILE /load FILE /help
    /exit.
    Alt-Enter begins another line, pasted lines are one message. Ctrl-C stops an answer, Ctrl-D leaves.

    When standard input is not a terminal, every line is one message, and the answers go to standard output. With --json
    a line may also be an object {"role": ..., "content": ...}, or a list of such: roles, and line breaks in messages.

    Examples:

    indexmem chat

    indexmem chat -m model.gguf --kv-budget 2048 -sys "You answer in one sentence."

    indexmem chat -m model.gguf --indexmem model.indexmem.gguf

    indexmem chat --session talk.imsess

    echo "What is a KV cache?" | indexmem chat --json
    """
    from ..doctor import firststart
    from .chat import Chat
    from .interrupt import ctrl_c_ends
    from .keeping import Keeper

    form.keywords()  # what is wrong there is said before anything takes time
    with Keeper(str(session)) if session is not None else contextlib.nullcontext() as keeper:
        with ctrl_c_ends():
            firststart.require_trial(options.model)
            llm = options.load(form.quiet)
            options.rehearse(llm)
        status = Chat(llm, options, form, keep_history=not no_history, keeper=keeper).run()
        llm.close()
    raise typer.Exit(status)


@app.command()
@with_run_options
@collecting(AnswerOptions, "form")
def generate(
    options: RunOptions,
    form: AnswerOptions,
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
    special: Annotated[
        bool,
        typer.Option("--special", help="Control tokens in the text, such as <|im_end|>, are control tokens and not text."),
    ] = False,
) -> None:
    """Continue a text, or answer one message, and exit.

    The text goes to standard output as it is generated, what the cache did to standard error.

    Examples:

    indexmem generate -p "Once upon a time" -n 64

    indexmem generate -f book.txt --kv-budget 1024 --kv-policy snapkv

    indexmem generate --chat -p "Name three rivers." --json

    indexmem generate --chat -p "Is the sea salty?" -q --json-schema '{"type": "boolean"}'
    """
    from .generate import generate as run

    raise typer.Exit(run(options, form, prompt, file, as_chat, special))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A sidecar, a model, or a session.", metavar="FILE", show_default=False)],
    model: Annotated[
        Optional[Path],
        typer.Option("-m", "--model", help="GGUF file that the sidecar or the session has to fit.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check a sidecar, a model or a session, and say what is in it.

    Of a sidecar: the indexer with its constants, its tensors, where it comes from, and whether the model is the one it
    was trained for. Of a model: its geometry, what its KV cache costs, whether it can be bounded, and the sidecars
    beside it. Of a session: its model, the options it was saved with, and the budgets that it loads with.

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
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Explain the policies, indexers and memories that there are.")
    ] = False,
) -> None:
    """Say which library, backends and models are in use, what is wrong, and how to mend it.

    A few tokens are decoded in another process, without and with a budget, until entries have been evicted and positions
    renewed, so that a crash is reported, too.

    The exit status is 1 if something is wrong.
    """
    from .doctor import examine, report

    findings = examine(model)
    report(findings, as_json, verbose)
    raise typer.Exit(0 if all(f.status != "wrong" for f in findings) else 1)


app.command("fit", no_args_is_help=True)(fit)
app.command("pull", no_args_is_help=True)(pull)
app.command("train", no_args_is_help=True)(train)
app.command("serve", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.command("calibrate-memory", no_args_is_help=True)(calibrate_memory)
app.command("calibrate-budgets", no_args_is_help=True)(calibrate_budgets)


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


@app.command(
    "convert",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def convert(context: typer.Context) -> None:
    """Turn a trained indexer or memory into a sidecar that the runtime can load; `indexmem-convert` is the same."""
    with one_line_errors():
        if importlib.util.find_spec("indexmem_edge.convert") is None:
            raise IndexMemError("the converter is not in this folder: install the package, for example with `pip install .`")
    from indexmem_edge.convert.cli import app as convert_app  # takes long: not for --help of all the commands

    convert_app(context.args, prog_name="indexmem convert")


_add_bench()


def main() -> None:
    """Runs the command line."""
    make_forgiving()
    app()


if __name__ == "__main__":
    main()
