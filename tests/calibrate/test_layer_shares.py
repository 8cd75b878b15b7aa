"""Which layers, and which of their heads, are widened, by judges that are known, and the whole of it on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import Tiny
from indexmem_edge.calibrate import budgets
from indexmem_edge.calibrate.budgets import WIDE, calibrate_budgets, choose
from indexmem_edge.cli.app import app
from indexmem_edge.convert import read_sidecar
from indexmem_edge.errors import IndexMemError
from reference.indexers import random_indexer, write_sidecar
from support.native_context import open_model
from tiny.models import BOS

N_LAYER = 8


Heads = tuple[tuple[int, int], ...]
LAYERS = {il: [(il, h) for h in range(3)] for il in range(N_LAYER)}


def judge_of(gains: dict[Any, float], on_others: Optional[dict[Any, float]] = None) -> Any:
    """NLL of 4 texts: each wide layer, or head, lowers it by its gain, and all others pay a little for each wide head. `on_others`: gains
    of the texts that do not choose."""

    def gained(wide: Heads, gains: dict[Any, float]) -> float:
        whole = [il for il, heads in LAYERS.items() if set(heads) <= set(wide)]
        return sum(gains.get(key, 0.0) for key in (*whole, *wide))

    def judge(wide: Heads) -> np.ndarray:
        chosen, other = (gained(wide, g) for g in (gains, gains if on_others is None else on_others))
        return np.array([3.0 - chosen, 3.0 - other] * 2) + 0.05 * len(wide)

    return judge


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("gains", [{5: 1.0}, {5: 1.0, 2: 0.5}, {0: 0.3, 3: 0.2, 6: 0.4, 7: 0.25}])
def test_layers_that_gain_are_wide(gains: dict[Any, float], apart: bool) -> None:
    wide, before, nll, alone = choose(judge_of(gains), LAYERS, apart)
    assert sorted(wide) == sorted(head for il in gains for head in LAYERS[il])
    assert before == 3 and nll == pytest.approx(3 - sum(gains.values()) + 0.15 * len(gains))
    assert alone == pytest.approx({il: gains.get(il, 0.0) - 0.15 for il in range(N_LAYER)})


@pytest.mark.parametrize("gains", [{(5, 1): 1.0}, {(5, 2): 1.0, (2, 0): 0.5}, {(0, 0): 0.3, (3, 2): 0.2, (6, 1): 0.4, (7, 1): 0.25}])
def test_of_the_layers_only_heads_that_gain(gains: dict[Any, float]) -> None:
    wide, _, nll, _ = choose(judge_of(gains), LAYERS, True)
    assert sorted(wide) == sorted(gains) and nll == pytest.approx(3 - sum(gains.values()) + 0.05 * len(gains))
    layers = {il for il, _ in gains}
    assert sorted(choose(judge_of(gains), LAYERS, False)[0]) == sorted(head for il in layers for head in LAYERS[il])


def test_other_texts_have_to_agree() -> None:
    wide, before, nll, _ = choose(judge_of({5: 1.0}, on_others={}), LAYERS, True)
    assert wide == () and before == nll == 3


def test_nothing_is_gained() -> None:
    assert choose(judge_of({}), LAYERS, True)[0] == ()


def test_only_bounded_layers_are_tried() -> None:
    wide, _, _, alone = choose(judge_of({1: 5.0, 4: 1.0}), {il: LAYERS[il] for il in (0, 4, 6)}, False)
    assert wide == tuple(LAYERS[4]) and list(alone) == [0, 4, 6]


def test_a_sidecar_with_what_was_measured(tiny: Tiny, tmp_path: Path) -> None:
    path, config = tiny("llama", n_layer=3)
    source, out, book = tmp_path / "a.indexmem.gguf", tmp_path / "b.indexmem.gguf", tmp_path / "book.txt"
    write_sidecar(source, random_indexer("retention-mlp", 3, config.n_embd, config.n_head_kv, 0), architecture=config.arch, keys={"indexmem.budget_share": [1.0, 2.0, 1.0]})
    book.write_text("A sentence of a book that nobody wrote, again and again. " * 60, encoding="utf-8")
    steps: list[tuple[int, int]] = []
    asked: dict[str, Any] = dict(kv_budget=40, n_ctx=700, n_texts=2, n_threads=1)
    result = calibrate_budgets(path, [book], source, out, progress=lambda *step: steps.append(step), **asked)
    written = read_sidecar(out).checkpoint
    assert written.budget_least == result.least and (result.least is None) == (result.nll == result.nll_before)
    assert result.least is None or (set(result.least) == {0, WIDE * (40 - 4 - 10)} and len(result.least) == 3 * config.n_head_kv)
    assert written.budget_share == (1.0, 2.0, 1.0)  # which it leaves as they are
    assert set(result.gains) == {0, 1, 2} and len(set(result.gains.values())) == 3  # each arrangement read differently
    assert steps[-1][0] == len(steps) <= steps[-1][1]
    before = read_sidecar(source).checkpoint
    for name, array in before.tensors().items():
        np.testing.assert_array_equal(written.tensors()[name], array)
    with pytest.raises(IndexMemError, match="b.indexmem.gguf"):
        calibrate_budgets(path, [book], source, out, **asked)
    with pytest.raises(IndexMemError, match="at least 2 texts"):
        calibrate_budgets(path, [book], source, out, force=True, **{**asked, "n_texts": 1})


def test_texts_begin_as_every_text_of_the_model_does(tiny: Tiny) -> None:
    path, _ = tiny("llama", n_layer=3)
    with open_model(path) as model:
        samples = budgets._samples(model, ["A sentence of a book that nobody wrote. " * 60], 700, 3, 0)
    for sample in samples:
        assert sample.tokens[0] == BOS and BOS not in sample.tokens[1:] and len(sample.tokens) == len(sample.weight) <= 700
        answers = np.flatnonzero(sample.weight > 1)
        assert len(answers) and answers[0] >= sample.asked - 1


def test_numbers_of_a_sidecar_stay_where_nothing_does_better(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has is a rival like any other, and not forgotten."""
    path, config = tiny("llama", n_layer=3)
    source, book = tmp_path / "a.indexmem.gguf", tmp_path / "book.txt"
    own = (0, 30, 0)
    write_sidecar(source, random_indexer("retention-mlp", 3, config.n_embd, config.n_head_kv, 0), architecture=config.arch, keys={"indexmem.budget_least": list(own)})
    book.write_text("A sentence of a book that nobody wrote, again and again. " * 60, encoding="utf-8")
    asked: dict[str, Any] = dict(kv_budget=40, n_ctx=700, n_texts=2, n_threads=1, force=True)

    def judged(of: Any) -> Any:
        """Calibrates with an NLL of `of(sidecar)` in place of a measured one."""
        read: list[Optional[tuple[int, ...]]] = []
        now: list[Any] = []

        class Context(budgets.TextContext):  # type: ignore[misc]
            def __init__(self, *args: Any) -> None:
                now[:] = [read_sidecar(args[-1].sidecar).checkpoint.budget_least]
                read.append(now[0])
                super().__init__(*args)

        monkeypatch.setattr(budgets, "TextContext", Context)
        monkeypatch.setattr(budgets, "_nll", lambda *_: of(now[0]))
        result = calibrate_budgets(path, [book], source, tmp_path / "b.indexmem.gguf", **asked)
        return result, read_sidecar(tmp_path / "b.indexmem.gguf").checkpoint.budget_least, read

    result, written, read = judged(lambda least: 1.0 if least == own else 2.0)
    assert result.least is None and written == own and own in read and None in read and result.nll == result.nll_before == 1.0
    result, written, _ = judged(lambda least: 1.0 if least is None else 2.0)
    assert written == result.least and not any(result.least) and (result.nll_before, result.nll) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("least", "words"),
    [(None, "nothing does better on other texts"), ((0, 0, 0), "nothing gets entries first any more"), ((0, 9, 0), "layer 1 gets 9 entries first")],
)
def test_the_command_says_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: Optional[tuple[int, ...]], words: str) -> None:
    found = budgets.LayerNeeds("out.gguf", 7, 40, 2, 2.0, 1.5, least, 1, {0: 0.1, 1: -0.1, 2: 0.0})
    monkeypatch.setattr(budgets, "calibrate_budgets", lambda *_, **__: found)
    result = CliRunner().invoke(app, ["calibrate-budgets", "-m", "m.gguf", "--indexmem", "in.gguf", "--text", "t", "--kv-budget", "40", "--out", "out.gguf"])
    assert result.exit_code == 0 and words in " ".join(result.output.split()) and "out.gguf" in result.output
