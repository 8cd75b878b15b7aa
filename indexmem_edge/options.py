"""The options of the bounded cache: their defaults, and what is wrong with a combination of them."""

from __future__ import annotations

import operator
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Optional, Union

from .errors import BudgetError, PolicyError
from .files.modelfile import check_sidecar_file
from .runtime.choice import DEFAULT_POLICY, MEMORY_OFF, choose_memory, choose_policy, sidecar_kinds

if TYPE_CHECKING:
    from .native.api import Request

DEFAULT_BUDGET = 1024  # of the command line; Llama itself is unbounded unless told otherwise
DEFAULT_SINKS = 4
DEFAULT_WINDOW = 128
PIN_AUTO = "auto"
LOGICAL_MAX = 1 << 21  # default n_ctx with a budget: a limit on positions, not on memory

_MAX_COUNT = (1 << 31) - 1


def minimum_budget(sinks: int, pin: int, window: int, memory_slots: int = 0) -> int:
    """The smallest budget that protects these, has slots for a memory, and still has something to evict."""
    return max(sinks, pin) + window + memory_slots + 1


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


def check_share(name: str, value: Any) -> float:
    """A share as a number; BudgetError if it is none."""
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise BudgetError(f"{name} must be a number above 0, at most 1, found {value!r}") from None
    if not 0 < number <= 1:
        raise BudgetError(f"{name} must be above 0 and at most 1, found {number:g}")
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
    budget_ratio: Optional[float] = None  # of the tokens seen
    sidecar: Optional[str] = None
    memory: str = MEMORY_OFF
    memory_slots: int = 0  # 0: none, or as the sidecar says
    span: Optional[int] = None  # positions that are used; None: as many as the model was trained for, 0: they grow

    @classmethod
    def checked(
        cls,
        budget: Optional[int],
        policy: Optional[str],
        sinks: int,
        window: int,
        pin: Union[int, str],
        evict_step: int,
        seed: int,
        budget_ratio: Optional[float] = None,
        sidecar: Union[str, os.PathLike[str], None] = None,
        memory: Optional[str] = None,
        memory_slots: Optional[int] = None,
        span: Optional[int] = None,
    ) -> CacheOptions:
        """Validates what does not depend on the model.

        Raises:
            BudgetError: a value is out of range, or the budget is too small; the message names the minimum.
            PolicyError: no such policy (the message lists them), or one that contradicts the sidecar.
            SidecarError: the sidecar is not there, or not a GGUF file.
            LatentMemoryError: no such memory (the message lists them), or not without trained weights.
        """
        size = 0 if budget is None else _count("kv_budget", budget)
        if size == 0:
            asked = {
                "a sidecar (indexmem)": sidecar is not None, "kv_budget_ratio": budget_ratio is not None,
                "a latent memory (memory)": memory not in (None, MEMORY_OFF), "memory_slots": memory_slots is not None,
                "kv_span": span not in (None, 0),
            }  # fmt: skip
            for name, given in asked.items():
                if given:
                    raise BudgetError(f"{name} needs a bounded KV cache: give a kv_budget, or leave it out")
            return cls()
        path = None if sidecar is None else check_sidecar_file(sidecar)
        if isinstance(pin, str) and pin != PIN_AUTO:
            raise BudgetError(f'kv_pin must be a number of tokens or "{PIN_AUTO}", found {pin!r}')
        fixed_pin = PIN_AUTO if pin == PIN_AUTO else _count("kv_pin", pin)
        from .native import api  # here, because it loads the library: --help needs only the defaults

        kinds = sidecar_kinds(path)
        if memory_slots is not None and _count("memory_slots", memory_slots) == 0:
            raise BudgetError("memory_slots must be at least 1, found 0: memory 'off' is none")
        kind, slots = choose_memory(memory, memory_slots, kinds, api.memories())
        options = cls(
            budget=size,
            policy=choose_policy(policy, kind, path, kinds),
            sinks=_count("kv_sinks", sinks),
            window=_count("kv_window", window),
            pin=fixed_pin,
            evict_step=_count("kv_evict_step", evict_step),
            seed=_count("kv_seed", seed, (1 << 64) - 1),
            budget_ratio=None if budget_ratio is None else check_share("kv_budget_ratio", budget_ratio),
            sidecar=path,
            memory=kind,
            memory_slots=slots,
            span=None if span is None else _count("kv_span", span),
        )
        options.require_room(options.fixed_pin, "kv_pin")
        known = api.policies()
        if options.policy not in known:
            raise PolicyError(f"unknown kv_policy {options.policy!r}: choose one of {', '.join(sorted(known))}")
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
        least = minimum_budget(self.sinks, pin, self.window, self.memory_slots)
        if self.budget < least:
            slots = f"plus {self.memory_slots} memory_slots, " if self.memory_slots else ""
            raise BudgetError(
                f"kv_budget {self.budget} is too small: at least {least} are needed (the larger of kv_sinks "
                f"{self.sinks} and {what} {pin}, plus kv_window {self.window}, {slots}plus 1 to evict). Raise kv_budget "
                f"to {least} or more, or lower the others"
            )

    def request(self) -> Request:
        """The same, as the native library takes it."""
        from .native.api import SPAN_TRAINED, Request

        return Request(
            self.budget,
            self.policy,
            self.sinks,
            self.window,
            self.fixed_pin,
            self.evict_step,
            self.seed,
            self.budget_ratio or 0.0,
            self.sidecar,
            self.memory,
            self.memory_slots,
            SPAN_TRAINED if self.span is None else self.span,
        )

    def keywords(self) -> dict[str, Any]:
        """The same as keyword arguments of `Llama`."""
        values = asdict(self)
        own = {"indexmem": values.pop("sidecar"), "memory": values.pop("memory")}
        own["memory_slots"] = values.pop("memory_slots") or None
        return {**own, **{f"kv_{name}": value for name, value in values.items()}}

    def fixed_for_state(self) -> dict[str, Any]:
        """What must be equal to continue a KV state: all but the ratio, the span, and the sidecar, which goes by content.

        The number of memory slots is the cache's to say, and whether it needs a span the state's.
        """
        free = ("indexmem", "kv_budget_ratio", "kv_span", "memory_slots")
        return {name: value for name, value in self.keywords().items() if name not in free}


def bounded_keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `llama_cpp.Llama`, with what a bounded cache needs.

    Raises:
        BudgetError: one of them cannot be combined with a budget.
    """
    if kwargs.get("embedding"):
        raise BudgetError("embedding=True cannot be combined with kv_budget: use a second Llama without one")
    if kwargs.get("draft_model") is not None:
        raise BudgetError("draft_model cannot be combined with kv_budget: rejected drafts cannot be taken out again")
    if kwargs.get("flash_attn") is not None and not kwargs["flash_attn"]:
        raise BudgetError("flash_attn=False cannot be combined with kv_budget: leave flash_attn out")
    n_ctx = kwargs.get("n_ctx")
    if n_ctx is None:
        n_ctx = 0 if kwargs.get("logits_all") else LOGICAL_MAX
    return {**kwargs, "flash_attn": True, "n_ctx": n_ctx}
