"""What a text says once has to outlive all that comes after it: facts are told apart, rank higher and age less. Forward passes only.

In a cache of 1024 entries a fact that was told 64K tokens ago is among the best 1.5 % of all that has been read since, and it has
to be there whole: of half a sentence a model makes another fact. Questions about a context of a thousand tokens do not teach
that. Here every token of what generated text tells, whether it is asked for or not, gets in every head the rank that it had and
`HIGHER` more; all other entries keep theirs. Which of two facts, or of two words of one, is worth more stays as it was, as other
objectives have found it, so this one comes last:

    loss = mean over facts of (rank - before - HIGHER)^2 + KEEP mean over the rest of (rank - before)^2

in standard deviations of a head's ranks. Where ranks fall with age, those of facts are to stay and all others to fall by FALL in
`age_scale` tokens, so that what no fact takes is left to what was read last, and short texts are as they were:

    + mean over facts of rate / FALL + 2 mean over the rest of max(1 - rate / FALL, 0)^2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import TrainingError
from ..data.sample import Sample
from ..model.attention import Heads
from .objective import Progress
from .regress import TOKENS, Regress, ranks_of

HIGHER = 1.5
KEEP = 5.0
FALL = 2.0


class ToldApart(Regress):
    """Targets are ranks from before."""

    name = "told-apart"

    def prepare(self, samples: Sequence[Sample], folder: Path, progress: Progress) -> None:
        if not any(sample.told for sample in samples):
            raise TrainingError(f"{self.name} needs generated text that tells something: give a --generated above 0, or more --samples")
        super().prepare(samples, folder, progress)

    def _settle(self, targets: Sequence[Tensor]) -> None:
        self.spread = torch.cat(list(targets), -1).std(-1, correction=0, keepdim=True).clamp_min(1e-6)

    def held_out_loss(self, samples: Sequence[Sample]) -> Optional[float]:
        return self._observed_loss(samples)

    @torch.no_grad()
    def _observe(self, sample: Sample, n: int) -> dict[str, Tensor]:
        """hidden bf16 [layers, n, d] and target float16 [layers, H, n] of facts and of some other tokens, their positions [n], and
        which are `told` [n].
        """
        end = min(sample.asked, len(sample.tokens))
        told = np.zeros(end, bool)
        for first, last in sample.told:
            told[first:last] = True
        places = np.arange(self.sinks, end)
        others = np.random.default_rng(n).permutation(places[~told[places]])[: max(TOKENS - int(told.sum()), 0)]
        chosen = np.sort(np.concatenate((places[told[places]], others)))
        where = torch.from_numpy(chosen).to(self.device)
        hidden, targets = [], []

        def look(heads: Heads) -> None:
            read = heads.hidden[0, where].to(torch.bfloat16)
            module = self.module_of(heads.layer)
            assert module is not None
            targets.append(ranks_of(module, read, where).half().cpu())
            hidden.append(read.cpu())

        self._read(sample.tokens[:end], look)
        return {
            "hidden": torch.stack(hidden), "target": torch.stack(targets), "positions": where.cpu(), "told": torch.from_numpy(told[chosen]),
        }  # fmt: skip

    def _loss(self, module: nn.Module, hidden: Tensor, target: Tensor, others: Mapping[str, Tensor], layer: int) -> Tensor:
        told, spread = others["told"], self.spread[layer].to(target.device)
        moved = (ranks_of(module, hidden, others["positions"]) - target) / spread
        loss = _mean((moved[:, told] - HIGHER).square()) + KEEP * _mean(moved[:, ~told].square())
        rate = module(hidden)[1]  # of change, so below 0
        if rate is None:
            return loss
        falls = -rate / spread / FALL
        return loss + _mean(falls[:, told]) + 2 * _mean((1 - falls[:, ~told]).clamp_min(0).square())


def _mean(values: Tensor) -> Tensor:
    """0 of none: a text may be without facts, or have nothing else."""
    return values.sum() / max(values.numel(), 1)
