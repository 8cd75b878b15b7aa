"""The options that `chat` and `generate` share, with llama.cpp's names where it has them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Optional

if sys.version_info >= (3, 11):
    from typing import get_type_hints
else:
    from typing_extensions import get_type_hints

import typer
from typing_extensions import Annotated

from ..errors import ContextError, IndexMemError
from ..files import cachetypes
from ..files.textfile import argument_text
from ..models.demo import demo_model
from ..options import DEFAULT_BUDGET, OPTIONS, CacheOptions
from ..stats import format_bytes
from .amounts import parsed_bytes
from .streams import reader_left
from .terminal import printable

if TYPE_CHECKING:
    from ..llama import Llama
    from ..runtime.sizes import Sizes


_MODEL, _CACHE, _SAMPLING, _OUTPUT = "Model", "KV cache", "Sampling", "Output"


def panel_option(panel: str, *names: str, help: str, **more: Any) -> Any:
    """A typer option in a panel of the help, for an annotation."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def cache_option(name: str, default: Any = None, *names: str) -> Any:
    """The typer option of a field of CacheOptions, for an annotation.

    Args:
        default: of the command, where that is another than of `Llama`.
        names: other flags than the usual one.
    """
    option, usual = OPTIONS[name], getattr(CacheOptions, name)
    shown: Any = True if default is not None else option.shown or (False if usual is None else str(usual))
    return typer.Option(
        *(names or (option.flag,)),
        help=option.help,
        rich_help_panel=_CACHE,
        min=option.least,
        metavar=option.metavar,
        show_default=shown,
    )


def _cache_parameters() -> list[inspect.Parameter]:
    """An argument of a command for each option of the cache."""
    defaults = {"budget": DEFAULT_BUDGET}
    return [
        inspect.Parameter(
            option.keyword,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(name),
            annotation=Annotated[
                option.kind if name in defaults else Optional[option.kind], cache_option(name, defaults.get(name))
            ],
        )
        for name, option in OPTIONS.items()
    ]


