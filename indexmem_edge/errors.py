"""Every error that indexmem-edge raises on purpose.

Each message says what was expected, what was found and what to do. Types that replace a `ValueError` or `RuntimeError`
of llama-cpp-python still derive from it, so code written for `llama_cpp.Llama` keeps catching them.
"""

from __future__ import annotations


class IndexMemError(Exception):
    """Base class of all errors of this package."""


class LibraryError(IndexMemError):
    """The native library is missing, is not ours, or another one is already loaded in this process."""


class VersionError(LibraryError):
    """llama-cpp-python, or the native interface, has another version than this package was built for."""


class ModelFileError(IndexMemError, ValueError):
    """The model file is missing, unreadable, not GGUF, damaged, or of an unknown architecture."""


# for a model without a bounded cache
UNBOUNDED = "Without a budget (--kv-budget 0, kv_budget=None) it runs as in llama.cpp"


class ModelNotSupported(IndexMemError, ValueError):
    """The model is fine, but its attention cannot run on a bounded KV cache, or training does not know how it computes."""


class SidecarError(IndexMemError, ValueError):
    """The sidecar is damaged, or for another model."""


class BudgetError(IndexMemError, ValueError):
    """The requested KV cache, or an option that contradicts it, is impossible."""


class PolicyError(IndexMemError, ValueError):
    """There is no eviction policy of that name."""


class LatentMemoryError(IndexMemError, ValueError):
    """There is no latent memory of that kind, or not without trained weights."""


class TrainingError(IndexMemError, ValueError):
    """What is to be trained, the objective and its options do not fit together."""


class TrainingCheckpointError(IndexMemError):
    """A checkpoint of a training could not be written, or was refused. The one written before it is intact."""


class TrainingStopped(IndexMemError):
    """A person ended a training early; the message says what is saved and how to go on."""


class ContextError(IndexMemError, RuntimeError):
    """The native context could not be created, for example for want of memory."""


class DecodeError(IndexMemError, RuntimeError):
    """Evaluating tokens failed; the cache holds exactly the tokens evaluated before the failure."""


class Cancelled(IndexMemError):
    """`Llama.cancel()` stopped the call in progress. The conversation is as it was before that call."""


class GenerationSuperseded(IndexMemError, RuntimeError):
    """Another call has started since: what a stream was in the middle of is not in the cache any more."""


class ModelClosed(IndexMemError, RuntimeError):
    """The `Llama` has been closed, or belongs to the process that this one was forked from."""


class RequestError(IndexMemError, ValueError):
    """A prompt, messages or an option of a request that no model can answer; the message says what to give instead."""


class GrammarError(RequestError):
    """A grammar, or a JSON schema that was to become one, has a mistake; the message says which."""


class BudgetExhausted(DecodeError):
    """The policy `full` never evicts, and the budget is used up."""


class SessionError(IndexMemError):
    """A session could not be saved, or a session file was refused. The state in memory is as it was."""


class DownloadError(IndexMemError):
    """A model could not be fetched; the message says why and what to do."""


class DemoModelMissing(IndexMemError):
    """The demo model is not installed."""


class TorchMissing(IndexMemError, ImportError):
    """PyTorch, which training needs, is not installed or does not start."""


class ConvertError(IndexMemError, ValueError):
    """A checkpoint or sidecar cannot be read, converted or written; the message says why and what to do."""


class CacheWarning(UserWarning):
    """Nothing failed, but a person would want to know: text is dropped or evaluated again, a prompt is not what it seems.

    `kind` says in a word or two what it is about; kinds are those of `indexmem_edge.runtime.notices`.
    """

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind
