"""Fetches a model, and sidecars for it, from the hub that huggingface_hub knows. That package does the transfer: it resumes what was
interrupted, checks lengths, and keeps one copy for all programs.

Everything that the other side says is of unknown origin: names are checked before they become paths, and files before they are used.
"""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from ..errors import ConvertError, DownloadError
from ..files.atomic import replacing
from ..files.gguffile import GGUFFile
from ..files.untrusted import quote, some
from .sidecars import SUFFIX

USUAL = ("Q4_K_M", "Q8_0")  # quantisations that are taken if none is named, as llama.cpp does
_GGUF = ".gguf"
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<all>\d{5})\.gguf")
_MOST_SIDECARS = 8
_HOW_TO_NAME = "owner/repo, owner/repo:QUANT (for example :Q4_K_M) or owner/repo/FILE.gguf"


@dataclass(frozen=True)
class Name:
    """What is asked for. Of `file` and `quant` at most one is given."""

    repo: str  # owner/repo
    file: Optional[str] = None  # a path inside of it
    quant: Optional[str] = None


@dataclass(frozen=True)
class Pulled:
    """What was fetched."""

    path: str  # of the model, of one in several files the first
    files: tuple[str, ...]  # all of the model
    sidecars: tuple[str, ...] = ()  # beside it
    problems: tuple[str, ...] = ()  # with sidecars, which are not needed


def parse_name(text: str) -> Name:
    """What a person wrote.

    Raises:
        DownloadError: it is no name of a model.
    """
    repo, colon, quant = text.partition(":")
    words = repo.split("/")
    wrong = DownloadError(f"{quote(text)} is not the name of a model: expected {_HOW_TO_NAME}")
    if len(words) < 2 or not all(_is_word(word) for word in words) or (colon and not _is_word(quant)):
        raise wrong
    if len(words) == 2:
        return Name("/".join(words), quant=quant if colon else None)
    if colon or not words[-1].lower().endswith(_GGUF):
        raise wrong
    return Name("/".join(words[:2]), file="/".join(words[2:]))


def _is_word(word: str) -> bool:
    """Whether a part of a name is plain: no dots at its beginning, no two in a row, nothing that a path gives a meaning to."""
    return bool(_WORD.fullmatch(word)) and ".." not in word


def is_safe(path: str) -> bool:
    """Whether a name that a repository says stays inside of a folder, on any system."""
    parts = path.split("/")
    return all(part not in ("", ".", "..") and part.isprintable() and not set(part) & set('\\:*?"<>|') for part in parts)


def choose(name: Name, files: Iterable[str]) -> list[str]:
    """The files of the model that a name means, of all that a repository has; those of one that is split in their order.

    Raises:
        DownloadError: there is none, or more than one; the message lists them.
    """
    models = [f for f in files if f.lower().endswith(_GGUF) and not f.endswith(SUFFIX) and is_safe(f)]
    if name.file is not None:
        if name.file not in models:
            raise DownloadError(f"{name.repo} has no file {name.file}: it has {_listed(models)}")
        return _all_parts(name.file, models)
    models = [f for f in models if not Path(f).name.lower().startswith("mmproj")]  # for images
    first = [f for f in models if (split := _SPLIT.fullmatch(f)) is None or int(split["part"]) == 1]
    if not first:
        raise DownloadError(f"{name.repo} has no GGUF file of a model: look for a repository of GGUF files of it, often named ...-GGUF")
    if name.quant is not None:
        found = _of_quant(name.quant, first)
        if len(found) != 1:
            how_many = f"{len(found)} files of {name.quant}: name one of {_listed(found)} as owner/repo/FILE.gguf"
            raise DownloadError(f"{name.repo} has {how_many if found else f'no file of {name.quant}: it has {_listed(first)}'}")
        return _all_parts(found[0], models)
    usual = next((found[0] for quant in USUAL if (found := _of_quant(quant, first))), sorted(first)[0])
    return _all_parts(usual, models)


