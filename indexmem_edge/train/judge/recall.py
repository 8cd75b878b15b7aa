"""How much of the attention of later queries an indexer keeps, against policies without training and against the best.

A context of n tokens is read; each policy ranks its entries once, at its end, and keeps a share of them; then the rest
of the sample is read. Its queries attend to the context with a certain mass, the sum of their probabilities, and recall
is the share of it that lies on what was kept, per layer and KV head. Nothing is evicted while this is measured: every
layer sees what it sees with an ordinary cache, so an error of one layer does not blur the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...errors import BudgetError, IndexMemError
from ...options import DEFAULT_SINKS, LEAST_WINDOW
from ..cache.future import future_mass, kept_mask
from ..cache.policies import POLICIES, Context, Policy, streaming
from ..data.sample import Sample
from ..model.attention import Heads
from ..model.frozen import Frozen
from ..objectives.objective import Progress

BUDGETS = (0.5, 0.25, 0.1)  # shares of the context
INDEXER, ORACLE = "indexer", "oracle"
_PROTECTED = "protected"
TAIL = 8  # of a text without a question the last eighth asks

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    """One sample: the first `n_context` of its `n_tokens` tokens were read before the selection."""

    source: str
    n_tokens: int
    n_context: int
    question: bool  # whether the rest asks about the context, or is just more text


@dataclass(frozen=True)
class Recall:
    """`shares[policy][budget]` are float32 [samples, layers, H] in 0..1, `indexer` first and `oracle` last.

    Layers are those that a budget bounds, `layers` are their numbers. The oracle ranks by the mass itself, so no choice beside
    the protected entries keeps more; it knows what comes.
    `protected[budget]` is what the protected entries would keep alone: what every policy has without choosing.
    """

    shares: Mapping[str, Mapping[float, Array]]
    protected: Mapping[float, Array]
    samples: tuple[Measured, ...]
    sinks: int
    window: int  # at most; of a small budget it is a quarter
    layers: tuple[int, ...]

    @property
    def budgets(self) -> tuple[float, ...]:
        return tuple(self.shares[ORACLE])

    def mean(self, policy: str, budget: float, question: Optional[bool] = None) -> float:
        """Over samples, layers and heads; `question` takes samples with one, or without, alone (NaN: there is none)."""
        chosen = [question in (None, sample.question) for sample in self.samples]
        return float(self.shares[policy][budget][chosen].mean()) if any(chosen) else float("nan")

    def by_layer(self, policy: str, budget: float) -> Array:
        """[layers], mean over samples and heads."""
        return self.shares[policy][budget].mean((0, 2))

    def relative(self, policy: str) -> float:
        """Share of the oracle's, mean over budgets, samples, layers and heads."""
        return float(np.mean([self.shares[policy][b] / self.shares[ORACLE][b] for b in self.budgets]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json.dumps takes: lists [budgets], [budgets, samples] and [budgets, layers, H] of means."""
        return {
            "sinks": self.sinks,
            "window": self.window,
            "layers": list(self.layers),
            "budgets": list(self.budgets),
            "samples": [vars(sample) for sample in self.samples],
            "relative": {policy: _rounded(self.relative(policy)) for policy in self.shares},
            "shares": {name: self._means(shares) for name, shares in self.shares.items()},
            "protected": self._means(self.protected),
        }

    def _means(self, shares: Mapping[float, Array]) -> dict[str, Any]:
        each = [shares[b] for b in self.budgets]
        return {
            "mean": [_rounded(a.mean()) for a in each],
            "by_sample": [_rounded(a.mean((1, 2))) for a in each],
            "by_head": [_rounded(a.mean(0)) for a in each],
        }


def context_length(sample: Sample) -> int:
    """Tokens that are read before the selection: up to the question, or all but a tail of a text without one."""
    n = len(sample.tokens)
    return sample.asked if sample.asked < n else n - -(-n // TAIL)


def measure(
    decoder: Frozen,
    modules: nn.ModuleList,
    samples: Sequence[Sample],
    budgets: Sequence[float] = BUDGETS,
    sinks: int = DEFAULT_SINKS,
    window: int = LEAST_WINDOW,
    policies: Mapping[str, Policy] = POLICIES,
    progress: Optional[Progress] = None,
) -> Recall:
    """Recall of the indexer, of `policies` and of the oracle.

    Args:
        modules: the indexer, one module per bounded layer, on the device of the decoder.
        budgets: shares of the context that are kept, protected entries included.
        sinks, window: first and most recent tokens of the context that always stay. Of a small budget the window is a
            quarter at most, as in the benchmarks.
        progress: called with the layers done and their number.

    Raises:
        BudgetError: of a sample so little may stay that there is nothing to choose.
        IndexMemError: there are no samples.
    """
    budgets = tuple(dict.fromkeys(budgets))
    check(samples, budgets, sinks, window)
    layers = decoder.geometry.bounded
    names = (INDEXER, *policies, ORACLE, _PROTECTED)
    found: dict[str, dict[float, list[Array]]] = {name: {b: [] for b in budgets} for name in names}
    done = 0

    def look(context: Context, mass: Tensor) -> None:
        nonlocal done
        module = modules[layers.index(context.layer)]
        rank = {INDEXER: _indexer(module), **policies, ORACLE: lambda _: mass, _PROTECTED: streaming}
        for name, policy in rank.items():
            scores = policy(context).float().expand(mass.shape)
            scores = scores.masked_fill(scores.isnan(), -torch.inf)  # below everything, as in the cache
            for budget in budgets:
                entries, recent = _room(len(context.hidden), budget, sinks, window)
                if name == _PROTECTED:
                    entries = sinks + recent
                share = kept_share(mass, kept_mask(scores, entries, sinks, recent))
                found[name][budget].append(share.cpu().numpy())
        done += 1
        if progress is not None:
            progress(done, len(layers) * len(samples), "recall")

    for sample in samples:
        _each_layer(decoder, sample, look)
    shape = len(samples), len(layers), decoder.geometry.n_head_kv
    shares = {name: {b: np.stack(rows).reshape(shape) for b, rows in by.items()} for name, by in found.items()}
    protected = shares.pop(_PROTECTED)
    return Recall(shares, protected, tuple(map(_measured, samples)), sinks, window, layers)


def check(samples: Sequence[Sample], budgets: Sequence[float], sinks: int, window: int) -> None:
    """Whether recall can be measured like this, without measuring it. Arguments and errors are those of `measure`."""
    if not samples:
        raise IndexMemError("recall is measured on samples, and there are none: hold some back from training")
    for sample in samples:
        for budget in budgets:
            _room(context_length(sample), budget, sinks, window)


def held_out_recall(
    decoder: Frozen,
    modules: nn.ModuleList,
    samples: Sequence[Sample],
    budgets: Sequence[float] = BUDGETS,
    sinks: int = DEFAULT_SINKS,
    window: int = LEAST_WINDOW,
) -> float:
    """What the indexer keeps of what the oracle keeps, in 0..1, mean over budgets, samples, layers and heads.

    For early stopping: without the other policies it costs little more than reading the samples. Arguments and errors
    are those of `measure`.
    """
    return measure(decoder, modules, samples, budgets, sinks, window, policies={}).relative(INDEXER)


def kept_share(mass: Tensor, kept: Tensor) -> Tensor:
    """Share [H] of mass [H, n] on the entries of the mask `kept` [H, n]; 1 where there is no mass to lose."""
    total = mass.sum(-1)
    share = mass.where(kept, 0).sum(-1) / total
    return torch.where(total > 0, share, 1.0).clamp(max=1)  # two sums of the same numbers may differ in rounding


@torch.no_grad()
def _each_layer(decoder: Frozen, sample: Sample, look: Callable[[Context, Tensor], None]) -> None:
    """Reads a sample and shows the context of each bounded layer, with the mass [H, n] that it receives from what follows."""
    n = context_length(sample)

    def context(heads: Heads) -> None:
        q, k, how = heads.q[0], heads.k[0], (heads.softcap, heads.sinks)
        mass = future_mass(q, k, heads.scale, n, *how)
        look(Context(heads.layer, heads.hidden[0, :n], q[:, :n], k[:, :n], heads.scale, *how), mass)

    decoder.observe(torch.tensor(sample.tokens, device=decoder.device), context)


def _indexer(module: nn.Module) -> Policy:
    return lambda c: module.ranks(c.hidden, c.positions, newest=len(c.hidden) - 1)  # type: ignore[operator]


def _room(n_context: int, budget: float, sinks: int, window: int) -> tuple[int, int]:
    """Entries that stay, and the most recent ones among them that always do."""
    entries = round(budget * n_context)
    recent = min(window, entries // 4)
    if entries <= sinks + recent or entries == 0:
        raise BudgetError(
            f"{budget:g} of a context of {n_context} tokens is {entries}: beside {sinks} sinks and a window of {recent} "
            "nothing can be chosen. Measure longer samples, or larger budgets"
        )
    return entries, recent


def _measured(sample: Sample) -> Measured:
    n = len(sample.tokens)
    return Measured(sample.source, n, context_length(sample), sample.asked < n)


def _rounded(value: Any) -> Any:
    return np.round(np.asarray(value, np.float64), 6).tolist()
