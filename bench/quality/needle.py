"""A needle in a haystack: is one sentence found again, by length of the text and by how deep it lies?

Every context is evaluated with the cache at its budget (physical eviction, the question unseen), then the question, then
the answer is scored by likelihood and generated greedily, as in quality.py. A sample has the same needle and the same
haystack at every depth and for every policy; another sample begins elsewhere in the text.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from indexmem_edge.runtime.choice import MEMORY_OFF

from ..machine import describe
from ..report import Report, Row, Verdict
from ..ruler.essay import Essay
from ..ruler.needles import ESSAY, Needles
from ..ruler.prompt import Material, dice, largest
from ..ruler.samples import Sample, n_generate, sample_of
from ..ruler.words import Words
from ..runner import BYTE_KEYS, BenchError, Model, Setup, library
from ..stats import bootstrap
from ..text import builtin_text
from .arms import FULL_ARM, Arm, Sidecars, arms
from .byte_budget import Budgets
from .plan import Job
from .run import Log
from .summary import arm_of
from .trial import run_sample

TASK = "needle"
COLUMNS = (
    "length", "depth", "policy", "memory", "ratio", "budget", "kv_bytes", "n", "score", "score_delta", "nll", "nll_delta",
)  # fmt: skip
HOW = (
    "one sentence with a number in an essay at the depth (0: before it, 100: after it); context evaluated with the cache "
    "at its budget, then question and answer prefix; true answer scored teacher-forced, then 32 tokens greedy; score: "
    "share of samples whose number was found; the same samples for every policy; interval of the difference to the full "
    "cache: paired bootstrap over samples, 95 %"
)


@dataclass(frozen=True)
class NeedleJob(Job):
    depth: int = 0  # per cent

    @property
    def key(self) -> str:
        return f"{super().key}/depth {self.depth}"


@dataclass(frozen=True)
class Grid:
    lengths: tuple[int, ...]  # tokens, those to generate included
    depths: tuple[int, ...]  # per cent
    policies: tuple[str, ...]  # without the full cache, which always runs
    ratios: tuple[float, ...]
    samples: int
    base: Setup
    memories: tuple[str, ...] = (MEMORY_OFF,)
    sidecars: Sidecars = field(default_factory=Sidecars)

    def __post_init__(self) -> None:
        if not self.lengths or not self.depths or min(self.lengths) < 1 or self.samples < 1:
            raise BenchError("expected at least one length, depth and sample, all lengths above 0")
        if not all(0 <= depth <= 100 for depth in self.depths):
            raise BenchError(f"depths are per cent of the text, 0 to 100: found {', '.join(map(str, self.depths))}")
        if not all(0 < ratio <= 1 for ratio in self.ratios):
            raise BenchError(f"budgets are shares of the context, such as 0.25: found {list(self.ratios)}")

    def arms(self) -> list[Arm]:
        return [FULL_ARM, *arms(self.policies, self.ratios, self.memories, self.sidecars, (self.base.cache_type,))]

    def jobs(self) -> Iterator[NeedleJob]:
        """Sample by sample, every arm on the same sample: whatever is finished can be compared."""
        for sample in range(self.samples):
            for length in self.lengths:
                for depth in self.depths:
                    for arm in self.arms():
                        yield NeedleJob(TASK, length, *arm[:2], sample, *arm[2:], depth)


class Haystack:
    """Makes samples; those of the place asked for last are kept, as every arm asks for them."""

    def __init__(self, model: Model, text: Path | None, seed: int, words: Words | None = None):
        self.model, self.seed = model, seed
        self.essay = Essay.read(text) if text else Essay.of(builtin_text(400_000))
        self.words = words or Words.installed()
        self._last: tuple[tuple[int, int, int], Sample] | None = None
        self._turned: tuple[str, Essay] = "", self.essay  # the text of a sample, the same at every depth

    def sample(self, length: int, depth: int, index: int) -> Sample:
        """
        Raises:
            BenchError: the length is too small.
        """
        place = length, depth, index
        if self._last and self._last[0] == place:
            return self._last[1]
        seed = f"{self.seed}/{TASK}/{length}/{index}"  # not the depth: the rest is the same at each
        if self._turned[0] != seed:
            self._turned = seed, self.essay.turned(dice(seed, "beginning").random())
        material = Material(length, self.words, self._turned[1])
        task = Needles(ESSAY, depth=depth / 100)
        prompt, _ = largest(
            lambda size: task.build(seed, size, material),
            lambda text: len(self.model.tokens(text)),
            length - n_generate(TASK),
            task.least,
        )
        row = {"input": prompt.input, "answer_prefix": prompt.answer_prefix, "outputs": prompt.outputs}
        self._last = place, sample_of(TASK, index, row)
        return self._last[1]


def run_needle(
    model: Model,
    grid: Grid,
    out: Path,
    text: Path | None = None,
    seed: int = 0,
    words: Words | None = None,
    progress: Progress | None = None,
) -> Report:
    """Every cell of the grid that is not in the log of an earlier run yet.

    Raises:
        BenchError: a length is too small for the question, or the words are missing.
    """
    base, haystack = grid.base, Haystack(model, text, seed, words)
    budgets = Budgets(model, base, grid.sidecars, "entries")
    settings = (
        f"{model.path.name} {model.identity} {base.cache_type} ubatch {base.ubatch} sinks {base.sinks} "
        f"window {base.window} seed {seed} text {haystack.essay.identity} {haystack.words.source}"
    )
    if base.budget_ratio:
        settings += f" at most {base.budget_ratio:g} of the tokens seen"
    log = Log(out / "needle.rows.jsonl", settings, grid.sidecars)
    report = Report(
        TASK,
        describe(
            model.path.name,
            library(),
            base.threads,
            how=HOW,
            settings=settings,
            sinks=base.sinks,
            window=base.window_says,
            samples=grid.samples,
            seed=seed,
            text=text.name if text else "sentences made up on the spot",
            memories=list(grid.memories),
            sidecars=grid.sidecars.describe() or None,
            budget_ratio=base.budget_ratio,
        ),
    )
    jobs = list(grid.jobs())

    def update() -> None:
        report.rows = summarise(log.rows[job.key] for job in jobs if job.key in log.rows)
        report.verdicts = verdicts(report.rows)
        report.save(out)

    todo = [job for job in jobs if job.key not in log.rows]
    bar = progress.add_task(TASK, total=len(jobs), completed=len(jobs) - len(todo)) if progress else None
    saved = time.monotonic()
    try:
        for job in todo:
            sample = haystack.sample(job.length, job.depth, job.sample)
            log.add(job, run_sample(model, budgets, job, sample, ()))
            if progress and bar is not None:
                progress.update(bar, advance=1, description=job.key)
            if time.monotonic() - saved > 30:
                update()
                saved = time.monotonic()
    finally:
        update()
    return report


def summarise(runs: Iterable[Row]) -> list[Row]:
    """One row per length, depth, policy, share and memory, with the difference to the full cache on the same samples."""
    cells: dict[tuple[int, int, Arm], dict[int, Row]] = defaultdict(dict)
    for run in runs:
        cells[run["length"], run["depth"], arm_of(run)][run["sample"]] = run
    out = []
    for (length, depth, arm), mine in sorted(cells.items(), key=lambda cell: (cell[0][0], cell[0][1])):
        row: Row = {"task": TASK, "length": length, "depth": depth, **arm._asdict(), "n": len(mine)}
        for key in ("budget", "memory_slots", "tokens_seen", *BYTE_KEYS, "rss_bytes", "prefill_tps", "decode_tps"):
            values = [run[key] for run in mine.values() if run.get(key) is not None]
            row[key] = statistics.median_low(values) if values else None  # a value that one of them had: whole bytes
        full = cells.get((length, depth, FULL_ARM), {}) if arm != FULL_ARM else {}
        for key in ("score", "nll"):
            row[key] = statistics.fmean(run[key] for run in mine.values())
            if pairs := [run[key] - full[i][key] for i, run in mine.items() if i in full]:
                row[f"{key}_delta"], row[f"{key}_low"], row[f"{key}_high"] = bootstrap([pairs])
        out.append(row)
    return out


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Nothing is passed or failed: the mean over the grid, and the depth where most is lost."""
    out = []
    for arm in dict.fromkeys(map(arm_of, rows)):
        mine = [row for row in rows if arm_of(row) == arm]
        depths = {
            d: statistics.fmean(row["score"] for row in mine if row["depth"] == d) for d in _values(mine, "depth")
        }
        worst = min(depths, key=lambda d: depths[d])
        lowest = f"; lowest at a depth of {worst} % ({depths[worst]:.3f})" if len(set(depths.values())) > 1 else ""
        out.append(Verdict(f"found in the mean, {label(arm)}{lowest}", statistics.fmean(row["score"] for row in mine)))
    return out


