"""The options of the bounded cache: the one list of them, their defaults, and what is wrong with a combination.

`CacheOptions` is that list. What else has to know an option takes it from there: the keywords of `Llama`, what the native
library is asked for, the flags of the command line, the benchmarks. docs/design.md says how to add one.
"""

from __future__ import annotations

import difflib
import inspect
import operator
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Optional, Union

from .errors import BudgetError, PolicyError
from .files.modelfile import check_sidecar_file
from .runtime.choice import (
    DEFAULT_MEMORY_SLOTS,
    DEFAULT_POLICY,
    INDEXER_POLICY,
    MEMORY_OFF,
    choose_memory,
    choose_policy,
    sidecar_kinds,
)

DEFAULT_BUDGET = 1024  # of the command line; Llama itself is unbounded unless told otherwise
DEFAULT_SINKS = 4
DEFAULT_WINDOW = 0  # chosen from the budget
LEAST_WINDOW = 128  # of one that is chosen so
PIN_AUTO = "auto"
SIDECAR_OFF = "off"
LAYERS_SIDECAR, LAYERS_EQUAL = "sidecar", "equal"  # budgets of layers
LOGICAL_MAX = 1 << 21  # default n_ctx with a budget: a limit on positions, not on memory
DEFAULT_UBATCH = 512

_MAX_COUNT = (1 << 31) - 1
_LEAST_UBATCH = 32
_SLOTS_PAD = 256  # N_KV_PAD: slots come in multiples of it

PathLike = Union[str, "os.PathLike[str]"]


def minimum_budget(sinks: int, pin: int, window: int, memory_slots: int = 0) -> int:
    """The smallest budget that protects these, has slots for a memory, and still has something to evict. Window 0: chosen."""
    return max(sinks, pin) + (window or LEAST_WINDOW) + memory_slots + 1


