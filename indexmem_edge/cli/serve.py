"""`indexmem serve`: llama.cpp's own server on our library, with the bounded cache."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import typer

from ..errors import IndexMemError
from ..files.modelfile import check_model_file
from ..models.demo import demo_model
from ..models.sidecars import find_sidecar
from ..native.find import program
from ..options import DEFAULT_BUDGET, SIDECAR_OFF
from ..runtime.choice import INDEXER_POLICY
from .options import one_line_errors

SERVER = "llama-server"
COPIES = 4  # of the state of each conversation; llama.cpp's default of 32 is for states that are small beside a cache
_MODEL = ("-m", "--model", "-mu", "--model-url", "-hf", "-hfr", "--hf-repo", "-dr", "--docker-repo", "--models-dir", "--models-preset")
_PRESET = re.compile("--(?!spec-).*-default")  # a model by name, such as --gpt-oss-20b-default
_BUDGET, _SIDECAR, _POLICY = "--kv-budget", "--indexmem", "--kv-policy"
_COPIES = ("-ctxcp", "--ctx-checkpoints", "--swa-checkpoints")
_ABOUT = ("-h", "--help", "--usage", "--version", "--completion-bash", "-cl", "--cache-list", "--license")
_VARIABLES = {  # of the environment, which the server reads, too
    "--model": "LLAMA_ARG_MODEL",
    "--model-url": "LLAMA_ARG_MODEL_URL",
    "--hf-repo": "LLAMA_ARG_HF_REPO",
    "--docker-repo": "LLAMA_ARG_DOCKER_REPO",
    "--models-dir": "LLAMA_ARG_MODELS_DIR",
    "--models-preset": "LLAMA_ARG_MODELS_PRESET",
    "--ctx-checkpoints": "LLAMA_ARG_CTX_CHECKPOINTS",
    _BUDGET: "LLAMA_ARG_KV_BUDGET",
    _SIDECAR: "LLAMA_ARG_INDEXMEM",
    _POLICY: "LLAMA_ARG_KV_POLICY",
}


def server_program() -> Path:
    """Path of the server.

    Raises:
        IndexMemError: it is not part of this installation.
    """
    file = program(SERVER)
    if file is None:
        raise IndexMemError(f"{SERVER} is not part of this installation: in a clone, `make server` builds it; wheels have it")
    return file


def given(arguments: Sequence[str], *names: str) -> bool:
    """Whether one of these options is among the arguments, or in the environment."""
    return any(argument.split("=", 1)[0] in names for argument in arguments) or _of_environment(names) is not None


def value_of(arguments: Sequence[str], *names: str) -> Optional[str]:
    """What an option that has one of these names is given, or None."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names:
            return value if equals else "".join(arguments[i + 1 : i + 2])
    return _of_environment(names)


def _of_environment(names: Sequence[str]) -> Optional[str]:
    values = (os.environ.get(_VARIABLES[name]) for name in names if name in _VARIABLES)
    return next((value for value in values if value is not None), None)


def complete(arguments: Sequence[str]) -> list[str]:
    """The server's arguments, with a model, a budget, the number of copies of the state and the sidecar that is found for the
    model, where none is named.
    """
    added = list(arguments)
    if given(added, *_ABOUT):
        return added
    if not given(added, *_MODEL) and not any(_PRESET.fullmatch(argument) for argument in added):
        added += ["-m", check_model_file(demo_model())]
    if not given(added, _BUDGET):
        added += [_BUDGET, str(DEFAULT_BUDGET)]
    budget = value_of(added, _BUDGET)
    none = value_of(added, _SIDECAR) == SIDECAR_OFF
    if none:
        added = _without(added, _SIDECAR)
    if budget in (None, "0"):
        return added
    if not given(added, *_COPIES):
        added += [_COPIES[1], str(COPIES)]
    model = value_of(added, "-m", "--model")
    ranks_itself = value_of(added, _POLICY) not in (None, INDEXER_POLICY)
    if none or given(added, _SIDECAR) or ranks_itself or model is None or not os.path.isfile(model):
        return added
    found = find_sidecar(model)
    for problem in found.problems:
        print(f"note: {problem}", file=sys.stderr)
    return added if found.path is None else [*added, _SIDECAR, found.path]


def _without(arguments: Sequence[str], name: str) -> list[str]:
    """The same without an option and its value."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] != name:
            kept.append(argument)
        skip = not skip and argument == name
    return kept


def serve(context: typer.Context) -> None:
    """Serve a model to any client that speaks OpenAI's or Anthropic's interface: llama.cpp's own server, with a bounded cache.

    Takes the options of llama-server (`indexmem serve --help` lists them all) and those of the cache: --kv-budget, --kv-policy,
    --indexmem, --memory, --kv-span, ... Each of the --parallel conversations has a budget of its own, and there is no limit
    on their length. Without -m it is the demo model, without --kv-budget a budget of 1024 entries, without --ctx-checkpoints 4 copies
    of the state of each conversation, which other answers and edits go on from.

    Examples:

    indexmem serve --port 8080

    indexmem serve -m model.gguf --kv-budget 4096 --indexmem model.indexmem.gguf --parallel 8
    """
    with one_line_errors():
        file, arguments = server_program(), complete(context.args)
        if value_of(context.args, _SIDECAR) == SIDECAR_OFF:
            os.environ.pop(_VARIABLES[_SIDECAR], None)  # the server would take it for a file, or a file in it for one that is wanted
    raise typer.Exit(_run(file, arguments))


def _run(file: Path, arguments: list[str]) -> int:
    command = [str(file), *arguments]
    if sys.platform == "win32":
        with subprocess.Popen(command) as server:
            while True:
                try:
                    return server.wait()
                except KeyboardInterrupt:
                    pass  # the server has it, too, and ends
    os.execv(command[0], command)  # its signals, its standard streams and its exit status are the server's
