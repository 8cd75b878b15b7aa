"""What a model and its cache will take, before they are loaded: a dry run of the library, which allocates nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Optional, Union

from ..files.modelfile import check_model_file, loaded_model
from ..native import api
from ..options import CacheOptions, require_known, split_keywords
from .checkpoints import default_limit
from .contexts import context_of
from .creation import options_for
from .inside import MAKE


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parts of a cache, and of what there is beside it."""

    kv: int  # keys and values of layers that are bounded; without a budget of all layers, states included
    meta: int = 0  # positions, and what policy, indexer and memory keep
    fixed: int = 0  # of layers that a budget does not bound: windows and recurrent states
    slots: int = 0  # per KV head; 0 without a budget
    exact: int = 0  # tokens that are kept before the first is evicted, in any KV head; without a budget as many as there is room for
    budget: int = 0  # 0: none
    model: int = 0  # weights, in all forms that they are kept in
    sidecar: int = 0  # those of an indexer or a memory
    compute: int = 0  # compute buffers, if the logits after one token at a time are wanted
    work: int = 0  # what the CPU takes for the cache's own ops
    span_reason: str = ""  # why positions grow with the text although they were to stay below the trained length

    @property
    def total(self) -> int:
        """All of the cache."""
        return self.kv + self.meta + self.fixed

    @property
    def copy(self) -> int:
        """A copy of the state when the budget is used up: entries, and not the slots of the working room. 0 without a budget,
        as nobody keeps one then.
        """
        if not self.budget:
            return 0
        return (self.kv + self.meta) * self.budget // self.slots + self.fixed

    def copies(self, limit: Optional[int] = None) -> int:
        """The copies that a `Llama` keeps, at most: those to go on from, of `limit` bytes together (None: as by default), and
        the one to come back to after a cancel.
        """
        if not self.copy:
            return 0
        limit = default_limit(self.total) if limit is None else limit
        return (limit // self.copy + 1) * self.copy

    @property
    def room(self) -> int:
        """What is needed to compute."""
        return self.compute + self.work


def kv_bytes(model_path: Union[str, os.PathLike[str]], keywords: Mapping[str, Any]) -> Sizes:
    """What a `Llama` with these keywords would have.

    Raises:
        BudgetError, PolicyError, SidecarError, LatentMemoryError, ModelNotSupported: the options are impossible.
        ModelFileError, ContextError: the model cannot be loaded.
    """
    path = check_model_file(model_path)
    asked, others = split_keywords(keywords)
    require_known(others, MAKE.parameters)
    options, _ = options_for(path, asked)
    with dry_model(path) as model:
        return model.sizes(options, others)


@contextlib.contextmanager
def dry_model(path: str) -> Iterator[DryModel]:
    """A model file for as many dry runs as wanted.

    Raises:
        ModelFileError: it cannot be loaded.
    """
    with loaded_model(path, as_used=True, dry=True) as model:
        yield DryModel(path, model)


class DryModel:
    """A model without its weights: contexts of it take nothing, and know what they would take.

    Attributes:
        handle: the library's llama_model.
    """

    def __init__(self, path: str, handle: int) -> None:
        self._path = path
        self.handle = handle

    def sizes(self, options: CacheOptions, keywords: Mapping[str, Any]) -> Sizes:
        """What a `Llama` with these options of the cache, and these other keywords, would have.

        Raises what `context_of` does.
        """
        with context_of(self._path, self.handle, options, keywords) as context:
            model = api.model_bytes(context)
            if not options.bounded:
                room = int(api.llama_lib.llama_n_ctx(context))
                return Sizes(api.cache_bytes(context), exact=room, model=model, compute=api.compute_bytes(context))
            stats = api.get_stats(context)
            return Sizes(
                kv=stats.kv_bytes,
                meta=stats.meta_bytes,
                fixed=stats.window_bytes + stats.recurrent_bytes,
                slots=stats.n_slots,
                exact=min(stats.class_budget[: stats.n_classes]) - stats.memory_slots,  # until the smallest KV head is full
                budget=options.budget,
                model=model,
                sidecar=stats.sidecar_bytes,
                compute=stats.compute_bytes,
                work=stats.work_bytes,
                span_reason=api.span_reason(context),
            )
