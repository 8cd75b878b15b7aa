"""Grammars are tried out before the library follows them: one with a mistake would end the process at the first token."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from .._vendor.llama_cpp import llama_cpp as llama_lib, llama_grammar
from ..errors import GrammarError
from ..native.logs import collected_errors, reason

_DEEPEST = 1000  # groups within groups: the library's parser takes its own stack for each
_NOT_A_GROUP = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)
_LONGEST = 200  # characters of the library's explanation, which may go on with all the rest of the grammar


def check_grammar(vocab: int, text: str, root: str = "root") -> None:
    """Raises GrammarError if the library cannot read the grammar."""
    if not isinstance(text, str) or not text.strip():
        raise GrammarError(f"a grammar must be text with rules such as `root ::= ...`, found {text!r:.80}")
    if "\0" in text:
        at = text.index("\0")
        raise GrammarError(f"the grammar has a NUL character at {at:,}, where the library would stop reading: take it out")
    depth = deepest = 0
    for sign in re.sub(r"[^()]", "", _NOT_A_GROUP.sub("", text)):
        depth += 1 if sign == "(" else -1
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:
        raise GrammarError(
            f"the grammar has {deepest:,} groups within one another, and at most {_DEEPEST:,} can be read: make rules of some"
        )
    try:
        rules = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GrammarError(f"the grammar has half a character (a lone surrogate) at {error.start:,}: take it out") from None
    with collected_errors(False) as log:
        sampler = llama_lib.llama_sampler_init_grammar(vocab, rules, root.encode())
    if not sampler:
        raise GrammarError(f"the grammar cannot be used: {_shortened(reason(log)) or 'the library gave no reason'}")
    llama_lib.llama_sampler_free(sampler)


def _shortened(why: str) -> str:
    line = " ".join(why.split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + " ..."


def _depth(value: Any) -> int:
    """How many objects and lists of a JSON value are within one another."""
    deepest, left = 0, [(value, 1)]
    while left:
        value, depth = left.pop()
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        deepest = max(deepest, depth)
        if deepest < sys.getrecursionlimit():  # a value that holds itself has no end
            left += [(part, depth + 1) for part in parts]
    return deepest


def schema_grammar(schema: Any, what: str) -> Any:
    """The grammar of the JSON that a schema describes; `what` names the schema in errors.

    Raises:
        GrammarError: the schema has a mistake, or something that no grammar can be made of.
    """
    if not isinstance(schema, dict):
        raise GrammarError(f"{what} must be a JSON schema, an object such as {{'type': 'object', ...}}, found {schema!r:.80}")
    try:
        if _depth(schema) >= sys.getrecursionlimit():
            raise RecursionError  # now, and not when others' code, such as finalizers, has no room left either
        return llama_grammar.LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)
    except RecursionError:
        raise GrammarError(f"{what} has too many schemas within one another to make a grammar of: make it flatter") from None
    except Exception as error:  # of all kinds: the converter was not written for schemas with mistakes
        why = str(error) or type(error).__name__
        if isinstance(error, KeyError):
            why = f"it names {why}, which it does not have"
        raise GrammarError(f"no grammar can be made of {what}: {_shortened(why)}. Simplify or mend the schema") from None