def _of_quant(quant: str, files: Iterable[str]) -> list[str]:
    pattern = re.compile(rf"(?:^|[-./]){re.escape(quant)}(?:[-./]|$)", re.IGNORECASE)
    return [f for f in files if pattern.search(f[: -len(_GGUF)])]


def _all_parts(file: str, files: Sequence[str]) -> list[str]:
    """The file, or all those that it is one of."""
    split = _SPLIT.fullmatch(file)
    if split is None:
        return [file]
    found = {int(m["part"]): f for f in files if (m := _SPLIT.fullmatch(f)) and (m["stem"], m["all"]) == (split["stem"], split["all"])}
    missing = int(split["all"]) - len(found)
    if missing or sorted(found) != list(range(1, len(found) + 1)):
        raise DownloadError(f"{file} is one of {int(split['all'])} files, and the repository lacks {missing} of them")
    return [found[i] for i in sorted(found)]


def choose_sidecars(model: str, files: Iterable[str]) -> list[str]:
    """Sidecars to fetch with a model: those that are named like it, or else all that there are, a few at most."""
    there = sorted(f for f in files if f.endswith(SUFFIX) and is_safe(f))
    stem = Path(model).name.lower()[: -len(_GGUF)]
    names = {f: Path(f).name.lower()[: -len(SUFFIX)] for f in there}
    alike = [f for f in there if stem.startswith(names[f]) or names[f].startswith(stem)]
    return (alike or there)[:_MOST_SIDECARS]


def _listed(files: Iterable[str]) -> str:
    return some(sorted(files), 12) or "none"


def pull(name: Name, folder: Union[str, os.PathLike[str], None] = None, *, force: bool = False, bars: bool = False) -> Pulled:
    """Fetches a model and its sidecars. What is there already is not fetched again.

    Args:
        folder: where the files go, as they lie in the repository. None: the cache that programs share.
        force: fetch again, and replace files in the folder that are others.
        bars: show how far it is, on standard error.

    Raises:
        DownloadError: it failed; the message says why and what to do. What was fetched so far is kept, and is gone on from.
    """
    from .hub import Hub

    hub = Hub(folder, force, bars)
    listed = hub.files(name.repo)
    chosen = choose(name, listed)
    paths = [_checked(hub.fetch(file), file) for file in chosen]
    sidecars, problems = [], []
    placed = set()
    for file in sorted(choose_sidecars(chosen[0], listed), key=lambda file: Path(file).parent != Path(chosen[0]).parent):
        if Path(file).name in placed:  # the one that lies in the folder of the model comes first
            continue
        placed.add(Path(file).name)
        try:
            sidecars.append(_beside(_checked(hub.fetch(file), file), paths[0], force))
        except DownloadError as error:
            problems.append(str(error))
    return Pulled(paths[0], tuple(paths), tuple(sidecars), tuple(problems))


def _checked(path: str, name: str) -> str:
    """The path of a file that is whole, as far as it says itself."""
    try:
        with GGUFFile(path) as file:
            file.check_whole()
    except ConvertError as error:
        raise DownloadError(
            f"what was fetched as {name} cannot be used: {error}. Fetch it again with --force; if that does not help, tell its owner"
        ) from error
    return path


def _beside(sidecar: str, model: str, force: bool) -> str:
    """The path of a sidecar in the folder of the model, where it is found: of one that lies elsewhere, a copy. `force`: in place of
    another file of that name.
    """
    target = Path(model).parent / Path(sidecar).name
    try:
        if Path(sidecar).parent == target.parent or (target.is_file() and filecmp.cmp(sidecar, target, shallow=False)):
            return str(target)
        if target.exists() and not force:
            raise DownloadError(f"{target}, which would be used with the model, is another file than {sidecar}: replace it with --force, or remove it")
        if target.is_symlink():  # into the store of a cache, where files are what their names say
            target.unlink()
        with replacing(target, force=True) as temporary:
            Path(temporary).write_bytes(Path(sidecar).read_bytes())
    except (ConvertError, OSError) as error:
        raise DownloadError(f"cannot put the sidecar {sidecar} beside the model: {error}") from error
    return str(target)
