"""The goals of `bench speed`, and what reading memory allows of each."""

from __future__ import annotations

from collections.abc import Sequence

from indexmem_edge.runtime.choice import INDEXER_POLICY, MEMORY_OFF

from ..report import Report, Row, Verdict
from ..runner import Setup

VS_EMPTY = 0.65  # decode at a full budget / with an empty context
VS_EMPTY_ALL = 0.6  # with indexer and memory
VS_FLASH, VS_NO_FLASH, DEEP = 15.0, 5.0, 8192  # decode / the unbounded cache, at a depth
FLAT, FLAT_FROM, FLAT_TO = 0.03, 2048, 131072  # spread of decode between two depths
ROWS, ROWS_GOAL = 8, 4.0
TAIL = 1.5  # 99th percentile / median of the latency of a token
LONG, LONG_GOAL = 32768, 4.0  # tokens of a prompt, and its time in the unbounded cache / with indexer and memory
FLAT_ENTRY, SMALL, LARGE = 1.3, 2048, 32768  # cost of an eviction per entry: between two budgets
EVICT_AT, EVICT_STEPS, EVICT_SNAPKV = 16384, 1.0, 4.0  # an eviction in decode steps, at a budget
BELOW = 0.97  # decode below the budget / the unbounded cache


def has_all(setup: Setup) -> bool:
    """Whether a system has an indexer and a memory, for which some goals are others."""
    return setup.policy == INDEXER_POLICY and setup.memory != MEMORY_OFF


def bytes_limit(weight_bytes: int, cache_bytes: int) -> float:
    """Speed of a decode / that with an empty context, if a token took the time of reading weights and cache at the bandwidth
    that the empty context reads its weights with."""
    return weight_bytes / (weight_bytes + cache_bytes)


def verdicts(report: Report) -> list[Verdict]:
    everything = report.meta["indexer_and_memory"]
    found: list[Verdict] = []
    for system in dict.fromkeys(row["system"] for row in report.rows if row["budget"]):
        found += _depths(
            [row for row in report.rows if row["system"] == system], report.rows, system, system in everything
        )
    for row in report.extra.get("rows_at_once", []):
        if row["rows"] == ROWS:
            found.append(Verdict(f"{row['system']}: throughput of {ROWS} rows / 1 row", row["vs_one"], ROWS_GOAL))
    for row in report.extra.get("latency", []):
        name = f"{row['system']}: 99th percentile / median of {row['tokens']} token latencies"
        found.append(Verdict(name, row["p99_vs_p50"], TAIL if row["evict_step"] else None, at_most=True))
    for row in report.extra.get("prefill", []):
        if "vs_unbounded" in row:
            at = row["compared_at"]
            short = "" if at == row["tokens"] else ", where the unbounded one stopped"
            goal = LONG_GOAL if at >= LONG and row["system"] in everything else None
            found.append(
                Verdict(f"{row['system']}: prefill of {at} tokens{short}: unbounded / this", row["vs_unbounded"], goal)
            )
    return found + _evictions(report.extra.get("evictions", []))


def _evictions(rows: Sequence[Row]) -> list[Verdict]:
    found: list[Verdict] = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == policy]
        small, large = mine[0], mine[-1]
        if small is not large:
            whole = small["budget"] <= SMALL and large["budget"] >= LARGE
            name = f"{policy}: cost of an eviction per entry at {large['budget']} / at {small['budget']}"
            found.append(Verdict(name, large["vs_smallest"], FLAT_ENTRY if whole else None, at_most=True))
        goal = EVICT_SNAPKV if policy == "snapkv" else EVICT_STEPS
        for row in mine:
            name = f"{policy}: an eviction at {row['budget']} in decode steps"
            limit = goal if row["budget"] == EVICT_AT else None
            found.append(Verdict(name, row["decode_steps"], limit, at_most=True))
    return found


def _depths(rows: Sequence[Row], of_all: Sequence[Row], system: str, everything: bool) -> list[Verdict]:
    found: list[Verdict] = []
    past = [row for row in rows if row["depth"] >= row["budget"]]
    if past:
        worst = min(past, key=lambda row: row["decode_vs_empty"])
        name = f"{system}: decode at a full budget / empty context (worst depth; bytes allow {worst['bytes_limit']:.2f})"
        found.append(Verdict(name, worst["decode_vs_empty"], VS_EMPTY_ALL if everything else VS_EMPTY))
    compared = [row for row in rows if row.get("decode_vs_flash") is not None]
    if compared:
        deep = max(compared, key=lambda row: row["depth"])
        for key, what, goal in (
            ("flash", "unbounded with flash attention", VS_FLASH),
            ("no_flash", "unbounded without flash attention", VS_NO_FLASH),
        ):
            value = deep.get(f"decode_vs_{key}")
            if value is None:
                continue
            allowed = deep["bytes_limit"] / _empty_ratio(of_all, deep["depth"], key == "flash")
            name = f"{system}: decode at {deep['depth']} / {what} (bytes allow {allowed:.1f})"
            found.append(Verdict(name, value, goal if deep["depth"] >= DEEP else None))
        found.append(Verdict(f"{system}: prefill at {deep['depth']} / unbounded", deep["prefill_vs_flash"]))
    below = [row["decode_vs_flash"] for row in compared if row["depth"] < row["budget"]]
    if below:
        found.append(Verdict(f"{system}: decode below the budget / unbounded (worst depth)", min(below), BELOW))
    flat = [row for row in past if row["depth"] >= FLAT_FROM]
    if len(flat) > 1:
        speeds = [row["decode_vs_empty"] for row in flat]
        depths = [row["depth"] for row in flat]
        name = f"{system}: decode from {min(depths)} to {max(depths)} tokens seen: fastest / slowest - 1"
        whole = min(depths) <= FLAT_FROM and max(depths) >= FLAT_TO
        found.append(Verdict(name, max(speeds) / min(speeds) - 1, FLAT if whole else None, at_most=True))
    return found


def _empty_ratio(rows: Sequence[Row], depth: int, flash: bool) -> float:
    """Decode of the unbounded cache at a depth / with an empty context, as measured."""
    return next(
        row["decode_vs_empty"]
        for row in rows
        if not row["budget"] and row["depth"] == depth and row["flash"] == flash
    )
