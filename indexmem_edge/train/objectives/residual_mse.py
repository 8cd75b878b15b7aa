"""`residual-mse`: the residual memory learns to add what attention lost with the evicted entries (method appendix B).

    loss = mean over layers and samples of the mean of (o_kept + gate m(q) - o_full)^2

over heads, dimensions, and the queries that come after the first eviction. Who leaves is decided by scorers that are already
trained, block by block as in the runtime; every layer has the operands of the full cache, so that errors of earlier layers
do not blur what this one has to learn. Scorers and model are frozen. Gradients reach back through all evictions of a sample;
what they need is a layer's features and readouts, and nothing of a layer outlives its turn.

The gate starts at 0.001, and a scalar moves by about one learning rate a step: rates near 0.05 suit a few hundred steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import TrainingError
from ..cache.eviction import Schedule, attend_block, evictions, pick
from ..data.sample import Sample
from ..indexers.residual import Residual
from ..model.attention import Heads
from ..model.decoder import Decoder
from .objective import Objective
from .operands import operands


@dataclass
class Errors:
    """Of one layer's output: sums of squares over the queries that have lost something."""

    remembered: float = 0.0  # with the memory
    forgotten: float = 0.0  # without it
    full: float = 0.0  # of the output itself

    def add(self, other: Errors) -> None:
        self.remembered += other.remembered
        self.forgotten += other.forgotten
        self.full += other.full

    @property
    def relative(self) -> tuple[float, float]:
        """Error relative to the output of the full cache, with the memory and without; zeros if nothing was lost."""
        full = self.full or 1.0
        return math.sqrt(self.remembered / full), math.sqrt(self.forgotten / full)

    @property
    def helps(self) -> bool:
        """Whether the layer is better with its memory: what `enabled` of docs/sidecar.md should be."""
        return self.remembered < self.forgotten


class ResidualMSE(Objective):
    """`scorers`: the trained indexers, one per bounded layer; `schedule`: how much they evict, and how often.

    Raises:
        TrainingError: the modules are no residual memories, or there is no scorer for each of them.
    """

    name = "residual-mse"
    kinds = (Residual.kind,)

    def __init__(
        self, decoder: Decoder, modules: nn.ModuleList, sinks: int, window: int, *, scorers: nn.ModuleList | None = None,
        schedule: Schedule = Schedule(),
    ) -> None:  # fmt: skip
        super().__init__(decoder, modules, sinks, window)
        if scorers is None or len(scorers) != len(modules):
            found = "none" if scorers is None else len(scorers)
            raise TrainingError(
                f"residual-mse needs a trained scorer for each of {len(modules)} layers, found {found}: a memory learns "
                "what one indexer evicts, so train that first"
            )
        schedule.limit(0, sinks, window)  # a budget that is too small is refused now
        self.scorers, self.schedule = scorers, schedule
        blocks = math.ceil((sinks + window + 2) / schedule.block)  # nothing leaves before, and the next one misses it
        self.shortest = schedule.block * blocks + 1

    def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
        """Figures: `loss`; `error` and `error_without`, relative errors with and without the memory, mean of the layers;
        `hurts`, the number of layers that are worse with it; `change.<layer>`, by which share its error changes: above 0
        the memory hurts there.
        """
        layers, total = [Errors() for _ in self.modules], 0.0
        share = 1 / (len(samples) * len(layers))
        for sample in samples:
            for i, (heads, full) in enumerate(self._operands(sample)):
                loss, errors = self.layer_loss(i, heads, full)
                layers[i].add(errors)
                if loss is not None:
                    (loss * share).backward()
                    total += loss.item() * share
        relative = [e.relative for e in layers]
        return {
            "loss": total,
            "error": sum(a for a, _ in relative) / len(layers),
            "error_without": sum(b for _, b in relative) / len(layers),
            "hurts": float(sum(a > b for a, b in relative)),
            **{f"change.{il}": a / b - 1 if b else 0.0 for il, (a, b) in zip(self.layers, relative)},
        }

    @torch.no_grad()
    def measure(self, samples: Sequence[Sample]) -> list[Errors]:
        """Errors of each bounded layer on samples that nothing is learned from."""
        layers = [Errors() for _ in self.modules]
        for sample in samples:
            for i, (heads, full) in enumerate(self._operands(sample)):
                layers[i].add(self.layer_loss(i, heads, full)[1])
        return layers

    def _operands(self, sample: Sample) -> Iterator[tuple[Heads, Tensor]]:
        """In the type of the memory: an error is a small difference of outputs, which half precision would blur."""
        memory = self.modules[0]
        assert isinstance(memory, Residual)
        return operands(self.decoder, sample, memory.dtype)

    def layer_loss(self, i: int, heads: Heads, full: Tensor) -> tuple[Tensor | None, Errors]:
        """Loss and errors of the i-th bounded layer and one sequence; no loss if nothing leaves before its last block."""
        memory, scorer = self.modules[i], self.scorers[i]
        assert isinstance(memory, Residual)
        hidden, q, k, v, full = heads.hidden[0], heads.q[0], heads.k[0], heads.v[0], full[0]
        total = len(hidden)
        positions = torch.arange(total, device=hidden.device)

        @torch.no_grad()
        def ranks(seen: int) -> Tensor:
            return scorer.ranks(hidden[:seen], positions[:seen], seen - 1)

        state, squares, errors, n_rows = memory.start(len(k)), [], Errors(), 0
        for block in evictions(ranks, len(k), total, self.schedule, self.sinks, self.window, hidden.device):
            if block.lost:
                rows = slice(block.start, block.end)
                kept = attend_block(q, k, v, block, heads.scale)
                squares.append((memory(state, q[:, rows], kept) - full[:, rows]).square().sum())
                errors.add(Errors(0.0, _sum_squares(kept - full[:, rows]), _sum_squares(full[:, rows])))
                n_rows += block.end - block.start
            if block.gone.shape[1] and block.end < total:
                state = memory.write(state, pick(k, block.gone), pick(v, block.gone))
        if not squares:
            return None, errors
        square = torch.stack(squares).sum()
        errors.remembered = square.item()
        return square / (n_rows * full.shape[0] * full.shape[2]), errors


def _sum_squares(a: Tensor) -> float:
    return a.square().sum().item()
