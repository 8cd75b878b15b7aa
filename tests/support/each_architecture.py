"""Tests that run for each architecture, and what they compare."""

from __future__ import annotations

from collections.abc import Iterable

from reference.mirror import Compared, near
from support.architectures import BOUNDED
from support.comparing import EVICTING
from tiny.models import TinyConfig

DEEP = ("exaone4", "gemma3n-shared")  # 64 and 22 layers, which take their time
POLICIES = [policy for policy in EVICTING if policy != "streaming"]


def pairs(names: list[str], others: Iterable[str], one: str, all_of: Iterable[str] = BOUNDED) -> list[tuple[str, str]]:
    """Some models with all of the others, which deep ones are not, and the rest with one of them."""
    some = set(all_of) - set(DEEP)
    return [(name, other) for name in names for other in others if name in some or other == one]




def bounded_layers(config: TinyConfig) -> list[int]:
    return [il for il in config.full_layers if il < config.n_layer - config.shared_layers]




def check(config: TinyConfig, cache: str, result: Compared) -> None:
    assert result.n_gone > 40
    assert result.felt > 5e-3 * result.spread, "what was evicted does not matter to this model"
    bound = near(config) if cache == "f32" else 0.0
    assert result.ours <= (bound * result.spread or 1.5 * result.theirs + 0.01 * result.felt)


