"""What is left of a measurement of recall: tables for people, JSON for programs, a plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from ...files.atomic import replacing
from ...options import DEFAULT_SINKS, LEAST_WINDOW
from ..data.sample import Sample
from ..model.frozen import Frozen
from ..objectives.objective import Progress
from .recall import BUDGETS, INDEXER, ORACLE, Recall, measure

JSON, PLOT = "recall.json", "recall.png"
COLOURS = ("C0", "C1", "C2", "C7", "C4", "C5", "C6", "C8", "C9")  # nothing near the indexer's red


def report(
    decoder: Frozen,
    modules: nn.ModuleList,
    samples: Sequence[Sample],
    folder: Path,
    budgets: Sequence[float] = BUDGETS,
    sinks: int = DEFAULT_SINKS,
    window: int = LEAST_WINDOW,
    progress: Optional[Progress] = None,
) -> Recall:
    """Measures and raises as `measure`; leaves recall.json in `folder`, and recall.png where matplotlib is there.

    Raises:
        ConvertError: a file cannot be written.
    """
    found = measure(decoder, modules, samples, budgets, sinks, window, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / JSON, force=True) as draft:
        Path(draft).write_text(json.dumps(found.to_dict()) + "\n", encoding="utf-8")
    draw(folder / PLOT, found)
    return found


def show(recall: Recall, console: Optional[Console] = None) -> None:
    """A table per budget with a row per layer, then one of the means.

    The indexer is bold where none but the oracle keeps more.
    """
    console = console or Console(highlight=False)
    for budget in recall.budgets:
        table = _table(recall, f"Attention mass kept with {_percent(budget)} of the context", "layer")
        layers = np.stack([recall.by_layer(policy, budget) for policy in recall.shares], axis=1)  # [layers, policies]
        for il, shares in zip(recall.layers, layers):
            table.add_row(str(il), *_cells(recall, shares))
        table.add_section()
        table.add_row("mean", *_cells(recall, layers.mean(0)))
        console.print(table)
    console.print(_means(recall))
    shortest, longest = (f(sample.n_context for sample in recall.samples) for f in (min, max))
    lengths = f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    alone = ", ".join(f"{recall.protected[b].mean():.3f}" for b in recall.budgets)
    console.print(
        f"{len(recall.samples)} samples, contexts of {lengths} tokens. Protected entries, {recall.sinks} sinks and a window "
        f"of up to {recall.window}, keep {alone} alone."
    )


def _means(recall: Recall) -> Table:
    """A row per budget; questions and ordinary text apart where there are both."""
    table = _table(recall, "Attention mass kept, means", "entries")
    kinds: list[tuple[str, Optional[bool]]] = [("", None)]
    if len({sample.question for sample in recall.samples}) == 2:
        kinds += [(", questions", True), (", text", False)]
    for name, question in kinds:
        for budget in recall.budgets:
            shares = [recall.mean(policy, budget, question) for policy in recall.shares]
            table.add_row(_percent(budget) + name, *_cells(recall, shares))
        table.add_section()
    table.add_row("of the oracle's", *_cells(recall, [recall.relative(policy) for policy in recall.shares]))
    return table


def _table(recall: Recall, title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=0)
    table.add_column(first)
    for policy in recall.shares:
        table.add_column(policy, justify="right", no_wrap=True)
    return table


def _cells(recall: Recall, shares: Iterable[float]) -> list[str]:
    """A number per policy, in the order of the columns."""
    values = dict(zip(recall.shares, shares))
    best = values[INDEXER] == max(value for policy, value in values.items() if policy != ORACLE)
    return [f"[bold]{v:.3f}[/]" if policy == INDEXER and best else f"{v:.3f}" for policy, v in values.items()]


def draw(path: Path, recall: Recall) -> bool:
    """One panel per budget: the share kept (y) in each layer (x), a line per policy.

    Returns False, and says so on standard error, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        Console(stderr=True).print(f"no {path.name}: it takes matplotlib (pip install matplotlib); {JSON} is complete")
        return False
    n = len(recall.budgets)
    figure = Figure(figsize=(1 + 4 * n, 4.4), layout="constrained")  # no pyplot: there may be no screen
    panels = figure.subplots(1, n, sharey=True, squeeze=False)[0]
    for axis, budget in zip(panels, recall.budgets):
        floor = recall.protected[budget].mean((0, 2))
        axis.fill_between(recall.layers, floor, color="0.92", label="protected entries alone", linewidth=0)
        for policy, style in _styles(recall).items():
            axis.plot(recall.layers, recall.by_layer(policy, budget), label=policy, **style)
        axis.set(title=f"{_percent(budget)} of the context", xlabel="layer", ylim=(0, 1))
        axis.set_xlim(recall.layers[0], max(recall.layers[-1], recall.layers[0] + 1))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("attention mass kept")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    with replacing(path, force=True) as draft:
        figure.savefig(draft, dpi=130, format="png")
    return True


def _styles(recall: Recall) -> dict[str, dict[str, Any]]:
    """Lines by policy: the indexer thick and above the others, the oracle dashed."""
    others = [policy for policy in recall.shares if policy not in (INDEXER, ORACLE)]
    return {
        **{policy: {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.1} for i, policy in enumerate(others)},
        ORACLE: {"color": "black", "linewidth": 1.3, "linestyle": "--"},
        INDEXER: {"color": "crimson", "linewidth": 2.4},
    }


def _percent(budget: float) -> str:
    return f"{100 * budget:g} %"