@dataclass(frozen=True)
class RunOptions:
    """Everything that `chat` and `generate` take to load a model and sample from it."""

    model: Annotated[
        Optional[Path],
        panel_option(_MODEL, "-m", "--model", help="GGUF file. Default: the demo model.", show_default=False),
    ] = None
    ctx_size: Annotated[
        Optional[int],
        panel_option(
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
        int, panel_option(_MODEL, "-b", "--batch-size", min=1, help="Tokens handed over at once in prefill.")
    ] = 512
    ubatch_size: Annotated[
        Optional[int],
        panel_option(
            _MODEL,
            "-ub",
            "--ubatch-size",
            min=1,
            show_default="follows the budget; 512 from a budget of 1024 on, and without one",
            help="Tokens evaluated at once; the working room of the KV cache.",
        ),
    ] = None
    gpu_layers: Annotated[
        int, panel_option(_MODEL, "-ngl", "--gpu-layers", min=-1, help="Layers to put on the GPU; -1: all of them.")
    ] = 0
    threads: Annotated[
        Optional[int],
        panel_option(
            _MODEL,
            "-t",
            "--threads",
            min=1,
            show_default="those that this process may use; of more than two, half for single tokens",
            help="CPU threads.",
        ),
    ] = None
    chat_template: Annotated[
        Optional[str],
        panel_option(
            _MODEL,
            "--chat-template",
            metavar="NAME|FILE",
            show_default="that of the model",
            help="How messages are written: a format by name (chatml, llama-3, ...), or a file with a Jinja template.",
        ),
    ] = None

    cache_type_k: Annotated[
        str, panel_option(_CACHE, "-ctk", "--cache-type-k", help="Type of the cached keys: f32, f16, q8_0, q4_0.")
    ] = "f16"
    cache_type_v: Annotated[
        str, panel_option(_CACHE, "-ctv", "--cache-type-v", help="Type of the cached values: f32, f16, q8_0, q4_0.")
    ] = "f16"

    kv_checkpoints: Annotated[
        Optional[str],
        panel_option(
            _CACHE, "--kv-checkpoints", metavar="MEMORY", show_default="256M, or, where the state is large, three of it",
            help="For copies of the state that edits, other answers and other conversations go on from: 64M, 1G; 0: none.",
        ),
    ] = None

    draft_lookup: Annotated[
        int,
        panel_option(
            _SAMPLING, "--draft-lookup", min=0, metavar="N", show_default="0: none",
            help="Guess up to N next tokens from what followed the last two earlier in the text: faster where an answer repeats it.",
        ),
    ] = 0
    predict: Annotated[
        int,
        panel_option(
            _SAMPLING, "-n", "--predict", min=-1, help="Tokens of an answer at most; 0: read the text, no more; -1: no limit."
        ),
    ] = 512
    temp: Annotated[float, panel_option(_SAMPLING, "--temp", min=0, help="Temperature; 0: always the likeliest token.")] = 0.3
    top_k: Annotated[int, panel_option(_SAMPLING, "--top-k", min=0, help="Only the k likeliest tokens; 0: all.")] = 40
    top_p: Annotated[
        float, panel_option(_SAMPLING, "--top-p", min=0, max=1, help="Only the likeliest tokens up to this mass; 1: all.")
    ] = 0.95
    min_p: Annotated[
        float,
        panel_option(_SAMPLING, "--min-p", min=0, max=1, help="Only tokens at least this likely, relative to the likeliest."),
    ] = 0.05
    repeat_penalty: Annotated[
        float, panel_option(_SAMPLING, "--repeat-penalty", min=0.01, help="Makes the last 64 tokens less likely; 1: off.")
    ] = 1.1
    seed: Annotated[int, panel_option(_SAMPLING, "--seed", min=-1, max=2**32 - 1, help="Of the random numbers; -1: a new one each time.")] = -1

    system: Annotated[
        Optional[str], panel_option(_OUTPUT, "-sys", "--system", help="System prompt.", show_default=False)
    ] = None
    as_json: Annotated[
        bool, panel_option(_OUTPUT, "--json", help="One JSON object per answer, with the text and what the cache did.")
    ] = False
    verbose: Annotated[
        bool, panel_option(_OUTPUT, "-v", "--verbose", help="Show what llama.cpp says (on standard error).")
    ] = False

    cache: Mapping[str, Any] = field(default_factory=dict)  # keywords of `Llama`, those that were given

    def __post_init__(self) -> None:
        if self.system is not None:
            object.__setattr__(self, "system", argument_text("--system", self.system))

    def load(self, quiet: bool = False) -> Llama:
        """Loads the model. What a person should know beforehand goes to standard error: the size of the cache, the sidecar.

        Args:
            quiet: only what is wrong.

        Raises:
            IndexMemError: it cannot be loaded with these options.
        """
        from .._vendor.llama_cpp.llama_speculative import LlamaPromptLookupDecoding
        from ..llama import Llama
        from ..runtime.sizes import kv_bytes

        path = str(self.model) if self.model is not None else str(demo_model())
        keywords = self._keywords()
        if not quiet:
            with contextlib.suppress(ContextError):  # whether there is one, loading will tell
                _note(_size(kv_bytes(path, keywords), keywords))
        if self.gpu_layers and not _has_gpu():
            _note(f"-ngl {self.gpu_layers} has no effect: this build of the library has no GPU backend")
        copies = None if self.kv_checkpoints is None else parsed_bytes("--kv-checkpoints", self.kv_checkpoints)
        lookup = LlamaPromptLookupDecoding(num_pred_tokens=self.draft_lookup) if self.draft_lookup else None
        llm = Llama(path, **keywords, kv_checkpoints=copies, draft_model=lookup, kv_warn=lambda warning: _note(str(warning)))
        if llm.sidecar_where and not quiet:
            name = os.path.basename(llm.kv_options.sidecar or "")
            _note(f"using the sidecar {name}, which {llm.sidecar_where} (--indexmem off: none)")
        if self.chat_template is not None:
            llm.use_chat_format(self.chat_template)
        if not self.verbose:
            _silence()
        return llm

    def rehearse(self, llm: Llama) -> None:
        """Says before the first message what would be wrong with it: no chat template, a system prompt without room.

        Raises:
            BudgetError: the system prompt is too long for the budget.
        """
        llm.rehearse(self.system)

    def _keywords(self) -> dict[str, Any]:
        """Keyword arguments of `Llama`."""
        types = {name: _cache_type(name, getattr(self, name)) for name in ("cache_type_k", "cache_type_v")}
        bounded = bool(self.cache.get("kv_budget"))
        given = {
            **self.cache,
            "n_ctx": 0 if self.ctx_size is None and not bounded else self.ctx_size,
            "n_batch": self.batch_size,
            "n_ubatch": self.ubatch_size,
            "n_gpu_layers": self.gpu_layers,
            "n_threads": self.threads,
            "n_threads_batch": self.threads,
            "type_k": types["cache_type_k"],
            "type_v": types["cache_type_v"],
            "flash_attn": True if bounded or self.cache_type_v not in cachetypes.PLAIN else None,
            "verbose": self.verbose,
        }
        return {name: value for name, value in given.items() if value is not None}

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
    return cachetypes.number_of(name, "--" + option.replace("_", "-"))


def _size(sizes: Sizes, keywords: Mapping[str, Any]) -> str:
    if not keywords.get("kv_budget"):
        return f"KV cache: {format_bytes(sizes.total)}, without a budget"
    return f"KV cache: {format_bytes(sizes.total)}, however long the text gets (budget {keywords['kv_budget']:,}, {sizes.slots:,} slots per KV head)"


def _has_gpu() -> bool:
    from ..native import api

    return bool(api.llama_lib.llama_supports_gpu_offload())


def _note(text: str) -> None:
    print(f"note: {printable(text)}", file=sys.stderr, flush=True)


def _silence() -> None:
    """Our errors say what went wrong; llama.cpp's own lines would say it twice."""
    import logging

    from .._vendor.llama_cpp._logger import logger

    logger.setLevel(logging.CRITICAL + 1)


def describe(error: BaseException) -> str:
    """The error in words, on one line, with what to do where llama-cpp-python does not say."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    if text.startswith("Requested tokens"):
        text += ": raise --ctx-size, which costs no memory with a --kv-budget"
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
        if f.name != "cache"
    ]
    shared += _cache_parameters()

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        values = {p.name: given.pop(p.name) for p in shared}
        cache = {o.keyword: value for o in OPTIONS.values() if (value := values.pop(o.keyword)) is not None}
        with one_line_errors():
            return command(options=RunOptions(**values, cache=cache), **given)

    run.__signature__ = inspect.Signature(own + shared)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in own + shared}
    del run.__wrapped__
    return run
