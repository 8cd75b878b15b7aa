"""What of a model fits into so much memory: with which budget and type of cache, from the sizes that the library itself computes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

from ..errors import BudgetError, ContextError, IndexMemError, ModelNotSupported, SidecarError
from ..files import cachetypes
from ..files.modelfile import check_model_file, gguf_values
from ..native import api
from ..native.memory import free_memory, resident_memory
from ..options import SIDECAR_OFF, CacheOptions, default_ubatch
from ..runtime.contexts import context_of
from ..runtime.creation import options_for
from ..runtime.sizes import DryModel, Sizes, dry_model
from . import families
from .measure import Progress, Speed, measured
from .sidecars import Found

CACHE_TYPES = ("f16", "q8_0", "q4_0")  # that are looked at
_STEP = 256  # slots are allocated in steps of so many
_USUAL, _LEAST = 1024, 256  # budgets: the least that is looked at, and where not even that fits
_LONGEST = 131072  # of models that do not say what length they were trained for
_RESERVE, _RESERVED_SHARE = 256 << 20, 10  # of the free memory that is left to other programs: so many bytes, or a tenth
_SHORTEST = 512  # tokens of a context without a budget
_ARCHITECTURE = "general.architecture"
_NO_TEXT = f"{families.ENCODERS} {families.EMBEDDING} {families.BUCKETS} {families.DIFFUSION}".split()  # they do not go on with a text


@dataclass(frozen=True)
class Memory:
    """Bytes that there are for a model."""

    usable: int
    free: Optional[int] = None  # that were free, if nobody said how many to use
    reserve: int = 0  # that are left to others of these


@dataclass(frozen=True)
class Row:
    """One choice: a budget, or none, and a type of the cache."""

    cache_type: str
    budget: int  # 0: none
    fits: bool = False
    total: int = 0  # bytes of everything
    sizes: Optional[Sizes] = None  # None: there can be no such cache
    why_not: str = ""  # then
    speed: Optional[Speed] = None  # None: not measured

    @property
    def exact(self) -> int:
        """Tokens that are kept before the first one is dropped, or, without a budget, before the end."""
        return self.sizes.exact if self.sizes is not None else 0


@dataclass(frozen=True)
class Fit:
    """What was found."""

    path: str
    file_bytes: int  # of all files of the model
    about: str  # what the model is, in the words of the library
    trained: int  # tokens that it was trained for; 0: it does not say
    memory: Memory
    program: int  # bytes of the program itself, and of the vocabulary
    rows: tuple[Row, ...]
    sidecar: Optional[str] = None
    problems: tuple[str, ...] = ()
    refused: Optional[str] = None  # why the model cannot have a budget
    generates: bool = True
    copies: Optional[int] = None  # bytes that checkpoints may take; None: as many as by default

    @property
    def least(self) -> Optional[Row]:
        """The one that takes least."""
        return min((row for row in self.rows if row.sizes is not None), key=lambda row: row.total, default=None)

    def row_keywords(self, row: Row) -> dict[str, Any]:
        """What a `Llama` of that row is made with."""
        return {**_cache_keywords(row.budget, self.sidecar), **_other_keywords(row.budget, row.cache_type, row.exact)}


def memory_for(asked: Optional[int]) -> Memory:
    """What there is: what was asked for, or what is free now, less a reserve.

    Raises:
        BudgetError: the system does not say what is free.
    """
    if asked is not None:
        return Memory(asked)
    free = free_memory()
    if free is None:
        raise BudgetError("this system does not say how much memory is free: say how much to use, for example --memory 8G")
    reserve = max(_RESERVE, free // _RESERVED_SHARE)
    return Memory(max(free - reserve, 0), free, reserve)


def fit(model: Union[str, os.PathLike[str]], memory: Memory, copies: Optional[int] = None) -> Fit:
    """Looks at a model, of which nothing but the header is read.

    Args:
        copies: bytes that checkpoints may take. None: as many as by default, or, where no budget fits beside these, none.

    Raises:
        ModelFileError: it cannot be loaded.
    """
    path = check_model_file(model)
    with dry_model(path) as dry:
        found = _Rows(path, dry, memory, copies).all()
        if copies is not None or found.refused or any(row.fits and row.budget for row in found.rows):
            return found
        return _Rows(path, dry, memory, 0).all()


def with_speeds(found: Fit, order: tuple[Row, ...], seconds: float, progress: Optional[Progress] = None) -> Iterator[Fit]:
    """The same with what was measured of the first, of the first two, ... of some of its rows, all of which have to fit.

    Raises:
        ModelFileError, ContextError, DecodeError: the model does not run.
    """
    caches = [
        (CacheOptions.from_keywords(_cache_keywords(row.budget, found.sidecar)), _other_keywords(row.budget, row.cache_type, row.exact))
        for row in order
    ]
    for row, speed in zip(order, measured(found.path, caches, seconds, progress)):
        found = replace(found, rows=tuple(replace(r, speed=speed) if r == row else r for r in found.rows))
        yield found


def _cache_keywords(budget: int, sidecar: Optional[str]) -> dict[str, Any]:
    return {"kv_budget": budget, "indexmem": sidecar or SIDECAR_OFF} if budget else {}


def _other_keywords(budget: int, cache_type: str, context: int = 0) -> dict[str, Any]:
    """Of `Llama`, as `indexmem chat` gives them."""
    number = cachetypes.ggml_type(cache_type)
    given: dict[str, Any] = {"type_k": number, "type_v": number}
    if budget or cache_type not in cachetypes.PLAIN:
        given["flash_attn"] = True
    if not budget:
        given["n_ctx"] = context  # 0: the length that the model was trained for
    return given


class _Rows:
    """What is found out about one model."""

    def __init__(self, path: str, model: DryModel, memory: Memory, copies: Optional[int]) -> None:
        llama = api.llama_lib
        self._path = path
        self._model = model
        self._memory = memory
        self._copies = copies
        self._about = api.model_description(model.handle)
        self._trained = int(llama.llama_model_n_ctx_train(model.handle))
        self._refused = api.model_unsupported_reason(model.handle)
        found = Found() if self._refused else options_for(path, {"kv_budget": _USUAL})[1]
        self._sidecar, self._problems = found.path, list(found.problems)
        self._generates = str(gguf_values(path, [_ARCHITECTURE]).get(_ARCHITECTURE)) not in _NO_TEXT
        self._program = self._own_bytes()

    def all(self) -> Fit:
        """All rows, and what else there is to know."""
        rows = [row for name in CACHE_TYPES for row in (*self._bounded(name), *self._unbounded(name))]
        return Fit(
            path=self._path,
            file_bytes=sum(map(os.path.getsize, _parts(self._path))),
            about=self._about,
            trained=self._trained,
            memory=self._memory,
            program=self._program,
            rows=tuple(rows),
            sidecar=self._sidecar,
            problems=tuple(self._problems),
            refused=self._refused,
            generates=self._generates and any(row.sizes is not None and row.sizes.total for row in rows),
            copies=self._copies,
        )

    def _own_bytes(self) -> int:
        """What this program takes with a vocabulary and a graph, but without anything that is counted otherwise."""
        with suppress(IndexMemError), context_of(self._path, self._model.handle, CacheOptions(), _other_keywords(0, "f16", _SHORTEST)):
            return resident_memory()
        return resident_memory()

    # rows

    def _bounded(self, cache_type: str) -> list[Row]:
        """From the usual budget up to the largest that fits and one that does not; down from there, if that does not fit."""
        if self._refused:
            return []
        most = self._largest_of_use()
        first = self._row(cache_type, min(_USUAL, most))
        if first.sizes is None:
            return [first]
        if not first.fits:
            smaller = [self._row(cache_type, budget) for budget in (_LEAST, 2 * _LEAST) if budget < first.budget]
            return [*smaller, first]
        rows = [first]
        while rows[-1].budget < most and rows[-1].fits:
            rows.append(self._row(cache_type, min(2 * rows[-1].budget, most)))
        if not rows[-1].fits:
            least, beyond = rows[-2], rows[-1]
            between = self._largest(lambda n: self._row(cache_type, n), least.budget, beyond.budget)
            if between is not None:
                rows.insert(-1, between)
        return rows

    def _largest_of_use(self) -> int:
        """A budget that leaves positions below the length that the model was trained for, a ubatch included."""
        trained = self._trained or _LONGEST
        return max((trained - default_ubatch(trained)) // _STEP * _STEP, _LEAST)

    def _unbounded(self, cache_type: str) -> list[Row]:
        """llama.cpp's own cache, as long as the model was trained for, and the longest that fits."""
        whole = self._row(cache_type, 0)
        if whole.sizes is None or whole.fits or whole.exact <= _SHORTEST:
            return [whole]
        shortest = self._row(cache_type, 0, _SHORTEST)
        if not shortest.fits:
            return [whole]
        return [self._largest(lambda n: self._row(cache_type, 0, n), _SHORTEST, whole.exact) or shortest, whole]

    def _largest(self, make: Callable[[int], Row], fits: int, too_large: int) -> Optional[Row]:
        """The largest row between one that fits and one that does not; None if that is the first."""
        best = None
        low, high = fits // _STEP, -(-too_large // _STEP)
        while high - low > 1:
            middle = (low + high) // 2
            row = make(middle * _STEP)
            if row.fits:
                low, best = middle, row
            else:
                high = middle
        return best

    def _row(self, cache_type: str, budget: int, context: int = 0) -> Row:
        others = _other_keywords(budget, cache_type, context)
        try:
            sizes = self._sizes(budget, others)
        except (BudgetError, ContextError, ModelNotSupported) as error:
            return Row(cache_type, budget, why_not=str(error))
        total = self._program + sizes.model + sizes.sidecar + sizes.total + sizes.room + sizes.copies(self._copies)
        return Row(cache_type, budget, total <= self._memory.usable, total, sizes)

    def _sizes(self, budget: int, others: dict[str, Any]) -> Sizes:
        """Without the sidecar, if it turns out that it cannot be used: nobody asked for it."""
        try:
            return self._model.sizes(CacheOptions.from_keywords(_cache_keywords(budget, self._sidecar)), others)
        except SidecarError as error:
            if self._sidecar is None:
                raise
            self._problems.append(f"the sidecar {self._sidecar} is not used: {error}")
            self._sidecar = None
            return self._model.sizes(CacheOptions.from_keywords(_cache_keywords(budget, None)), others)


def _parts(path: str) -> Iterator[str]:
    """All files of a model, of which the first is named."""
    yield path
    n = int(gguf_values(path, ["split.count"]).get("split.count", 1))
    if n > 1:
        pattern = re.compile(rf"-\d{{5}}-of-{n:05d}(?=\.gguf$)")
        others = (pattern.sub(f"-{i:05d}-of-{n:05d}", path) for i in range(2, n + 1))
        yield from (name for name in others if os.path.isfile(name))
