"""The meter of the cache: a bar of what it keeps, and the counts beside it."""

from __future__ import annotations

import tkinter as tk
from tkinter import ttk
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from indexmem_edge import KVStats

_WIDTH, _HEIGHT = 140, 14


class Meter(ttk.Frame):
    """Shows the counts of one conversation."""

    def __init__(self, parent: tk.Misc) -> None:
        super().__init__(parent)
        self._bar = tk.Canvas(self, width=_WIDTH, height=_HEIGHT, highlightthickness=1, highlightbackground="#999", background="#fff")
        self._filled = self._bar.create_rectangle(0, 0, 0, _HEIGHT + 2, width=0)
        self._counts = ttk.Label(self)
        self._bar.pack(side="left", padx=(0, 8))
        self._counts.pack(side="left", fill="x")
        self.show(None)

    @property
    def text(self) -> str:
        return str(self._counts["text"])

    def show(self, stats: Optional[KVStats]) -> None:
        """None: nothing has been said yet."""
        share = min(stats.kept / (stats.budget or stats.n_ctx), 1.0) if stats else 0.0
        self._bar.coords(self._filled, 0, 0, round(share * (_WIDTH + 2)), _HEIGHT + 2)
        self._bar.itemconfigure(self._filled, fill="#d08030" if stats and stats.evicted else "#4a90c0")
        self._counts["text"] = words(stats) if stats else "the cache is empty"


def words(stats: KVStats) -> str:
    """What the numbers mean: entries of the budget, what was dropped, bytes, and what the last question cost."""
    parts = [f"{stats.kept:,} kept" + (f" of {stats.budget:,}" if stats.budget else ""), f"{stats.evicted:,} evicted"]
    if stats.cache_bytes is not None:
        parts.append(f"{stats.cache_bytes / 2**20:.1f} MiB")
    parts.append(f"last question: {max(stats.turn_evaluated, 0):,} tokens read, {stats.turn_reused:,} reused")
    return " · ".join(parts)
