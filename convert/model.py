"""A checkpoint in memory, whatever file it came from: what every reader returns and every writer takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from indexmem_edge import __version__
from indexmem_edge.errors import ConvertError
from indexmem_edge.files.untrusted import check_text, quote, show, some

from .spec import INDEXERS, LIMITS, MEMORIES, Kind, check_constants, check_f32, check_needs, check_u32, find

Array = npt.NDArray[np.float32]
Layer = dict[str, Array]

TOOL = f"indexmem-edge {__version__}"
UNKNOWN = "unknown"
SOURCE_FORMATS = ("indexmem", "indexmem-legacy", "v1", "kvzap", "fast-kvzip", "indexmem-edge")
DEFAULTS = ("sinks", "window", "budget")
_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.indexmem\.(.+)", re.S)
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SCORE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Geometry:
    """The shape of the base model. What a checkpoint does not say is None."""

    block_count: int
    embedding_length: int
    head_count_kv: int
    head_count: Optional[int] = None
    key_length: Optional[int] = None

    def validated(self) -> Geometry:
        """Checks the numbers; returns them as Python integers.

        Raises:
            ConvertError: one is missing, no integer, or absurd.
        """
        found = {}
        for name, value in asdict(self).items():
            if value is not None or name not in ("head_count", "key_length"):
                found[name] = check_u32(name, value, 1, LIMITS[name])
        return Geometry(**found)

    def to_dict(self) -> dict[str, int]:
        """The numbers that are known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Provenance:
    """Where the weights come from. Files are names without folders; `source_sha256` has the same order."""

    source_format: str
    source_files: tuple[str, ...] = ()
    source_sha256: tuple[str, ...] = ()
    trained_on: Optional[str] = None
    step: Optional[int] = None
    tool: str = TOOL

    def validated(self) -> Provenance:
        """Returns itself; ConvertError if a field has another type or form."""
        if self.source_format not in SOURCE_FORMATS:
            raise ConvertError(f"unknown source format {show(self.source_format)}: one of {', '.join(SOURCE_FORMATS)}")
        if len(self.source_files) != len(self.source_sha256):
            raise ConvertError(
                f"{len(self.source_files)} source files with {len(self.source_sha256)} hashes: expected one a file"
            )
        for name in self.source_files:
            if not check_text("the name of a source file", name) or "/" in name or "\\" in name:
                raise ConvertError(f"expected the name of a source file without folders, found {quote(name)}")
        for digest in self.source_sha256:
            if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
                raise ConvertError(f"a SHA-256 must be 64 lower-case hexadecimal digits, found {show(digest)}")
        if self.trained_on is not None:
            check_text("trained_on", self.trained_on)
        if self.step is not None:
            check_u32("step", self.step)
        if not check_text("tool", self.tool):
            raise ConvertError("the name of the tool is empty")
        return self


