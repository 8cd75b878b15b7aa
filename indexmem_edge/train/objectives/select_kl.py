"""Questions after a context that has really been evicted: the model should answer as it does with all of it.

Unlike gated-kl, where every entry stays and has a weight, what ranks low is gone here, as in use, and what it would have
changed reaches the ranks through `selected`. The context is read once, with everything kept and without gradients; only the
rows after it, which are few, are computed for each budget and in both directions. That is also what makes it cheap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..cache.eviction import Schedule
from ..data.sample import Sample
from ..model.attention import Heads, attention, causal
from .losses import both_kl
from .objective import Objective
from .selected import choose, selected_attention

ROWS = 256  # after the context that are read
RATIOS = (0.08, 0.12, 0.18, 0.3)  # shares of the context that stay
DRAWN = 2  # of them, for each sequence
MUCH = 0.25  # nats: beyond it a loss counts by its logarithm. A long passage, to be repeated word by word, cannot stay


class SelectKL(Objective):
    name = "select-kl"

    @torch.no_grad()
    def held_out_loss(self, samples: Sequence[Sample]) -> float:
        """The loss on held-out samples, over all ratios."""
        losses = [float(self.loss(sample, RATIOS)) for sample in samples]
        return sum(losses) / len(losses)

    def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
        rng = np.random.default_rng((seed, step))
        total = 0.0
        for sample in samples:
            ratios = rng.choice(RATIOS, DRAWN, replace=False)
            loss = self.loss(sample, ratios.tolist()) / len(samples)
            loss.backward()
            total += float(loss.detach())
        return {"loss": total}

    def factors(self, layer: int, hidden: Tensor, ratios: Sequence[float]) -> list[Tensor]:
        """For each ratio, the factors [H, n] of the entries of a context with hidden states [n, d], as `choose` has them."""
        n = len(hidden)
        module = self.module_of(layer)
        assert module is not None
        ranks = module.ranks(hidden, torch.arange(n, device=self.device), n - 1)
        found = []
        for ratio in ratios:
            budgets = self.budgets(layer, Schedule(ratio).limit(n, self.sinks, self.window), len(ranks))
            found.append(torch.cat([choose(r[None], budget, self.sinks, self.window) for r, budget in zip(ranks, budgets)]))
        return found

    def loss(self, sample: Sample, ratios: Sequence[float]) -> Tensor:
        """Divergence over the rows after the context, both ways, answers counted by their weight; over `ratios` the mean."""
        n = self._context(sample)
        tokens = torch.from_numpy(sample.tokens[: n + ROWS]).long().to(self.device)
        context: list[tuple[Tensor, Tensor, Tensor]] = []

        def read(heads: Heads) -> Tensor:
            start = max(n - heads.window, 0) if heads.window else 0
            context.append((heads.hidden[0, :n], heads.k[0, :, start:n], heads.v[0, :, start:n]))
            return causal(heads)

        with torch.no_grad():
            teacher = self.decoder(tokens[None], read)[0, n:]

        def attend(heads: Heads) -> Tensor:
            hidden, k, v = context[heads.layer]
            if self.module_of(heads.layer) is None:
                before = (t.expand(len(ratios), -1, -1, -1) for t in (k, v))
                k, v = (torch.cat(parts, dim=2) for parts in zip(before, (heads.k, heads.v)))
                return attention(heads.q, k, v, heads.scale, heads.window)
            rows = []
            for b, factors in enumerate(self.factors(heads.layer, hidden, ratios)):
                own = heads.k[b], heads.v[b]
                rows.append(selected_attention(heads.q[b], k, v, factors, *own, heads.scale))
            return torch.stack(rows)

        students = self.decoder(tokens[None, n:].expand(len(ratios), -1), attend, first=n)
        weight = torch.from_numpy(sample.weight[n : n + ROWS]).to(self.device)
        (head, bias), softcap = self.decoder.output, self.decoder.config.logit_softcap
        losses = torch.stack([both_kl(student, teacher, head, weight, bias=bias, softcap=softcap) for student in students])
        return (MUCH * (losses / MUCH).log1p()).mean()

    def _context(self, sample: Sample) -> int:
        """Tokens before the question; of a page without one, all but the last rows."""
        total, least = len(sample.tokens), self.sinks + self.window + 1
        n = sample.asked if sample.asked < total else total - min(ROWS, total // 4)
        return min(max(n, least), total - 1)
