"""Why a `Llama` could not be made, in words: what llama-cpp-python raises says only that it could not."""

from __future__ import annotations

from typing import Optional

from ..errors import BudgetError, ContextError, IndexMemError, ModelFileError, ModelNotSupported, SidecarError
from ..native import api
from ..native.logs import reason
from .inside import Inside


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
        return ModelNotSupported(f"{path} cannot have a bounded KV cache: {unsupported}. Load it without kv_budget")
    if kind == api.ERROR_SIDECAR:
        return SidecarError(said)
    if kind == api.ERROR_PARAMS:
        return BudgetError(said)
    why = (said if kind == api.ERROR_MODEL else "") or reason(log) or said or "is there enough memory?"
    return ContextError(f"cannot create a context for {path}: {why}")
