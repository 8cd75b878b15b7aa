"""Questions after a context that has really been evicted: the model should answer as it does with all of it.

Unlike gated-kl, where every entry stays and has a weight, what ranks low is gone here, as in use, and what it would have
changed reaches the ranks through `selected`. The context is read once, with everything kept and without gradients; only the
rows after it, which are few, are computed for each budget and in both directions. That is also what makes it cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Context:
    """What one layer holds of a context of n tokens, with everything kept."""

    layer: int
    hidden: Tensor  # [n, d]
    k: Tensor  # [H, n, D], of a window layer only the last ones
    v: Tensor


View = Callable[[Context], tuple[Tensor, Tensor, Tensor]]  # -> keys, values [H, m, D] and factors [H, m] of what is read of it


class SelectKL(Objective):
    name = "select-kl"

    @torch.no_grad()
    def held_out_loss(self, samples: Sequence[Sample]) -> float:
        """The loss on held-out samples, over all ratios."""
        losses = [float(self.loss(sample, [self.share(ratio) for ratio in RATIOS])) for sample in samples]
        return sum(losses) / len(losses)

    def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
        rng = np.random.default_rng((seed, step))
        total = 0.0
        for sample in samples:
            ratios = rng.choice(RATIOS, DRAWN, replace=False).tolist()
            loss = self.loss(sample, [self.share(ratio) for ratio in ratios]) / len(samples)
            loss.backward()
            total += float(loss.detach())
        return {"loss": total}

    def share(self, ratio: float) -> View:
        """What stays of a context if that share of it may."""

        def view(context: Context) -> tuple[Tensor, Tensor, Tensor]:
            n = len(context.hidden)
            ranks = self.ranks(context.layer, context.hidden, torch.arange(n, device=self.device), n - 1)
            budget = self.budget(context.layer, Schedule(ratio).limit(n, self.sinks, self.window))
            return context.k, context.v, choose(ranks, budget, self.sinks, self.window)

        return view

    def ranks(self, layer: int, hidden: Tensor, positions: Tensor, newest: int) -> Tensor:
        """Ranks [H, n] of entries with hidden states [n, d] when the newest token is at `newest`."""
        module = self.module_of(layer)
        assert module is not None
        ranks: Tensor = module.ranks(hidden, positions, newest)  # type: ignore[operator]
        return ranks

    def loss(self, sample: Sample, views: Sequence[View]) -> Tensor:
        """Divergence over the rows after the context, both ways, answers counted by their weight; over `views` the mean."""
        n = self._context(sample)
        tokens = torch.from_numpy(sample.tokens[: n + ROWS]).long().to(self.device)
        contexts: list[Context] = []

        def read(heads: Heads) -> Tensor:
            start = max(n - heads.window, 0) if heads.window else 0
            contexts.append(Context(heads.layer, heads.hidden[0, :n], heads.k[0, :, start:n], heads.v[0, :, start:n]))
            return causal(heads)

        with torch.no_grad():
            teacher = self.decoder(tokens[None], read)[0, n:]

        def attend(heads: Heads) -> Tensor:
            context = contexts[heads.layer]
            if self.module_of(heads.layer) is None:
                before = (t.expand(len(views), -1, -1, -1) for t in (context.k, context.v))
                k, v = (torch.cat(parts, dim=2) for parts in zip(before, (heads.k, heads.v)))
                return attention(heads.q, k, v, heads.scale, heads.window)
            rows = []
            for b, view in enumerate(views):
                rows.append(selected_attention(heads.q[b], *view(context), heads.k[b], heads.v[b], heads.scale))
            return torch.stack(rows)

        students = self.decoder(tokens[None, n:].expand(len(views), -1), attend, first=n)
        weight = torch.from_numpy(sample.weight[n : n + ROWS]).to(self.device)
        (head, bias), softcap = self.decoder.output, self.decoder.config.logit_softcap
        losses = torch.stack([both_kl(student, teacher, head, weight, bias=bias, softcap=softcap) for student in students])
        return (MUCH * (losses / MUCH).log1p()).mean()

    def _context(self, sample: Sample) -> int:
        """Tokens before the question; of a page without one, all but the last rows."""
        total, least = len(sample.tokens), self.sinks + self.window + 1
        n = sample.asked if sample.asked < total else total - min(ROWS, total // 4)
        return min(max(n, least), total - 1)
