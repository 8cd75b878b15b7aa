"""The table of objectives: what `--objective` takes."""

from __future__ import annotations

from ..objective import Objective
from .pooled_kl import PooledKL
from .residual_mse import ResidualMSE

_TABLE: tuple[type[Objective], ...] = (PooledKL, ResidualMSE)
OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in _TABLE}
