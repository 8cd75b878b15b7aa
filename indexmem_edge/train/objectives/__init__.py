"""The table of objectives: what `--objective` takes."""

from __future__ import annotations

from .asked_kl import AskedKL
from .gated_kl import GatedKL
from .objective import Objective
from .pooled_kl import PooledKL
from .regress import Regress
from .residual_mse import ResidualMSE
from .select_kl import SelectKL
from .told_apart import ToldApart

_TABLE: tuple[type[Objective], ...] = (Regress, AskedKL, GatedKL, SelectKL, ToldApart, PooledKL, ResidualMSE)
OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in _TABLE}
