"""Types for methods that hand their arguments on, for type checkers and editors: nothing here does anything at run time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Optional, TypeVar, Union, cast

from ..errors import CacheWarning

Method = TypeVar("Method", bound=Callable[..., Any])


def like(original: Method) -> Callable[[Callable[..., Any]], Method]:
    """Gives a method the types of `original`. It stays as it is."""

    def typed(method: Callable[..., Any]) -> Method:
        return cast(Method, method)

    return typed


def made_with(
    self: Any,
    model_path: Union[str, os.PathLike[str]],
    *,
    kv_budget: Optional[int] = None,
    kv_budget_ratio: Optional[float] = None,
    indexmem: Union[str, os.PathLike[str], None] = None,
    memory: Optional[str] = None,
    memory_slots: Optional[int] = None,
    kv_policy: Optional[str] = None,
    kv_sinks: Optional[int] = None,
    kv_window: Optional[int] = None,
    kv_pin: Union[int, str, None] = None,
    kv_evict_step: Optional[int] = None,
    kv_seed: Optional[int] = None,
    kv_span: Optional[int] = None,
    kv_layer_budgets: Optional[str] = None,
    kv_cancel: bool = True,
    kv_checkpoints: Optional[int] = None,
    kv_warn: Optional[Callable[[CacheWarning], None]] = None,
    **kwargs: Any,
) -> None:
    """What `Llama` is made with: the options of the cache, which tests compare with `CacheOptions`, and llama_cpp's."""
