"""Models and contexts to measure: tokens in, seconds, bytes and logits out. Nothing is sampled in Python."""

from __future__ import annotations

import ctypes
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from indexmem_edge import llama_cpp
from indexmem_edge._vendor.llama_cpp._internals import LlamaModel
from indexmem_edge.errors import IndexMemError
from indexmem_edge.files import cachetypes
from indexmem_edge.files.modelfile import fingerprint
from indexmem_edge.native import api, logs  # loads the library, before llama_cpp would
from indexmem_edge.options import LOGICAL_MAX, CacheOptions

UNBOUNDED = "full"  # the policy of the stock cache, which keeps everything
F16 = "f16"
# of layers whose cache does not grow with the text: what is counted beside K and V
FIXED_KEYS = ("window_bytes", "recurrent_bytes")
WHOLE_KEYS = ("kv_bytes", "meta_bytes", "sidecar_bytes", *FIXED_KEYS)  # together all that a conversation needs
BYTE_KEYS = (*WHOLE_KEYS, "indexer_bytes", "memory_bytes")  # these are part of meta_bytes


class BenchError(IndexMemError):
    """A message for the person at the terminal."""


def kv_types(cache_type: str) -> tuple[str, str]:
    """Types of K and of V: one name stands for both, K/V for two.

    Raises:
        BenchError: one of them is unknown.
    """
    k, slash, v = cache_type.partition("/")
    for name in (k, v) if slash else (k,):
        if name not in cachetypes.NAMES:
            raise BenchError(
                f"unknown cache type {cache_type!r}: choose one of {', '.join(cachetypes.NAMES)}, or two of them as in q8_0/q4_0"
            )
    return k, v if slash else k


@dataclass(frozen=True)
class Setup(CacheOptions):
    """One system under test: options of the cache, and of the context around it. Budget 0 is the stock cache, which needs
    `n_ctx`.
    """

    policy: str = UNBOUNDED
    n_ctx: int = 0
    flash: bool = True
    cache_type: str = F16  # of K and V, or K/V
    threads: int = 2
    ubatch: int = 512
    sequences: int = 1  # that there is room for, in one cache
    offload: bool = True  # the cache of a layer that is on a GPU lies there, too

    def unbounded(self) -> Setup:
        """The stock cache in the place of this one."""
        return replace(self, policy=UNBOUNDED, budget=0, sidecar=None, budget_ratio=None, memory="off", memory_slots=0)

    @property
    def window_says(self) -> str:
        """The window of any budget, for a report."""
        return f"min({self.window}, budget / 4)" if self.window else "a quarter of the budget"

    @property
    def label(self) -> str:
        if not self.budget:
            return "unbounded" + ("" if self.flash else ", no flash")
        memory = f", memory {self.memory}" if self.memory != "off" else ""
        return f"{self.policy} {self.budget}" + (f", at most {self.budget_ratio:.0%}" if self.budget_ratio else "") + memory


