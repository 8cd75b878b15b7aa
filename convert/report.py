"""What a conversion tells: a table for people, JSON for programs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from indexmem_edge.files.untrusted import quote

from .checkpoint import describe
from .model import UNKNOWN, Checkpoint
from .writer import Written

NO_MODEL = (
    "without --model (or --arch) the file does not say which model it is for: only the geometry will be compared when "
    "it is loaded"
)


def notes(checkpoint: Checkpoint) -> list[str]:
    """What should not pass unnoticed."""
    return [*checkpoint.warnings(), *([NO_MODEL] if checkpoint.architecture == UNKNOWN else [])]


def to_dict(checkpoint: Checkpoint, written: Written, outtype: str) -> dict[str, Any]:
    """Everything about a sidecar that was written, as plain JSON values."""
    return {
        "file": written.path,
        "bytes": written.size,
        "outtype": outtype,
        "fallback_to_f16": list(written.fallbacks),
        **{key: value for key, value in describe(checkpoint).items() if key != "schema"},
        "tensors": [
            {"name": r.name, "count": r.count, "shape": list(r.shape), "type": r.type, "bytes": r.bytes}
            for r in written.rows
        ],
        "notes": notes(checkpoint),
    }


def print_summary(console: Console, checkpoint: Checkpoint, written: Written, outtype: str) -> None:
    """A line for each class of tensors, then what the file says of itself. Names of unknown origin are escaped."""
    table = Table(title=Text(f"{os.path.basename(written.path)}: {written.size:,} bytes"), title_justify="left")
    for name in ("tensor", "layers", "shape", "type", "bytes"):
        table.add_column(name, justify="left" if name in ("tensor", "type") else "right")
    for r in written.rows:
        table.add_row(Text(r.name), str(r.count), " x ".join(map(str, r.shape)), r.type, f"{r.bytes:,}")
    console.print(table)
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _facts(checkpoint):
        facts.add_row(name, Text(value))
    if written.fallbacks:
        facts.add_row("not q8_0", Text(f"{', '.join(written.fallbacks)}: rows are no multiple of 32, so F16"))
    console.print(facts)


def _facts(c: Checkpoint) -> list[tuple[str, str]]:
    p, g = c.provenance, c.geometry
    base = [_plain(c.base_model)] if c.base_model else []
    layers = f"{g.block_count} layers" + ("" if c.only is None else f" (the file is for {', '.join(map(str, c.only))})")
    base += [c.architecture, layers, f"width {g.embedding_length}", f"{g.head_count_kv} KV heads"]
    files = [f"{_plain(name)} (SHA-256 {digest[:16]}...)" for name, digest in zip(p.source_files, p.source_sha256)]
    facts = [("indexer", _kind(c.kind, c.constants)), ("memory", _kind(c.memory, c.memory_constants))]
    facts += [("base model", ", ".join(base)), ("fingerprint", c.fingerprint or "none")]
    facts += [("source", f"{p.source_format}: {', '.join(files)}")]
    if p.step is not None:
        facts.append(("step", str(p.step)))
    if p.trained_on:
        facts.append(("trained on", _plain(p.trained_on)))
    for what, values in (("defaults", c.defaults), ("scores", c.scores)):
        if values:
            facts.append((what, ", ".join(f"{k} {_number(v)}" for k, v in values.items())))
    return facts


def _kind(name: str, constants: Any) -> str:
    return ", ".join([name, *(f"{key} {_value(value)}" for key, value in constants.items())])


def _value(value: Any) -> str:
    if isinstance(value, list):
        return _range(value)
    return ("yes" if value else "no") if isinstance(value, bool) else _number(value)


def _range(values: Sequence[Any]) -> str:
    if isinstance(values[0], bool):
        return f"in {sum(values)} of {len(values)} layers"
    return f"{min(values):.4g} to {max(values):.4g}"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    """The text as it is if that is safe to print."""
    return text if text.isprintable() else quote(text)
