"""Another chat format than the model's file names."""

from __future__ import annotations

import os

from .._vendor.llama_cpp import llama_chat_format as chat_format
from ..errors import ModelFileError
from ..files.textfile import read_text
from .inside import Inside


def use_format(llm: Inside, name_or_file: str) -> None:
    """Has messages written in another format: one that llama-cpp-python knows by name, or the Jinja template in a file.

    Raises:
        ModelFileError: it is neither; the message lists the names.
    """
    public = llm.public
    if name_or_file in llm.chat_formats:
        public.chat_format, public.chat_handler = name_or_file, None
        return
    if not os.path.exists(name_or_file):
        raise ModelFileError(
            f"{name_or_file!r} is neither a file with a Jinja template nor a chat format: choose one of {', '.join(llm.chat_formats)}"
        )
    bos, eos = llm.token_text(public.token_bos()), llm.token_text(public.token_eos())
    try:
        formatter = chat_format.Jinja2ChatFormatter(
            read_text(name_or_file), eos_token=eos, bos_token=bos, stop_token_ids=[public.token_eos()]
        )
    except Exception as error:  # jinja2.TemplateSyntaxError and others
        raise ModelFileError(f"{name_or_file} is not a Jinja template: {error}") from None
    public.chat_handler = formatter.to_chat_handler()
