"""select-kl with other text that competes for the same budget: what is kept would still be there many thousands of tokens later.

In a cache of 1024 entries a fact that was told 64K tokens ago is among the best 1.5 % of all that has been read since. Contexts
of which so little stays would have to be that long to hold a fact and anything else. Instead, pages of books are read once, and
their ranks compete with those of a context as if they had come after it; what of a page wins a place takes it and is not read.
So the threshold is that of a long text, at the price of a short one. Half of the work is select-kl as it is: what
matters soon after it was read must stay, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import TrainingError
from ..data.sample import Sample
from ..model.decoder import Heads, causal
from .objective import Progress
from .select_kl import RATIOS, SelectKL
from .selected import choose

COMPETITORS = 4096  # tokens of the pages
SHARES = (0.012, 0.02, 0.035, 0.06)  # of context and pages together, that stay beside what is never evicted


class OutliveKL(SelectKL):
    name = "outlive-kl"
    pages: dict[int, Tensor]  # by layer, of those that are bounded: hidden states [COMPETITORS, d]

    def prepare(self, samples: Sequence[Sample], folder: Path, progress: Progress) -> None:
        """Reads pages without questions; `folder` is not needed, for that is soon done again."""
        found: list[Sample] = []
        wanted = COMPETITORS
        for sample in samples:
            if wanted <= 0:
                break
            if sample.asked >= len(sample.tokens):
                found.append(sample)
                wanted -= len(sample.tokens)
        if not found:
            raise TrainingError(
                f"{self.name} needs pages of books, and there are only generated texts: give a --generated below 1, or more "
                "--samples"
            )
        read: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

        def keep(heads: Heads) -> Tensor:
            if heads.layer in read:
                read[heads.layer].append(heads.hidden[0, self.sinks :])  # its first tokens are like none of a long text
            return causal(heads)

        with torch.no_grad():
            for i, sample in enumerate(found):
                progress(i, len(found), "pages that compete")
                self.decoder(torch.from_numpy(sample.tokens).long().to(self.device)[None], keep)
        self.pages = {layer: torch.cat(parts)[:COMPETITORS] for layer, parts in read.items()}

    def held_out_loss(self, samples: Sequence[Sample]) -> float:
        with torch.no_grad():
            losses = [float(self.loss(sample, (RATIOS[1], *SHARES[1:3]))) for sample in samples]
        return sum(losses) / len(losses)

    def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
        rng = np.random.default_rng((seed, step))
        total = 0.0
        for sample in samples:
            loss = self.loss(sample, (float(rng.choice(RATIOS)), float(rng.choice(SHARES)))) / len(samples)
            loss.backward()
            total += float(loss.detach())
        return {"loss": total}

    def factors(self, layer: int, hidden: Tensor, ratios: Sequence[float]) -> list[Tensor]:
        """The first ratio is one of select-kl, the others are shares of context and pages together."""
        found = super().factors(layer, hidden, ratios[:1])
        module, pages, n = self.module_of(layer), self.pages[layer], len(hidden)
        assert module is not None
        newest = n + len(pages) - 1
        # sinks, pages, the rest: ranks go by position, while the order here is what is protected at either end
        own = module.ranks(hidden, torch.arange(n, device=self.device), newest)
        others = module.ranks(pages, torch.arange(n, newest + 1, device=self.device), newest)
        ranks = torch.cat((own[:, : self.sinks], others, own[:, self.sinks :]), -1)
        for share in ratios[1:]:
            budget = self.sinks + self.window + math.ceil(share * ranks.shape[-1])
            stays = choose(ranks, budget, self.sinks, self.window)
            found.append(torch.cat((stays[:, : self.sinks], stays[:, self.sinks + len(pages) :]), -1))
        return found
