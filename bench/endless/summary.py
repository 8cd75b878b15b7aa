"""What the runs of `endless` come to: rows by window, distance and turn, each against the shift on the same text; verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from ..report import Report, Row, Verdict
from ..runner import BYTE_KEYS
from ..stats import bootstrap, wilson
from . import far as endless_far
from .arms import SHIFT, TRAINED
from .talk import BACK

BLOCKS = 8  # rows of talk
NEAR, FAR = 8192, 65536  # distances that the goal for facts compares
GOAL_FACTS = 0.8  # share of what is answered at NEAR that is answered at FAR
GOAL_NLL = {"streaming": 0.05, "indexer": 0.0}  # nats above the shift, at most
GOAL_COST = 0.01
Arm = tuple[int, str, str]  # budget, policy, span
Runs = dict[Arm, dict[int, Row]]  # by arm and sample


def fill(report: Report, logged: Sequence[Row], per: int, fine: int) -> None:
    """Makes rows, extras and verdicts of a report from the units that are done."""
    parts: dict[str, Runs] = {}
    for row in logged:
        arm = row["budget"], row["policy"], row["span"]
        parts.setdefault(row["part"], {}).setdefault(arm, {})[row["sample"]] = row
    report.rows, report.extra = [], {}
    for row in nll_rows(parts.get("nll", {}), per, fine):
        report.add(**row)
    made = {
        "fine": nll_rows(parts.get("nll", {}), fine, fine),
        "facts": fact_rows(parts.get("facts", {})),
        "fact_kinds": kind_rows(parts.get("facts", {})),
        "talk": talk_rows(parts.get("talk", {})),
        "far": far_rows(parts.get("far", {})),
        "cost": [_of_report(row) for runs in parts.get("cost", {}).values() for row in runs.values()],
    }
    report.extra = {name: rows for name, rows in made.items() if rows}
    report.meta["without_span"] = sorted({row["span_reason"] for row in logged if row.get("span_reason")})
    report.verdicts = verdicts(report, report.meta.get("trained_length") or 0)


def _of_report(row: Row) -> Row:
    """Without what names the run among those that are written down."""
    return {name: value for name, value in row.items() if name not in ("key", "settings", "sample")}


def _named(arm: Arm, runs: Iterable[Row]) -> Row:
    """What all rows of an arm have."""
    first = next(iter(runs))
    keys = ("cells", "span_in_force", "rss_bytes", *BYTE_KEYS)
    return {"budget": arm[0], "policy": arm[1], "span": arm[2], **{key: first.get(key) for key in keys}}


def _rival(runs: Runs, arm: Arm) -> dict[int, Row]:
    """The runs of the shift with that budget; none for itself."""
    return {} if arm[1] == SHIFT else runs.get((arm[0], SHIFT, "-"), {})


def _against(name: str, pairs: Sequence[float]) -> Row:
    """Mean of paired differences with its interval."""
    if not pairs:
        return {}
    mean, low, high = bootstrap([pairs])
    return {f"{name}_delta": mean, f"{name}_low": low, f"{name}_high": high}


def nll_rows(runs: Runs, per: int, fine: int) -> list[Row]:
    """One row per arm and window of `per` tokens; `tokens_seen` is where it ends."""
    out, step = [], per // fine
    for arm, mine in runs.items():
        rival = _rival(runs, arm)
        for start in range(0, max(len(run["nll"]) for run in mine.values()), step):
            windows = {sample: run["nll"][start : start + step] for sample, run in mine.items()}
            pairs = [
                a - b for s, window in windows.items() if s in rival for a, b in zip(window, rival[s]["nll"][start:])
            ]
            row = _named(arm, mine.values())
            ends = (min((start + step) * fine, run.get("tokens", len(run["nll"]) * fine)) for run in mine.values())
            row |= {"tokens_from": start * fine, "tokens_seen": max(ends), "n": len(mine)}
            row["nll"] = statistics.fmean(value for window in windows.values() for value in window)
            row["prefill_tps"] = statistics.median(run["prefill_tps"] for run in mine.values())
            row["rebases"] = statistics.median(run["rebases"] for run in mine.values())
            out.append(row | _against("nll", pairs))
    return out


def fact_rows(runs: Runs) -> list[Row]:
    """One row per arm and distance; `found_near` is the share of the same facts at the distance NEAR."""
    out = []
    for arm, mine in runs.items():
        found = {(s, a["distance"], a["fact"]): a for s, run in mine.items() for a in run["answers"]}
        rival = {(s, a["distance"], a["fact"]): a for s, run in _rival(runs, arm).items() for a in run["answers"]}
        for distance in sorted({key[1] for key in found}):
            here = {key: a for key, a in found.items() if key[1] == distance}
            share, low, high = wilson(sum(a["found"] for a in here.values()), len(here))
            nll, nll_from, nll_to = bootstrap([[a["nll"] for a in here.values()]])
            row = _named(arm, mine.values())
            row |= {"distance": distance, "n": len(here), "found": share, "found_low": low, "found_high": high}
            row |= {"nll": nll, "nll_from": nll_from, "nll_to": nll_to}
            near = [found[s, NEAR, fact]["found"] for s, _, fact in here if (s, NEAR, fact) in found]
            row["found_near"] = statistics.fmean(near) if near else None
            out.append(row | _against("nll", [a["nll"] - rival[key]["nll"] for key, a in here.items() if key in rival]))
    return out


def kind_rows(runs: Runs) -> list[Row]:
    """One row per arm and kind of fact, all distances together."""
    out = []
    for arm, mine in runs.items():
        kinds: dict[str, list[bool]] = {}
        for run in mine.values():
            for answer in run["answers"]:
                kinds.setdefault(answer["kind"], []).append(answer["found"])
        for kind, found in sorted(kinds.items()):
            share, low, high = wilson(sum(found), len(found))
            row = {"budget": arm[0], "policy": arm[1], "span": arm[2], "kind": kind, "n": len(found)}
            out.append({**row, "found": share, "found_low": low, "found_high": high})
    return out


def talk_rows(runs: Runs) -> list[Row]:
    """One row per arm and block of turns; answers that stand far back are told apart."""
    out = []
    for arm, mine in runs.items():
        rival = {(s, t["turn"]): t["nll"] for s, run in _rival(runs, arm).items() for t in run["turns"]}
        n = max(len(run["turns"]) for run in mine.values())
        size = -(-n // BLOCKS)
        for start in range(0, n, size):
            block = [(s, turn) for s, run in mine.items() for turn in run["turns"][start : start + size]]
            row = _named(arm, mine.values()) | {"turns": min(start + size, n), "n": len(block)}
            row["tokens_seen"] = max(turn["tokens_seen"] for _, turn in block)
            row["nll"] = _mean(turn["nll"] for _, turn in block if turn["kind"] != BACK)
            row["nll_back"] = _mean(turn["nll"] for _, turn in block if turn["kind"] == BACK)
            for name, wanted in (("nll", _is_not_back), ("nll_back", lambda turn: not _is_not_back(turn))):
                pairs = [t["nll"] - rival[s, t["turn"]] for s, t in block if wanted(t) and (s, t["turn"]) in rival]
                row |= _against(name, pairs)
            out.append(row)
    return out


def far_rows(runs: Runs) -> list[Row]:
    """One row per arm: the same passages near the beginning and at the end of a long text."""
    out = []
    for arm, mine in runs.items():
        row = _named(arm, mine.values())
        for name in ("near", "far"):
            row[name] = statistics.fmean(value for run in mine.values() for value in run[name])
        row["tokens_seen"] = max(run["tokens_seen"] for run in mine.values())
        row["rebases"] = max(run["rebases"] for run in mine.values())
        row["finite"] = all(run["finite"] for run in mine.values())
        row["grown"] = any(run["grown"] for run in mine.values())
        out.append(row | _against("far", [a - b for run in mine.values() for a, b in zip(run["far"], run["near"])]))
    return out


def _is_not_back(turn: Row) -> bool:
    return turn["kind"] != BACK


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None


def verdicts(report: Report, trained: int) -> list[Verdict]:
    """The goals hold for the span that is the default; of other spans and of none, the same numbers are told."""
    out = []
    for arm, rows in by_arm(report.rows):
        past = [row["nll_delta"] for row in rows if row["tokens_from"] >= trained and row.get("nll_delta") is not None]
        if past:
            name = f"NLL minus that of the shift, {label(arm)}: the worst window past {trained} tokens"
            out.append(Verdict(name, max(past), _goal(arm, GOAL_NLL.get(arm[1])), at_most=True))
    for arm, rows in by_arm(report.extra.get("facts", [])):
        far = next((row for row in rows if row["distance"] == FAR), None)
        if far and far["found_near"]:
            name = f"facts answered after {FAR} tokens / after {NEAR}, the same {far['n']} facts, {label(arm)}"
            out.append(Verdict(name, far["found"] / far["found_near"], _goal(arm, GOAL_FACTS, "indexer")))
    for arm, rows in by_arm(report.extra.get("talk", [])):
        if rows[-1].get("nll_delta") is not None:
            name = f"NLL of scripted answers minus that of the shift, {label(arm)}: the last {rows[-1]['n']} turns"
            low, high = rows[-1]["nll_low"], rows[-1]["nll_high"]
            out.append(Verdict(f"{name} ({low:.3f} to {high:.3f})", rows[-1]["nll_delta"]))
    for arm, rows in by_arm(report.extra.get("far", [])):
        row = rows[0]
        bytes_ = "more bytes" if row["grown"] else "the same bytes"
        name = f"NLL after {row['tokens_seen']} tokens minus near the beginning, {bytes_}, {label(arm)}"
        worth = row["far_delta"] if row["finite"] and not row["grown"] else float("inf")
        out.append(Verdict(name, worth, _goal(arm, endless_far.GOAL), at_most=True))
    for arm, rows in by_arm(report.extra.get("cost", [])):
        for what in ("prefill", "decode"):
            name = f"share of {what} that renewing positions takes, {label(arm)}"
            out.append(Verdict(name, rows[0][f"{what}_share"], _goal(arm, GOAL_COST), at_most=True))
    return out


def _goal(arm: Arm, threshold: float | None, policy: str | None = None) -> float | None:
    return threshold if arm[2] == TRAINED and policy in (None, arm[1]) else None


def by_arm(rows: Sequence[Row]) -> list[tuple[Arm, list[Row]]]:
    groups: dict[Arm, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["budget"], row["policy"], row["span"]), []).append(row)
    return list(groups.items())


def label(arm: Arm) -> str:
    budget, policy, span = arm
    return f"{policy} {budget}" + ("" if policy == SHIFT else f", span {span}")
