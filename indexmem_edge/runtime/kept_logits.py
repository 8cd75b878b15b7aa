"""Logits after the last token that the library does not have: another text, or a cancelled call, has overwritten its own."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from .inside import Inside, sample_from

Logits = Optional[npt.NDArray[np.single]]


class KeptLogits:
    """Those after the last token of the conversation of one `Llama`, as long as no other token is evaluated."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._values: Logits = None
        self.all_known = True  # with `logits_all`: those after each token of the history are what `scores` has

    def __bool__(self) -> bool:
        return self._values is not None

    def now(self) -> Logits:
        """The logits after the last token, whoever has them; None if nobody has. Not to be written to."""
        inside = self._inside
        if inside.n_tokens == 0 or not inside.fresh:
            return None
        return self._values if self._values is not None else inside.last_logits()

    def restore(self, values: Logits, known: bool = False) -> None:
        """The conversation is another now, with these logits after its last token; None: they have to be computed. `known`: with
        `logits_all`, those after the tokens before it are what `scores` has.
        """
        inside = self._inside
        self._values = values
        inside.fresh = values is not None
        self.all_known = known
        if values is not None and inside.logits_all:
            inside.scores[inside.n_tokens - 1] = values

    def forget(self) -> None:
        """A token is evaluated: from now on the library has them."""
        self._values = None

    def sample(self, sampler: Any) -> int:
        """A token, drawn from what is kept as the library would draw it."""
        assert self._values is not None
        return sample_from(self._values, sampler)
