"""What a `Llama` is made with, and why one could not be made, in words: what llama-cpp-python raises says only that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from ..errors import UNBOUNDED, BudgetError, ContextError, IndexMemError, ModelFileError, ModelNotSupported, SidecarError
from ..files.cachetypes import numbered
from ..files.modelfile import check_lora_file
from ..models.sidecars import Found, find_sidecar
from ..native import api
from ..native.logs import reason
from ..native.processors import default_threads
from ..options import CacheOptions, bounded_keywords
from .choice import INDEXER_POLICY, MEMORY_OFF, SLOTTED_MEMORY, choose_memory, choose_policy, sidecar_kinds
from .inside import Inside


def options_for(path: str, given: Mapping[str, Any]) -> tuple[CacheOptions, Found]:
    """The options that keywords come to with a model, and the sidecar that was found for it if none was named.

    Raises what `CacheOptions.from_keywords` does.
    """
    policy, memory = given.get("kv_policy"), given.get("memory")
    # with another policy there is no use for one, unless its memory was asked for
    useful = policy in (None, INDEXER_POLICY) or memory not in (None, MEMORY_OFF, SLOTTED_MEMORY)
    if not given.get("kv_budget") or given.get("indexmem") is not None or not useful:
        return CacheOptions.from_keywords(given), Found()

    def fits(sidecar: str) -> bool:
        kinds = sidecar_kinds(sidecar)
        try:
            kind, _ = choose_memory(memory, given.get("memory_slots"), kinds, api.memories())
            choose_policy(policy, kind, sidecar, kinds)
        except IndexMemError:
            return False
        return True

    found = find_sidecar(path, fits)
    return CacheOptions.from_keywords({**given, "indexmem": found.path}), found


def base_keywords(kwargs: Mapping[str, Any], options: CacheOptions) -> dict[str, Any]:
    """Keyword arguments of `llama_cpp.Llama`: with our defaults, and with what a bounded cache needs.

    Raises:
        BudgetError: one of them cannot be combined with a budget, or is no type of a cache.
        ModelFileError: the LoRA file is not there, or not a GGUF file.
    """
    one, many = default_threads()
    ready = {**numbered(kwargs), "n_threads": kwargs.get("n_threads") or one, "n_threads_batch": kwargs.get("n_threads_batch") or many}
    if kwargs.get("lora_path") is not None:
        ready["lora_path"] = check_lora_file(kwargs["lora_path"])
    return bounded_keywords(ready, options.budget) if options.bounded else ready


def lacks_template(llm: Inside, keywords: Mapping[str, Any]) -> bool:
    """Whether neither the file of a model nor who loads it says how messages are written for it."""
    named = keywords.get("chat_format") is not None or keywords.get("chat_handler") is not None
    return not named and not any(name.startswith("tokenizer.chat_template") for name in llm.public.metadata)


def require_lora(llm: Inside, log: list[str]) -> None:
    """Raises ModelFileError if llama.cpp could not load the LoRA file that was named: llama-cpp-python goes on without."""
    if llm.public.lora_path and not llm.has_lora:
        raise ModelFileError(f"cannot load the LoRA {llm.public.lora_path}: {reason(log) or 'llama.cpp gave no reason'}")


def explain(llm: Inside, bounded: bool, error: Exception, path: str, log: list[str]) -> Optional[IndexMemError]:
    """The error to raise in place of one of the base class's constructor; None to let that one through."""
    if isinstance(error, IndexMemError):
        return None
    said, kind = (api.last_error(), api.last_error_kind()) if bounded else ("", api.ERROR_NONE)
    model = llm.loaded_model
    if model is None:
        if str(error).startswith("Failed to load model"):
            why = reason(log) or "llama.cpp gave no reason"
            return ModelFileError(f"cannot load the model {path}: {why}. Is the file complete?")
        return None
    if llm.has_context or not str(error).startswith("Failed to create llama_context"):
        return None
    unsupported = api.model_unsupported_reason(model) if bounded else None
    if unsupported is not None:
        return ModelNotSupported(f"{path} cannot have a bounded KV cache: {unsupported}. {UNBOUNDED}")
    if kind == api.ERROR_SIDECAR:
        return SidecarError(said)
    if kind == api.ERROR_PARAMS:
        return BudgetError(said)
    why = (said if kind == api.ERROR_MODEL else "") or reason(log) or said or "is there enough memory?"
    return ContextError(f"cannot create a context for {path}: {why}")
