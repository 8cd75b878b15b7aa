"""select-kl in the middle of a long text: pages of books compete for the same budget, and what they win is read.

In a cache of 1024 entries a fact that was told 64K tokens ago is among the best 1.5 % of all that has been read since, and beside
it is the best of everything else, which can mislead. Contexts of which so little stays would have to be that long to hold a fact
and anything else. Instead, many pages of books are read once, and some of them compete with each context, at the price of a short
one. The teacher reads the context alone: pages have nothing to do with what is asked, so keeping the wrong ones costs. They lie
before the context, so that what was said last is asked for among remains of the past, or between the context and its question,
which is then about what was said long ago. Half of the work is select-kl as it is: what matters soon after it was read must stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import TrainingError
from ..cache.eviction import pick
from ..data.sample import Sample
from ..model.decoder import Heads, causal
from .objective import Progress
from .select_kl import RATIOS, Context, SelectKL, View
from .selected import choose

POOL = 16384  # tokens of pages that are read before training
COMPETITORS = 8192  # of them, drawn for each sequence
TOLD = 8  # one token of so many, at most, is of facts
SHARES = (0.012, 0.02, 0.035, 0.06)  # of context and pages together, that stay beside what is never evicted
CONSIDERED = 2  # times what stays: entries of pages that have a gradient. Far below the threshold it is next to nothing


@dataclass(frozen=True)
class Page:
    """What the bounded layers hold of a page, without its first tokens, which are like none of a long text."""

    hidden: dict[int, Tensor]  # by layer, [n, d]
    k: dict[int, Tensor]  # [H, n, D], rotated to their positions in the page
    v: dict[int, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.hidden.values())))


class OutliveKL(SelectKL):
    name = "outlive-kl"
    pages: list[Page]

    def prepare(self, samples: Sequence[Sample], folder: Path, progress: Progress) -> None:
        """Reads pages of books and, for one token in `TOLD`, facts that other sequences ask for: what answers a question must not
        be taken for what answers another. `folder` is not needed, for that is soon done again.
        """
        found: list[np.ndarray] = []
        n_told = n_page = 0
        for sample in samples:
            if n_told + n_page >= POOL:
                break
            told = self._asks(sample)
            tokens = sample.tokens[: sample.asked] if told else sample.tokens
            if len(tokens) <= self.sinks or (told and TOLD * (n_told + len(tokens)) > POOL):
                continue
            found.append(tokens)
            n_told += told * len(tokens)
            n_page += (not told) * len(tokens)
        if not n_page:
            raise TrainingError(
                f"{self.name} needs pages of books, and there are only generated texts: give a --generated below 1, or more "
                "--samples"
            )
        self.pages = []
        for i, tokens in enumerate(found):
            progress(i, len(found), "pages that compete")
            page = Page({}, {}, {})

            def keep(heads: Heads, page: Page = page) -> Tensor:
                if heads.layer in self.layers:
                    page.hidden[heads.layer] = heads.hidden[0, self.sinks :]
                    page.k[heads.layer], page.v[heads.layer] = heads.k[0, :, self.sinks :], heads.v[0, :, self.sinks :]
                return causal(heads)

            with torch.no_grad():
                self.decoder(torch.from_numpy(tokens).long().to(self.device)[None], keep)
            self.pages.append(page)

    @torch.no_grad()
    def held_out_loss(self, samples: Sequence[Sample]) -> float:
        losses = []
        for i, sample in enumerate(samples):
            pages = self.drawn(np.random.default_rng(i))
            views = [self.share(RATIOS[1]), *(self.outlived(share, pages, self._asks(sample)) for share in SHARES[1:3])]
            losses.append(float(self.loss(sample, views)))
        return sum(losses) / len(losses)

    def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
        rng = np.random.default_rng((seed, step))
        total = 0.0
        for sample in samples:
            ratio, share, between = float(rng.choice(RATIOS)), float(rng.choice(SHARES)), bool(rng.random() < 0.5)
            pages = self.drawn(rng)
            outlived = self.outlived(share, pages, between and self._asks(sample))
            loss = self.loss(sample, [self.share(ratio), outlived]) / len(samples)
            loss.backward()
            total += float(loss.detach())
        return {"loss": total}

    def drawn(self, rng: np.random.Generator) -> list[Page]:
        """Pages in a new order, until they have as many tokens as compete with a context."""
        found: list[Page] = []
        for i in rng.permutation(len(self.pages)):
            if sum(map(len, found)) >= COMPETITORS:
                break
            found.append(self.pages[i])
        return found

    def outlived(self, share: float, pages: Sequence[Page], between: bool) -> View:
        """What stays of a context and pages if that share of both may.

        Args:
            between: the pages come after the context, and the rows that read both after the pages; else they come before it.
        """

        def view(context: Context) -> tuple[Tensor, Tensor, Tensor]:
            layer, sinks = context.layer, self.sinks
            hidden = torch.cat([page.hidden[layer] for page in pages])
            n, n_page = len(context.hidden), len(hidden)
            # The order of the text: sinks, then pages, then the context, or the last two the other way round.
            start = n if between else sinks
            at = torch.arange(n + n_page, device=self.device)
            of_page = (at >= start) & (at < start + n_page)
            own, others = at[~of_page], at[of_page]
            newest = n + n_page - 1
            ranks = torch.empty(len(context.k), n + n_page, device=self.device)
            ranks[:, own] = self.ranks(layer, context.hidden, own, newest)
            ranks[:, others] = self.ranks(layer, hidden, others, newest)
            budget = self.budget(layer, sinks + self.window + math.ceil(share * (n + n_page)))
            factors = choose(ranks, budget, sinks, self.window)
            # Of the pages the best are enough: those that stay first, ties as they come.
            order = (ranks + torch.where(factors > 0, torch.inf, 0)).detach()[:, others]
            order = order.argsort(dim=-1, descending=True, stable=True)[:, : CONSIDERED * budget]
            k = self._turned(layer, context.k, own - n_page - torch.arange(n, device=self.device))
            theirs = torch.cat([torch.arange(sinks, sinks + len(page), device=self.device) for page in pages])
            page_k = self._turned(layer, torch.cat([page.k[layer] for page in pages], 1), others - n_page - theirs)
            page_v = torch.cat([page.v[layer] for page in pages], 1)
            return (
                torch.cat((k, pick(page_k, order)), 1),
                torch.cat((context.v, pick(page_v, order)), 1),
                torch.cat((factors[:, own], factors[:, others].gather(1, order)), 1),
            )

        return view

    def _turned(self, layer: int, k: Tensor, by: Tensor) -> Tensor:
        """Keys at other positions: the rows stay where they are, so what comes before them moves back."""
        rope = self.decoder.config.rope_of(layer)
        return k if rope is None else rope.turned(k, by)

    def _asks(self, sample: Sample) -> bool:
        return sample.asked < len(sample.tokens)
