"""Contexts of a model that is loaded, made as `Llama` makes its own, for whoever wants to know something of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ContextError
from ..files.cachetypes import numbered
from ..native import api
from ..native.logs import collected_errors, reason
from ..native.processors import default_threads
from ..options import CacheOptions, bounded_keywords

_DEFAULTS = {"n_ctx": 512, "n_batch": 512, "n_ubatch": 512}  # llama-cpp-python's
_COUNT = (*_DEFAULTS, "n_threads", "n_threads_batch", "type_k", "type_v", "swa_full")  # by their names in llama.cpp


def _params(options: CacheOptions, keywords: Mapping[str, Any]) -> Any:
    """llama_context_params of a `Llama` with these options, and other keywords."""
    llama = api.llama_lib
    keywords = numbered(keywords)
    ready = bounded_keywords(keywords, options.budget) if options.bounded else keywords
    one, many = default_threads()
    known = {**_DEFAULTS, "n_threads": one, "n_threads_batch": many}
    params = llama.llama_context_default_params()
    for name in _COUNT:
        value = ready[name] if ready.get(name) is not None else known.get(name)
        if value is not None:
            setattr(params, name, value)
    params.n_ubatch = min(params.n_ubatch, params.n_batch)
    flash = options.bounded or bool(ready.get("flash_attn"))
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if not ready.get("logits_all"):
        params.n_outputs_max = 1  # a `Llama` reserves more rows of logits, and never touches them
    return params


@contextlib.contextmanager
def context_of(path: str, model: int, options: CacheOptions, keywords: Mapping[str, Any]) -> Iterator[int]:
    """A context of a loaded model, for as long as the block runs.

    Args:
        path: the file of the model, for messages.
        keywords: those of `Llama` that are not options of the cache.

    Raises:
        BudgetError, SidecarError, ModelNotSupported: the options are impossible with this model.
        ContextError: there can be no such context.
    """
    llama = api.llama_lib
    params = _params(options, keywords)
    with collected_errors(False) as log:
        try:
            options.request()
            context = llama.llama_init_from_model(model, params)
            if not context:
                why = f"cannot make a context for {path}: {reason(log) or 'llama.cpp gave no reason'}"
                raise api.failure(why, ContextError) if options.bounded else ContextError(why)
        finally:
            if options.bounded:
                api.withdraw_request()
        try:
            yield context
        finally:
            llama.llama_free(context)
