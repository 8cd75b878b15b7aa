"""Is a memory of what was evicted worth having? Measured on text, layer by layer, and written into a sidecar.

    from indexmem_edge.calibrate.run import calibrate_memory

    result = calibrate_memory("model.gguf", ["book.txt"], "model.indexmem.gguf", kv_budget=1024)
    print(result.error_without, result.error)

The error of a layer is that of its attention output against that of a cache that keeps everything: the root of the
summed squares, relative to the output itself. Without memory all of the budget holds exact entries; a centroid memory
has its slots paid from the budget, of every layer. The gate is chosen on every second passage, and a layer uses the
memory only if that lowers its error on those and on the others. Whether the whole is worth its slots is for
`Calibration.notes` to say.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Optional, Union

import numpy as np

from indexmem_edge.convert import Checkpoint

from ..errors import BudgetError, IndexMemError, LatentMemoryError
from ..files.modelfile import check_model_file, loaded_model
from ..files.textfile import read_text
from ..options import DEFAULT_SINKS, LEAST_WINDOW, CacheOptions
from ..runtime.choice import DEFAULT_MEMORY_SLOTS, INDEXER_POLICY, MEMORY_OFF
from .attention import Array, CentroidMemory, Errors, Logits, Memory, ResidualMemory, layer_errors
from .gates import CENTROID, RESIDUAL, LayerResult, choose
from .passages import Reader, first_tokens, passages, tokenize

MEMORIES = ("centroid", "residual")
DEFAULT_PASSAGES, DEFAULT_LENGTH, DEFAULT_UBATCH = 4, 4096, 512
MAX_SLOTS = 4096

PathLike = Union[str, "os.PathLike[str]"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What was measured, on what, and where it was written."""

    path: str
    bytes: int
    memory: str
    slots: int  # 0: the memory has none
    policy: str
    budget: int
    passages: tuple[int, ...]  # lengths in tokens
    rows: int  # measured in each layer, times query heads
    layers: tuple[LayerResult, ...]

    @property
    def error_without(self) -> float:
        """Mean over layers without memory."""
        return float(np.mean([row.without for row in self.layers]))

    @property
    def error(self) -> float:
        """Mean over layers with the memory as it was written."""
        return float(np.mean([row.error for row in self.layers]))

    @property
    def worse(self) -> tuple[int, ...]:
        """Layers that were better off with all of the budget and no memory."""
        return tuple(row.layer for row in self.layers if row.error > row.without)

    @property
    def notes(self) -> tuple[str, ...]:
        """What should not pass unnoticed."""
        if self.error < self.error_without:
            return ()
        return ("with this budget and policy the model is better off without the memory",)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json.dumps takes."""
        more = {name: getattr(self, name) for name in ("error_without", "error", "worse", "notes")}
        return {**asdict(self), **more}


def calibrate_memory(
    model: PathLike,
    texts: Sequence[PathLike],
    out: PathLike,
    *,
    kv_budget: int,
    kv_policy: Optional[str] = None,
    kv_sinks: int = DEFAULT_SINKS,
    kv_window: int = LEAST_WINDOW,
    indexmem: Optional[PathLike] = None,
    memory: str = "centroid",
    slots: int = DEFAULT_MEMORY_SLOTS,
    n_ctx: int = DEFAULT_LENGTH,
    n_ubatch: int = DEFAULT_UBATCH,
    n_passages: int = DEFAULT_PASSAGES,
    n_threads: Optional[int] = None,
    fingerprint: bool = True,
    force: bool = False,
    progress: Optional[Progress] = None,
) -> Calibration:
    """Measures a memory on text and writes a sidecar with its flags and gates.

    Args:
        texts: UTF-8 files; passages of `n_ctx` tokens are taken from all over them, at most `n_passages`.
        out: the sidecar; `indexmem` with the memory, or without that, a sidecar of a memory alone.
        kv_budget, kv_policy, kv_sinks, kv_window: the cache that the memory is for, as `Llama` takes them; the window by its number.
        indexmem: a sidecar whose indexer decides who leaves unless a kv_policy does, and with the weights of a
            residual memory.
        memory: `centroid`, or `residual`, which `indexmem` must hold.
        slots: of a centroid memory, for each KV head; paid from the budget.
        n_ubatch: tokens evaluated at once. What leaves leaves with its ubatch.
        fingerprint: write the identity of the model into a new sidecar, so that no fine-tune of it is taken for it.
        force: overwrite `out`.
        progress: called with the steps done and their number.

    Raises:
        IndexMemError: an option is impossible, a file cannot be read or written, the sidecar is for another model, or
            the text is too short. Nothing is written then.
    """
    from . import calibrated_file as files

    _check_range("slots", slots, 1, MAX_SLOTS)
    _check_range("n_ubatch", n_ubatch, 1)
    _check_range("kv_window", kv_window, 1)
    _check_range("n_passages", n_passages, 2)
    name = check_model_file(model)
    names = [os.path.expanduser(os.fspath(text)) for text in texts]
    files.check_output(out, [name, *names, *([indexmem] if indexmem is not None else [])], force)
    source = files.open_source(name, indexmem, fingerprint)
    _check_memory(memory, source.checkpoint)
    ranks = source.checkpoint.kind != "none" and kv_policy in (None, INDEXER_POLICY)
    asked: dict[str, Any] = {} if kv_budget == 0 else {  # span: what is kept is compared with the whole of the text
        "kv_budget": kv_budget, "kv_policy": kv_policy, "kv_sinks": kv_sinks, "kv_window": kv_window, "kv_pin": 0,
        "indexmem": indexmem if ranks else None, "memory": MEMORY_OFF, "kv_span": 0,
    }  # fmt: skip
    options = CacheOptions.from_keywords(asked)
    exact = _exact(options, slots if memory == "centroid" else 0)
    contents = [read_text(text) for text in names]
    least = (options.budget // n_ubatch + 2) * n_ubatch  # then all rows of a ubatch see that something has left
    if n_ctx < least:
        raise IndexMemError(
            f"passages of {n_ctx:,} tokens are too short: with a budget of {options.budget:,} and ubatches of "
            f"{n_ubatch:,} tokens they need at least {least:,}"
        )
    with loaded_model(name) as loaded:
        first = first_tokens(loaded)
        cut = passages([tokenize(loaded, text) for text in contents], first, n_ctx, least, n_passages)
        bounded = [options, *([exact] if exact is not options else [])]
        with Reader(loaded, bounded, max(map(len, cut)), n_ubatch, n_threads) as reader:
            numbers = reader.layers
            measured = _measure(reader, cut, source.checkpoint, memory, slots, options, exact, progress)
    kind = CENTROID if memory == "centroid" else RESIDUAL
    trained = _sigmoid(source.checkpoint.memory_constants.get("gate_logit", ())) if memory == "residual" else None
    layers = tuple(
        choose(il, parts, kind, 1.0 if trained is None else trained[il]) for il, parts in zip(numbers, measured)
    )
    result = Calibration(
        path=os.fspath(out),
        bytes=0,
        memory=memory,
        slots=options.budget - exact.budget,
        policy=options.policy,
        budget=options.budget,
        passages=tuple(map(len, cut)),
        rows=sum(len(part.full) for part in measured[0]),
        layers=layers,
    )
    written = files.write_calibrated(
        out,
        source,
        numbers,
        memory,
        _constants(result, source.checkpoint),
        names,
        {"sinks": options.sinks, "window": options.window, "budget": options.budget},
        {"attention_error.without_memory": result.error_without, "attention_error.with_memory": result.error},
        force,
    )
    return replace(result, bytes=written.size)


def _check_range(name: str, value: int, least: int, most: int = 1 << 20) -> None:
    if not least <= value <= most:
        raise IndexMemError(f"{name} must be from {least:,} to {most:,}, found {value}")


def _check_memory(memory: str, checkpoint: Checkpoint) -> None:
    if memory not in MEMORIES:
        raise LatentMemoryError(f"unknown memory {memory!r}: choose one of {', '.join(MEMORIES)}")
    if memory == "residual" and checkpoint.memory != "residual":
        raise LatentMemoryError(
            "a residual memory has trained weights: name a sidecar that holds them with --indexmem FILE (indexmem= in "
            "Python), or calibrate a centroid memory, which needs none"
        )


def _exact(options: CacheOptions, slots: int) -> CacheOptions:
    """The cache of the exact entries beside a memory that takes so many slots."""
    if not options.bounded:
        raise BudgetError("a memory holds what a bounded KV cache evicts: give a kv_budget")
    if options.policy == "full":
        raise BudgetError("the policy 'full' never evicts, so there is nothing to remember: choose another kv_policy")
    if slots == 0:
        return options
    replace(options, memory_slots=slots).require_room(0, "kv_pin")
    return replace(options, budget=options.budget - slots)


def _measure(
    reader: Reader,
    cut: Sequence[Array],
    checkpoint: Checkpoint,
    memory: str,
    slots: int,
    options: CacheOptions,
    exact: CacheOptions,
    progress: Optional[Progress],
) -> list[list[Errors]]:
    """Errors by layer, of those that a budget bounds, and passage. One passage at a time is in memory."""
    total = sum(reader.steps(len(tokens)) + len(reader.layers) for tokens in cut)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    found: list[list[Errors]] = [[] for _ in reader.layers]
    for tokens in cut:
        passage, layers = reader.read(tokens, step)
        for i, il in enumerate(reader.layers):
            layer = layers.pop(il)
            assert layer.keys is not None and layer.values is not None
            n_k, n_v = layer.keys.shape[2], layer.values.shape[2]
            found[i].append(
                layer_errors(
                    passage,
                    il,
                    (layer.queries, layer.keys, layer.values),
                    Logits(layer.scale, layer.softcap),
                    _memory_of(checkpoint, memory, slots, il, (n_k, n_v), layer.query_scale),
                    options.budget,
                    exact.budget,
                    layer.sinks,
                )
            )
            step()
    return found


def _memory_of(
    c: Checkpoint, memory: str, slots: int, layer: int, sizes: tuple[int, int], query_scale: float
) -> Callable[[], Memory]:
    n_k, n_v = sizes
    if memory == "centroid":
        return lambda: CentroidMemory(slots, n_k, n_v)
    known = c.memory_constants
    rate, decay = float(np.logaddexp(0, known["eta_raw"][layer])), _sigmoid([known["decay_logit"][layer]])[0]
    phi = c.layers[layer]["phi_proj.weight"]
    return lambda: ResidualMemory(phi, n_v, rate, decay, known["eps"], query_scale)


def _sigmoid(values: Sequence[float]) -> list[float]:
    return [float(np.exp(-np.logaddexp(0, -x))) for x in values]


def _constants(result: Calibration, c: Checkpoint) -> dict[str, Any]:
    """With a value for each layer of the model; the memory is off in those that no budget bounds."""
    used = {row.layer: row for row in result.layers if row.enabled}
    numbers = range(c.geometry.block_count)
    enabled = [il in used for il in numbers]
    if result.memory == "centroid":
        gates = [used[il].gate if il in used else 1.0 for il in numbers]
        return {"slot_count": result.slots, "enabled": enabled, "gate": gates}
    logits = [
        float(np.log(used[il].gate) - np.log1p(-used[il].gate)) if il in used else trained
        for il, trained in enumerate(c.memory_constants["gate_logit"])
    ]
    return {**c.memory_constants, "enabled": enabled, "gate_logit": logits}
