"""Regression on the attention that a key will receive (KVzap, arXiv 2601.07891): forward passes only.

The target of an entry is the logarithm of the largest attention it gets from any later query outside of the window, the
maximum over the query heads of its group. Hidden states and targets of a share of the tokens are written once, and then
the networks are fitted to random batches of them, which costs next to nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open  # type: ignore[attr-defined, unused-ignore]
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import TrainingCheckpointError
from ..cache.future import future_attention
from ..data.sample import Sample
from ..model.attention import Heads, Look
from ..model.decoder import Decoder
from .objective import Objective, Progress

FLOOR = 1e-6  # attention below it is not told apart: bf16 operands do not resolve it
TOKENS = 1024  # of each sequence that are written


class Regress(Objective):
    """Huber loss between ranks and log attention, in nats; a constant per layer and head is free."""

    name = "regress"
    observes = True
    kinds: ClassVar[tuple[str, ...]] = ("retention", "kvzap", "pairwise")

    def __init__(self, decoder: Decoder, modules: nn.ModuleList, sinks: int, window: int) -> None:
        super().__init__(decoder, modules, sinks, window)
        self.shards: list[Path] = []
        self.mean: Tensor = torch.zeros(())

    def prepare(self, samples: Sequence[Sample], folder: Path, progress: Progress) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.shards = folder, []
        for n, sample in enumerate(samples):
            path = folder / f"{self.name}-{n:05}.safetensors"
            if not path.exists():
                write(path, self._observe(sample, n))
            self.shards.append(path)
            progress(n + 1, len(samples), "attention of sequences")
        some = self.shards[:: max(len(self.shards) // 32, 1)]
        self._settle([_target(path).float() for path in some])

    def agree(self, mean: Callable[[list[float]], list[float]]) -> None:
        self.mean = agreed(self.mean, mean)

    def _settle(self, targets: Sequence[Tensor]) -> None:
        """What all losses need of targets, here of a part of the sequences, [layers, H, n] each."""
        self.mean = torch.stack([target.mean(-1) for target in targets]).mean(0)[..., None]

    @torch.no_grad()
    def _observe(self, sample: Sample, n: int) -> dict[str, Tensor]:
        """hidden bf16 [layers, n, d] and target float16 [layers, H, n] of some tokens, and their positions [n]."""
        where = torch.from_numpy(chosen_positions(self.sinks, len(sample.tokens) - self.window, n)).to(self.device)
        hidden, targets = [], []

        def look(heads: Heads) -> None:
            best, _ = future_attention(
                heads.q[0], heads.k[0], heads.scale, self.window, softcap=heads.softcap, sinks=heads.sinks
            )
            hidden.append(heads.hidden[0, where].to(torch.bfloat16).cpu())
            targets.append(best[:, where].clamp_min(FLOOR).log().half().cpu())

        self._read(sample.tokens, look)
        return {"hidden": torch.stack(hidden), "target": torch.stack(targets), "positions": where.cpu()}

    @torch.no_grad()
    def _observed_loss(self, samples: Sequence[Sample]) -> float:
        """The loss on held-out samples, which are observed once."""
        paths = [self.folder / f"held-out-{n:05}.safetensors" for n in range(len(samples))]
        for n, (sample, path) in enumerate(zip(samples, paths)):
            if not path.exists():
                write(path, self._observe(sample, n))
        return sum(sum(float(loss) for loss in self._losses([path])) for path in paths) / len(paths) / len(self.modules)

    def _read(self, tokens: npt.NDArray[np.int32], look: Look) -> None:
        self.decoder.observe(torch.from_numpy(tokens).long().to(self.device), look)

    def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
        rng = np.random.default_rng((seed, step))
        drawn = rng.integers(0, len(self.shards), max(len(samples), 1))
        losses = []
        for loss in self._losses([self.shards[i] for i in drawn]):
            (loss / len(self.modules)).backward()
            losses.append(float(loss.detach()))
        return {"loss": sum(losses) / len(losses)}

    def _losses(self, shards: Sequence[Path]) -> Iterator[Tensor]:
        """Of each layer, the mean over some sequences. Of the files one layer after the other is read: all of them together may be
        as large as the model.
        """
        with contextlib.ExitStack() as stack:
            parts = [stack.enter_context(opened(path)) for path in shards]
            for i, module in enumerate(self.modules):
                loss = torch.zeros((), device=self.device)
                for part in parts:
                    hidden, target = (part.get_slice(name)[i].to(self.device) for name in ("hidden", "target"))
                    others = {name: part.get_tensor(name).to(self.device) for name in set(part.keys()) - {"hidden", "target"}}
                    loss = loss + self._loss(module, hidden, target.float(), others, i)
                yield loss / len(parts)

    def _loss(self, module: nn.Module, hidden: Tensor, target: Tensor, others: Mapping[str, Tensor], layer: int) -> Tensor:
        """Of one layer, the module with that number, and one sequence; `others` is what has been written beside, `positions` [n]
        at least.
        """
        ranks = ranks_of(module, hidden, others["positions"])
        return F.smooth_l1_loss(ranks, target - self.mean[layer].to(target.device))


def agreed(values: Tensor, mean: Callable[[list[float]], list[float]]) -> Tensor:
    """The mean of a tensor over the processes, as `Objective.agree` has it."""
    return torch.tensor(mean(values.flatten().tolist())).view_as(values)


def ranks_of(module: nn.Module, hidden: Tensor, positions: Tensor) -> Tensor:
    """[H, n] when the last of the entries is the newest."""
    ranks: Tensor = module.ranks(hidden, positions, int(positions[-1]))  # type: ignore[operator]
    return ranks


def chosen_positions(first: int, end: int, seed: int) -> npt.NDArray[np.int64]:
    """Some positions of a sequence from `first` to `end` - 1, ascending; all if there are not too many."""
    return np.sort(np.random.default_rng(seed).permutation(np.arange(first, end))[:TOKENS])


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """A file appears as a whole or not at all.

    Raises:
        TrainingCheckpointError: it cannot be written.
    """
    draft = path.with_suffix(".draft")
    try:
        save_file(tensors, draft)
        draft.replace(path)
    except (SafetensorError, OSError) as error:
        raise TrainingCheckpointError(
            f"cannot keep what was observed in {path.parent}: {getattr(error, 'strerror', None) or error}. Free disk space, take fewer --samples, or name "
            "another --run folder"
        ) from None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of which tensors, or parts of them, are read.

    Raises:
        TrainingCheckpointError: it is damaged, or gone.
    """
    try:
        with safe_open(str(path), framework="pt") as file:  # type: ignore[no-untyped-call, unused-ignore]
            yield file
    except (SafetensorError, OSError) as error:
        raise TrainingCheckpointError(f"{path} cannot be read: {error}. Remove it, and what it held is observed again") from None


def _target(path: Path) -> Tensor:
    """Without the hidden states, which are a hundred times as large."""
    with opened(path) as file:
        target: Tensor = file.get_tensor("target")
        return target
