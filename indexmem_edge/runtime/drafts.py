"""Drafts: guesses at the next tokens, all of which one batch checks.

llama_cpp evaluates a token together with what a draft model guesses comes after it, samples behind each of them, and takes
out those that are wrong. With a budget nothing must be left of these. So a batch has no more drafts than can be taken out
without a trace (`indexmem_draft_room`): the token that makes entries leave comes alone. And it has no more than are worth checking:
a row more costs a tenth to a fifth of a token, whether its guess is right or not.
"""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from .._vendor.llama_cpp import llama_cpp as llama_lib
from .._vendor.llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
from ..errors import ModelNotSupported, RequestError
from ..native import api
from .inside import Inside
from .kept_logits import KeptLogits

FIRST = 4  # guesses that are checked at the beginning
LOOK = 1 << 14  # tokens that are looked through for what was said before: all of a long text would take longer than it saves
MORE, FEWER = 2, 1  # after a batch that had no wrong one, after one that had

_NONE: npt.NDArray[np.intc] = np.empty(0, dtype=np.intc)


class Drafts(LlamaDraftModel):
    """The draft model of one `Llama`, as llama_cpp's `generate` sees it.

    Between two items of a stream, the cache may hold drafts that nobody has accepted yet: those after `Inside.sure`.

    Raises:
        RequestError: `model` is none.
        ModelNotSupported: the model that is to check them has recurrent layers, whose state has no way back.
    """

    def __init__(self, model: LlamaDraftModel, llm: Inside, kept: KeptLogits, bounded: bool) -> None:
        if not callable(model):
            raise RequestError(f"draft_model must be called with token ids and return those that it guesses, found {model!r:.60}: take LlamaPromptLookupDecoding()")
        if llama_lib.llama_model_is_recurrent(llm.model) or llama_lib.llama_model_is_hybrid(llm.model):
            raise ModelNotSupported("draft_model cannot be used with this model: its recurrent layers cannot take a wrong draft back. Leave it out")
        self.model = model
        self._bounded = bounded
        self._llm = llm
        self._kept = kept
        self._handed_out = 0  # drafts at the end of what is evaluated next
        self._look = slice(-LOOK, None) if isinstance(model, LlamaPromptLookupDecoding) else slice(None)  # that compares all that it is given
        self._worth = FIRST
        self._asked = (0, 0)  # tokens of the history when drafts were last handed out, and how many were

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        """What the draft model guesses comes after `input_ids`, the last of which has not been evaluated yet."""
        llm = self._llm
        self._handed_out = 0
        self._learn(len(input_ids))
        room = self._room(min(llm.n_batch, llm.n_ctx - llm.n_tokens) - 1)
        if len(input_ids) - llm.n_tokens != 1 or not room:
            return _NONE  # an application has added tokens of its own, or this one has to come alone
        drafts = self.model(input_ids[self._look], **kwargs)[: min(room, self._worth)]
        self._handed_out = len(drafts)
        self._asked = len(input_ids), len(drafts)
        return drafts

    def _learn(self, n_tokens: int) -> None:
        """How many guesses the next batch is worth, by how many of the last one were right: after them comes a token that was
        sampled, and was none of them.
        """
        before, drafts = self._asked
        right = n_tokens - before - 1
        self._asked = 0, 0
        if drafts and 0 <= right <= drafts:  # or it is another text by now
            self._worth = max(self._worth, drafts + MORE) if right == drafts else max(self._worth - FEWER, 1)

    def _room(self, n: int) -> int:
        return api.draft_room(self._llm.ctx, n) if self._bounded and n > 0 else max(n, 0)

    def handed_out(self) -> int:
        """How many of the tokens that are evaluated now are drafts; asked once."""
        n, self._handed_out = self._handed_out, 0
        self._llm.sure = None
        return n

    def evaluated(self, n: int) -> None:
        """The last `n` tokens of the history are drafts."""
        llm = self._llm
        llm.sure = llm.n_tokens - n - 1 if n else None  # the first token that is sampled accepts none of them

    def sampled(self) -> None:
        """The next token has been sampled: it is the first draft that was not accepted, or the others will be taken out."""
        llm = self._llm
        llm.sure = llm.sure + 1 if llm.sure is not None and llm.sure < llm.n_tokens else None

    def take_back(self) -> None:
        """Takes out what nobody has accepted: cache, history and logits are as if it had never been guessed."""
        llm, n = self._llm, self._llm.unsure
        llm.sure = None
        if n == 0:
            return
        logits: Optional[npt.NDArray[np.single]] = llm.last_logits(n)
        if llama_lib.llama_memory_seq_rm(llm.memory, 0, llm.n_tokens - n, -1):
            llm.n_tokens -= n
            self._kept.restore(logits, known=self._kept.all_known)
