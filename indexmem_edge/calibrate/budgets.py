"""Which layers, and which of their KV heads, need more of a budget than others? Measured by answers about a text, and written into a
sidecar.

    from indexmem_edge.calibrate.budgets import calibrate_budgets

    result = calibrate_budgets("model.gguf", ["book.txt"], "model.indexmem.gguf", "shared.indexmem.gguf", kv_budget=128)
    print(result.nll_before, result.nll, result.least)

Texts with facts are read with a bounded cache and asked about, as they are run: once with what the sidecar says of shares alone, and
once for each layer with WIDE times the room in that one, the others paying for it. The layers that gain most are widened together, and
then only as many of their heads as gain as much. Every second text chooses, the others have to agree; if they do not, no head is wide.

What is written is how many entries a wide head had (`budget_least`), and not a share: nothing was measured with larger budgets, and
of those a head that needs many entries needs no more. Numbers that the sidecar has already make way if those texts agree to that, too.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Optional, Union

import numpy as np
import numpy.typing as npt

from indexmem_edge.convert.writer import write_sidecar

from ..errors import IndexMemError, SidecarError
from ..files.modelfile import check_model_file, loaded_model
from ..files.textfile import read_text
from ..native import api
from ..options import DEFAULT_SINKS, LEAST_WINDOW, CacheOptions, default_ubatch
from ..runtime.answers import log_probabilities
from ..runtime.choice import INDEXER_POLICY, MEMORY_OFF
from ..train.data.generated import ANSWER_WEIGHT, generate
from ..train.data.sample import Sample
from . import calibrated_file as files
from .passages import TextContext, first_tokens, tokenize

WIDE = 4  # times the room of the other heads
TOGETHER = 1, 2, 4  # layers, or heads of them, that are widened at once

PathLike = Union[str, "os.PathLike[str]"]
Array = npt.NDArray[np.float64]
Wide = tuple[tuple[int, int], ...]  # KV heads: layer, head
Judge = Callable[[Wide], Array]  # NLL of the answers of each text, nats per token


@dataclass(frozen=True)
class LayerNeeds:
    """What was measured, and where it was written."""

    path: str
    bytes: int
    budget: int
    texts: int
    nll_before: float  # of the answers, nats per token, as the sidecar had it; on the texts that did not choose
    nll: float  # as it is written
    least: Optional[tuple[int, ...]]  # entries that each KV head gets before the rest is shared, layer by layer; None: as the sidecar had it, which nothing betters
    heads: int  # that are told apart of a layer; 1: `least` has one number a layer
    gains: dict[int, float]  # by bounded layer: what is gained, on the texts that choose, if it alone is wide

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json.dumps takes."""
        return asdict(self)


