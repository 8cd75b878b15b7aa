"""The options of the cache as settings of llama-cpp-python's server: flags, variables of the environment, and keys of its config file.

Its settings of a model derive from `CacheSettings` (native/patches/0023), so they have the names that `Llama` has: --kv_budget, KV_BUDGET.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Union, get_args

from pydantic import Field, create_model
from pydantic_settings import BaseSettings

from ..options import OPTIONS, CacheOptions

# What the server gives a model where nobody has named it, and a budget has better values for: its 2048 tokens of context would end a
# conversation that has no end, and the logits of all tokens are as large as they are many.
_LEFT_TO_LLAMA = ("n_ctx", "n_ubatch", "flash_attn", "logits_all")


class _CacheSettings(BaseSettings):
    kv_checkpoints: Optional[int] = Field(
        default=None, ge=0, description="Bytes for copies of the state that edits and other conversations go on from. 0: none."
    )

    def with_cache(self, **keywords: Any) -> dict[str, Any]:
        """Keyword arguments of `Llama`: those that are given, and the options of the cache that somebody has set."""
        names = [option.keyword for option in OPTIONS.values()] + ["kv_checkpoints"]
        asked = {name: value for name in names if (value := getattr(self, name)) is not None}
        if asked.get("kv_budget"):
            for name in _LEFT_TO_LLAMA:
                if name not in self.model_fields_set:
                    keywords.pop(name, None)
        return {**keywords, **asked}


def _fields() -> dict[str, Any]:
    """Type and description of each option, as pydantic wants them."""
    fields = {}
    for name, option in OPTIONS.items():
        default = option.shown or getattr(CacheOptions, name)
        about = option.help if name == "budget" else f"{option.help} Default: {default}."
        kinds = [option.kind, *(kind for kind in get_args(option.takes) if isinstance(kind, type))] # the first is that of a flag
        fields[option.keyword] = Optional[Union[tuple(kinds)]], Field(default=None, description=about.replace("%", "%%"))
    return fields


if TYPE_CHECKING:
    CacheSettings = _CacheSettings
else:
    CacheSettings = create_model("CacheSettings", __base__=_CacheSettings, **_fields())
