"""What the KV cache holds, dropped, and cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Optional


@dataclass(frozen=True)
class LayerBudget:
    """KV heads of the bounded layers that have the same budget, and hold the same number of entries."""

    heads: int
    budget: int
    kept: int


def layer_budgets(native: Any) -> tuple[LayerBudget, ...]:
    """From the library's own counts. Heads whose needs differ may have the same budget nevertheless."""
    found: dict[tuple[int, int], int] = {}
    for i in range(native.n_classes):
        key = int(native.class_budget[i]), int(native.class_kept[i])
        found[key] = found.get(key, 0) + int(native.class_heads[i])
    return tuple(LayerBudget(heads, *key) for key, heads in found.items())


@dataclass(frozen=True)
class KVStats:
    """Counts of the one sequence of a `Llama`. Entries are counted per KV head; where heads differ, as means over them."""

    policy: str  # "unbounded" without a budget
    budget: int  # 0 without a budget
    tokens_seen: int  # logical length of the conversation so far
    kept: int  # entries in the cache now
    evicted: int  # entries dropped so far
    reevaluated: int = 0  # tokens that had to be evaluated again because history was edited
    reevaluated_reason: Optional[str] = None  # why, the last time it happened
    turn_evaluated: int = 0  # prompt tokens evaluated for the last prompt
    turn_reused: int = 0  # prompt tokens of the last prompt that were already in the cache
    turn_generated: int = 0  # tokens generated after it that went through the model
    kv_bytes: Optional[int] = None  # K and V of the bounded layers, fixed at creation; without a budget all that is cached
    window_bytes: int = 0  # with a budget: caches of layers that look at a window, likewise fixed
    recurrent_bytes: int = 0  # with a budget: states of recurrent layers, likewise
    meta_bytes: int = 0  # positions, state of policy, indexer and memory; fixed at creation
    indexer: str = ""  # kind of the trained indexer that ranks, "" without one
    sidecar: str = ""  # name of the file of indexer or memory
    sidecar_bytes: int = 0  # its weights in memory
    indexer_bytes: int = 0  # the part of meta_bytes that the indexer keeps
    memory: str = ""  # kind of the latent memory, "off" without one, "" without a budget
    memory_slots: int = 0  # its slots, which are part of the budget; 0 of a kind that has none
    memory_layers: int = 0  # layers that have it
    memory_bytes: int = 0  # the part of meta_bytes that it keeps
    cancel_bytes: int = 0  # of the copy of the state that a cancelled call is brought back from
    cancel_device_bytes: int = 0  # those of them in memory of devices
    checkpoints: int = 0  # copies of the state that prompts go on from
    checkpoint_bytes: int = 0  # that they take
    checkpoint_device_bytes: int = 0  # those of them in memory of devices, where the cache lies: copies there do not pass through the host
    background: int = 0  # of tokens_seen: those that every prompt comes after, because a session was loaded as a background
    budget_now: int = 0  # the budget at this length: smaller than `budget` only with kv_budget_ratio
    compute_bytes: int = 0  # compute buffers of the context, whatever the length
    work_bytes: int = 0  # what the CPU takes for the cache's own ops, from the first eviction on
    slots: int = 0  # slots allocated per KV head: the budget plus working room
    sinks: int = 0
    window: int = 0
    pin: int = 0
    first: int = 0  # first tokens that stay in every KV head: sinks and pin, of which heads with small budgets may keep only the beginning
    evict_step: int = 0
    evict_seconds: float = 0.0  # time in ranking, selection and compaction
    evictions: int = 0  # micro-batches that evicted
    span: int = 0  # positions that are used; 0: they grow with the text
    span_reason: str = ""  # why they do, although they were to stay below the trained length
    next_position: int = 0  # of the next token
    rebases: int = 0  # times that what is kept got new positions, because the span was used up
    rebase_seconds: float = 0.0  # time that this took
    layers: tuple[LayerBudget, ...] = ()  # heads of the layers that have a budget; where all have the same, one
    n_ctx: int = 0  # largest logical length
    n_ctx_train: int = 0  # length the model was trained for
    warnings: tuple[str, ...] = field(default=())

    @property
    def remembers(self) -> bool:
        """Whether there is a latent memory."""
        return self.memory not in ("", "off")

    @property
    def cache_bytes(self) -> Optional[int]:
        """Keys, values and states of all layers, bounded or not; None if unknown."""
        return None if self.kv_bytes is None else self.kv_bytes + self.window_bytes + self.recurrent_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json.dumps takes."""
        return {**asdict(self), "warnings": list(self.warnings)}

    def line(self) -> str:
        """One short line: the footer of the chat."""
        parts = [f"{self.tokens_seen:,} tokens seen", f"{self.kept:,} kept", f"{self.evicted:,} evicted"]
        if self.cache_bytes is not None:
            parts.append(f"KV {format_bytes(self.cache_bytes)}")
        if self.rebases:
            parts.append(f"positions renewed {_times(self.rebases)}")
        return " · ".join(parts)

    def __str__(self) -> str:
        rows = [
            ("policy", self.policy + _budget(self)),
            ("tokens seen", f"{self.tokens_seen:,} (kept {self.kept:,}, evicted {self.evicted:,})"),
            (
                "last prompt",
                f"{self.turn_evaluated:,} tokens evaluated, {self.turn_reused:,} reused, "
                f"{self.turn_generated:,} generated",
            ),
            ("re-evaluated", f"{self.reevaluated:,}" + _because(self.reevaluated_reason)),
            ("KV memory", _memory(self)),
        ]
        if self.background:
            rows.insert(2, ("background", f"the first {self.background:,} of them, of another conversation"))
        if self.sidecar:
            kind = f"{self.indexer}, " if self.indexer else ""
            rows.append(("indexer" if kind else "sidecar", f"{kind}{self.sidecar} ({format_bytes(self.sidecar_bytes)})"))
        if self.remembers:
            slots = f"{self.memory_slots} slots per KV head, " if self.memory_slots else ""
            rows.append(("memory", f"{self.memory}, {slots}{self.memory_layers} layers"))
        if self.budget:
            if len(self.layers) > 1:
                rows.append(("heads", ", ".join(f"{x.heads} keep {x.kept:,} of {x.budget:,}" for x in self.layers)))
            part = f" ({self.first:,} in the smallest KV heads)" if self.first < self.pin else ""
            rows.append(("protected", f"sinks {self.sinks}, pinned prefix {self.pin}{part}, recent window {self.window}"))
            work = f"{format_bytes(self.compute_bytes)} of compute buffers, {format_bytes(self.work_bytes)} for the cache's ops"
            rows.append(("positions", _positions(self)))
            rows.append(("work memory", work))
            rows.append(("eviction", f"{self.evict_seconds:.3f} s in {self.evictions:,} evictions"))
        if self.cancel_bytes:
            size = _copied(self.cancel_bytes, self.cancel_device_bytes)
            rows.append(("way back", f"{size}, a copy of the state, should a call be cancelled"))
        if self.checkpoints:
            size = _copied(self.checkpoint_bytes, self.checkpoint_device_bytes)
            rows.append(("checkpoints", f"{self.checkpoints}, {size}: what edits and other answers go on from"))
        rows += [("warning", text) for text in self.warnings]
        return "\n".join(f"{name:<13} {value}" for name, value in rows)


def _copied(n: int, on_device: int) -> str:
    """Bytes of copies, and where they lie if that is not the host."""
    where = "" if not on_device else f" ({format_bytes(on_device)} of it on the device)"
    return format_bytes(n) + where


def _because(reason: Optional[str]) -> str:
    return f" ({reason})" if reason else ""


def _budget(stats: KVStats) -> str:
    if not stats.budget:
        return ""
    now = f", {stats.budget_now:,} at this length" if stats.budget_now < stats.budget else ""
    return f", budget {stats.budget:,} entries per KV head{now}"


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n:,} times"


def _positions(stats: KVStats) -> str:
    if not stats.span:
        return "grow with the text" + (stats.span_reason and f", because {stats.span_reason}")
    renewed = f"renewed {_times(stats.rebases)} in {stats.rebase_seconds:.3f} s" if stats.rebases else "not renewed yet"
    return f"below {stats.span:,}, the next is {stats.next_position:,}; {renewed}"


def _memory(stats: KVStats) -> str:
    if stats.kv_bytes is None:
        return "unknown"
    if not stats.budget:
        return f"{format_bytes(stats.kv_bytes)} for {stats.n_ctx:,} tokens"
    parts = {"indexer": stats.indexer_bytes, "memory": stats.memory_bytes}
    sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    state = "positions and state" + (f" ({sizes})" if sizes else "")
    rest = "".join(f" + {part}" for part in fixed_parts(stats))
    return (
        f"{format_bytes(stats.kv_bytes)} + {format_bytes(stats.meta_bytes)} of {state}{rest}, "
        f"fixed ({stats.slots:,} slots per KV head)"
    )


def fixed_parts(stats: Any) -> list[str]:
    """What layers keep that a budget does not bound, in words: of a `KVStats`, or of the library's own counts."""
    parts = {"window caches": stats.window_bytes, "recurrent states": stats.recurrent_bytes}
    return [f"{name} {format_bytes(size)}" for name, size in parts.items() if size]


def format_bytes(n: int) -> str:
    """Bytes for humans, in powers of 1024."""
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def trained_length_warning(position: int, n_ctx_train: int, why: str) -> Optional[str]:
    """The warning for positions that the model has never been trained on, if there are any, and why they are used."""
    if n_ctx_train <= 0 or position <= n_ctx_train:
        return None
    return (
        f"position {position:,} is beyond the {n_ctx_train:,} tokens that this model was trained for: its answers may get "
        f"worse, whatever the cache keeps. Positions grow with the text because {why}"
    )
