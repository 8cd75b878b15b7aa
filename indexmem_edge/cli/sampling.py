"""The options of `chat` and `generate` that say which texts an answer can be, and what is shown beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from typing_extensions import Annotated

from ..errors import IndexMemError
from ..files.textfile import argument_text, read_text
from .options import panel_option

if TYPE_CHECKING:
    from .._vendor.llama_cpp import LlamaGrammar

_SAMPLING, _OUTPUT = "Sampling", "Output"


@dataclass(frozen=True)
class AnswerOptions:
    """Where an answer ends, and which form it has."""

    stop: Annotated[
        Optional[list[str]],
        panel_option(
            _SAMPLING,
            "--stop",
            metavar="TEXT",
            help="End the answer before this text; may be given repeatedly.",
            show_default=False,
        ),
    ] = None
    grammar: Annotated[
        Optional[Path],
        panel_option(
            _SAMPLING,
            "--grammar",
            metavar="FILE",
            help="Grammar (GBNF) that the answer follows.",
            show_default=False,
        ),
    ] = None
    json_schema: Annotated[
        Optional[str],
        panel_option(
            _SAMPLING,
            "--json-schema",
            metavar="FILE|JSON",
            help="JSON schema that the answer follows: a file, or the schema itself, which begins with {.",
            show_default=False,
        ),
    ] = None
    quiet: Annotated[
        bool,
        panel_option(_OUTPUT, "-q", "--quiet", help="No figures, no bars, no greeting."),
    ] = False

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of create_completion and create_chat_completion.

        Raises:
            IndexMemError: a file cannot be read, or there is no such grammar or schema.
        """
        given: dict[str, Any] = {}
        if self.stop:
            given["stop"] = [argument_text("--stop", text) for text in self.stop]
            if "" in given["stop"]:
                raise IndexMemError("--stop is empty: give the text that the answer is to end before")
        grammar = self._grammar()
        if grammar is not None:
            given["grammar"] = grammar
        return given

    def _grammar(self) -> Optional[LlamaGrammar]:
        if self.grammar is not None and self.json_schema is not None:
            raise IndexMemError("--grammar and --json-schema both say what the answer looks like: give one of them")
        if self.grammar is None and self.json_schema is None:
            return None
        from .._vendor.llama_cpp import LlamaGrammar

        if self.grammar is not None:
            text = read_text(self.grammar)
            if not text.strip():
                raise IndexMemError(f"the grammar {self.grammar} is empty")
            return LlamaGrammar.from_string(text, verbose=False)
        assert self.json_schema is not None
        name, text = "--json-schema", argument_text("--json-schema", self.json_schema)
        if not text.lstrip().startswith("{"):
            name, text = text, read_text(text)
        try:
            schema = json.loads(text)
        except ValueError as error:
            raise IndexMemError(f"{name} is not JSON: {error}") from None
        if not isinstance(schema, (dict, bool)):
            raise IndexMemError(f"{name} is no JSON schema: expected an object, found {type(schema).__name__}")
        try:
            return LlamaGrammar.from_json_schema(text, verbose=False)
        except Exception as error:  # of many kinds, for what it does not know
            raise IndexMemError(f"{name} cannot be made into a grammar: {type(error).__name__}: {error}") from error
