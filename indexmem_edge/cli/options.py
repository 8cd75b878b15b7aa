"""The options that `chat` and `generate` share, with llama.cpp's names where it has them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Optional

if sys.version_info >= (3, 11):
    from typing import get_type_hints
else:
    from typing_extensions import get_type_hints

import typer
from typing_extensions import Annotated

from ..errors import BudgetError, IndexMemError
from ..files.textfile import argument_text
from ..models.demo import demo_model, demo_sidecar
from ..options import DEFAULT_BUDGET, DEFAULT_SINKS, DEFAULT_WINDOW, PIN_AUTO
from ..runtime.choice import DEFAULT_MEMORY_SLOTS, DEFAULT_POLICY, INDEXER_POLICY, MEMORY_OFF
from .streams import reader_left
from .terminal import printable

if TYPE_CHECKING:
    from ..llama import Llama

CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2}
_PLAIN_TYPES = ("f32", "f16", "bf16")

_MODEL, _CACHE, _SAMPLING, _OUTPUT = "Model", "KV cache", "Sampling", "Output"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


@dataclass(frozen=True)
class RunOptions:
    """Everything that `chat` and `generate` take to load a model and sample from it."""

    model: Annotated[
        Optional[Path],
        _option(_MODEL, "-m", "--model", help="GGUF file. Default: the demo model.", show_default=False),
    ] = None
    ctx_size: Annotated[
        Optional[int],
        _option(
            _MODEL,
            "-c",
            "--ctx-size",
            min=0,
            show_default=False,
            help="Largest length in tokens. With a budget it costs no KV memory (default: 2 Mi); without one it is "
            "the size of the cache (default, and 0: the length the model was trained for).",
        ),
    ] = None
    batch_size: Annotated[
        int, _option(_MODEL, "-b", "--batch-size", min=1, help="Tokens handed over at once in prefill.")
    ] = 512
    ubatch_size: Annotated[
        int,
        _option(
            _MODEL, "-ub", "--ubatch-size", min=1, help="Tokens evaluated at once; the working room of the KV cache."
        ),
    ] = 512
    gpu_layers: Annotated[
        int, _option(_MODEL, "-ngl", "--gpu-layers", help="Layers to put on the GPU; -1: all of them.")
    ] = 0
    threads: Annotated[
        Optional[int],
        _option(_MODEL, "-t", "--threads", min=1, help="CPU threads. Default: chosen.", show_default=False),
    ] = None

    kv_budget: Annotated[
        int,
        _option(
            _CACHE,
            "--kv-budget",
            min=0,
            help="Entries that each KV head keeps, however long the text gets. 0: llama.cpp's own cache, unbounded.",
        ),
    ] = DEFAULT_BUDGET
    kv_budget_ratio: Annotated[
        Optional[float],
        _option(
            _CACHE,
            "--kv-budget-ratio",
            show_default=False,
            help="Keep no more than this share of the tokens seen, either (0.25: a quarter of them).",
        ),
    ] = None
    indexmem: Annotated[
        Optional[Path],
        _option(
            _CACHE,
            "--indexmem",
            metavar="FILE",
            show_default="for the demo model, its own",
            help="Sidecar with an indexer or a memory for the model; `indexmem inspect` shows what is in it.",
        ),
    ] = None
    memory: Annotated[
        Optional[str],
        _option(
            _CACHE,
            "--memory",
            show_default=f"that of the sidecar, without one {MEMORY_OFF}",
            help="What becomes of evicted entries: `centroid` keeps running means of them and needs no training, "
            "`residual` needs a trained sidecar, `off` forgets them.",
        ),
    ] = None
    memory_slots: Annotated[
        Optional[int],
        _option(
            _CACHE,
            "--memory-slots",
            min=1,
            show_default=f"that of the sidecar, without one {DEFAULT_MEMORY_SLOTS}",
            help="Slots of the memory `centroid` per KV head, out of the budget.",
        ),
    ] = None
    kv_policy: Annotated[
        Optional[str],
        _option(
            _CACHE,
            "--kv-policy",
            show_default=f"{INDEXER_POLICY} with a sidecar that has one, else {DEFAULT_POLICY}",
            help="Who is evicted when the budget is reached; `indexmem doctor` lists and explains the policies.",
        ),
    ] = None
    kv_sinks: Annotated[int, _option(_CACHE, "--kv-sinks", min=0, help="First tokens, which are never evicted.")] = (
        DEFAULT_SINKS
    )
    kv_window: Annotated[
        int, _option(_CACHE, "--kv-window", min=0, help="Most recent tokens, which are never evicted.")
    ] = DEFAULT_WINDOW
    kv_pin: Annotated[
        str,
        _option(
            _CACHE, "--kv-pin", help="Tokens of a prefix that is never evicted; `auto`: the system prompt of a chat."
        ),
    ] = PIN_AUTO
    kv_span: Annotated[
        Optional[int],
        _option(
            _CACHE,
            "--kv-span",
            min=0,
            show_default="the length the model was trained for",
            help="Positions that are used: what is kept gets new ones before the text passes them. At least the budget "
            "and --ubatch-size. 0: positions grow with the text.",
        ),
    ] = None
    cache_type_k: Annotated[
        str, _option(_CACHE, "-ctk", "--cache-type-k", help="Type of the cached keys: f32, f16, q8_0, q4_0.")
    ] = "f16"
    cache_type_v: Annotated[
        str, _option(_CACHE, "-ctv", "--cache-type-v", help="Type of the cached values: f32, f16, q8_0, q4_0.")
    ] = "f16"

    predict: Annotated[
        int, _option(_SAMPLING, "-n", "--predict", help="Tokens of an answer at most; 0: read the text, no more; -1: no limit.")
    ] = 512
    temp: Annotated[float, _option(_SAMPLING, "--temp", help="Temperature; 0: always the likeliest token.")] = 0.3
    top_k: Annotated[int, _option(_SAMPLING, "--top-k", help="Only the k likeliest tokens; 0: all.")] = 40
    top_p: Annotated[float, _option(_SAMPLING, "--top-p", help="Only the likeliest tokens up to this mass.")] = 0.95
    min_p: Annotated[
        float, _option(_SAMPLING, "--min-p", help="Only tokens at least this likely, relative to the likeliest.")
    ] = 0.05
    repeat_penalty: Annotated[
        float, _option(_SAMPLING, "--repeat-penalty", help="Makes the last 64 tokens less likely; 1: off.")
    ] = 1.1
    seed: Annotated[int, _option(_SAMPLING, "--seed", help="Of the random numbers; -1: a new one each time.")] = -1

    system: Annotated[
        Optional[str], _option(_OUTPUT, "-sys", "--system", help="System prompt.", show_default=False)
    ] = None
    as_json: Annotated[
        bool, _option(_OUTPUT, "--json", help="One JSON object per answer, with the text and what the cache did.")
    ] = False
    verbose: Annotated[
        bool, _option(_OUTPUT, "-v", "--verbose", help="Show what llama.cpp says (on standard error).")
    ] = False

    def __post_init__(self) -> None:
        if self.system is not None:
            object.__setattr__(self, "system", argument_text("--system", self.system))

    def load(self) -> Llama:
        """Loads the model.

        Raises:
            IndexMemError: it cannot be loaded with these options.
        """
        from ..llama import Llama

        path = str(self.model) if self.model is not None else str(demo_model())
        types = {name: _cache_type(name, getattr(self, name)) for name in ("cache_type_k", "cache_type_v")}
        n_ctx = self.ctx_size
        if n_ctx is None and not self.kv_budget:
            n_ctx = 0
        quantised_v = self.cache_type_v not in _PLAIN_TYPES
        llm = Llama(
            path,
            kv_budget=self.kv_budget,
            kv_budget_ratio=self.kv_budget_ratio,
            kv_policy=self.kv_policy,
            kv_sinks=self.kv_sinks,
            kv_window=self.kv_window,
            kv_pin=_pin(self.kv_pin),
            kv_span=self.kv_span,
            indexmem=self.indexmem or self._own_sidecar(),
            memory=self.memory,
            memory_slots=self.memory_slots,
            n_batch=self.batch_size,
            n_ubatch=self.ubatch_size,
            n_gpu_layers=self.gpu_layers,
            n_threads=self.threads or _default_threads(),
            n_threads_batch=self.threads,
            type_k=types["cache_type_k"],
            type_v=types["cache_type_v"],
            verbose=self.verbose,
            **({} if n_ctx is None else {"n_ctx": n_ctx}),
            **({"flash_attn": True} if self.kv_budget or quantised_v else {}),
        )
        if not self.verbose:
            _silence()
        return llm

    def _own_sidecar(self) -> Optional[Path]:
        """The demo model brings its sidecar along, unless another policy was asked for or there is no budget."""
        wanted = self.model is None and bool(self.kv_budget) and self.kv_policy in (None, INDEXER_POLICY)
        return demo_sidecar() if wanted and demo_sidecar().is_file() else None

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments of create_completion and create_chat_completion."""
        return {
            "max_tokens": max(self.predict, 1) if self.predict >= 0 else None,  # of 0, what is drawn is not shown
            "temperature": self.temp,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty,
            "seed": self.seed if self.seed >= 0 else int.from_bytes(os.urandom(4), "little"),
        }


