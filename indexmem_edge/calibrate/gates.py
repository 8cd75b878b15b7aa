"""The best gate of a layer's memory, and whether the layer is better off with it than with it off. Plain NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .attention import Array, Errors

GATES = 2.0 ** (np.arange(-64, 33) / 16)  # of a centroid memory, 1/16 to 4
_LARGEST = 1 - 2.0**-10  # gate of a residual memory, which is a sigmoid
_TINY = np.finfo(float).tiny


@dataclass(frozen=True)
class LayerResult:
    """Errors of one layer, on all measured rows. `mean_...` are means of the rows' own relative errors.

    Slots are paid for in a layer whose memory is off, too.
    """

    layer: int
    without: float  # a cache without memory
    off: float  # the memory's cache, with the memory off in this layer
    plain: float  # the memory with gate 1, or the one it was trained with
    gated: float  # with `gate`
    mean_without: float
    mean_off: float
    mean_gated: float
    gate: float
    enabled: bool

    @property
    def error(self) -> float:
        """As it is written."""
        return self.gated if self.enabled else self.off


@dataclass(frozen=True)
class Kind:
    """A kind of memory in numbers: how far a gate moves the output, and the best gate."""

    weight: Callable[[float, Errors], Array]
    best: Callable[[Errors], float]


def _centroid_weight(gate: float, errors: Errors) -> Array:
    with np.errstate(over="ignore"):
        weight: Array = 1 / (1 + np.exp(-(np.log(gate) + errors.log_mass)))
    return weight


def _centroid_best(errors: Errors) -> float:
    return float(GATES[np.argmin([errors.at(_centroid_weight(g, errors)).sum() for g in GATES])])


def _residual_best(errors: Errors) -> float:
    square = errors.square.sum()
    return float(np.clip(-errors.cross.sum() / square, 0, _LARGEST)) if square > 0 else 0.0


CENTROID = Kind(_centroid_weight, _centroid_best)
RESIDUAL = Kind(lambda gate, errors: np.full(len(errors.full), gate), _residual_best)


def choose(layer: int, passages: Sequence[Errors], kind: Kind, plain: float) -> LayerResult:
    """The gate that is best on every second passage, and whether it helps there and on the others."""
    gate = kind.best(Errors.joined(passages[::2]))

    def helps(part: Sequence[Errors]) -> bool:
        errors = Errors.joined(part)
        return bool(errors.at(kind.weight(gate, errors)).sum() < errors.base.sum())

    everything = Errors.joined(passages)
    full = everything.full
    gated = everything.at(kind.weight(gate, everything))
    return LayerResult(
        layer=layer,
        without=_relative(everything.without, full),
        off=_relative(everything.base, full),
        plain=_relative(everything.at(kind.weight(plain, everything)), full),
        gated=_relative(gated, full),
        mean_without=_mean_relative(everything.without, full),
        mean_off=_mean_relative(everything.base, full),
        mean_gated=_mean_relative(gated, full),
        gate=gate,
        enabled=helps(passages[::2]) and helps(passages[1::2]),
    )


def _relative(squares: Array, full: Array) -> float:
    return float(np.sqrt(squares.sum() / max(full.sum(), _TINY)))


def _mean_relative(squares: Array, full: Array) -> float:
    return float(np.sqrt(squares / np.maximum(full, _TINY)).mean())
