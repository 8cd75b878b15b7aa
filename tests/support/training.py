"""What the tests of training share: a small text, options that fit it, and stubs of what a training works with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from indexmem_edge.train.data.sample import Sample
from indexmem_edge.train.model.decoder import Decoder
from indexmem_edge.train.objectives.objective import Objective
from indexmem_edge.train.options import TrainOptions
from indexmem_edge.train.run import Tools
from indexmem_edge.train.watch import Watcher

SMALL: dict[str, Any] = {
    "lengths": (64,), "steps": (6,), "batch": 2, "samples": (6,), "eval_samples": 2, "eval_every": 2, "checkpoint_every": 2,
    "patience": 0, "sinks": 2, "window": 8, "mid_dim": 16, "lr": (1e-2,), "device": "cpu",
}  # fmt: skip


def write_books(folder: Path, sizes: Sequence[int] = (2000, 900), seed: int = 0) -> Path:
    """Books of so many bytes; the tiny models make a token of each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i, n in enumerate(sizes):
        (folder / f"book-{i}.txt").write_bytes(bytes(rng.choice(list(b"abcdefgh .\n"), n).tolist()))
    return folder


def small_options(model: Path, folder: Path, **more: Any) -> TrainOptions:
    books = folder / "books"
    if folder.exists() and not books.exists():
        write_books(books)
    return TrainOptions(**{"model": model, "texts": (books,), "out": folder / "out.indexmem.gguf", **SMALL, **more})


def stub_generate(
    tokenize: Callable[[str], list[int]], filler: Callable[[int], list[int]], length: int, rng: np.random.Generator,
    held_out: bool,
) -> Sample:  # fmt: skip
    """Book text with a number in it that is asked for at the end."""
    fact, question = tokenize(f"<{rng.integers(1000)}>"), tokenize("?")
    tokens = [*fact, *filler(length - len(fact) - len(question)), *question]
    return Sample(np.asarray(tokens, np.int32), np.ones(len(tokens), np.float32), length - 1, f"stub {held_out}")


class Follow(Objective):
    """Scores become numbers that follow from the token: enough to see a loss fall, and every bit of what it depends on."""

    name = "follow"
    noise = 0.01

    def prepare(self, samples: Sequence[Sample], folder: Path, progress: Callable[[int, int, str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for n, sample in enumerate(samples):
            (folder / f"{n}.txt").write_text(sample.source)
            progress(n + 1, len(samples), "nothing")

    def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
        noise = torch.rand((), generator=torch.Generator().manual_seed(seed + step))
        total = 0.0
        for sample in samples:
            tokens = torch.from_numpy(sample.tokens).long().to(self.device)
            hidden, positions = self.decoder.embed(tokens), torch.arange(len(tokens), device=self.device)
            for module in self.modules:
                ranks = module.ranks(hidden, positions, len(tokens) - 1)  # type: ignore[operator]
                loss = (ranks - (tokens % 7).float() + self.noise * noise).square().mean() / len(samples) / len(self.modules)
                loss.backward()
                total += float(loss.detach())
        return {"loss": total, "noise": float(noise)}


class Calm(Follow):
    """The same without anything random."""

    noise = 0.0


def recall_of(values: Sequence[float]) -> Callable[[Decoder, nn.ModuleList, Sequence[Sample]], dict[str, float]]:
    """An evaluation that gives one value after the other."""
    left = iter(values)
    return lambda decoder, modules, samples: {"recall": next(left)}


def weight_recall(decoder: Decoder, modules: nn.ModuleList, samples: Sequence[Sample]) -> dict[str, float]:
    """An evaluation that follows from the weights."""
    return {"recall": float(sum(p.double().abs().sum() for p in modules.parameters())), "samples": float(len(samples))}


def stub_tools(**more: Any) -> Tools:
    return Tools(**{"objectives": {"follow": Follow}, "generate": stub_generate, "evaluate": weight_recall, **more})


class StopAfter(Watcher):
    """Presses Ctrl-C after so many steps in all."""

    def __init__(self, steps: int) -> None:
        self.left, self.notes = steps, list[str]()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, step: int, figures: Any) -> None:
        self.left -= 1
        if self.left == 0:
            import signal

            signal.raise_signal(signal.SIGINT)
