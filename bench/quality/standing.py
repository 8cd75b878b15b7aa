"""Where each arm stands: its share of the full cache's score, and what it has over the training-free policies, with intervals.

    retained            mean score over the judged tasks / that of the full f16 cache
    nll, agreement      of the true answer, and with the full cache's own answer, over the same tasks
    book_nll, ..._recall   of the text that follows a long context; of words in it that were last met far back
    versus              retained, nll and book_nll minus those of each training-free policy with the same share, and minus those
                        of full caches with quantised entries, whatever they take

All of a length is one draw of samples (paired.py), so that everything is paired with everything. Length "all" takes the tasks
of all lengths together, for arms that there are at all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..report import Row, Verdict
from ..runner import UNBOUNDED
from .arms import FULL_ARM, Arm
from .paired import FEW, LEAST, NONE, Interval, Paired
from .summary import BOOK, arm_of

ALL = "all"  # the length of what is pooled
GOALS = {0.5: 0.97, 0.25: 0.90, 0.1: 0.75}  # share of the score to retain, by the share that is kept
FULL_VALUE = {"agreement": 1.0, "prefix": None}  # the full cache agrees with itself
HOW = (
    "retained: mean score over the judged tasks as a share of the full f16 cache's; delta: minus the full cache's, or minus that of "
    "a training-free policy with the same share or of a quantised full cache (versus); 95 % intervals by paired bootstrap: samples drawn again within tasks, the "
    "same draw for all arms of a length; the best training-free policy is the one with the highest mean score on these very samples, "
    "which favours it; agreement: share of the first tokens of the full cache's greedy answer that are the arm's choice, too, read "
    "along that answer; recall: words that the context has, but not the last 256 tokens; length all: tasks of all lengths together"
)
Group = dict[Arm, dict[int, Row]]  # of one task and length: rows by arm and sample


@dataclass
class Standing:
    rows: list[Row]  # one per length and arm
    versus: list[Row]  # one per length, arm and what it is held against


def standing(rows: Iterable[Row], able: Mapping[int, Sequence[str]]) -> Standing:
    """Of rows that are balanced: all arms of a length on the same samples."""
    groups: dict[int, dict[str, Group]] = {}
    for row in rows:
        if row["task"] == BOOK or row["task"] in able.get(row["length"], ()):
            task = groups.setdefault(row["length"], {}).setdefault(row["task"], {})
            task.setdefault(arm_of(row), {})[row["sample"]] = row
    out = Standing([], [])
    for length in sorted(groups):
        _stand(out, length, list(groups[length].items()))
    if len(groups) > 1:
        _stand(out, ALL, [item for length in sorted(groups) for item in groups[length].items()])
    return out


def _stand(out: Standing, length: int | str, named: Sequence[tuple[str, Group]]) -> None:
    """Adds the rows of a length."""
    tasks, books = ([group for name, group in named if (name == BOOK) == book] for book in (False, True))
    everywhere = set.intersection(*(set(group) for _, group in named))
    arms = [arm for arm in dict.fromkeys(a for _, group in named for a in group) if arm in everywhere]
    if FULL_ARM not in arms:
        return
    arms.sort(key=_place)
    full, at = arms.index(FULL_ARM), {arm: i for i, arm in enumerate(arms)}
    score, nll, agree = (_paired(tasks, arms, key) for key in ("score", "nll", "agreement"))
    book, recall, rest = (_paired(books, arms, key) for key in ("nll", "nll_recall", "nll_rest"))

    found: dict[Arm, Row] = {}
    for arm, i in at.items():
        mine = [row for _, group in named for row in group[arm].values()]
        row: Row = {"length": length, **arm._asdict(), "trained": any(r.get("trained") for r in mine), **_sizes(mine)}
        row |= {"n": score.n if score else 0, "tasks": len(tasks), "windows": book.n if book else 0}
        if score:
            row |= {"score": float(score.means[i]), **score.share(i, full).row("retained")}
        if agree and arm != FULL_ARM:
            row |= agree.mean(i).row("agreement")
        for name, paired in (("nll", nll), ("book_nll", book), ("book_recall", recall), ("book_rest", rest)):
            if paired:
                row |= {name: float(paired.means[i]), **paired.difference(i, full).row(f"{name}_delta")}
        found[arm] = row
    out.rows += found.values()

    for arm, row in found.items():
        if arm.policy == UNBOUNDED:
            continue
        rivals = [a for a in found if a.policy != UNBOUNDED and a.ratio == arm.ratio and not found[a]["trained"]]
        quantised = [a for a in found if a.policy == UNBOUNDED and a != FULL_ARM]
        best = max(rivals, key=lambda a: (found[a].get("score", 0.0), -found[a].get("nll", 0.0)), default=None)
        row["best_training_free"] = arm == best
        for rival in rivals + quantised:
            if rival == arm:
                continue
            versus: Row = {"length": length, **arm._asdict(), "trained": row["trained"]}
            versus |= {"against": rival.name, "against_best": rival == best}
            versus |= {"against_share": found[rival]["bytes_share"]}
            i, j = at[arm], at[rival]
            if score:
                versus |= _told("retained_delta", score.share_difference(i, j, full), score.enough, 1)
            for name, paired in (("nll", nll), ("book_nll", book)):
                if paired:
                    versus |= _told(f"{name}_delta", paired.difference(i, j), paired.enough, -1)
            out.versus.append(versus)


def _place(arm: Arm) -> tuple[object, ...]:
    return arm.policy != UNBOUNDED, -arm.ratio, arm != FULL_ARM


def _paired(groups: Sequence[Group], arms: Sequence[Arm], key: str) -> Paired | None:
    """Samples that have a number for all of them; None without any."""
    tables = []
    for group in groups:
        samples = sorted(set.intersection(*(set(group[arm]) for arm in arms)))
        table = [[_value(group[arm][s], key) for arm in arms] for s in samples]
        if kept := [line for line in table if None not in line]:
            tables.append(np.array(kept, dtype=float))
    return Paired(tables) if tables else None


def _value(row: Row, key: str) -> float | None:
    value = row.get(key)
    return FULL_VALUE.get(key) if value is None and arm_of(row) == FULL_ARM else value


def _sizes(rows: Sequence[Row]) -> Row:
    """Means over the runs."""
    sizes: Row = {}
    for key in ("budget", "memory_slots", "kv_bytes", "used_bytes", "room_bytes"):
        values = [row[key] for row in rows if row.get(key) is not None]
        sizes[key] = round(statistics.fmean(values)) if values else None
    for key in ("bytes_share", "prefix"):
        values = [row[key] for row in rows if row.get(key) is not None]
        sizes[key] = statistics.fmean(values) if values else None
    return sizes


def _told(name: str, interval: Interval, enough: bool, good: int) -> Row:
    """An interval, and in a word what it says."""
    if not enough:
        word = FEW
    elif interval.without_zero:
        word = "better" if interval.value * good > 0 else "worse"
    else:
        word = NONE
    return {**interval.row(name), f"{name}_effect": word}


def verdicts(found: Standing, able: Mapping[int, Sequence[str]], unit: str) -> list[Verdict]:
    """What the full cache can do; what trained arms and the best training-free policy retain; whether training pays."""
    out = [
        Verdict(f"tasks the full cache can do at {length}: {', '.join(tasks) or 'none'}", float(len(tasks)))
        for length, tasks in able.items()
    ]
    for row in found.rows:
        if row.get("retained") is None or not (row["trained"] or row.get("best_training_free")):
            continue
        where = f"{_tokens(row['length'])} with {row['ratio']:.0%} of the {unit}"
        who = arm_of(row).name + ("" if row["trained"] else ", best training-free")
        out.append(Verdict(f"score retained at {where} ({who})", row["retained"], GOALS.get(round(row["ratio"], 3))))
        if row["trained"]:
            out += [_over(versus, where) for versus in found.versus if versus["against_best"] and _same(versus, row)]
    return out


def _over(versus: Row, where: str) -> Verdict:
    """Is the whole interval above zero?"""
    enough = versus["retained_delta_effect"] != FEW
    name = f"{arm_of(versus).name} minus {versus['against']} at {where}, lower end of the interval" + (
        "" if enough else f" ({LEAST} samples and two of each task are needed)"
    )
    return Verdict(name, versus["retained_delta_low"] if enough else None, 0.0, strictly=True)


def _same(a: Row, b: Row) -> bool:
    return a["length"] == b["length"] and arm_of(a) == arm_of(b)


def _tokens(length: int | str) -> str:
    return "all lengths" if length == ALL else f"{length} tokens"