class Model:
    def __init__(self, path: Path, gpu_layers: int | None = None):
        """`gpu_layers`: how many layers go to a GPU, if the build has a backend for one; None: all."""
        if not path.is_file():
            raise BenchError(f"no model file at {path}")
        self.path = path
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        if gpu_layers is not None:
            params.n_gpu_layers = gpu_layers
        with _quiet() as lines:
            try:
                self.raw = LlamaModel(path_model=str(path), params=params, verbose=False)
            except ValueError as error:
                raise BenchError(f"cannot load {path.name}: {logs.reason(lines) or error}") from None
        self.n_vocab = self.raw.n_vocab()
        self.identity = fingerprint(path)[-16:]

    def tokens(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """`special`: words such as <|im_end|> are the tokens that they stand for."""
        return list(self.raw.tokenize(text.encode(), add_bos=bos and self.raw.add_bos_token(), special=special))

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.raw.detokenize(list(tokens)), errors="replace")

    def piece(self, token: int) -> bytes:
        """What a token adds to a text."""
        return bytes(self.raw.detokenize([token]))

    def tokenizer_identity(self) -> str:
        """The same for models that cut every text into the same tokens: a hash of vocabulary and rules."""
        meta, raw = self.raw.metadata(), self.raw.vocab
        rules = (meta.get(f"tokenizer.ggml.{key}") for key in ("model", "pre", "add_space_prefix"))
        digest = hashlib.sha256(repr(tuple(rules)).encode())
        for token in range(self.n_vocab):
            digest.update(llama_cpp.llama_vocab_get_text(raw, token) + b"\0")
        return digest.hexdigest()[:16]

    def is_end(self, token: int) -> bool:
        return bool(llama_cpp.llama_vocab_is_eog(self.raw.vocab, token))

    def trained_length(self) -> int:
        return int(llama_cpp.llama_model_n_ctx_train(self.raw.model))

    def kv_bytes(self, n_tokens: int, cache_type: str, window: bool = False) -> int:
        """Bytes of K and V that the stock cache takes for `n_tokens`, rounded up as it rounds."""
        return self.token_bytes(cache_type, window) * -(-n_tokens // 256) * 256

    def token_bytes(self, cache_type: str, window: bool = False) -> int:
        """Bytes of K and V of one token, in the layers that attend to all of the text; or in those with a window."""
        types = kv_types(cache_type)
        rows = self._rows(api.LAYER_WINDOW if window else api.LAYER_BOUNDED)
        return sum(cachetypes.nbytes(t, n) for row in rows for n, t in zip(row, types))

    def has_fixed(self) -> bool:
        """Whether there are layers whose cache does not grow with the text."""
        kinds = api.LAYER_WINDOW | api.LAYER_RECURRENT
        return not self._stock and any(flags & kinds for flags in api.model_layers(self.raw.model))

    def has_recurrent(self) -> bool:
        """Whether there are layers with a state that cannot be rolled back."""
        if self._stock:
            return bool(llama_cpp.llama_model_is_recurrent(self.raw.model) or llama_cpp.llama_model_is_hybrid(self.raw.model))
        return any(flags & api.LAYER_RECURRENT for flags in api.model_layers(self.raw.model))

    @property
    def _stock(self) -> bool:
        """Whether the library is a llama.cpp without the bounded cache."""
        return not hasattr(api.llama_lib._lib, "indexmem_api_version")

    def _rows(self, kind: int) -> list[tuple[int, int]]:
        """Numbers that a token leaves in keys and values of each layer of a kind."""
        raw = self.raw.model
        if not self._stock:
            return [row for row, flags in zip(api.model_rows(raw), api.model_layers(raw)) if flags & kind]
        meta = self.raw.metadata()
        heads, layers = llama_cpp.llama_model_n_head_kv(raw), llama_cpp.llama_model_n_layer(raw)
        size = llama_cpp.llama_model_n_embd(raw) // llama_cpp.llama_model_n_head(raw)
        arch = meta.get("general.architecture", "")
        k, v = (heads * int(meta.get(f"{arch}.attention.{name}_length", size)) for name in ("key", "value"))
        return [(k, v)] * layers if kind == api.LAYER_BOUNDED else []

    def weight_bytes(self) -> int:
        """Bytes of weights that a token reads: all, but for a table of embeddings that is not the output matrix, too."""
        tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(self.path).tensors}
        spared = tensors["token_embd.weight"] if "output.weight" in tensors else 0
        return sum(tensors.values()) - spared

    def close(self) -> None:
        self.raw.close()


