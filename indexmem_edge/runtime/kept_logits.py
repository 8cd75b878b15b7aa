"""Logits that the library no longer has, because a call that was cancelled has overwritten them."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import numpy.typing as npt

from .._vendor.llama_cpp import llama_cpp as llama_lib
from ..native import api  # noqa: F401  (chooses the library)

if TYPE_CHECKING:
    from ..llama import Llama

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class KeptLogits:
    """Those after the last token of the conversation."""

    def __init__(self, values: npt.NDArray[np.float32]) -> None:
        self._values = values

    @classmethod
    def of(cls, llm: Llama) -> Optional[KeptLogits]:
        """A copy, where there are any."""
        if llm.n_tokens == 0 or llm._requires_eval:
            return None
        found = llama_lib.llama_get_logits_ith(llm.ctx, -1)
        return cls(np.ctypeslib.as_array(found, shape=(llm._n_vocab,)).copy()) if found else None

    def sample(self, sampler: Any) -> int:
        """What llama_sampler_sample does with logits of a context."""
        candidates = np.zeros(len(self._values), dtype=_CANDIDATE)
        candidates["id"], candidates["logit"] = np.arange(len(self._values)), self._values
        data = candidates.ctypes.data_as(llama_lib.llama_token_data_p)
        array = llama_lib.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
        llama_lib.llama_sampler_apply(sampler.sampler, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        llama_lib.llama_sampler_accept(sampler.sampler, token)
        return token
