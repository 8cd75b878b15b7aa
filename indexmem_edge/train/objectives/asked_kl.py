"""Which entries of a context are asked for: by the questions after it, and by saying it once more. Forward passes only.

The largest attention that an entry gets from any later query (`regress`) is mostly that of neighbours and of heads that look
everywhere. Two kinds of queries look for what a context says: those of generated questions and answers, and those of
the context itself when it is read a second time, as if the model repeated it (KVzip, KVzap): whoever copies a word
looks at the place where it stands. The target of an entry is the mean of the logarithms of the largest attention from
either, over the query heads of its group; of a text without a question that of the second reading.

What counts is who is above whom, most of all at the top. So the ranks of a head are fitted as a distribution over the entries:

    loss = - sum_j softmax_j(t target) log softmax_j(t rank)            t = 1/2: not only the very first
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.future import attention_blocks
from ..data.sample import Sample
from ..model.attention import Heads
from .regress import FLOOR, Regress, chosen_positions, ranks_of

TEMPERATURE = 0.5


class AskedKL(Regress):
    """Cross entropy between attention and ranks, both as distributions over the entries of a head, in nats."""

    name = "asked-kl"
    readings = 2

    def held_out_loss(self, samples: Sequence[Sample]) -> Optional[float]:
        return self._observed_loss(samples)

    @torch.no_grad()
    def _observe(self, sample: Sample, n: int) -> dict[str, Tensor]:
        total = len(sample.tokens)
        asks = sample.asked < total
        end = min(sample.asked, total - self.window)
        chosen = chosen_positions(self.sinks, end, n)
        where = torch.from_numpy(chosen).to(self.device)
        hidden: dict[int, Tensor] = {}
        targets: dict[int, Tensor] = {}

        def read(heads: Heads) -> None:
            hidden[heads.layer] = heads.hidden[0, where].to(torch.bfloat16).cpu()
            if asks:
                targets[heads.layer] = _log_attention(heads, sample.asked, where)

        def repeat(heads: Heads) -> None:
            again = _log_attention(heads, end, where)
            targets[heads.layer] = (targets[heads.layer] + again) / 2 if asks else again

        self._read(sample.tokens, read)
        self._read(np.concatenate((sample.tokens[:end], sample.tokens[1:end])), repeat)  # without what a text begins with
        return {
            "hidden": torch.stack([hidden[il] for il in self.layers]),
            "target": torch.stack([targets[il].half().cpu() for il in self.layers]),
            "positions": where.cpu(),
        }

    def _loss(self, module: nn.Module, hidden: Tensor, target: Tensor, others: Mapping[str, Tensor], layer: int) -> Tensor:
        ranks = ranks_of(module, hidden, others["positions"])
        wanted = (TEMPERATURE * target).softmax(-1)
        return -(wanted * (TEMPERATURE * ranks).log_softmax(-1)).sum(-1).mean()


def _log_attention(heads: Heads, first: int, where: Tensor) -> Tensor:
    """Logarithm of the largest attention [H, n] that the entries at `where` get from queries at `first` and later."""
    q, k = heads.q[0], heads.k[0]
    best = torch.zeros(len(k), len(where), device=k.device)
    for _, p in attention_blocks(q, k, heads.scale, first=first, softcap=heads.softcap, sinks=heads.sinks):
        torch.maximum(best, p[..., where].amax((1, 2)), out=best)
    return best.clamp_min(FLOOR).log()