@dataclass(frozen=True)
class Checkpoint:
    """Weights and constants of an indexer, a memory, or both, for one base model.

    `layers[i]` maps the names of docs/sidecar.md, without `blk.<layer>.indexmem.`, to float32 arrays in PyTorch order
    (`[out, in]`); names of indexers and memories never collide. `only` are the layers that have them, in models where
    some have caches that no budget bounds, such as those with a sliding window; the others are empty. None: all.
    `constants` are the keys of the kind without
    `indexmem.<kind>.`. `source_names` are what the source calls a tensor, for messages.
    """

    geometry: Geometry
    kind: str
    constants: Mapping[str, Any]
    layers: list[Layer]
    provenance: Provenance
    memory: str = "none"
    memory_constants: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = UNKNOWN
    name: Optional[str] = None
    base_model: Optional[str] = None
    fingerprint: Optional[str] = None
    defaults: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    only: Optional[tuple[int, ...]] = None
    budget_share: Optional[tuple[float, ...]] = None  # what of a budget each layer, or each KV head, gets; None: all the same
    budget_least: Optional[tuple[int, ...]] = None  # entries that each gets before the rest is shared, likewise; None: none
    source_names: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def kinds(self) -> tuple[Kind, Kind]:
        """The entries of the tables: indexer, memory."""
        return find(INDEXERS, "indexer", self.kind), find(MEMORIES, "memory", self.memory)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layers that have an indexer, a memory, or both."""
        return tuple(range(self.geometry.block_count)) if self.only is None else self.only

    def shapes(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Tensors of each of those layers: name -> (shape in PyTorch order, whether it is a matrix)."""
        sizes = {"d": self.geometry.embedding_length, "H": self.geometry.head_count_kv}
        indexer, memory = self.kinds
        return {**indexer.shapes(sizes, self.constants), **memory.shapes(sizes, self.memory_constants)}

    def tensors(self) -> dict[str, Array]:
        """All tensors by their names in files, `blk.<layer>.indexmem.<name>`, in a fixed order."""
        names = self.shapes()
        return {f"blk.{i}.indexmem.{name}": self.layers[i][name] for i in self.numbers for name in names}

    def validated(self, texts: bool = True) -> Checkpoint:
        """Checks everything against the table of docs/sidecar.md and returns it with constants as files hold them.

        Args:
            texts: also refuse what this program would not write into a text, such as control characters. A sidecar
                that holds them is valid: they are data there.

        Raises:
            ConvertError: a constant or tensor is missing, unknown, of another type or shape, or not finite.
        """
        geometry = self.geometry.validated()
        indexer, memory = self.kinds
        if indexer.name == memory.name == "none":
            raise ConvertError("there is neither an indexer nor a memory")
        checked = replace(
            self,
            geometry=geometry,
            constants=check_constants(indexer, self.constants, geometry.block_count),
            memory_constants=check_constants(memory, self.memory_constants, geometry.block_count),
            provenance=self.provenance.validated() if texts else self.provenance,
            defaults={k: check_u32(f"defaults.{k}", v) for k, v in self.defaults.items()},
            scores={k: check_f32(f"scores.{k}", v) for k, v in self.scores.items()},
            only=check_only(self.only, geometry.block_count),
        )
        for key in ("budget_share", "budget_least"):
            if indexer.name == "none" and getattr(self, key) is not None:
                raise ConvertError(f"there is a {key} without an indexer, whose ranks it is measured with")
        shares, least = check_needs(
            self.budget_share, self.budget_least, geometry.block_count, geometry.head_count_kv, checked.numbers, indexer.ranks_heads
        )
        checked = replace(checked, budget_share=shares, budget_least=least)
        for key in checked.defaults:
            if key not in DEFAULTS:
                raise ConvertError(f"unknown default {show(key)}: expected {', '.join(DEFAULTS)}")
        for key in checked.scores:
            if not _SCORE.fullmatch(key):
                raise ConvertError(f"the name of a score must be letters, digits and ._-, found {quote(key)}")
        for what in ("architecture", "name", "base_model") if texts else ():
            if getattr(self, what) is not None and not check_text(what, getattr(self, what)):
                raise ConvertError(f"{what} is empty")
        if self.fingerprint is not None and not _FINGERPRINT.fullmatch(check_text("fingerprint", self.fingerprint)):
            raise ConvertError(
                f"a fingerprint must be 16 lower-case hexadecimal digits, found {show(self.fingerprint)}"
            )
        checked._check_memory_size()
        checked._check_layers()
        return checked

    def _check_memory_size(self) -> None:
        head_dim, known = self.memory_constants.get("head_dim"), self.geometry.key_length
        if head_dim is not None and known is not None and head_dim != known:
            raise ConvertError(f"the memory is for heads of {head_dim}, the base model has heads of {known}")

    def _check_layers(self) -> None:
        shapes, numbers = self.shapes(), self.numbers
        if len(self.layers) != self.geometry.block_count:
            raise ConvertError(f"expected {self.geometry.block_count} layers, found {len(self.layers)}")
        for i, layer in enumerate(self.layers):
            if i not in numbers:
                self._check_absent(i, layer)
                continue
            for name, (shape, _) in shapes.items():
                if name not in layer:
                    raise ConvertError(f"layer {i}: {self._called(name)} is missing")
                array = layer[name]
                if array.dtype != np.float32 or array.shape != shape:
                    raise ConvertError(
                        f"layer {i}: {self._called(name)} is {list(array.shape)} {array.dtype}, expected {list(shape)}"
                    )
                if not np.isfinite(array).all():
                    raise ConvertError(f"layer {i}: {self._called(name)} holds NaN or infinity")
            extra = [name for name in layer if name not in shapes]
            if extra:
                raise ConvertError(f"layer {i}: {some(extra)} does not belong to {self.kind} with memory {self.memory}")

    def _check_absent(self, i: int, layer: Layer) -> None:
        if layer:
            raise ConvertError(f"layer {i}: {some(layer)} does not belong there, {_listed(self.numbers)}")
        enabled = self.memory_constants.get("enabled")
        if enabled is not None and enabled[i]:
            raise ConvertError(f"layer {i}: {self.memory}.enabled must be false there, {_listed(self.numbers)}")

    def _called(self, name: str) -> str:
        alias = self.source_names.get(name)
        return f"{name} ({alias} in the source)" if alias and alias != name else name

    def warnings(self) -> list[str]:
        """What a person should know about weights that are valid nonetheless."""
        gates = self.constants.get("gate_scale") or []
        negative = [str(i) for i, gate in enumerate(gates) if gate < 0]
        if not negative:
            return []
        return [
            f"gate_scale is negative in layer {', '.join(negative)}: there the training preferred low scores, while "
            "eviction keeps high ones, so these layers rank in reverse"
        ]


