"""The table of objectives: what `--objective` takes."""

from __future__ import annotations

from ..objective import Objective
from .gated_kl import GatedKL
from .regress import Regress

OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in (Regress, GatedKL)}
