"""What the cache of a model will take, before it is loaded: a dry run of the library, which allocates nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Union

from ..errors import ContextError
from ..files.modelfile import check_model_file, loaded_model
from ..native import api
from ..native.logs import collected_errors, reason
from ..options import CacheOptions, bounded_keywords, require_known, split_keywords
from .creation import options_for
from .inside import MAKE

_PARAMS = ("n_ctx", "n_batch", "n_ubatch", "type_k", "type_v", "swa_full")  # that count, by their names in llama.cpp


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parts of a cache."""

    kv: int  # keys and values of layers that are bounded; without a budget of all layers, states included
    meta: int = 0  # positions, and what policy, indexer and memory keep
    fixed: int = 0  # of layers that a budget does not bound: windows and recurrent states
    slots: int = 0  # per KV head; 0 without a budget

    @property
    def total(self) -> int:
        """All of it."""
        return self.kv + self.meta + self.fixed


def kv_bytes(model_path: Union[str, os.PathLike[str]], keywords: Mapping[str, Any]) -> Sizes:
    """What a `Llama` with these keywords would have.

    Raises:
        BudgetError, PolicyError, SidecarError, LatentMemoryError, ModelNotSupported: the options are impossible.
        ModelFileError, ContextError: the model cannot be loaded.
    """
    path = check_model_file(model_path)
    asked, others = split_keywords(keywords)
    require_known(others, MAKE.parameters)
    options, _ = options_for(path, asked)
    return _dry_run(path, options, bounded_keywords(others, options.budget) if options.bounded else others)


def _dry_run(path: str, options: CacheOptions, keywords: Mapping[str, Any]) -> Sizes:
    llama = api.llama_lib
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, 512  # llama-cpp-python's
    for name in _PARAMS:
        if keywords.get(name) is not None:
            setattr(params, name, keywords[name])
    params.n_ubatch = min(params.n_ubatch, params.n_batch)
    flash = options.bounded or bool(keywords.get("flash_attn"))
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    with loaded_model(path, dry=True) as model, collected_errors(False) as log:
        try:
            options.request()
            context = llama.llama_init_from_model(model, params)
            if not context:
                raise api.failure(f"cannot compute the size of the cache of {path}: {reason(log)}", ContextError)
        finally:
            if options.bounded:
                api.withdraw_request()
        try:
            if not options.bounded:
                return Sizes(api.cache_bytes(context))
            stats = api.get_stats(context)
            return Sizes(stats.kv_bytes, stats.meta_bytes, stats.window_bytes + stats.recurrent_bytes, stats.n_slots)
        finally:
            llama.llama_free(context)
