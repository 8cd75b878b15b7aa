"""`indexmem generate`: one text, or one answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from ..errors import Cancelled, IndexMemError
from ..files.textfile import argument_text, read_standard_input, read_text
from .answers import cut_by, is_full, pieces, why_cut
from .console import Bar
from .conversation import Conversation
from .interrupt import ctrl_c_ends
from .options import RunOptions
from .sampling import AnswerOptions
from .terminal import without_controls

if TYPE_CHECKING:
    from ..llama import Llama

STOPPED = 130  # exit status after Ctrl-C


def generate(
    options: RunOptions, form: AnswerOptions, prompt: Optional[str], file: Optional[Path], as_chat: bool, special: bool
) -> int:
    """Writes the text to standard output, and what the cache did to standard error; returns the exit status.

    Args:
        special: control tokens in the text to go on from are such, and not text.
    """
    text = _prompt_text(prompt, file)
    sampling = {**options.sampling(), **form.keywords()}
    with_messages = as_chat or options.system is not None
    with ctrl_c_ends():
        llm = options.load(form.quiet)
        if with_messages:
            options.rehearse(llm)

    def begin() -> Any:
        if not with_messages:
            return llm.create_completion(llm.tokenize(text.encode(), special=special), stream=True, **sampling)
        messages: Any = Conversation(options.system).asked(text).messages
        return llm.create_chat_completion(messages, stream=True, **sampling)

    bar = Bar("reading", wanted=not (options.as_json or form.quiet))
    shown = sys.stdout.isatty()
    written: list[str] = []
    finish: Optional[str] = None
    try:
        for piece, reason in pieces(llm, begin, options.predict, bar):
            written.append(piece)
            finish = reason or finish
            if not options.as_json:
                print(without_controls(piece) if shown else piece, end="", flush=True)
    except (Cancelled, KeyboardInterrupt):
        finish = "stopped"
    _end(llm, options, form, "".join(written), finish)
    llm.close()
    return STOPPED if finish == "stopped" else 0


def _end(llm: Llama, options: RunOptions, form: AnswerOptions, text: str, finish: Optional[str]) -> None:
    stats = llm.kv_stats()
    if options.as_json:
        print(json.dumps({"text": text, "finish_reason": finish, **cut_by(finish, stats, options.predict), "stats": stats.to_dict()}))
        return
    if text or finish != "stopped":
        print(flush=True)
    if finish == "stopped":
        print("stopped" if text else "stopped: nothing was generated", file=sys.stderr)
    elif finish == "length" and is_full(stats, options.predict):
        print(f"note: {why_cut(stats, options.predict)}", file=sys.stderr)
    if not form.quiet:
        print(stats, file=sys.stderr)


def _prompt_text(prompt: Optional[str], file: Optional[Path]) -> str:
    if (prompt is None) == (file is None):
        raise IndexMemError("give the text with either -p TEXT or -f FILE (`-f -` reads standard input)")
    if prompt is not None:
        text = argument_text("--prompt", prompt)
    else:
        assert file is not None
        text = read_standard_input() if str(file) == "-" else read_text(file, pipes=True)
    if not text.strip():
        raise IndexMemError("the text is empty")
    return text
