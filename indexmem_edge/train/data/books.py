"""Books that a person named: found, read, tokenized, and each cut once into what is trained on and what is held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import numpy.typing as npt

from ...errors import TrainingError
from ...files.textfile import read_text

SUFFIXES = (".txt", ".md")

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Book:
    """Tokens of one file. `held_out` is its end, and shares nothing with `train`."""

    name: str
    train: Tokens
    held_out: Tokens


def find_books(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and all .txt and .md files of the folders that are named; each once, in a fixed order.

    Raises:
        TrainingError: a path is not there, or a folder has no such file.
    """
    found: dict[str, Path] = {}
    for path in (Path(os.path.expanduser(path)) for path in paths):
        if path.is_dir():
            texts = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            files = sorted(texts, key=lambda p: p.parts)  # Windows compares paths without case
            if not files:
                raise TrainingError(f"no {' or '.join(SUFFIXES)} files in {path}: name a folder that has some, or a file")
        elif path.exists():
            files = [path]
        else:
            raise TrainingError(f"there is no text at {path}")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def books_digest(files: Sequence[Path]) -> str:
    """SHA-256 of the content of all files in their order: the same books, wherever they lie."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(read_text(file).encode()).digest())
    return digest.hexdigest()


def read_books(
    files: Sequence[Path],
    tokenize: Callable[[str], list[int]],
    held_out: float,
    progress: Optional[Callable[[int, int], None]] = None,
) -> list[Book]:
    """Tokenizes whole books; the last `held_out` of the tokens of each is held out.

    Raises:
        IndexMemError: a file cannot be read, or is not text.
    """
    books = []
    for n, file in enumerate(files):
        tokens = np.asarray(tokenize(read_text(file)), np.int32)
        cut = len(tokens) - round(held_out * len(tokens))
        books.append(Book(file.name, tokens[:cut], tokens[cut:]))
        if progress is not None:
            progress(n + 1, len(files))
    return books


class Shelf:
    """One side of all books, to take passages from."""

    def __init__(self, parts: Sequence[tuple[str, Tokens]]) -> None:
        self.parts = [(name, tokens) for name, tokens in parts if len(tokens)]
        self.total = sum(len(tokens) for _, tokens in self.parts)
        self._all = np.concatenate([tokens for _, tokens in self.parts]) if self.parts else np.empty(0, np.int32)

    def passage(self, n: int, rng: np.random.Generator) -> tuple[str, Tokens]:
        """n consecutive tokens of a book, and its name. A token of a short book is as likely as one of a long book.

        Where a book has fewer than n, the next one goes on, and the first after the last: nothing is left out for being
        short.

        Raises:
            TrainingError: all books together have fewer.
        """
        if n > self.total:
            raise TrainingError(f"{n:,} tokens of book text are needed at once, found {self.total:,}: give more text")
        sizes = np.array([len(tokens) for _, tokens in self.parts])
        i = int(rng.choice(len(sizes), p=sizes / sizes.sum()))
        name, tokens = self.parts[i]
        if len(tokens) >= n:
            start = int(rng.integers(0, len(tokens) - n + 1))
            return name, tokens[start : start + n]
        start = int(sizes[:i].sum() + rng.integers(0, len(tokens)))
        return name, self._all[(start + np.arange(n)) % self.total]

    def filler(self, n: int, rng: np.random.Generator) -> list[int]:
        """The tokens of a passage."""
        tokens: list[int] = self.passage(n, rng)[1].tolist()
        return tokens
