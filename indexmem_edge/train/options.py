"""What a training is asked for: defaults, what is wrong with a combination, and which of it decides the weights.

PyTorch is not needed here, so that the command line can show its help without.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Optional, TypeVar

from ..errors import TrainingCheckpointError, TrainingError
from ..options import DEFAULT_SINKS, LEAST_WINDOW
from ..runtime.choice import DEFAULT_MEMORY_SLOTS, MEMORY_OFF

KINDS = {"retention": "regress", "kvzap": "regress", "pairwise": "pooled-kl"}  # and what trains them by default
OBSERVED = {"retention": "asked-kl", "kvzap": "asked-kl"}  # by --engine native
MEMORIES = {MEMORY_OFF: None, "centroid": None, "residual": "residual-mse"}
TORCH, NATIVE = "torch", "native"
ENGINES = (TORCH, NATIVE)
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_LENGTH = 1 << 21
RUN_FILE = "run.json"  # the options, in a run folder

# Nothing of these changes a weight, so a training that is resumed may be given others.
_FREE = ("model", "texts", "start", "out", "run", "outtype", "fingerprint", "device", "checkpoint_every", "memory_slots")

_PER_OBJECTIVE = ("steps", "lr", "lengths", "samples")

_FLAGS = {  # not as the field
    "texts": "text", "lengths": "length", "budgets": "budget", "sinks": "kv-sinks", "window": "kv-window", "start": "from",
    "fingerprint": "no-fingerprint",
}  # fmt: skip

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class TrainOptions:
    """Everything that `indexmem train` takes. Tuples with one value hold for all objectives."""

    model: Path
    texts: tuple[Path, ...]
    out: Path
    engine: str = TORCH  # who computes the model: PyTorch, or the native library
    kind: str = "retention"
    mid_dim: int = 128  # 0: linear
    decay: bool = False
    start: Optional[Path] = None  # sidecar with the indexer to begin with, of that kind and size; None: an untrained one
    memory: str = MEMORY_OFF
    memory_slots: int = DEFAULT_MEMORY_SLOTS  # of a centroid memory
    objective: tuple[str, ...] = ()  # one after the other, each from the weights of the one before; (): by kind and memory
    steps: tuple[int, ...] = (300,)
    lr: tuple[float, ...] = (1e-3,)  # the highest
    batch: int = 4  # sequences of a step, of all processes together
    lengths: tuple[int, ...] = (1024,)  # tokens of a sequence
    samples: tuple[int, ...] = (128,)  # distinct sequences; 0: every step has new ones
    generated: float = 0.75  # share of sequences with generated facts and questions
    held_out: float = 0.1  # share of each book, its end
    eval_samples: int = 8
    budgets: tuple[float, ...] = (0.5, 0.25, 0.1)  # shares of the context that are kept when recall is measured
    eval_every: int = 100  # steps; 0: only before and after
    patience: int = 3  # evaluations without a gain; 0: never stop early
    checkpoint_every: int = 50
    sinks: int = DEFAULT_SINKS
    window: int = LEAST_WINDOW
    seed: int = 42
    device: str = "auto"
    dtype: str = "auto"  # of the model; what is trained is float32
    outtype: str = "q8_0"  # of the matrices in the sidecar
    fingerprint: bool = True
    run: Optional[Path] = None  # folder of checkpoints and figures; None: beside `out`

    def checked(self) -> TrainOptions:
        """The same with every default filled in.

        Raises:
            TrainingError: an option is impossible; the message names it.
        """
        from indexmem_edge.convert.writer import OUTTYPES  # not above: it takes a while, and the command line reads this page

        _check_choice("--engine", self.engine, ENGINES)
        _check_choice("--kind", self.kind, KINDS)
        _check_choice("--memory", self.memory, MEMORIES)
        _check_choice("--device", self.device, DEVICES)
        _check_choice("--dtype", self.dtype, DTYPES)
        _check_choice("--outtype", self.outtype, OUTTYPES)
        trained_by = KINDS | OBSERVED if self.engine == NATIVE else KINDS
        if self.decay and self.kind != "retention":
            raise TrainingError(f"--decay: ranks of kind {self.kind} do not fall with age, those of kind retention can")
        by_default = [trained_by[self.kind], *([trains] if (trains := MEMORIES[self.memory]) else [])]
        o = replace(self, objective=self.objective or tuple(by_default), run=self.run or run_folder(self.out))
        if not o.texts:
            raise TrainingError("there is nothing to train on: name books, or folders of books, with --text")
        o._check_numbers()
        return o

    def _check_numbers(self) -> None:
        for name in _PER_OBJECTIVE:
            values = getattr(self, name)
            if len(values) not in (1, len(self.objective)):
                raise TrainingError(
                    f"{flag_of(name)} has {len(values)} values for {len(self.objective)} objectives "
                    f"({', '.join(self.objective)}): expected one for all, or one for each"
                )
        counts = {"steps": 1, "batch": 1, "eval_samples": 1, "lengths": 2, "checkpoint_every": 1}
        for f in fields(self):
            least = counts.get(f.name, 0)
            for value in _as_tuple(getattr(self, f.name)):
                if f.type in ("int", "tuple[int, ...]") and not least <= value <= MAX_LENGTH and f.name != "seed":
                    raise TrainingError(f"{flag_of(f.name)} must be from {least:,} to {MAX_LENGTH:,}, found {value:,}")
        if not 0 <= self.seed < 1 << 63:
            raise TrainingError(f"--seed must be from 0 to 2^63 - 1, found {self.seed}")
        if bad := [rate for rate in self.lr if not 0 < rate < math.inf]:
            raise TrainingError(f"--lr must be a number above 0, found {bad[0]}")
        if not 0 <= self.generated <= 1:
            raise TrainingError(f"--generated must be a share from 0 to 1, found {self.generated:g}")
        if not 0 < self.held_out < 1:
            raise TrainingError(f"--held-out must be a share between 0 and 1, found {self.held_out:g}")
        if min(self.lengths) <= self.protected + 1:
            raise TrainingError(
                f"sequences of {min(self.lengths):,} tokens leave nothing to rank: {self.sinks:,} sinks and a window of "
                f"{self.window:,} are never evicted. Give a --length of at least {self.protected + 2:,}, or a smaller "
                "--kv-window"
            )
        if bad := [share for share in self.budgets if not 0 < share < 1]:
            raise TrainingError(f"--budget must be a share between 0 and 1, found {bad[0]:g}")

    @property
    def protected(self) -> int:
        """Tokens that are never evicted."""
        return self.sinks + self.window

    def steps_of(self, stage: int) -> int:
        """Steps of the objective with that number."""
        return self.steps[stage % len(self.steps)]

    def lr_of(self, stage: int) -> float:
        """Its highest learning rate."""
        return self.lr[stage % len(self.lr)]

    def length_of(self, stage: int) -> int:
        """Tokens of its sequences."""
        return self.lengths[stage % len(self.lengths)]

    def samples_of(self, stage: int) -> int:
        """Its distinct sequences; 0: as many as its steps need."""
        return self.samples[stage % len(self.samples)]

    def deciding(self) -> dict[str, Any]:
        """All options that change a weight, as JSON has them. A checkpoint is for these alone."""
        return {name: value for name, value in self.to_dict().items() if name not in _FREE}

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json.dumps takes; paths are absolute, so that they hold in any folder."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainOptions:
        """The options that `to_dict` gave.

        Raises:
            TrainingError: a name is unknown, or a value has another type.
        """
        known = {f.name: f.type for f in fields(cls)}
        if unknown := [name for name in values if name not in known]:
            raise TrainingError(f"unknown option {unknown[0]!r}: is it of a newer indexmem-edge?")
        try:
            return cls(**{name: _typed(known[name], value) for name, value in values.items()})
        except (TypeError, ValueError) as error:
            raise TrainingError(f"the options cannot be read: {error}") from None


def run_folder(out: Path) -> Path:
    """`model.indexmem.gguf` -> `model.indexmem.train`, beside it."""
    return out.with_name((out.name[: -len(".gguf")] if out.name.endswith(".gguf") else out.name) + ".train")


def options_of(run: Path) -> TrainOptions:
    """The options of a training that is to go on.

    Raises:
        TrainingCheckpointError: the folder holds none.
    """
    path = run / RUN_FILE
    try:
        return replace(TrainOptions.from_dict(json.loads(path.read_text(encoding="utf-8"))), run=run)
    except (OSError, ValueError, AttributeError) as error:
        why = str(error) if path.exists() else "it does not exist"
        raise TrainingCheckpointError(
            f"{run} is no folder of a training: {RUN_FILE} cannot be read ({why}). Name the folder that a training was "
            "saved in"
        ) from None


def numbers(flag: str, text: str, kind: type[T]) -> tuple[T, ...]:
    """The values of a comma list.

    Raises:
        TrainingError: one is not a number.
    """
    try:
        return tuple(kind(part.replace("_", "")) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise TrainingError(f"{flag} {text!r}: expected {what} with commas between them") from None


def difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> Optional[str]:
    """The first option in which two trainings differ, in words."""
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        a, b = wanted.get(name), found.get(name)
        if json.dumps(a) != json.dumps(b):
            if name in ("model", "text", "start"):  # known by what is in them
                return f"{flag_of(name)} is another one"
            return f"{flag_of(name)} is {_shown(a)}, there it is {_shown(b)}"
    return None


def _check_choice(flag: str, value: str, choices: Mapping[str, Any] | Sequence[str]) -> None:
    if value not in choices:
        raise TrainingError(f"{flag} {value!r}: expected one of {', '.join(choices)}")


def flag_of(name: str) -> str:
    """The option of the command line for a field."""
    return "--" + _FLAGS.get(name, name.replace("_", "-"))


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else "not there" if value is None else str(value)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return os.path.abspath(os.path.expanduser(value)) if isinstance(value, Path) else value


def _typed(kind: Any, value: Any) -> Any:
    """A value out of JSON as the annotation, a string, wants it."""
    if kind.startswith("tuple"):
        item = Path if "Path" in kind else int if "int" in kind else float if "float" in kind else str
        return tuple(item(part) for part in value)
    return Path(value) if "Path" in kind and value is not None else value
