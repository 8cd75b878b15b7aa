"""One native context driven by hand: batches of any shape, logits of every token, the functions of indexmem.h."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from indexmem_edge import llama_cpp
from indexmem_edge.calibrate.capture import Capture
from indexmem_edge.native import api

F32, F16, Q4_0, Q8_0 = (llama_cpp.GGML_TYPE_F32, llama_cpp.GGML_TYPE_F16, llama_cpp.GGML_TYPE_Q4_0, llama_cpp.GGML_TYPE_Q8_0)
BF16 = 30  # which llama_cpp does not name


class Refused(Exception):
    """The library did not create the context, or did not decode."""


@llama_cpp.llama_log_callback
def _silence(level: int, text: bytes, data: object) -> None:
    pass


@contextlib.contextmanager
def open_model(path: Path) -> Iterator[Any]:
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_silence, None)
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise Refused(f"{path} does not load")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


class Context:
    """A context of a model; bounded if `budget` is not 0."""

    def __init__(
        self,
        model: Any,
        *,
        budget: int = 0,
        policy: str = "streaming",
        sinks: int = 4,
        window: int = 8,
        pin: int = 0,
        evict_step: int = 0,
        seed: int = 0,
        n_ubatch: int = 32,
        n_seq: int = 1,
        n_ctx: int = 1024,
        type_k: int = F16,
        type_v: int = F16,
        flash_attn: bool = True,
        n_threads: int = 2,
        n_rs_seq: int = 0,
        can_stop: bool = False,
        sidecar: Optional[Path] = None,
        budget_ratio: float = 0.0,
        memory: Optional[str] = None,
        memory_slots: int = 0,
        span: int = api.SPAN_TRAINED,
        layer_budgets: Optional[str] = None,
        rope: Optional[tuple[int, float]] = None,  # kind of scaling and scale of the frequencies, other than the model's
        capture: Optional[Capture] = None,
    ) -> None:
        self.model, self.n_seq, self.n_batch = model, n_seq, 512
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx * n_seq, self.n_batch, n_ubatch, n_seq
        params.n_threads = params.n_threads_batch = n_threads
        params.n_rs_seq = n_rs_seq  # snapshots of recurrent states to go back to
        params.type_k, params.type_v = type_k, type_v
        if rope:
            params.rope_scaling_type, params.rope_freq_scale = rope
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._go_on = llama_cpp.ggml_abort_callback(lambda _: False)  # until aborting() says otherwise
        if can_stop:
            params.abort_callback = self._go_on
        self._capture = capture  # its callback is called until the context is freed
        if capture:
            params.cb_eval = capture.callback
        api.request_context(
            budget=budget, policy=policy, sinks=sinks, window=window, pin=pin, evict_step=evict_step, seed=seed,
            budget_ratio=budget_ratio, sidecar=sidecar, memory=memory, memory_slots=memory_slots, span=span,
            layer_budgets=layer_budgets,
        )  # fmt: skip
        self.ctx = llama_cpp.llama_init_from_model(model, params)
        error = api.last_error()
        api.withdraw_request()
        if not self.ctx:
            raise Refused(error)
        self.memory = llama_cpp.llama_get_memory(self.ctx)

    def close(self) -> None:
        if self.ctx:
            llama_cpp.llama_free(self.ctx)
            self.ctx = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def aborting(self, after: int) -> Iterator[None]:
        """Aborts what is computed meanwhile, after so many of the questions that the CPU backend asks, one a node."""
        asked = 0

        def callback(_: object) -> bool:
            nonlocal asked
            asked += 1
            return asked > after

        kept = llama_cpp.ggml_abort_callback(callback)
        llama_cpp.llama_set_abort_callback(self.ctx, kept, None)
        try:
            yield
        finally:
            llama_cpp.llama_set_abort_callback(self.ctx, llama_cpp.ggml_abort_callback(), None)

    def n_seen(self, seq: int = 0) -> int:
        return llama_cpp.llama_memory_seq_pos_max(self.memory, seq) + 1

    def decode(self, tokens: Sequence[int], seq: int = 0) -> np.ndarray:
        """Continues a sequence with one batch; logits [T, V]."""
        return self.decode_many({seq: tokens})[seq]

    def decode_at(self, tokens: Sequence[int], positions: Sequence[int], seq: int = 0) -> int:
        """Evaluates tokens at positions of the caller's; what llama_decode returns."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for row, (token, position) in enumerate(zip(tokens, positions)):
                batch.token[row], batch.pos[row] = int(token), position
                batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, seq, 1
            return int(llama_cpp.llama_decode(self.ctx, batch))
        finally:
            llama_cpp.llama_batch_free(batch)

    def decode_embeddings(self, rows: np.ndarray, n_dims: int = 1, seq: int = 0) -> int:
        """Evaluates what an image would bring [T, E], at positions of so many dimensions; what llama_decode returns."""
        n, start = len(rows), self.n_seen(seq)
        batch = llama_cpp.llama_batch_init(n, rows.shape[1], 1)
        kind, allocated = type(batch.pos), ctypes.cast(batch.pos, ctypes.c_void_p)
        positions = (ctypes.c_int32 * (n * n_dims))(*list(range(start, start + n)) * n_dims)
        try:
            batch.n_tokens = n
            ctypes.memmove(batch.embd, np.ascontiguousarray(rows, np.float32).ctypes.data, rows.size * 4)
            batch.pos = ctypes.cast(positions, kind)
            for row in range(n):
                batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, seq, 1
            return int(llama_cpp.llama_decode(self.ctx, batch))
        finally:
            batch.pos = ctypes.cast(allocated, kind)
            llama_cpp.llama_batch_free(batch)

    def decode_many(self, tokens: dict[int, Sequence[int]]) -> dict[int, np.ndarray]:
        """One batch with tokens of several sequences, interleaved token by token as servers do; logits by sequence."""
        order = [(s, i) for i in range(max(map(len, tokens.values()))) for s in tokens if i < len(tokens[s])]
        start = {s: self.n_seen(s) for s in tokens}
        batch = llama_cpp.llama_batch_init(len(order), 0, 1)
        try:
            batch.n_tokens = len(order)
            for row, (s, i) in enumerate(order):
                batch.token[row], batch.pos[row] = int(tokens[s][i]), start[s] + i
                batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, s, 1
            status = llama_cpp.llama_decode(self.ctx, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if self._capture and self._capture.error:
            raise self._capture.error
        if status != 0:
            raise Refused(f"llama_decode returned {status}")
        flat = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.ctx), shape=(len(order), self.n_vocab)).copy()
        return {s: flat[[row for row, (other, _) in enumerate(order) if other == s]] for s in tokens}

    def feed(self, tokens: Sequence[int], n: int, seq: int = 0) -> np.ndarray:
        """Batches of up to n tokens; logits [T, V]."""
        return np.concatenate([self.decode(tokens[i : i + n], seq) for i in range(0, len(tokens), n)])

    def positions(self, seq: int = 0) -> list[list[np.ndarray]]:
        """Positions held, [layer][head], ascending."""
        n_layer = llama_cpp.llama_model_n_layer(self.model)
        return [
            [api.positions(self.ctx, il, h, seq) for h in range(api.n_head_kv(self.ctx, il))]
            for il in range(n_layer)
        ]

    def rotary(self, seq: int = 0) -> list[list[np.ndarray]]:
        """Rotary positions of what is held, [layer][head], in order of the positions."""
        n_layer = llama_cpp.llama_model_n_layer(self.model)
        return [
            [api.rotary(self.ctx, il, h, seq) for h in range(api.n_head_kv(self.ctx, il))] for il in range(n_layer)
        ]

    def span_reason(self) -> str:
        """Why no span is in force, "" if one is or none was wanted."""
        return api.span_reason(self.ctx)

    def stats(self, seq: int = 0) -> api.Stats:
        return api.get_stats(self.ctx, seq)

    def use_lora(self, path: Path) -> None:
        """Applies an adapter to all that follows; it is freed with the model."""
        adapter = llama_cpp.llama_adapter_lora_init(self.model, str(path).encode())
        if not adapter:
            raise Refused(f"{path} does not load")
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(ctypes.cast(adapter, llama_cpp.llama_adapter_lora_p_ctypes))
        assert llama_cpp.llama_set_adapters_lora(self.ctx, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0

    def seq_rm(self, seq: int, p0: int, p1: int = -1) -> bool:
        return bool(llama_cpp.llama_memory_seq_rm(self.memory, seq, p0, p1))

    def seq_cp(self, src: int, dst: int) -> None:
        llama_cpp.llama_memory_seq_cp(self.memory, src, dst, -1, -1)

    def seq_keep(self, seq: int) -> None:
        llama_cpp.llama_memory_seq_keep(self.memory, seq)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)

    def state_size(self, seq: int) -> int:
        return int(llama_cpp.llama_state_seq_get_size(self.ctx, seq))

    def save(self, seq: int | None = None) -> bytes:
        """State of one sequence, or of the whole context."""
        size = llama_cpp.llama_state_get_size(self.ctx) if seq is None else llama_cpp.llama_state_seq_get_size(self.ctx, seq)
        buffer = (ctypes.c_uint8 * size)()
        if seq is None:
            n = llama_cpp.llama_state_get_data(self.ctx, buffer, size)
        else:
            n = llama_cpp.llama_state_seq_get_data(self.ctx, buffer, size, seq)
        assert n == size
        return bytes(buffer)

    def load(self, state: bytes, seq: int | None = None) -> bool:
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if seq is None:
            return llama_cpp.llama_state_set_data(self.ctx, buffer, len(state)) == len(state)
        return llama_cpp.llama_state_seq_set_data(self.ctx, buffer, len(state), seq) == len(state)
