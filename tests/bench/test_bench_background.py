"""`indexmem bench background`: what is told, what is asked, and what the arms know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from indexmem_edge.native import find

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")


@pytest.fixture(scope="module")
def model(demo_model: Path) -> Any:
    from indexmem_edge.bench.runner import Model

    return Model(demo_model)


def test_every_fact_is_told_once_and_asked_up_to_its_value(model: Any) -> None:
    from indexmem_edge.bench.quality import background as bench

    told = bench.conversation(model, ["The miller sold a clock", "The clerk hid the map"], 600, 5, "0/1")
    text = model.text(told.tokens)
    assert 400 < len(told.tokens) < 700 and len(told.facts) == 5
    for fact in told.facts:
        assert text.count(fact.telling) == 1
        asked = model.text(bench.question(model, fact))
        assert asked.endswith(fact.question.strip()) and fact.value not in asked
    assert told == bench.conversation(model, ["The miller sold a clock", "The clerk hid the map"], 600, 5, "0/1")


def test_a_background_is_known_and_nothing_is_not(model: Any) -> None:
    """With room for all of it, as much as at the end of the whole text, but for rounding."""
    from rich.progress import Progress

    from indexmem_edge.bench.quality import background as bench

    arms = bench.arms_of(["streaming"], [400], "off", None)
    assert [arm.name for arm in arms] == ["nothing", "streaming", "all of it"]
    report = bench.run_background(
        model, arms, n_tokens=250, n_facts=2, samples=1, seed=0, threads=2, text=None, progress=Progress(disable=True)
    )
    nothing, background, whole = report.rows
    assert nothing["kept"] == 0 and background["kept"] == background["tokens"] == whole["tokens"]
    assert nothing["n"] == background["n"] == 2
    assert background["nll"] < nothing["nll"] / 2 and abs(background["nll"] - whole["nll"]) < 0.5
    assert background["answered"] >= nothing["answered"] == 0
