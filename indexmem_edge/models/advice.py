"""Which of the choices that fit to take, and why; or, where none does, what would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from ..options import default_ubatch
from ..stats import format_bytes
from .fit import Fit, Row

_PLAIN, _HALF = "f16", "q8_0"  # of the second twice as many entries fit, and answers hardly change
_SLOW = 0.5  # of the speed with the smallest budget: a larger one that writes more slowly is not advised
_MEASURED = 4  # rows, at most: a minute is not to be divided further


@dataclass(frozen=True)
class Advice:
    """What to take."""

    why: str  # or why nothing
    row: Optional[Row] = None
    command: tuple[str, ...] = ()
    short_by: int = 0  # bytes that are missing for the least row
    largest_file: int = 0  # bytes of weights that would fit with the least row; 0: none would


def advise(found: Fit) -> Advice:
    """The row to take."""
    if not found.generates:
        return Advice(f"it does not generate text: {found.refused}" if found.refused else "it does not generate text")
    rows = _good(found)
    if not rows:
        return _too_large(found)
    row = _largest(rows)
    if not row.budget:
        return Advice(_why_unbounded(found, row), row, command(found, row))
    slower = ""
    least = min((r for r in rows if _write(r) and r.cache_type == row.cache_type), key=lambda r: r.budget, default=None)
    if least is not None and 0 < _write(row) < _SLOW * _write(least):
        slower = f", and larger ones write more slowly than half of the {_write(least):.1f} tokens/s with {least.budget:,}"
        row = _largest([r for r in rows if _write(r) >= _SLOW * _write(least)])
    return Advice(_why_bounded(found, row) + slower + _more_without(rows, found, row), row, command(found, row))


def worth_measuring(found: Fit) -> tuple[Row, ...]:
    """Rows to measure, the most interesting first: the one that is advised, the smallest budget, what is between, and none."""
    best = advise(found).row
    if best is None:
        return ()
    same = sorted((r for r in found.rows if r.fits and r.budget and r.cache_type == best.cache_type), key=lambda r: r.budget)
    unbounded = [r for r in found.rows if r.fits and not r.budget and r.cache_type == _PLAIN]
    wanted = [best, *same[:1], same[len(same) // 2] if same else best, *unbounded[:1]]
    return tuple(dict.fromkeys(wanted))[:_MEASURED]


def command(found: Fit, row: Row) -> tuple[str, ...]:
    """What to type."""
    types = () if row.cache_type == _PLAIN else ("-ctk", row.cache_type, "-ctv", row.cache_type)
    start = ("indexmem", "chat", "-m", found.path, "--kv-budget", str(row.budget))
    if not row.budget:
        return (*start, "-c", str(row.exact), *types)
    copies = () if found.copies is None else ("--kv-checkpoints", str(found.copies))
    return (*start, *types, *copies, *(("--indexmem", found.sidecar) if found.sidecar else ()))


def _good(found: Fit) -> list[Row]:
    """Rows that fit and are worth having: of those with a budget, if there are any, such that positions stay below the trained
    length; cheaper types than q8_0 change answers, so they are for want of others.
    """
    fitting = [row for row in found.rows if row.fits and row.sizes is not None]
    for rows in ([row for row in fitting if row.budget], fitting):
        good = [row for row in rows if row.cache_type in (_PLAIN, _HALF)]
        if good or rows:
            return good or rows
    return []


def _largest(rows: list[Row]) -> Row:
    """The one that keeps most; of two, the one that is named first in the table."""
    return max(rows, key=lambda row: row.exact)


def _write(row: Row) -> float:
    return (row.speed.write or 0.0) if row.speed is not None else 0.0


def _why_bounded(found: Fit, row: Row) -> str:
    kinds = {_HALF: ", with q8_0, which holds about twice as much as f16 and hardly changes answers"}
    how = kinds.get(row.cache_type, "" if row.cache_type == _PLAIN else f", with {row.cache_type}, as nothing else fits")
    if found.trained and row.budget + default_ubatch(row.budget) + 256 > found.trained:
        return f"the largest budget below the {found.trained:,} tokens that the model was trained for{how}"
    return f"the largest budget that fits into {format_bytes(found.memory.usable)}{how}"


def _more_without(rows: list[Row], found: Fit, row: Row) -> str:
    """What a person who needs it once, and all of it, might rather take."""
    types = {r.cache_type for r in rows}
    longest = max((r.exact for r in found.rows if r.fits and not r.budget and r.cache_type in types), default=0)
    return f"; without a budget {longest:,} tokens fit, and there it ends" if longest > row.exact else ""


def _why_unbounded(found: Fit, row: Row) -> str:
    whole = found.trained and row.exact >= found.trained
    length = "all that it was trained for" if whole else f"as much of {found.trained:,} as fits"
    why = f"it cannot have a budget: {found.refused}" if found.refused else "no budget fits"
    return f"{why}; without one there is room for {row.exact:,} tokens, {length}"


def _too_large(found: Fit) -> Advice:
    least = found.least
    if least is None or least.sizes is None:
        reasons = {row.why_not: None for row in found.rows}
        return Advice("; ".join(reasons) or "there is no cache for it")
    short = least.total - found.memory.usable
    largest = max(found.memory.usable - (least.total - least.sizes.model), 0)
    what = f"a budget of {least.budget:,}" if least.budget else f"{least.exact:,} tokens and no budget"
    need = f"it does not fit: with {what} ({least.cache_type}) it takes {format_bytes(least.total)}, {format_bytes(short)} more than there is"
    would = (
        f"a file of the same model of at most {format_bytes(largest)} would (another quantisation), this one has {format_bytes(found.file_bytes)}"
        if largest
        else "no file of this model would, however small"
    )
    return Advice(f"{need}; {would}", short_by=short, largest_file=largest)