def check_only(only: Any, n_layer: int) -> Optional[tuple[int, ...]]:
    """Numbers of layers as `Checkpoint.only` has them: None if they are all layers.

    Raises:
        ConvertError: there are none, they do not ascend, or the model has no such layer.
    """
    if only is None:
        return None
    if not isinstance(only, (list, tuple)) or not only:
        found = "none" if isinstance(only, (list, tuple)) else show(only)
        raise ConvertError(f"layers must be a list of one number or more, found {found}")
    numbers = tuple(check_u32("the number of a layer", i, 0, n_layer - 1) for i in only)
    if any(a >= b for a, b in zip(numbers, numbers[1:])):
        raise ConvertError("the numbers of layers must ascend, each of them once")
    return None if len(numbers) == n_layer else numbers


def _listed(numbers: tuple[int, ...]) -> str:
    return f"the file is for the layers {', '.join(map(str, numbers[:20]))}{', ...' if len(numbers) > 20 else ''}"


def layers_from(
    tensors: Mapping[str, Array], geometry: Geometry, only: Optional[tuple[int, ...]] = None
) -> list[Layer]:
    """Sorts tensors named `blk.<layer>.indexmem.<name>` into layers. Without any there are empty ones: some memories
    have no tensors.

    Args:
        only: as of `Checkpoint`.

    Raises:
        ConvertError: another name, or layers that are not those of `only`; without it, not contiguous from 0.
    """
    n_layer = geometry.validated().block_count
    found: dict[int, Layer] = {}
    for key, array in tensors.items():
        match = _TENSOR.fullmatch(key)
        if match is None:
            raise ConvertError(f"unexpected tensor {quote(key)}: expected names like blk.0.indexmem.<name>")
        found.setdefault(int(match.group(1)), {})[match.group(2)] = array
    if only is None and found:
        return contiguous(found)
    only = only or ()
    if other := [i for i in found if i not in only]:
        raise ConvertError(f"layer {other[0]} has tensors, {_listed(only)}")
    return [found.get(i, {}) for i in range(n_layer)]


def contiguous(found: Mapping[int, Layer]) -> list[Layer]:
    """Layers by number as a list; ConvertError unless they are 0, 1, 2, ... without a gap."""
    missing = next((i for i in range(len(found)) if i not in found), None)
    if missing is not None:
        raise ConvertError(f"layers must be contiguous from 0: layer {missing} is missing, layer {max(found)} is there")
    if not found:
        raise ConvertError("there are no layers")
    return [found[i] for i in range(len(found))]
