"""Who is still in a bounded cache while a text is read, as in use: blocks are appended, then entries leave for good."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import BudgetError
from ..cache.future import kept_mask

Ranks = Callable[[int], Tensor]  # tokens seen n -> ranks [H or 1, n] of all of them


@dataclass(frozen=True)
class Schedule:
    """How many entries stay. `block` tokens are appended before anything leaves: the ubatch of the runtime.

    After n tokens `ratio * n` of them stay, rounded up, and never more than `budget` (None: no such cap).

    Raises:
        BudgetError: the share is not above 0, or a block has no token.
    """

    ratio: float = 0.25
    budget: int | None = None
    block: int = 512

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise BudgetError(f"the ratio must be a share above 0, found {self.ratio:g}")
        if self.block < 1:
            raise BudgetError(f"a block must have a token or more, found {self.block}")

    def limit(self, seen: int, sinks: int, window: int) -> int:
        """Entries that stay of `seen` tokens: at least what is protected and one more.

        Raises:
            BudgetError: the budget has no room for that.
        """
        least = sinks + window + 1
        if self.budget is not None and self.budget < least:
            raise BudgetError(f"the budget must be at least {least} (sinks, window and one more), found {self.budget}")
        limit = max(math.ceil(self.ratio * seen), least)
        return limit if self.budget is None else min(limit, self.budget)


@dataclass(frozen=True)
class Block:
    """Tokens at positions start to end - 1, which read `held` and, causally, each other; then `gone` leaves."""

    start: int
    end: int
    held: Tensor  # [H, n] positions, ascending, of what each KV head holds before the block
    gone: Tensor  # [H, m] positions of what leaves after it

    @property
    def lost(self) -> int:
        """Entries of a head that had left before the block."""
        return self.start - self.held.shape[1]


def evictions(
    ranks: Ranks, n_head_kv: int, total: int, schedule: Schedule, sinks: int, window: int, device: torch.device
) -> Iterator[Block]:
    """The blocks of a text of `total` tokens. What has left never comes back, whatever its rank becomes."""
    held = torch.zeros(n_head_kv, 0, dtype=torch.long, device=device)
    for start in range(0, total, schedule.block):
        end = min(start + schedule.block, total)
        new = torch.arange(start, end, device=device).expand(n_head_kv, -1)
        entries = torch.cat((held, new), dim=-1)
        scores = ranks(end).expand(n_head_kv, -1).gather(-1, entries)
        stays = kept_mask(scores, schedule.limit(end, sinks, window), sinks, window)
        yield Block(start, end, held, entries[~stays].view(n_head_kv, -1))
        held = entries[stays].view(n_head_kv, -1)


def attend_block(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> Tensor:
    """What a block's queries read of a bounded cache: q [Hq, T, D] and k, v [H, T, D] of the text -> [Hq, n, D]."""
    rows = slice(block.start, block.end)
    n, n_held = block.end - block.start, block.held.shape[1]
    kept_k, kept_v = (torch.cat((pick(a, block.held), a[:, rows]), dim=1) for a in (k, v))
    visible = torch.ones(n, n_held + n, dtype=torch.bool, device=q.device).tril(n_held)
    return torch.nn.functional.scaled_dot_product_attention(
        q[None, :, rows], kept_k[None], kept_v[None], attn_mask=visible, scale=scale, enable_gqa=True
    )[0]


def pick(a: Tensor, positions: Tensor) -> Tensor:
    """Rows [H, n, D] of a [H, T, D] at positions [H, n], which differ from head to head."""
    return a.gather(1, positions[..., None].expand(-1, -1, a.shape[-1]))