def default_ubatch(budget: int) -> int:
    """Tokens evaluated at once with a budget: they take working room, so not much more than half of it, a power of two.

    Slots come in multiples of 256, so a ubatch that fits into what that leaves costs nothing. Without a budget 512.
    """
    if budget <= 0:
        return DEFAULT_UBATCH
    n = _LEAST_UBATCH
    while n < DEFAULT_UBATCH and (2 * n <= budget // 2 or _padded(budget + 2 * n) == _padded(budget + n)):
        n *= 2
    return n


def _padded(n: int) -> int:
    return -(-n // _SLOTS_PAD) * _SLOTS_PAD


# what a value has to be; each takes the option's keyword and the value, and returns the value that is meant


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


def check_checkpoints(value: Any, bounded: bool) -> Optional[int]:
    """`kv_checkpoints`: bytes, or None.

    Raises:
        BudgetError: it is no number of bytes, or there is no budget.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 0:
        raise BudgetError(f"kv_checkpoints must be a whole number of bytes, found {value!r}")
    if not bounded and value:
        raise BudgetError("kv_checkpoints is for copies of a bounded cache: give a kv_budget, or leave it out")
    return operator.index(value)


def _seed(name: str, value: Any) -> int:
    return _count(name, value, (1 << 64) - 1)


def _slots(name: str, value: Any) -> int:
    if _count(name, value) == 0:
        raise BudgetError(f"{name} must be at least 1, found 0: memory 'off' is none")
    return int(value)


def _pin(name: str, value: Any) -> Union[int, str]:
    if isinstance(value, str):
        if value == PIN_AUTO:
            return value
        if not (value.isascii() and value.isdigit()):
            raise BudgetError(f'{name} must be a number of tokens or "{PIN_AUTO}", found {value!r}')
        value = int(value)
    return _count(name, value)


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BudgetError(f"{name} must be a name, found {value!r}")
    return value


def _layer_budgets(name: str, value: Any) -> str:
    if value not in (LAYERS_SIDECAR, LAYERS_EQUAL):
        raise BudgetError(f"{name} must be {LAYERS_SIDECAR!r} or {LAYERS_EQUAL!r}, found {value!r}")
    return str(value)


def _sidecar(name: str, value: Any) -> Optional[str]:
    return None if value == SIDECAR_OFF else check_sidecar_file(value)


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
class Option:
    """What there is to know of one option, beside the default."""

    keyword: str  # of `Llama`
    help: str  # for the command line and for the docstring of `Llama`
    check: Callable[[str, Any], Any]
    kind: Any = int  # of a value on the command line
    takes: Any = int  # of the keyword, beside None
    least: Optional[int] = None  # on the command line
    shown: Optional[str] = None  # as the default, where that is not a value
    metavar: Optional[str] = None
    in_session: bool = False  # whether a session says what it was
    nothing: Any = None  # a value that asks for nothing, and so needs no budget

    @property
    def flag(self) -> str:
        """Of the command line."""
        return "--" + self.keyword.replace("_", "-")


def _option(default: Any, keyword: str, help: str, check: Callable[[str, Any], Any], **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(keyword, help, check, **more)})


@dataclass(frozen=True)
class CacheOptions:
    """What is asked of the KV cache. `budget` 0 means unbounded: llama.cpp's own cache.

    The fields are named as in the native library (indexmem_params), which is filled from them. `from_keywords` is how one
    is made of what a person gave; by itself the class checks nothing.
    """

    budget: int = _option(
        0, "kv_budget",
        "Entries that each KV head keeps, however long the text gets. 0: llama.cpp's own cache, unbounded.",
        _count, least=0, in_session=True,
    )  # fmt: skip
    budget_ratio: Optional[float] = _option(
        None, "kv_budget_ratio",
        "Keep no more than this share of the tokens seen, either (0.25: a quarter of them), nor fewer than the protected "
        "ones; the budget remains the most that is kept.",
        check_share, kind=float, takes=float,
    )  # fmt: skip
    sidecar: Optional[str] = _option(
        None, "indexmem",
        "Sidecar with an indexer or a memory for the model; `indexmem inspect` shows what is in it. `off`: none.",
        _sidecar, kind=str, takes=PathLike, metavar="FILE", nothing=SIDECAR_OFF,
        shown="one for this model that lies beside it or comes with this package",
    )  # fmt: skip
    memory: str = _option(
        MEMORY_OFF, "memory",
        "What becomes of evicted entries: `centroid` keeps running means of them and needs no training, `residual` needs a "
        "trained sidecar, `off` forgets them.",
        _name, kind=str, takes=str, in_session=True, nothing=MEMORY_OFF,
        shown=f"that of the sidecar, without one {MEMORY_OFF}",
    )  # fmt: skip
    memory_slots: int = _option(  # 0: none, or as the sidecar says
        0, "memory_slots", "Slots of the memory `centroid` per KV head, out of the budget.", _slots, least=1,
        shown=f"that of the sidecar, without one {DEFAULT_MEMORY_SLOTS}",
    )  # fmt: skip
    policy: str = _option(
        DEFAULT_POLICY, "kv_policy",
        "Who is evicted when the budget is reached; `indexmem doctor` lists the policies.",
        _name, kind=str, takes=str, in_session=True,
        shown=f"{INDEXER_POLICY} with a sidecar that has one, else {DEFAULT_POLICY}",
    )  # fmt: skip
    sinks: int = _option(
        DEFAULT_SINKS, "kv_sinks", "First tokens, which are never evicted.", _count, least=0, in_session=True
    )
    window: int = _option(  # 0: chosen from the budget
        DEFAULT_WINDOW, "kv_window", "Most recent tokens, which are never evicted.", _count, least=0, in_session=True,
        shown=f"a quarter of what is not protected of the budget, at least {LEAST_WINDOW}",
    )  # fmt: skip
    pin: Union[int, str] = _option(
        PIN_AUTO, "kv_pin", "Tokens of a prefix that is never evicted; `auto`: the system prompt of a chat.", _pin,
        kind=str, takes=Union[int, str], in_session=True,
    )  # fmt: skip
    evict_step: int = _option(
        0, "kv_evict_step", "Entries evicted at once while an answer is generated.", _count, least=0, in_session=True,
        shown="chosen from the budget",
    )  # fmt: skip
    seed: int = _option(0, "kv_seed", "Of policies that draw numbers.", _seed, least=0, in_session=True)
    span: Optional[int] = _option(  # None: as many as the model was trained for
        None, "kv_span",
        "Positions that are used: what is kept gets new ones, in its order, before the text passes them. At least the budget "
        "and the ubatch. 0: positions grow with the text.",
        _count, least=0, nothing=0, shown="the length the model was trained for",
    )  # fmt: skip
    layer_budgets: str = _option(
        LAYERS_SIDECAR, "kv_layer_budgets",
        f"`{LAYERS_SIDECAR}`: layers, and their KV heads, share what all may keep as the sidecar of the indexer says, if it does. "
        f"`{LAYERS_EQUAL}`: each keeps as much as the others.",
        _layer_budgets, kind=str, takes=str, nothing=LAYERS_SIDECAR,
    )  # fmt: skip

    @classmethod
    def from_keywords(cls, given: Mapping[str, Any]) -> CacheOptions:
        """What keywords of `Llama` come to. Those that are None, or not there, are not given.

        Validates what does not depend on the model.

        Raises:
            BudgetError: a value is out of range, there is none such, it needs a budget, or the budget is too small; the
                message names the minimum.
            PolicyError: no such policy (the message lists them), or one that contradicts the sidecar.
            SidecarError: the sidecar is not there, or not a GGUF file.
            LatentMemoryError: no such memory (the message lists them), or not without trained weights.
        """
        keywords = {option.keyword for option in OPTIONS.values()}
        require_known([name for name in given if name not in keywords], ())
        asked = {
            name: option.check(option.keyword, given[option.keyword])
            for name, option in OPTIONS.items()
            if given.get(option.keyword) is not None
        }
        if not asked.get("budget"):
            for name, option in OPTIONS.items():
                if name in asked and name != "budget" and given[option.keyword] != option.nothing:
                    raise BudgetError(
                        f"{option.keyword} needs a bounded KV cache: give a kv_budget ({OPTIONS['budget'].flag}), or leave "
                        f"{option.keyword} out"
                    )
            return cls()
        from .native import api  # here, because it loads the library: --help needs only the defaults

        kinds = sidecar_kinds(asked.get("sidecar"))
        memory, slots = choose_memory(asked.get("memory"), asked.get("memory_slots"), kinds, api.memories())
        policy = choose_policy(asked.get("policy"), memory, asked.get("sidecar"), kinds)
        options = cls(**{**asked, "memory": memory, "memory_slots": slots, "policy": policy})
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

    def pin_room(self) -> int:
        """The longest prefix that can be pinned."""
        return self.budget - minimum_budget(0, 0, self.window, self.memory_slots)

    def require_room(self, pin: int, what: str) -> None:
        """Raises BudgetError if a pinned prefix of `pin` tokens leaves nothing to evict. (Where a sidecar divides the budget, KV heads that
        have less room keep its beginning.)
        """
        least = minimum_budget(self.sinks, pin, self.window, self.memory_slots)
        if self.budget < least:
            slots = f"plus {self.memory_slots} memory_slots, " if self.memory_slots else ""
            raise BudgetError(
                f"kv_budget {self.budget} is too small: at least {least} are needed (the larger of kv_sinks "
                f"{self.sinks} and {what} {pin}, plus kv_window {self.window or LEAST_WINDOW}, {slots}plus 1 to evict). Raise kv_budget "
                f"to {least} or more, or lower the others"
            )

    def request(self) -> None:
        """Asks the native library that the next context of this thread have this cache; one without a budget asks nothing."""
        if self.bounded:
            from .native import api

            values = {name: getattr(self, name) for name in OPTIONS}
            api.request_context(**{**values, "pin": self.fixed_pin})

    def keywords(self) -> dict[str, Any]:
        """The same as keyword arguments of `Llama`."""
        if not self.bounded:
            return {}
        values = {option.keyword: getattr(self, name) for name, option in OPTIONS.items()}
        return {**values, "indexmem": self.sidecar or SIDECAR_OFF, "memory_slots": self.memory_slots or None}

    def for_session(self) -> dict[str, Any]:
        """What a session says that its cache was asked for, by keyword.

        The sidecar goes by its content, the number of memory slots is the cache's to say, whether a span is needed the
        state's, which has its own pinned prefix, too.
        """
        return {option.keyword: getattr(self, name) for name, option in OPTIONS.items() if option.in_session}


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in fields(CacheOptions)}  # by the name of the field


def split_keywords(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of `Llama`: those of the cache, and the others."""
    ours = {option.keyword for option in OPTIONS.values()}
    return {k: v for k, v in kwargs.items() if k in ours}, {k: v for k, v in kwargs.items() if k not in ours}


def require_known(names: Collection[str], others: Collection[str]) -> None:
    """Raises BudgetError for a keyword that was meant to be one of the cache's, and is none.

    Such are all that begin with `kv_`, or are nearly spelled like one of ours. `others` are llama_cpp's, which takes any
    further keyword without a word.
    """
    ours = [*(option.keyword for option in OPTIONS.values()), "kv_cancel", "kv_checkpoints", "kv_warn"]
    for name in names:
        if name in others:
            continue
        near = difflib.get_close_matches(name, ours, 1, 0.8)
        if near or name.startswith("kv_"):
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(ours))}"
            raise BudgetError(f"unknown option {name} of the KV cache: {meant}")


