"""The options of the bounded cache: their defaults, and what is wrong with a combination of them."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Optional, Union

from .errors import BudgetError, PolicyError

if TYPE_CHECKING:
    from ._capi import Request

DEFAULT_POLICY = "streaming"
DEFAULT_BUDGET = 1024  # of the command line; Llama itself is unbounded unless told otherwise
DEFAULT_SINKS = 4
DEFAULT_WINDOW = 128
PIN_AUTO = "auto"
LOGICAL_MAX = 1 << 21  # default n_ctx with a budget: a limit on positions, not on memory

_MAX_COUNT = (1 << 31) - 1


def minimum_budget(sinks: int, pin: int, window: int) -> int:
    """The smallest budget that protects these and still has something to evict."""
    return max(sinks, pin) + window + 1


def _count(name: str, value: Any, largest: int = _MAX_COUNT) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise BudgetError(f"{name} must be a whole number of tokens, found {value!r}") from None
    if not 0 <= number <= largest:
        raise BudgetError(f"{name} must be from 0 to {largest}, found {number}")
    return number


@dataclass(frozen=True)
class CacheOptions:
    """What the user asked of the KV cache. `budget` 0 means unbounded: llama.cpp's own cache."""

    budget: int = 0
    policy: str = DEFAULT_POLICY
    sinks: int = DEFAULT_SINKS
    window: int = DEFAULT_WINDOW
    pin: Union[int, str] = 0
    evict_step: int = 0
    seed: int = 0

    @classmethod
    def checked(
        cls,
        budget: Optional[int],
        policy: str,
        sinks: int,
        window: int,
        pin: Union[int, str],
        evict_step: int,
        seed: int,
    ) -> CacheOptions:
        """Validates what does not depend on the model.

        Raises:
            BudgetError: a value is out of range, or the budget is too small; the message names the minimum.
            PolicyError: no such policy; the message lists them.
        """
        size = 0 if budget is None else _count("kv_budget", budget)
        if size == 0:
            return cls()
        if isinstance(pin, str) and pin != PIN_AUTO:
            raise BudgetError(f'kv_pin must be a number of tokens or "{PIN_AUTO}", found {pin!r}')
        fixed_pin = PIN_AUTO if pin == PIN_AUTO else _count("kv_pin", pin)
        options = cls(
            budget=size,
            policy=policy,
            sinks=_count("kv_sinks", sinks),
            window=_count("kv_window", window),
            pin=fixed_pin,
            evict_step=_count("kv_evict_step", evict_step),
            seed=_count("kv_seed", seed, (1 << 64) - 1),
        )
        options.require_room(options.fixed_pin, "kv_pin")
        from . import _capi  # here, because it loads the library: --help needs only the defaults

        known = _capi.policies()
        if policy not in known:
            raise PolicyError(f"unknown kv_policy {policy!r}: choose one of {', '.join(sorted(known))}")
        return options

    @property
    def bounded(self) -> bool:
        """Whether there is a budget at all."""
        return self.budget > 0

    @property
    def auto_pin(self) -> bool:
        """Whether the pinned prefix follows the system prompt."""
        return self.pin == PIN_AUTO

    @property
    def fixed_pin(self) -> int:
        """The pinned prefix that is known before there is a prompt."""
        return 0 if isinstance(self.pin, str) else self.pin

    def require_room(self, pin: int, what: str) -> None:
        """Raises BudgetError if a pinned prefix of `pin` tokens leaves nothing to evict."""
        least = minimum_budget(self.sinks, pin, self.window)
        if self.budget < least:
            raise BudgetError(
                f"kv_budget {self.budget} is too small: at least {least} are needed (the larger of kv_sinks "
                f"{self.sinks} and {what} {pin}, plus kv_window {self.window}, plus 1 to evict). Raise kv_budget to "
                f"{least} or more, or lower the others"
            )

    def request(self) -> Request:
        """The same, as the native library takes it."""
        from ._capi import Request

        return Request(self.budget, self.policy, self.sinks, self.window, self.fixed_pin, self.evict_step, self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for session files and JSON."""
        return asdict(self)

    def keywords(self) -> dict[str, Any]:
        """The same as keyword arguments of `Llama`."""
        return {f"kv_{name}": value for name, value in self.to_dict().items()}
