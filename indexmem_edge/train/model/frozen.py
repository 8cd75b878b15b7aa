"""What a training needs of the model, whoever computes it: `Decoder` in PyTorch, or the native library (`observed`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from .attention import Look


class Geometry(Protocol):
    """The numbers that modules are made for."""

    @property
    def n_layer(self) -> int: ...

    @property
    def n_embd(self) -> int: ...

    @property
    def n_head_kv(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def bounded(self) -> tuple[int, ...]:
        """Layers that a budget bounds."""
        ...


class Frozen(ABC):
    """A model whose attention can be looked at."""

    @property
    @abstractmethod
    def geometry(self) -> Geometry: ...

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where what is trained lies, and what `observe` shows."""

    @abstractmethod
    def observe(self, tokens: Tensor, look: Look) -> None:
        """Reads a text of tokens [T] with nothing evicted, and shows the operands of each bounded layer (B = 1), one layer after
        the other. What is shown is gone when `look` returns.
        """