class System:
    """A context of one sequence, evaluated ubatch by ubatch."""

    def __init__(self, model: Model, setup: Setup):
        self.model, self.setup, self.seen = model, setup, 0
        self.logits: np.ndarray | None = None  # of the last token fed with logits
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = LOGICAL_MAX if setup.budget else -(-setup.n_ctx // 256) * 256
        params.n_batch = params.n_ubatch = setup.ubatch
        params.n_seq_max, params.kv_unified = setup.sequences, setup.sequences > 1
        params.n_threads = params.n_threads_batch = setup.threads
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if setup.flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.type_k, params.type_v = (cachetypes.ggml_type(name) for name in kv_types(setup.cache_type))
        params.offload_kqv = params.op_offload = setup.offload
        params.no_perf = True
        setup.request()
        with _quiet() as lines:
            self.ctx = llama_cpp.llama_init_from_model(model.raw.model, params)
        if not self.ctx:
            why = (api.last_error() if setup.budget else "") or logs.reason(lines)
            raise BenchError(f"no context for {setup.label}: {why or 'the library gave no reason'}")
        self.batch = llama_cpp.llama_batch_init(setup.ubatch, 0, 1)
        shape = (setup.ubatch,)
        self._token = np.ctypeslib.as_array(self.batch.token, shape)
        self._pos = np.ctypeslib.as_array(self.batch.pos, shape)
        self._want = np.ctypeslib.as_array(self.batch.logits, shape)
        np.ctypeslib.as_array(self.batch.n_seq_id, shape)[:] = 1
        for i in range(setup.ubatch):
            self.batch.seq_id[i][0] = 0

    def _room_for(self, n: int) -> int:
        """The position of the next token; what has to leave for `n` of them, leaves."""
        return self.seen

    def _ubatch(self, tokens: Sequence[int], want: str) -> float:
        n, first = len(tokens), self._room_for(len(tokens))
        self.batch.n_tokens = n
        self._token[:n] = tokens
        self._pos[:n] = range(first, first + n)
        self._want[:n] = want == "all"
        self._want[n - 1] = want != "none"
        start = time.perf_counter()
        code = llama_cpp.llama_decode(self.ctx, self.batch)
        llama_cpp.llama_synchronize(self.ctx)
        seconds = time.perf_counter() - start
        if code:
            raise BenchError(f"{self.setup.label}: llama_decode gave {code} after {self.seen} tokens")
        self.seen += n
        return seconds

    def feed(self, tokens: Sequence[int], last_logits: bool = False) -> list[tuple[int, float]]:
        """Evaluates tokens; (tokens, seconds) of every ubatch."""
        times, step = [], self.setup.ubatch
        for i in range(0, len(tokens), step):
            part = tokens[i : i + step]
            times.append((len(part), self._ubatch(part, "last" if last_logits and i + step >= len(tokens) else "none")))
        if last_logits:
            self.logits = self._rows(1)[0].copy()
        return times

    def step(self, token: int) -> float:
        """Evaluates one token with logits, as a decode does; seconds."""
        seconds = self._ubatch([token], "last")
        self.logits = self._rows(1)[0].copy()
        return seconds

    def at_once(self, tokens: Sequence[int]) -> float:
        """Evaluates tokens as one ubatch with the logits of all, as a check of a draft does; seconds."""
        return self._ubatch(tokens, "all")

    def decode(self, n: int, first: int) -> list[float]:
        """`n` greedy steps beginning with token `first`; seconds of each."""
        return [self.step(first if i == 0 else self.greedy()) for i in range(n)]

    def greedy(self) -> int:
        assert self.logits is not None
        return int(self.logits.argmax())

    def nll(self, tokens: Sequence[int], chunk: int = 128) -> np.ndarray:
        """Negative log-likelihood (nats) of each token, teacher-forced after what was fed with logits."""
        return np.concatenate([token_nll(rows, part) for part, rows in self._forced(tokens, chunk)])

    def choices(self, tokens: Sequence[int], chunk: int = 128) -> np.ndarray:
        """The likeliest token in the place of each of `tokens`, which are what was read before that place."""
        return np.concatenate([rows.argmax(axis=1) for _, rows in self._forced(tokens, chunk)])

    def _forced(self, tokens: Sequence[int], chunk: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """Evaluates tokens; some of them at a time, with the logits [tokens, vocabulary] that foretell them."""
        assert self.logits is not None
        before, chunk = self.logits[None], min(chunk, self.setup.ubatch)
        for i in range(0, len(tokens), chunk):
            part = list(tokens[i : i + chunk])
            self._ubatch(part, "all")
            rows = np.concatenate([before, self._rows(len(part))])
            before = rows[-1:].copy()
            yield part, rows[:-1]
        self.logits = before[0]

    def _rows(self, n: int) -> np.ndarray:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.ctx), (n, self.model.n_vocab))

    def rollback(self, n_seen: int) -> bool:
        """Forgets what came after `n_seen` tokens if the cache can do that exactly."""
        memory = llama_cpp.llama_get_memory(self.ctx)
        if self.seen > n_seen and not (
            self.stats()["evicted"] == 0 and llama_cpp.llama_memory_seq_rm(memory, 0, n_seen, -1)
        ):
            return False
        self.seen = n_seen
        return True

    def bookmark(self) -> Callable[[], None]:
        """What goes back to here, as often as it is called."""
        seen, logits = self.seen, self.logits
        if self.setup.budget or self.model.has_recurrent():  # which cannot be rolled back
            state = self.save()
            return lambda: self.restore(state)

        def back() -> None:
            if not self.rollback(seen):
                raise BenchError(f"{self.setup.label}: what came after {seen} tokens could not be taken back")
            self.logits = logits

        return back

    def save(self) -> tuple[Any, int, np.ndarray | None]:
        buffer = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(self.ctx, 0))()
        if not llama_cpp.llama_state_seq_get_data(self.ctx, buffer, len(buffer), 0):
            raise BenchError(f"{self.setup.label}: the state could not be copied")
        return buffer, self.seen, self.logits

    def restore(self, state: tuple[Any, int, np.ndarray | None]) -> None:
        buffer, self.seen, self.logits = state
        if not llama_cpp.llama_state_seq_set_data(self.ctx, buffer, len(buffer), 0):
            raise BenchError(f"{self.setup.label}: the state could not be put back")

    def stats(self) -> dict[str, int]:
        if self.setup.budget:
            stats = api.get_stats(self.ctx)
            return {
                "kv_bytes": stats.kv_bytes,
                "meta_bytes": stats.meta_bytes,
                "indexer_bytes": stats.indexer_bytes,
                "memory_bytes": stats.memory_bytes,
                "sidecar_bytes": stats.sidecar_bytes,
                "window_bytes": stats.window_bytes,
                "recurrent_bytes": stats.recurrent_bytes,
                "slots": stats.n_slots,
                "memory_slots": stats.memory_slots,
                "kept": stats.n_kept,
                "evicted": stats.n_evicted,
                "evict_us": stats.evict_us,
                "rebases": stats.n_rebases,
                "rebase_us": stats.rebase_us,
                "next_position": stats.next_position,
                "span": stats.span,
            }
        n_ctx, cache_type = llama_cpp.llama_n_ctx(self.ctx), self.setup.cache_type
        kv, window = (self.model.kv_bytes(n_ctx, cache_type, of_windows) for of_windows in (False, True))
        return {
            "kv_bytes": kv,
            "window_bytes": window,  # the stock cache is made with swa_full, so that it can go back
            "recurrent_bytes": api.cache_bytes(self.ctx) - kv - window if self.model.has_fixed() else 0,
            "meta_bytes": 0,
            "indexer_bytes": 0,
            "memory_bytes": 0,
            "sidecar_bytes": 0,
            "memory_slots": 0,
            "kept": self.seen,
            "evicted": 0,
        }

    def byte_counts(self) -> dict[str, int]:
        """All that the cache takes: entries, state kept for each of them, and the weights of its indexer."""
        stats = self.stats()
        return {key: stats[key] for key in BYTE_KEYS}

    def n_reused(self) -> int:
        """Ubatches so far whose graph had been built before."""
        return int(llama_cpp.llama_perf_context(self.ctx).n_reused)

    def evict_step(self) -> int:
        """Entries that leave at once during decode."""
        return int(api.get_stats(self.ctx).evict_step) if self.setup.budget else 0

    def span_reason(self) -> str:
        """Why there is no span although the trained length was to be one; "" otherwise."""
        return api.span_reason(self.ctx) if self.setup.budget else ""

    def close(self) -> None:
        if self.ctx:
            llama_cpp.llama_batch_free(self.batch)
            llama_cpp.llama_free(self.ctx)
            self.ctx = None

    def __enter__(self) -> System:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def token_nll(logits: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    top = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
    return log_sum - logits[np.arange(len(tokens)), list(tokens)]


def library() -> str:
    """What is measured: the build, and the features of the CPU that it uses."""
    try:
        return f"{api.build_info()}; {llama_cpp.llama_print_system_info().decode().strip()}"
    except IndexMemError:
        return f"stock llama.cpp; {llama_cpp.llama_print_system_info().decode().strip()}"


@dataclass
class Captures:
    """CUDA graphs since the program began, as the library logs them."""

    made: int = 0
    dropped: int = 0  # something in them had changed

    def count(self, text: bytes) -> None:
        self.made += b"CUDA graph warmup complete" in text
        self.dropped += b"CUDA graph warmup reset" in text


captures = Captures()


@llama_cpp.llama_log_callback
def _no_log(level: int, text: bytes, data: Any) -> None:
    captures.count(text)


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Errors of llama.cpp are collected, then and later nothing is printed."""
    try:
        with logs.collected_errors(False) as lines:
            yield lines
    finally:
        llama_cpp.llama_log_set(_no_log, ctypes.c_void_p(0))
