"""The table of objectives: what `--objective` takes."""

from __future__ import annotations

from ..objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in ()}
