"""What a text says once has to outlive all that comes after it, in the heads that will look for it. Forward passes only.

In a cache of 1024 entries a fact that was told 64K tokens ago is among the best 1.5 % of all that has been read since, and it has
to be there whole: of half a sentence a model makes another fact. Questions about a context of a thousand tokens do not teach
that. But few heads bring an answer what was told (of the demo model's 90 about twenty; without the others it answers as well), and in
all others old entries only take the place of new ones. So there are two kinds of heads:

**Those that remember**: of the attention of answers, at least `LOOKS` of what the head that looks most has there lies on what was told.
Every token of what generated text tells, whether it is asked for or not, gets the rank that it had and `HIGHER` more. Which
of two facts, or of two words of one, is worth more stays as it was, as other objectives have found it, so this one comes last.

**The others** keep the ranks that they have, and forget.

    loss = mean over facts of (rank - before - HIGHER)^2 + KEEP mean over the rest of (rank - before)^2     heads that remember
           KEEP mean over all of (rank - before)^2                                                          the others

in standard deviations of a head's ranks. Where ranks fall with age, all but facts are to fall by FALL in `age_scale` tokens, so that what
no fact takes is left to what was read last, and short texts are as they were. Facts fall by `FADE` of that: some of what a book says
looks like one, and if it never fell it would fill the cache in the end.

    + STAY mean over facts of (rate / FALL - FADE)^2 + 2 mean over the rest of max(1 - rate / FALL, 0)^2    heads that remember
    + 2 mean over all of max(1 - rate / FALL, 0)^2                                                          the others

What a sidecar says of budgets was measured with the ranks from before: afterwards heads that remember get SHARE times what the others get.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import TrainingError
from ..cache.future import attention_blocks
from ..data.sample import Sample
from ..model.attention import Heads
from .objective import Progress
from .regress import Regress, agreed, opened, ranks_of

LOOKS = 0.2
HIGHER = 3.0
KEEP = 4.0
FALL = 3.0
OTHERS = 400  # tokens of a sequence that are not told; more sequences teach more than more of their tokens
FADE = 0.03  # what is between the two kinds falls at a rate between theirs
STAY = 3.0
SHARE = 5.0  # of a budget that heads which remember get, where the others get 1


class ToldApart(Regress):
    """Targets are ranks from before."""

    name = "told-apart"
    kinds = ("retention", "kvzap")
    from_before = True

    before: nn.ModuleList  # the modules before the first step
    looks: Tensor  # [layers, H]
    spread: Tensor  # of the ranks before, [layers, H, 1]
    remember: Tensor  # bool [layers, H, 1]

    def prepare(self, samples: Sequence[Sample], folder: Path, progress: Progress) -> None:
        samples = _teach(samples)
        if not any(map(self.teaches, samples)):
            raise TrainingError(
                f"{self.name} needs generated text that tells something and asks for it: give a --generated above 0, more --samples, or a larger --length"
            )
        self.before = copy.deepcopy(self.modules)
        super().prepare(samples, folder, progress)
        self.looks = looks_of(self.shards)
        self.remember = heads_that_look(self.looks)

    def teaches(self, sample: Sample) -> bool:
        return bool(sample.told) and sample.asked < len(sample.tokens)

    def agree(self, mean: Callable[[list[float]], list[float]]) -> None:
        self.remember, self.spread = heads_that_look(agreed(self.looks, mean)), agreed(self.spread, mean)

    def found(self) -> str:
        remember = self.remember[..., 0]
        heads = ", ".join(
            f"{layer}: {' '.join(map(str, here.nonzero()[:, 0].tolist()))}" for layer, here in zip(self.layers, remember) if here.any()
        )
        return f"{int(remember.sum())} of {remember.numel()} heads remember (layer: heads) {heads}"

    def needs(self) -> Optional[dict[int, list[float]]]:
        of_layers = zip(self.layers, self.remember[..., 0].tolist())
        return {layer: [SHARE if remembers else 1.0 for remembers in here] for layer, here in of_layers}

    def _settle(self, targets: Sequence[Tensor]) -> None:
        self.spread = torch.cat(list(targets), -1).std(-1, correction=0, keepdim=True).clamp_min(1e-6)

    def held_out_loss(self, samples: Sequence[Sample]) -> Optional[float]:
        samples = _teach(samples)
        return self._observed_loss(samples) if samples else None

    @torch.no_grad()
    def _observe(self, sample: Sample, n: int) -> dict[str, Tensor]:
        """hidden bf16 [layers, n, d] and target float16 [layers, H, n] of facts and of some other tokens, their positions [n],
        which are `told` [n], and how much answers `look` [layers, H] at what was told (0: there is no answer).
        """
        end = min(sample.asked, len(sample.tokens))
        told = np.zeros(end, bool)
        for first, last in sample.told:
            told[first:last] = True
        places = np.arange(self.sinks, end)
        others = np.random.default_rng(n).permutation(places[~told[places]])[:OTHERS]
        chosen = np.sort(np.concatenate((places[told[places]], others)))
        where = torch.from_numpy(chosen).to(self.device)
        answers = torch.from_numpy(np.flatnonzero(sample.weight[end:] > 1) + end)  # each predicts a token of an answer
        hidden, targets, looks = [], [], []

        def look(heads: Heads) -> None:
            read = heads.hidden[0, where].to(torch.bfloat16)
            module = self.before[self.layers.index(heads.layer)]
            targets.append(ranks_of(module, read, where).half().cpu())
            hidden.append(read.cpu())
            looks.append(looks_at(heads, answers, torch.from_numpy(told)).cpu())

        self._read(sample.tokens, look)
        return {
            "hidden": torch.stack(hidden), "target": torch.stack(targets), "positions": where.cpu(), "told": torch.from_numpy(told[chosen]),
            "looks": torch.stack(looks),
        }  # fmt: skip

    def _loss(self, module: nn.Module, hidden: Tensor, target: Tensor, others: Mapping[str, Tensor], layer: int) -> Tensor:
        remember = self.remember[layer].to(target.device)
        told, spread = others["told"] & remember, self.spread[layer].to(target.device)
        positions = others["positions"]
        ranks, rate = module.ranks_and_rate(hidden, positions, int(positions[-1]))  # type: ignore[operator]
        moved = (ranks - target) / spread
        loss = _mean((moved - HIGHER).square(), told) + KEEP * _mean(moved.square(), ~told)
        if rate is None:
            return loss
        falls = -rate / spread / FALL
        return loss + STAY * _mean((falls - FADE).square(), told) + 2 * _mean((1 - falls).clamp_min(0).square(), ~told)


def _teach(samples: Sequence[Sample]) -> list[Sample]:
    """Pages of books, and generated text that says where a book tells something. What lists, code and noise are made of would be a fact
    wherever it stands, and of a book it would keep what only looks like one.
    """
    return [sample for sample in samples if sample.told or sample.asked >= len(sample.tokens)]


@torch.no_grad()
def looks_at(heads: Heads, rows: Tensor, told: Tensor) -> Tensor:
    """The share of the attention of the queries `rows`, which come after the n tokens of `told` [n], that lies on those of them which are
    true: mean over the rows, [H], of the query heads of a group that with most. Zeros without rows.
    """
    k, n = heads.k[0], len(told)
    told = told.to(k.device)
    total = torch.zeros(len(k), heads.q.shape[1] // len(k), device=k.device)
    for i, p in attention_blocks(heads.q[0], k, heads.scale, first=n, softcap=heads.softcap, sinks=heads.sinks):
        here = (rows[(rows >= i) & (rows < i + p.shape[-2])] - i).to(k.device)
        total += p[:, :, here, :n][..., told].sum((-1, -2))
    return total.amax(1) / max(len(rows), 1)


def looks_of(shards: Sequence[Path]) -> Tensor:
    """How much the heads look at what was told, [layers, H], on average over the sequences with answers."""
    found = []
    for path in shards:
        with opened(path) as file:
            found.append(file.get_tensor("looks"))
    return torch.stack([one for one in found if one.any()]).mean(0)


def heads_that_look(looks: Tensor) -> Tensor:
    """Which heads remember, bool [layers, H, 1]."""
    return (looks >= LOOKS * looks.max())[..., None]


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Of the values [H, n] that are chosen, in each head; mean over the heads. 0 where there are none: a text may be without facts, or
    have nothing else.
    """
    return ((values * chosen).sum(-1) / chosen.sum(-1).clamp_min(1)).mean()
