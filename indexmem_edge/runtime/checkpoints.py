"""Copies of the KV state after some tokens: a prompt that begins with these goes on from there.

A bounded cache cannot take back what it has evicted. But a copy of it has a fixed size, however long the conversation, and costs
milliseconds. So a few are kept: of where a prompt began, of a little before its end, and of a conversation that another one
replaces. Another answer, an edit, a branch, a template that drops what the model thought, a second question about the same text,
or the other of two tabs then cost what is new.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import numpy.typing as npt

from .._vendor.llama_cpp import llama_cpp as llama_lib
from .align import common_prefix
from .kept_logits import Logits
from .statecopy import StateCopy

Tokens = npt.NDArray[np.intc]
_LEAST = 256 << 20  # bytes
_AT_LEAST_OF_THEM = 3


def default_limit(whole: int) -> int:
    """Bytes that checkpoints may take unless told otherwise, of a cache of `whole` bytes: 256 MiB, or three of it."""
    return max(_LEAST, _AT_LEAST_OF_THEM * whole)


@dataclass(eq=False)
class Checkpoint:
    """The state of a conversation after some tokens, of which the last may be such that they can be taken out.

    Attributes:
        tokens: these, the whole history.
        least: so many of them, or more, it can be put back as.
        logits: after the last of them, where they were known.
        background: what the prompts of this conversation come after, if anything.
    """

    tokens: Tokens
    least: int
    logits: Logits = None
    background: Optional[Background] = None
    _copy: StateCopy = field(default_factory=StateCopy, repr=False)

    @classmethod
    def of(cls, ctx: int, tokens: Tokens, logits: Logits = None, copy: Optional[StateCopy] = None) -> Optional[Checkpoint]:
        """The state as it is now, after these tokens; None: there is no memory for it.

        Args:
            copy: the memory of another one, which this takes over.
        """
        first = int(llama_lib.llama_memory_seq_pos_min(llama_lib.llama_get_memory(ctx), 0))
        made = cls(tokens.copy(), max(first + 1, 1), logits, _copy=copy or StateCopy())
        return made if len(tokens) and made._copy.take(ctx) else None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def state(self) -> bytes:
        """The state itself, as the library writes it."""
        return self._copy.state

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        logits = self.logits.nbytes if self.logits is not None else 0
        return self._copy.nbytes + self.tokens.nbytes + logits

    @property
    def device_nbytes(self) -> int:
        """Those of them in memory of devices."""
        return self._copy.device_nbytes

    def fits(self, prompt: Tokens) -> int:
        """How many of the first tokens of a prompt it can be put back as. After all of them the logits are known."""
        n = common_prefix(self.tokens, prompt)
        if n == len(prompt) and (n < len(self) or self.logits is None):
            n -= 1
        return n if n >= self.least else 0

    def put(self, ctx: int, n: int) -> bool:
        """Makes the state of the sequence that after the first `n` tokens; False, and nothing has changed, if it cannot be."""
        if not self._copy.give_back(ctx):
            return False
        if n < len(self):
            removed = llama_lib.llama_memory_seq_rm(llama_lib.llama_get_memory(ctx), 0, n, -1)
            assert removed, f"a state of {len(self)} tokens, of which {self.least} are fixed, cannot be cut at {n}"
        return True


@dataclass(frozen=True, eq=False)
class Background:
    """What every prompt of a conversation comes after: the end of another one.

    Attributes:
        tokens: its text.
        checkpoint: the state after them, for prompts that begin anew; None: there was no memory for it.
    """

    tokens: Tokens
    checkpoint: Optional[Checkpoint] = None


NO_BACKGROUND = Background(np.empty(0, dtype=np.intc))


class Checkpoints:
    """Those that are kept of one `Llama`, and how many bytes they may take together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held: Optional[Checkpoint] = None  # one that stays whatever the limit: that of a background
        self._kept: list[Checkpoint] = []  # the one that was made or used last is the last

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes that they take, in memory of the host and of devices."""
        return self._bytes + (self.held.nbytes if self.held is not None else 0)

    @property
    def device_nbytes(self) -> int:
        """Those of them in memory of devices."""
        return sum(made.device_nbytes for made in self._all)

    @property
    def _all(self) -> list[Checkpoint]:
        return [*self._kept, *([self.held] if self.held is not None else [])]

    @property
    def _bytes(self) -> int:
        """Those that the limit is about."""
        return sum(kept.nbytes for kept in self._kept)

    def newest_first(self) -> list[Checkpoint]:
        """Those that were made or used last come first."""
        return self._kept[::-1]

    def clear(self) -> None:
        """Forgets them."""
        self._kept.clear()

    def take(self, ctx: int, tokens: Tokens, logits: Logits = None) -> None:
        """Keeps the state as it is now, after these tokens, unless one of the same tokens is kept. Where its bytes are not left,
        others leave: first those that two newer ones of the same conversation make needless, and of these and of the rest
        those that were not used for longest.
        """
        same = self.after(tokens)
        if same is not None:
            same.logits = logits if logits is not None else same.logits
            self.used(same)
            self._trim()
            return
        room = StateCopy.size(ctx) + tokens.nbytes + (logits.nbytes if logits is not None else 0)
        if len(tokens) == 0 or room > self.limit:
            return
        memory: Optional[StateCopy] = None
        while self._kept and self._bytes + room > self.limit:
            memory = self._drop()
        made = Checkpoint.of(ctx, tokens, logits, memory)
        if made is not None:
            self._kept.append(made)
            self._trim()

    def after(self, tokens: Tokens) -> Optional[Checkpoint]:
        """The one of just these tokens, if there is one."""
        return next((made for made in self._all if np.array_equal(made.tokens, tokens)), None)

    def take_out(self, tokens: Tokens) -> Optional[Checkpoint]:
        """The one of just these tokens, if it is kept; from now on somebody else keeps it."""
        found = next((kept for kept in self._kept if np.array_equal(kept.tokens, tokens)), None)
        if found is not None:
            self._kept.remove(found)
        return found

    def add(self, made: Checkpoint) -> None:
        """Keeps one that is there already, as `take` would; unless one of the same tokens is."""
        if made.nbytes > self.limit or self.after(made.tokens) is not None:
            return
        while self._kept and self._bytes + made.nbytes > self.limit:
            self._drop()
        self._kept.append(made)

    def best(self, prompt: Tokens) -> tuple[Optional[Checkpoint], int]:
        """The one that has most of the prompt, and how many of its first tokens that is; None and 0 if none has any."""
        found, most = None, 0
        for kept in self._all:
            n = kept.fits(prompt)
            if n > most:
                found, most = kept, n
        return found, most

    def used(self, checkpoint: Checkpoint) -> None:
        """It was of use: it leaves later."""
        if checkpoint in self._kept:
            self._touch(checkpoint)

    def drop(self, checkpoint: Checkpoint) -> None:
        """It is of no use."""
        if checkpoint in self._kept:
            self._kept.remove(checkpoint)

    def _touch(self, checkpoint: Checkpoint) -> None:
        self._kept.remove(checkpoint)
        self._kept.append(checkpoint)

    def _trim(self) -> None:
        """Holds to the limit: memory that was taken over may be larger than what is in it, and logits come later."""
        while self._bytes > self.limit:
            self._drop()

    def _drop(self) -> StateCopy:
        """Takes the least useful one out and returns its memory.

        Who edits or branches mostly does so in the last turns: two newer ones of the same conversation are enough.
        """
        for i, kept in enumerate(self._kept):
            newer = [other for other in self._kept[i + 1 :] if common_prefix(kept.tokens, other.tokens) == len(kept)]
            if len(newer) >= 2:
                return self._kept.pop(i)._copy
        return self._kept.pop(0)._copy