def signature_of(method: Callable[..., Any], base: Callable[..., Any]) -> inspect.Signature:
    """That of a method that takes the options of the cache, and keywords of `base`, among its own `**kwargs`."""
    own = list(inspect.signature(method).parameters.values())
    named = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
    only = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(option.keyword, only, default=None, annotation=Optional[option.takes])
        for option in OPTIONS.values()
    ]
    known = {p.name for p in (*named, *options)}
    others = [p for p in inspect.signature(base).parameters.values() if p.name not in known]
    return inspect.Signature([*named, *options, *others])


def described(indent: str = " " * 8) -> str:
    """The options as lines of a docstring."""
    lines = []
    for name, option in OPTIONS.items():
        default = option.shown or getattr(CacheOptions, name)
        lines.append(f"{indent}{option.keyword}: {option.help}" + ("" if name == "budget" else f" Default: {default}."))
    return "\n".join(lines)


def bounded_keywords(kwargs: Mapping[str, Any], budget: int) -> dict[str, Any]:
    """Keyword arguments of `llama_cpp.Llama`, with what a bounded cache needs.

    Raises:
        BudgetError: one of them cannot be combined with a budget.
    """
    if kwargs.get("embedding"):
        raise BudgetError("embedding=True cannot be combined with kv_budget: use a second Llama without one")
    if kwargs.get("flash_attn") is not None and not kwargs["flash_attn"]:
        raise BudgetError("flash_attn=False cannot be combined with kv_budget: leave flash_attn out")
    n_ctx, n_ubatch = kwargs.get("n_ctx"), kwargs.get("n_ubatch")
    if n_ctx is None:
        n_ctx = 0 if kwargs.get("logits_all") else LOGICAL_MAX
    if n_ubatch is None:
        n_ubatch = default_ubatch(budget)
    return {**kwargs, "flash_attn": True, "n_ctx": n_ctx, "n_ubatch": n_ubatch}
