"""Finds the sidecar of a model: one that lies beside it, or one that comes with this package."""

from __future__ import annotations

import functools
import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from ..errors import IndexMemError
from ..files.modelfile import gguf_values, loaded_model, model_fingerprint

SUFFIX = ".indexmem.gguf"
SHIPPED = Path(__file__).resolve().parents[1] / "data"
_FINGERPRINT = "indexmem.base_model.norms_fnv1a64"
_SHAPE = ("block_count", "embedding_length")


@dataclass(frozen=True)
class Found:
    """A sidecar for a model, or none, and what is wrong with a file that was meant to be one."""

    path: Optional[str] = None
    where: str = ""  # "lies beside the model" or "comes with this package"
    problems: tuple[str, ...] = ()


def named_after(model: str) -> list[str]:
    """Sidecars that are named after a model and lie beside it."""
    path = Path(model)
    found = [str(p) for p in path.parent.glob(f"{glob.escape(path.stem)}*{SUFFIX}")]
    return sorted(found, key=lambda name: (len(name), name))  # the one of just that name first


def find_sidecar(model: str, wanted: Callable[[str], bool] = lambda path: True) -> Found:
    """The sidecar to use with a model when none was named: the first that fits it and is wanted.

    One that is named after the model goes before the others beside it, and these before those of the package. A model is
    known by its fingerprint; without one in the sidecar, by its shape and the name.
    """
    identity = _Identity(model)
    problems: list[str] = []
    for path, where, named in _candidates(model):
        try:
            why = identity.differs_from(path, named)
            if why is None and wanted(path):
                _check_whole(path)
                return Found(path, where, tuple(problems))
        except (IndexMemError, OSError) as error:
            why = str(error)
        if why and named:
            problems.append(f"the sidecar {path} is not used: {why}")
    return Found(problems=tuple(problems))


def _candidates(model: str) -> Iterator[tuple[str, str, bool]]:
    named = named_after(model)
    yield from ((path, "lies beside the model", True) for path in named)
    folder = Path(model).parent
    yield from ((str(p), "lies beside the model", False) for p in sorted(folder.glob(f"*{SUFFIX}")) if str(p) not in named)
    yield from ((str(p), "comes with this package", False) for p in sorted(SHIPPED.glob(f"*{SUFFIX}")))


def _check_whole(path: str) -> None:
    from ..native import api

    api.check_sidecar(path)


class _Identity:
    """What a model is, read no further than is needed to tell it from the model of a sidecar."""

    def __init__(self, model: str) -> None:
        self._model = model

    def differs_from(self, sidecar: str, named: bool) -> Optional[str]:
        """Why a sidecar is for another model, or None.

        Raises:
            ModelFileError: one of the files is damaged.
        """
        theirs = gguf_values(sidecar, ["general.architecture", _FINGERPRINT, *(f"indexmem.{key}" for key in _SHAPE)])
        arch = theirs.get("general.architecture")
        ours = gguf_values(self._model, ["general.architecture", *(f"{arch}.{key}" for key in _SHAPE)])
        shape = [("general.architecture", "general.architecture"), *((f"indexmem.{k}", f"{arch}.{k}") for k in _SHAPE)]
        for of_sidecar, of_model in shape:
            if theirs.get(of_sidecar) is None or theirs[of_sidecar] != ours.get(of_model):
                return f"its {of_sidecar} is {theirs.get(of_sidecar)}, that of the model {ours.get(of_model)}"
        wanted = theirs.get(_FINGERPRINT)
        if wanted is None:
            return None if named else "it does not say which model it is for"
        return None if wanted == self._fingerprint else "it was made for another model of the same shape"

    @functools.cached_property
    def _fingerprint(self) -> str:
        if int(gguf_values(self._model, ["split.count"]).get("split.count", 1)) > 1:  # the norms are in all of its files
            from ..native import api

            with loaded_model(self._model) as loaded:
                return api.fingerprint(loaded)
        return model_fingerprint(self._model)