def _cache_type(option: str, name: str) -> int:
    if name not in CACHE_TYPES:
        flag = "--" + option.replace("_", "-")
        raise BudgetError(f"{flag} {name!r} is not a cache type: choose one of {', '.join(CACHE_TYPES)}")
    return CACHE_TYPES[name]


def _pin(text: str) -> Any:
    return int(text) if text.isascii() and text.isdigit() else text


def _default_threads() -> Optional[int]:
    """llama-cpp-python halves the number of processors, which leaves one of two idle."""
    processors = os.cpu_count() or 1
    return processors if processors <= 2 else None


def _silence() -> None:
    """Our errors say what went wrong; llama.cpp's own lines would say it twice."""
    import logging

    from .._vendor.llama_cpp._logger import logger

    logger.setLevel(logging.CRITICAL + 1)


def describe(error: BaseException) -> str:
    """The error in words, on one line, with what to do where llama-cpp-python does not say."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    if text.startswith("Requested tokens"):
        text += ": raise --ctx-size, or set a --kv-budget, with which the length does not matter"
    return text


def fail(error: BaseException) -> None:
    """One line on standard error, then exit status 1; a traceback only with INDEXMEM_DEBUG=1."""
    if os.environ.get("INDEXMEM_DEBUG") == "1":
        raise error
    print(f"error: {describe(error)}", file=sys.stderr)
    raise typer.Exit(1)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors of a command become one line on standard error."""
    try:
        yield
    except typer.Exit:
        raise
    except (IndexMemError, ValueError, RuntimeError, OSError, MemoryError) as error:
        if not reader_left(error):
            fail(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # say no more
        raise typer.Exit(0) from None


def with_run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a typer command every field of RunOptions as an option, collected in its argument `options`.

    Errors of the command become one line on standard error.
    """
    own_hints = get_type_hints(command, include_extras=True)
    hints = get_type_hints(RunOptions, include_extras=True)
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "options"
    ]
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(RunOptions)
    ]

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        values = {f.name: given.pop(f.name) for f in fields(RunOptions)}
        with one_line_errors():
            return command(options=RunOptions(**values), **given)

    run.__signature__ = inspect.Signature(own + shared)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in own + shared}
    del run.__wrapped__
    return run
