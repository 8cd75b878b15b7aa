"""What an eviction costs at growing budgets, by policy: time per entry, and in decode steps of the same model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from indexmem_edge import llama_cpp
from indexmem_edge.native import api
from indexmem_edge.runtime.choice import INDEXER_POLICY

from ..report import Row
from ..runner import UNBOUNDED, Model, Setup, System
from ..text import TokenStream

COLUMNS = ("policy", "budget", "evict_ms", "ns_per_entry", "vs_smallest", "step_ms", "decode_steps")
FREE = 64  # slots that are left at first: what the state of another policy needs of tokens before the first eviction
WARM = 2  # evictions that are not counted


def policies() -> list[str]:
    """Those that evict, and need nothing but a model."""
    return [name for name in api.policies() if name not in (UNBOUNDED, INDEXER_POLICY)]


def evictions(
    model: Model, base: Setup, names: Sequence[str], budgets: Sequence[int], corpus: list[int], rounds: int
) -> list[Row]:
    """One cache of each size is filled, and its state goes on under each policy: `rounds` evictions, and the steps between them.

    `ns_per_entry` is of one KV head of one layer. `vs_smallest` compares it with the smallest of the budgets, where fixed costs
    weigh most; `decode_steps` is the eviction in medians of the steps that evict nothing."""
    found: list[Row] = []
    least: dict[str, float] = {}
    for budget in sorted(budgets):
        setup = replace(base, policy="streaming", budget=budget, sidecar=None, memory="off", memory_slots=0, budget_ratio=None)
        with System(model, setup) as system:
            system.feed(TokenStream(corpus).take(budget - FREE), last_logits=True)
            state = system.save()
        for name in names:
            with System(model, replace(setup, policy=name)) as system:
                system.restore(state)
                evict, step = _times(system, rounds)
                layers = range(llama_cpp.llama_model_n_layer(model.raw.model))
                heads = sum(api.n_head_kv(system.ctx, il) for il in layers)  # 0 in layers that keep no entries
            entry = evict / budget / heads
            least.setdefault(name, entry)
            found.append(
                {
                    "policy": name,
                    "budget": budget,
                    "evict_ms": evict * 1e3,
                    "ns_per_entry": entry * 1e9,
                    "vs_smallest": entry / least[name],
                    "step_ms": step * 1e3,
                    "decode_steps": evict / step,
                }
            )
    return found


def _times(system: System, rounds: int) -> tuple[float, float]:
    """Seconds of an eviction (the ops that rank, select and move), and of a step without one: medians."""
    evicted: list[float] = []
    plain: list[float] = []
    before = system.stats()
    while len(evicted) < WARM + rounds:
        seconds = system.step(system.greedy())
        after = system.stats()
        if after["evicted"] > before["evicted"]:
            evicted.append((after["evict_us"] - before["evict_us"]) * 1e-6)
        elif evicted:
            plain.append(seconds)
        before = after
    return statistics.median(evicted[WARM:]), statistics.median(plain)
