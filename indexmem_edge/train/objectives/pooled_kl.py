"""`pooled-kl`: the pairwise indexer learns which keys the model's own attention asks for (method appendix A).

Per layer, for a set of queries Q and the keys t that one of them may lose:

    teacher_t = max over s in Q and query heads of q_hs . k_t / sqrt(D)         student_t = max over s in Q of A_st
    loss      = KL( softmax_t(teacher) || softmax_t(student) )                  mean over query sets, layers and samples

A pair (s, t) counts if `sinks <= t <= s - window`: the paper masks the sinks; what lies in the window of a query cannot have
left when that query asks, so it teaches nothing. With window 0 these are all causal pairs. An indexer that reduces by the
mean is trained by the means over s, on both sides; heads have a maximum in any case.

Nothing larger than `chunk` queries against all keys is ever held: the student's chunks are computed again for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import TrainingError
from ..data.sample import Sample
from ..indexers.pairwise import Pairwise
from ..model.attention import Heads
from ..model.decoder import Decoder, soft_capped
from .objective import Objective

TEACHERS = ("logits", "attention")

Scores = Callable[[slice, slice], Tensor]  # queries and keys, by their positions -> [n, m]


class PooledKL(Objective):
    """`queries`: how many consecutive queries are a set, as the compressions of decode have them; None: the whole sample is
    one, as the paper has it for prompts. `teacher`: `logits` as in the paper, or `attention`, their log-probabilities, with
    which a head whose logits are all large does not outvote the others.

    Raises:
        TrainingError: the modules are no pairwise indexers, or an option is impossible.
    """

    name = "pooled-kl"
    observes = True
    kinds = (Pairwise.kind,)

    def __init__(
        self, decoder: Decoder, modules: nn.ModuleList, sinks: int, window: int, *, queries: int | None = None,
        teacher: str = "logits", chunk: int = 256,
    ) -> None:  # fmt: skip
        super().__init__(decoder, modules, sinks, window)
        if teacher not in TEACHERS:
            raise TrainingError(f"the teacher of pooled-kl must be {' or '.join(TEACHERS)}, found {teacher!r}")
        if chunk < 1 or (queries is not None and queries < 1):
            raise TrainingError(f"pooled-kl needs at least one query, found queries {queries} and chunk {chunk}")
        self.queries, self.teacher, self.chunk = queries, teacher, chunk

    def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
        """Figures: `loss`, and `agreement`, the share of the teacher's best quarter of keys in the student's."""
        losses: list[float] = []
        agreements: list[float] = []
        share = 1 / (len(samples) * len(self.modules))

        @torch.enable_grad()
        def look(heads: Heads) -> None:
            module = self.module_of(heads.layer)
            assert isinstance(module, Pairwise)
            if (found := self.layer_loss(module, heads)) is None:
                return
            loss, agreement = found
            (loss * share).backward()
            losses.append(loss.item())
            agreements.append(agreement)

        for sample in samples:
            with torch.no_grad():
                self.decoder.observe(torch.from_numpy(sample.tokens).long().to(self.device), look)
        return {"loss": sum(losses) * share, "agreement": sum(agreements) / max(len(agreements), 1)}

    def layer_loss(self, module: Pairwise, heads: Heads) -> tuple[Tensor, float] | None:
        """Loss and agreement of one layer and one sequence; None if no set of queries has two keys to choose from."""
        hidden, reduce = heads.hidden[0], module.constants["reduce"]
        (q, c), keys = module.queries(hidden), module(hidden)
        losses, agreements = [], []
        for first, last in self._sets(len(hidden)):
            with torch.no_grad():
                teacher = self._pooled(lambda rows, seen: self._teacher(heads, rows, seen), first, last, reduce)
            student = self._pooled(lambda rows, seen: module.scores(q[rows], c[rows], keys[seen]), first, last, reduce)
            expected = teacher.to(student.dtype).log_softmax(0)
            losses.append(F.kl_div(student.log_softmax(0), expected, reduction="sum", log_target=True))
            agreements.append(_agreement(teacher, student.detach()))
        if not losses:
            return None
        return torch.stack(losses).mean(), sum(agreements) / len(agreements)

    def _sets(self, total: int) -> Iterator[tuple[int, int]]:
        """First and last query of each set that has two keys or more."""
        size = self.queries or total
        for first in range(0, total, size):
            last = min(first + size, total) - 1
            if self._n_keys(last) > 1:
                yield first, last

    def _n_keys(self, s: int) -> int:
        """How many keys the query at s may ask for: those at sinks, sinks + 1, ..."""
        return s - self.window - self.sinks + 1

    def _spans(self, first: int, last: int) -> Iterator[tuple[slice, slice]]:
        """Chunks of queries that have something to ask for, and the keys that the last of them may ask for."""
        for i in range(max(first, self.sinks + self.window), last + 1, self.chunk):
            end = min(i + self.chunk, last + 1)
            yield slice(i, end), slice(self.sinks, self.sinks + self._n_keys(end - 1))

    def _pooled(self, scores: Scores, first: int, last: int, reduce: str) -> Tensor:
        """One number for each key of a set of queries [n_keys]: `scores` reduced over the queries that may ask for it."""
        n_keys, parts = self._n_keys(last), []

        def chunk(rows: slice, seen: slice) -> Tensor:
            a = scores(rows, seen)
            s = torch.arange(rows.start, rows.stop, device=a.device)[:, None]
            hidden = torch.arange(seen.start, seen.stop, device=a.device) > s - self.window
            return a.masked_fill(hidden, 0).sum(0) if reduce == "mean" else a.masked_fill(hidden, -torch.inf).amax(0)

        for rows, seen in self._spans(first, last):
            part = checkpoint(chunk, rows, seen, use_reentrant=False, preserve_rng_state=False)
            fill = 0.0 if reduce == "mean" else -torch.inf
            parts.append(F.pad(part, (0, n_keys - len(part)), value=fill))
        if reduce == "max":
            return torch.stack(parts).amax(0)
        asked_from = (torch.arange(n_keys, device=parts[0].device) + self.sinks + self.window).clamp_min(first)
        return torch.stack(parts).sum(0) / (last + 1 - asked_from)

    def _teacher(self, heads: Heads, rows: slice, seen: slice) -> Tensor:
        """Maximum over all heads of what queries `rows` give keys `seen`: float32 [n, m], nothing masked."""
        k, n = heads.k[0], rows.stop - rows.start
        q = heads.q[0].unflatten(0, (len(k), -1))[:, :, rows].flatten(1, 2)  # [H, G*n, D]: one product per KV head
        scale = heads.scale
        if self.teacher == "logits":
            return soft_capped(((q @ k[:, seen].mT).amax(0).float() * scale).unflatten(0, (-1, n)).amax(0), heads.softcap)
        logits = soft_capped(((q @ k[:, : rows.stop].mT).float() * scale).unflatten(1, (-1, n)), heads.softcap)
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=k.device).triu(rows.start + 1)
        logits = logits.masked_fill(later, -torch.inf)
        total = logits.logsumexp(-1, keepdim=True)
        if heads.sinks is not None:
            total = torch.logaddexp(total, heads.sinks.float().view(len(k), -1, 1, 1))
        return (logits - total)[..., seen].amax((0, 1))


def _agreement(teacher: Tensor, student: Tensor) -> float:
    """Share of the teacher's best quarter [n_keys] that is in the student's."""
    n = max(len(teacher) // 4, 1)
    best = torch.zeros_like(teacher, dtype=torch.bool).index_fill_(0, teacher.topk(n).indices, True)
    return float(best[student.topk(n).indices].float().mean())
