"""Decode, whole prompts, the second question and memory, at growing depths: a stock llama.cpp and this library take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..endless.arms import shifting
from ..machine import describe
from ..report import Report, Row, Verdict, series
from ..runner import F16, BenchError, Setup
from ..stats import alternate, pair_interval, pair_ratio
from . import copies
from .remote import SLICE, Remote

COLUMNS = (
    "system",
    "depth",
    "prompt_seconds",
    "prompt_vs_stock",
    "decode_tps",
    "decode_vs_stock",
    "first_token_ms",
    "kv_bytes",
    "peak_bytes",
)
CHUNK = 32  # decoded tokens of one turn: at least one eviction falls into each
QUESTION = 24  # tokens of a second question, after the text and a first answer
PACES = 2  # ubatches whose seconds stand for all that are read at a depth
FLASH, NO_FLASH, SHIFT = "stock, flash attention", "stock, without", "stock, context shift"
OWN = "this library, no budget"
STOPPED = (
    "bounded caches, the context shift among them, read {read} tokens and cost the same from then on: what is shown past them was "
    "measured there, the seconds of a prompt are computed from those of its last ubatches"
)
HOW = (
    "each system in a process of its own, all read the same text and take turns: {slice} tokens of a prompt, {rounds} times {chunk} "
    "greedy tokens and a question of {question} tokens; figures are medians, ratios medians of the pairwise ratios with 95 % "
    "intervals; the context shift keeps as many cells as the budget has entries"
)


@dataclass(frozen=True)
class Contender:
    name: str
    setup: Setup
    stock: bool

    @property
    def shifts(self) -> bool:
        return self.name == SHIFT

    @property
    def unbounded(self) -> bool:
        return not self.setup.budget and not self.shifts


def contenders(bounded: Sequence[Setup], deepest: int, own: bool = False, copied: bool = False) -> list[Contender]:
    """The stock ones, of which the first is what the others are compared with, then ours.

    Args:
        deepest: tokens that the unbounded ones have room for.
        own: this library without a budget, too.
        copied: the unbounded ones are to be filled with copies, for which they need room for a second sequence.
    """
    ours = bounded[0]
    stock = ours.unbounded()
    # an answer, a question and an ubatch are read after the text, and a copy lies beside what it is copied from
    room = deepest + 2 * CHUNK + QUESTION + (max(ours.ubatch, copies.PIECE) if copied else 0)
    everything = replace(stock, n_ctx=room, sequences=2 if copied else 1)
    found = [Contender(FLASH, everything, True)]
    if ours.cache_type in (F16, "f32"):  # values of other types take flash attention
        found.append(Contender(NO_FLASH, replace(everything, flash=False), True))
    found.append(Contender(SHIFT, shifting(stock, ours.budget), True))
    if own:
        found.append(Contender(OWN, everything, False))
    return found + [Contender(setup.label, setup, False) for setup in bounded]


def run_stock(
    model: Path,
    bounded: Sequence[Setup],
    depths: Sequence[int],
    library: Path,
    *,
    unbounded_max: int,
    bounded_max: int = 0,
    rounds: int,
    text: Path | None,
    own: bool = False,
    name: str = "stock",
    progress: Progress,
    out: Path | None = None,
) -> Report:
    """Fills every system once, depth by depth; at each depth they take turns.

    Args:
        bounded: ours; they differ in no more than policy, sidecar and memory.
        library: folder of the stock libraries.
        unbounded_max: the caches that keep everything read so many tokens, as it takes hours to go far; past them they are
            filled with copies, if they are of a kind that can be, else they stop there.
        bounded_max: those that keep so much and no more read so many tokens, 0: all. Past them they stay as they are, full.
        own: this library without a budget, too.

    Raises:
        BenchError: nothing to measure, a system that cannot be opened or fails, or bounded caches that would stop before they are full.
    """
    if not bounded or not depths:
        raise BenchError("stock takes at least one bounded system and one depth")
    depths = sorted(set(depths))
    bounded_max = bounded_max or depths[-1]
    if bounded_max < min(depths[-1], 2 * bounded[0].budget):
        raise BenchError(
            f"--bounded-max {bounded_max} of a budget of {bounded[0].budget}: a cache that is not full is cheaper than it will be; expected "
            f"at least {2 * bounded[0].budget}"
        )
    copied = 0 < unbounded_max < depths[-1]
    deepest = depths[-1] if copied else max((d for d in depths if d <= unbounded_max), default=0)
    systems = contenders(bounded, deepest, own, copied)
    how = HOW.format(slice=SLICE, rounds=rounds, chunk=CHUNK, question=QUESTION)
    if copied:
        how += "; " + copies.HOW.format(read=unbounded_max, piece=copies.PIECE)
    if bounded_max < depths[-1]:
        how += "; " + STOPPED.format(read=bounded_max)
    report = Report(name, {})
    report.meta = describe(
        model.name, "", bounded[0].threads, how=how, cache_type=bounded[0].cache_type, text=text.name if text else "built in"
    )
    reads = {s.name: min(depths[-1], unbounded_max if s.unbounded else bounded_max) for s in systems}
    task = progress.add_task("tokens read", total=sum(reads.values()))
    with ExitStack() as stack:
        remotes: list[tuple[Contender, Remote]] = []
        for system in systems:
            opened = Remote(
                system.name, model, system.setup, library=library if system.stock else None, shift=system.shifts, text=text
            )
            remotes.append((system, stack.enter_context(opened)))
        report.meta["library"] = remotes[-1][1].library
        report.meta["stock"] = remotes[0][1].library
        prompts = dict.fromkeys(reads, 0.0)
        for previous, depth in zip([0, *depths], depths):
            here = [(s, r) for s, r in remotes if not s.unbounded or depth <= unbounded_max or (copied and r.can_copy)]
            _read(here, previous, depth, reads, prompts, lambda n: progress.advance(task, n))
            report.rows += _measure(here, depth, prompts, rounds)
            for row in report.rows[-len(here) :]:
                row["computed"] = depth > reads[row["system"]]
                row["copied"] = row["computed"] and row["everything"]
            report.verdicts = verdicts(report.rows)
            if out:
                report.save(out)
    return report


def _read(
    here: Sequence[tuple[Contender, Remote]],
    previous: int,
    depth: int,
    reads: Mapping[str, int],
    prompts: dict[str, float],
    advance: Callable[[int], None],
) -> None:
    """All systems read from the `previous` depth up to `depth` or as far as each of them `reads`, in turns of a slice, so that a machine
    that slows down does so for all of them. `prompts`: the seconds of each up to there.
    """
    start = min((remote.seen for _, remote in here), default=depth)
    for upto in [*range(start + SLICE, depth, SLICE), depth]:
        for system, remote in here:
            prompts[system.name] += remote.fill(min(upto, reads[system.name]), advance)
    missing = [(system, remote) for system, remote in here if reads[system.name] < depth]
    if not missing:
        return
    before = alternate(PACES, [_pace(remote) for _, remote in missing])
    for system, remote in missing:
        if system.unbounded:
            remote.copy(depth)
    after = alternate(PACES, [_pace(remote) for _, remote in missing])
    for (system, _), pace_before, pace_after in zip(missing, before, after):
        n = depth - max(previous, reads[system.name])
        # entries to attend to grow evenly, so do the seconds of a token
        prompts[system.name] += n * (statistics.median(pace_before) + statistics.median(pace_after)) / 2


def _pace(remote: Remote) -> Callable[[], float]:
    """Seconds a token of an ubatch that is read where the system is, and forgotten again."""

    def once() -> float:
        depth, n = remote.seen, remote.setup.ubatch
        seconds = remote.feed(n)
        remote.go_back(depth)
        return seconds / n

    return once


def _measure(here: Sequence[tuple[Contender, Remote]], depth: int, prompts: Mapping[str, float], rounds: int) -> list[Row]:
    def turn(remote: Remote, act: Callable[[Remote], float]) -> Callable[[], float]:
        def once() -> float:
            seen = min(remote.seen, depth)
            value = act(remote)
            remote.go_back(seen)
            return value

        return once

    decode = alternate(rounds, [turn(remote, lambda r: r.decode(CHUNK)) for _, remote in here])
    asked = alternate(rounds, [turn(remote, lambda r: r.feed(QUESTION)) for _, remote in here])
    base = next((i for i, (system, _) in enumerate(here) if system.name == FLASH), None)
    rows = []
    for i, (system, remote) in enumerate(here):
        row: Row = {
            "system": system.name,
            "stock": system.stock,
            "everything": system.unbounded,
            "budget": system.setup.budget,
            "depth": depth,
            "prompt_seconds": prompts[system.name] if depth else None,
            "decode_tps": statistics.median(decode[i]),
            "first_token_ms": 1000 * statistics.median(asked[i]),
            **remote.figures(),
        }
        if base is not None:
            row["decode_vs_stock"] = pair_ratio(decode[i], decode[base])
            row["decode_interval"] = pair_interval(decode[i], decode[base])
            row["prompt_vs_stock"] = prompts[FLASH] / prompts[system.name] if depth else None
        rows.append(row)
    return rows


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """At the deepest depth that an unbounded stock cache went to: the slower of ours against the faster of theirs."""
    deepest = max((row["depth"] for row in rows if row["system"] == FLASH), default=None)
    if deepest is None:
        return []
    here = [row for row in rows if row["depth"] == deepest]
    ours = [row for row in here if not row["stock"] and not row["everything"]]
    theirs = [row for row in here if row["stock"] and row["everything"]]
    shift = next(row for row in here if row["system"] == SHIFT)
    found = [
        Verdict(f"decode at {deepest} / the faster stock cache", _least(ours, "decode_tps") / _most(theirs, "decode_tps"), 1),
        Verdict(f"decode at {deepest} / stock context shift", _least(ours, "decode_tps") / shift["decode_tps"], 1),
        Verdict(
            f"first token of a question at {deepest}, times faster than the faster stock cache",
            _least(theirs, "first_token_ms") / _most(ours, "first_token_ms"),
            1,
        ),
        Verdict(
            f"peak memory at {deepest} / the smaller stock one",
            _most(ours, "peak_bytes") / _least(theirs, "peak_bytes"),
            1,
            True,
        ),
    ]
    if deepest:
        ratio = _least(theirs, "prompt_seconds") / _most(ours, "prompt_seconds")
        found.insert(1, Verdict(f"a prompt of {deepest}, times faster than the faster stock cache", ratio, 1))
    return found


def _least(rows: Sequence[Row], key: str) -> float:
    return min(float(row[key]) for row in rows)


def _most(rows: Sequence[Row], key: str) -> float:
    return max(float(row[key]) for row in rows)


def plot(figure: Any, report: Report) -> None:
    """Decode, time of the prompt, and memory over tokens seen; dashed: stock."""
    panels = [("decode_tps", "decode, tokens/s"), ("prompt_seconds", "seconds to read it"), ("peak_bytes", "peak memory, MiB")]
    for axis, (key, label) in zip(figure.subplots(1, len(panels)), panels):
        for name in dict.fromkeys(row["system"] for row in report.rows):
            rows = [row for row in report.rows if row["system"] == name]
            x, y = series(rows, "depth", key)
            values = [v / 2**20 for v in y] if key == "peak_bytes" else y
            axis.plot(x, values, marker="o", label=name, linestyle="--" if rows[0]["stock"] else "-")
        axis.set_xscale("symlog", base=2, linthresh=1024)
        if key == "prompt_seconds":
            axis.set_yscale("log")
        axis.set(xlabel="tokens already seen", ylabel=label)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
