"""What an objective is. Each is a module of its own in `objectives/`, and a line in its table.

The loop gives an objective its samples, once to prepare and then step by step; the objective computes a loss and leaves
gradients in the parameters of the modules that it trains. How it does so, layer by layer or block by block, is its own
affair: that is what keeps memory small. Optimiser, schedule, clipping, checkpoints and several processes are the loop's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Optional

import torch
from torch import nn

from ...errors import TrainingError
from ..data.sample import Sample
from ..model.decoder import Decoder

Progress = Callable[[int, int, str], None]  # done, of how many, of what


class Objective(ABC):
    """Trains `modules`, one for each bounded layer of `decoder`, on the device that the decoder is on. TrainingError if they are of
    another kind.

    `sinks` and `window` are the tokens that are never evicted, in training as later in use. Layers with a window of their
    own are computed as they are.
    """

    name: ClassVar[str]
    observes: ClassVar[bool] = False  # whether `Frozen.observe` is all that it asks of the model
    readings: ClassVar[int] = 1  # texts that it observes are at most so many times as long as a sample
    kinds: ClassVar[tuple[str, ...]] = ("retention", "kvzap")  # of modules that it trains
    from_before: ClassVar[bool] = False  # whether its targets are of the modules as they were before its first step
    shortest: int = 2  # tokens that a sequence needs for there to be something to learn

    shares: Mapping[int, Sequence[float]] = MappingProxyType({})  # of a budget: of each KV head of a layer, 1 on average; none: 1

    def __init__(self, decoder: Decoder, modules: nn.ModuleList, sinks: int, window: int) -> None:
        if others := sorted({str(module.kind) for module in modules} - set(self.kinds)):
            raise TrainingError(f"{self.name} trains modules of kind {' or '.join(self.kinds)}, found {', '.join(others)}")
        self.decoder, self.modules, self.sinks, self.window = decoder, modules, sinks, window

    def budgets(self, layer: int, entries: int, n_heads: int) -> list[int]:
        """Entries that each KV head of a layer keeps where heads keep `entries` on average; what is protected is shared with no other."""
        protected = self.sinks + self.window
        return [protected + max(1, round((entries - protected) * share)) for share in self.shares.get(layer, (1.0,) * n_heads)]

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers that the modules are for."""
        return self.decoder.geometry.bounded

    def module_of(self, layer: int) -> Optional[nn.Module]:
        """The module of a layer, None if nothing is ever evicted there."""
        return self.modules[self.layers.index(layer)] if layer in self.layers else None

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def prepare(self, samples: Sequence[Sample], folder: Path, progress: Progress) -> None:  # noqa: B027  nothing, by default
        """Once before the first step, and again after a resume: work that all steps share, kept in `folder`.

        What is there already, from this call with the same samples, is not computed again. Modules whose objective is `from_before`
        have the weights that they had before the first step.
        """

    def teaches(self, sample: Sample) -> bool:
        """Whether something is learned from this sample; what is measured before a training begins is measured on such ones."""
        return True

    def agree(self, mean: Callable[[list[float]], list[float]]) -> None:  # noqa: B027  nothing, by default
        """After `prepare`: what each process has found out on sequences of its own and all need alike; `mean` is over the processes,
        which call it together.
        """

    def found(self) -> Optional[str]:
        """What `prepare` found out and whoever trains should know; None: nothing."""
        return None

    def needs(self) -> Optional[dict[int, list[float]]]:
        """By layer, what of a budget each KV head gets with these ranks, in place of what a training began with; None: as before."""
        return None

    def held_out_loss(self, samples: Sequence[Sample]) -> Optional[float]:
        """What says better than recall which weights are best, the lowest ones; None: recall does."""
        return None

    @abstractmethod
    def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
        """Adds gradients of the mean loss over `samples` to the parameters; returns figures for the log, with `loss`.

        Everything random depends on `step` and `seed` alone, so that a resumed run repeats itself.
        """
