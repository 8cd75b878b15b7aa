"""indexmem-edge: llama.cpp with a KV cache of the size you choose.

    from indexmem_edge import Llama

    llm = Llama("model.gguf", kv_budget=1024)       # everything else as llama_cpp.Llama
    llm.create_chat_completion([{"role": "user", "content": "Hello"}])
    print(llm.kv_stats())

Importing the package is cheap: the library is loaded, and checked, when `Llama` is first used. `indexmem_edge.llama_cpp` is the
copy of llama-cpp-python that runs on it.

What `__all__` names is promised, with the modules that it comes from, `llama`, `options`, `stats` and `errors`, and is described in
docs/api.md. All other modules may change with any release.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from .errors import (
    BudgetError,
    BudgetExhausted,
    CacheWarning,
    Cancelled,
    ContextError,
    ConvertError,
    DecodeError,
    DemoModelMissing,
    DownloadError,
    GenerationSuperseded,
    GrammarError,
    IndexMemError,
    LatentMemoryError,
    LibraryError,
    ModelClosed,
    ModelFileError,
    ModelNotSupported,
    PolicyError,
    RequestError,
    SessionError,
    SidecarError,
    TorchMissing,
    TrainingCheckpointError,
    TrainingError,
    TrainingStopped,
    VersionError,
)

if TYPE_CHECKING:
    from ._vendor import llama_cpp as llama_cpp
    from .llama import Llama
    from .models.demo import demo_model
    from .options import CacheOptions
    from .runtime.checkpoints import Checkpoint
    from .sessions.info import SessionInfo
    from .stats import KVStats

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "BudgetExhausted",
    "CacheOptions",
    "CacheWarning",
    "Cancelled",
    "Checkpoint",
    "ContextError",
    "ConvertError",
    "DecodeError",
    "DemoModelMissing",
    "DownloadError",
    "GenerationSuperseded",
    "GrammarError",
    "IndexMemError",
    "LatentMemoryError",
    "KVStats",
    "LibraryError",
    "Llama",
    "ModelClosed",
    "ModelFileError",
    "ModelNotSupported",
    "PolicyError",
    "RequestError",
    "SessionError",
    "SessionInfo",
    "SidecarError",
    "TorchMissing",
    "TrainingCheckpointError",
    "TrainingError",
    "TrainingStopped",
    "VersionError",
    "demo_model",
    "indexers",
    "kv_bytes",
    "llama_cpp",
    "memories",
    "policies",
]


def policies() -> dict[str, str]:
    """The eviction policies of the loaded library, each with one line of help."""
    from .native import api

    return api.policies()


def indexers() -> dict[str, str]:
    """The kinds of indexers that a sidecar can hold, each with one line of help."""
    from .native import api

    return api.indexers()


def memories() -> dict[str, str]:
    """The latent memories of what was evicted, each with one line of help."""
    from .native import api

    return api.memories()


def kv_bytes(model_path: str | os.PathLike[str], **keywords: Any) -> int:
    """Bytes that the cache of a model would take, computed without loading the weights.

    Args:
        model_path: the GGUF file.
        keywords: as `Llama` takes them; n_ctx, n_ubatch, type_k and type_v count, too.

    Raises what `Llama` does for options that are impossible and models that cannot be loaded.
    """
    from .runtime.sizes import kv_bytes as computed

    return computed(model_path, keywords).total


_LATER = {  # which module has it: imported when it is first asked for
    "CacheOptions": "options",
    "Checkpoint": "runtime.checkpoints",
    "KVStats": "stats",
    "Llama": "llama",
    "SessionInfo": "sessions.info",
    "demo_model": "models.demo",
}


def __getattr__(name: str) -> Any:
    if name == "llama_cpp":
        return importlib.import_module(f"{__name__}._vendor.llama_cpp")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
