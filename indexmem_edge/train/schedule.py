"""The learning rate over a training (method section 7.4): up, level, and down to nearly nothing."""

from __future__ import annotations

import math

WARM_UP, STABLE, FINAL = 0.1, 0.6, 0.005  # shares of the steps; the last multiplier


def lr_multiplier(step: int, steps: int) -> float:
    """Factor of the highest learning rate in step 0, 1, ... `steps` - 1."""
    rising, level = max(1, math.floor(WARM_UP * steps)), math.floor((WARM_UP + STABLE) * steps)
    if step < rising:
        return (step + 1) / rising
    if step < level:
        return 1.0
    return 1.0 - (1.0 - FINAL) * (step - level) / max(steps - 1 - level, 1)