def label(arm: Arm) -> str:
    if arm == FULL_ARM:
        return "full cache"
    return f"{arm.kind} {arm.ratio:.0%}" + ("" if arm.memory == MEMORY_OFF else f", memory {arm.memory}")


def _values(rows: Sequence[Row], key: str) -> list[Any]:
    return sorted({row[key] for row in rows})


def plot(figure: Any, report: Report) -> None:
    """A panel per policy, lengths to the right, depths downwards. Dark to bright in a scale that all eyes can order."""
    panels = list(dict.fromkeys(map(arm_of, report.rows)))
    lengths, depths = _values(report.rows, "length"), _values(report.rows, "depth")
    if not panels:
        return
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    width = max(2.2, 0.75 * len(lengths) + 0.6)
    figure.set_size_inches(columns * width + 1.6, lines * max(2.2, 0.42 * len(depths) + 1.0))
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axis, arm in zip(axes.flat, panels):
        score = {(row["depth"], row["length"]): row["score"] for row in report.rows if arm_of(row) == arm}
        grid = [[score.get((d, n), float("nan")) for n in lengths] for d in depths]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (depth, length), value in score.items():
            colour = "black" if value > 0.6 else "white"
            axis.text(
                lengths.index(length), depths.index(depth), f"{value:.2f}", ha="center", va="center", color=colour
            )
        axis.set_title(label(arm), fontsize=10)
        axis.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        axis.set_yticks(range(len(depths)), [str(d) for d in depths])
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.supxlabel("tokens", fontsize=10)
    figure.supylabel("depth of the needle, %", fontsize=10)
    figure.colorbar(image, ax=axes, label="share of needles found")