def calibrate_budgets(
    model: PathLike,
    texts: Sequence[PathLike],
    indexmem: PathLike,
    out: PathLike,
    *,
    kv_budget: int,
    kv_sinks: int = DEFAULT_SINKS,
    kv_window: Optional[int] = None,
    n_ctx: int = 2048,
    n_texts: int = 8,
    n_threads: Optional[int] = None,
    seed: int = 0,
    force: bool = False,
    progress: Optional[Callable[[int, int], None]] = None,
) -> LayerNeeds:
    """Measures what layers need and writes the sidecar with it.

    Args:
        texts: UTF-8 books, between whose sentences facts are told.
        indexmem: the sidecar whose indexer ranks.
        kv_budget: what heads have on average. Where it is short, it matters: a twentieth of `n_ctx` or less.
        kv_window: default: a quarter of the budget, at most 128.
        progress: called with the texts read and their number.

    Raises:
        IndexMemError: an option is impossible, a file cannot be read or written, or the sidecar has no indexer.
    """
    name = check_model_file(model)
    names = [os.path.expanduser(os.fspath(text)) for text in texts]
    files.check_output(out, [name, *names, indexmem], force)
    source = files.open_source(name, indexmem, True)
    if source.checkpoint.kind == "none":
        raise SidecarError(f"{os.fspath(indexmem)} holds no indexer, by whose ranks needs of layers are measured")
    if n_texts < 2:
        raise IndexMemError(f"at least 2 texts are needed, one to choose by and one to agree, found {n_texts}")
    window = min(LEAST_WINDOW, kv_budget // 4) if kv_window is None else kv_window
    asked = {
        "kv_budget": kv_budget, "kv_sinks": kv_sinks, "kv_window": window, "kv_pin": 0, "kv_policy": INDEXER_POLICY,
        "memory": MEMORY_OFF,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, loaded_model(name) as loaded:
        samples = _samples(loaded, [read_text(text) for text in names], n_ctx, n_texts, seed)
        bounded = [il for il, kind in enumerate(api.model_layers(loaded)) if kind & api.LAYER_BOUNDED]
        n_heads = source.checkpoint.geometry.head_count_kv if source.checkpoint.kinds[0].ranks_heads else 1  # that are told apart
        places = [(il, h) for il in range(source.checkpoint.geometry.block_count) for h in range(n_heads)]
        own = source.checkpoint.budget_least
        done, total = 0, n_texts * (1 + (own is not None) + len(bounded) + len(TOGETHER) + (max(TOGETHER) * n_heads + len(TOGETHER) if n_heads > 1 else 0))

        def least(wide: Wide) -> Optional[tuple[int, ...]]:
            room = max(kv_budget - kv_sinks - window, 1)
            return tuple(WIDE * room if place in wide else 0 for place in places) if wide else None

        def judge(first: Optional[tuple[int, ...]]) -> Array:
            nonlocal done
            path = os.path.join(folder, f"{done}.gguf")
            write_sidecar(path, replace(source.checkpoint, budget_least=first), source.outtype)
            options = CacheOptions.from_keywords({**asked, "indexmem": path})
            context = TextContext(loaded, n_ctx, default_ubatch(kv_budget), n_threads, options)
            found = []
            try:
                for sample in samples:
                    found.append(_nll(context, sample, default_ubatch(kv_budget)))
                    done += 1
                    if progress is not None:
                        progress(done, total)
            finally:
                context.close()
            os.remove(path)
            return np.array(found)

        layers = {il: [(il, h) for h in range(n_heads)] for il in bounded}
        wide, before, nll, gains = choose(lambda wide: judge(least(wide)), layers, n_heads > 1)
        found = least(wide)
        if own is not None:
            before = float(judge(own)[1::2].mean())
            if before <= nll:
                found, nll = None, before
            elif found is None:
                found = (0,) * len(places)
    written = write_sidecar(out, replace(source.checkpoint, budget_least=own if found is None else found), source.outtype, force)
    return LayerNeeds(os.fspath(out), written.size, kv_budget, n_texts, before, nll, found, n_heads, gains)


def choose(judge: Judge, layers: Mapping[int, Sequence[tuple[int, int]]], apart: bool) -> tuple[Wide, float, float, dict[int, float]]:
    """The heads to widen, out of those of the bounded layers, NLL before and then on the texts that did not choose, and the gain of each
    layer alone. Heads of a layer stay together unless they can be told `apart`.
    """
    before = judge(())
    gains = {il: float((before - judge(tuple(heads)))[::2].mean()) for il, heads in layers.items()}
    order = sorted((il for il in layers if gains[il] > 0), key=lambda il: -gains[il])
    best: Wide = ()
    found = before
    for n in TOGETHER:
        if n > len(order) or n >= len(layers):
            break
        wide = tuple(head for il in order[:n] for head in layers[il])
        nll = judge(wide)
        if nll[::2].mean() < found[::2].mean():
            best, found = wide, nll
    if best and apart:
        best, found = _narrow(judge, best, found)
    if found[1::2].mean() >= before[1::2].mean():
        best, found = (), before
    return best, float(before[1::2].mean()), float(found[1::2].mean()), gains


def _narrow(judge: Judge, wide: Wide, found: Array) -> tuple[Wide, Array]:
    """Fewer of these heads, if they alone do as well or better: the others keep more then."""
    alone = {head: float(judge((head,))[::2].mean()) for head in wide}
    order, best = sorted(wide, key=lambda head: alone[head]), wide
    for n in TOGETHER:
        if n < len(wide):
            nll = judge(tuple(order[:n]))
            if nll[::2].mean() < found[::2].mean() or (best == wide and nll[::2].mean() == found[::2].mean()):
                best, found = tuple(sorted(order[:n])), nll
    return best, found


def _samples(model: int, texts: Sequence[str], length: int, n: int, seed: int) -> list[Sample]:
    """Texts of up to `length` tokens that begin as every text of this model does."""
    rng, first = np.random.default_rng(seed), first_tokens(model)
    length -= len(first)
    books = [tokenize(model, text) for text in texts]
    if min(map(len, books)) < length:
        raise IndexMemError(f"a text of {min(map(len, books)):,} tokens is too short: at least {length:,} are needed")

    def filler(count: int) -> list[int]:
        book = books[int(rng.integers(len(books)))]
        start = int(rng.integers(len(book) - count + 1))
        return book[start : start + count]

    found: list[Sample] = []
    while len(found) < n:
        sample = generate(lambda text: tokenize(model, text), filler, length, rng)
        if (sample.weight >= ANSWER_WEIGHT).any() and sample.asked < len(sample.tokens):
            found.append(sample.after(first))
    return found


def _nll(context: TextContext, sample: Sample, n_ubatch: int) -> float:
    """Of the answers, when the text is read with what the cache keeps of it."""
    context.clear()
    tokens = sample.tokens
    for start in range(0, sample.asked, n_ubatch):
        context.decode(tokens[start : min(start + n_ubatch, sample.asked)])
    total, count = 0.0, 0
    for t in range(sample.asked, len(tokens) - 1):
        context.decode(tokens[t : t + 1])
        if sample.weight[t] >= ANSWER_WEIGHT:
            total -= float(log_probabilities(context.logits())[tokens[t + 1]])
            count += 1
    return total / max(count, 1)
