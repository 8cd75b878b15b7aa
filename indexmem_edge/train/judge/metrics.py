"""Figures of every step, as lines of JSON that can be read while the training goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ...errors import TrainingCheckpointError
from ...files.atomic import replacing

NAME = "metrics.jsonl"


class Metrics:
    """`{"objective": "regress", "stage": 0, "step": 1, "loss": 0.9, "lr": 0.001, "grad_norm": 2.1, ...}`, one line a step, and
    `{..., "held_out_recall": 0.8, "best": true}` after an evaluation. `step` counts steps done, of the objective.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def begin(self, stage: int, step: int) -> None:
        """Drops what came after that position, and at the beginning of an objective what was measured there: that will be done again.

        Raises:
            TrainingCheckpointError: the file cannot be written.
        """
        kept = [line for line in self.lines() if (line["stage"], line["step"]) <= (stage, step or -1)]
        try:
            with replacing(self.path, force=True) as temporary:
                Path(temporary).write_text("".join(_text(line) for line in kept), encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TrainingCheckpointError(str(error)) from None

    def lines(self) -> list[dict[str, Any]]:
        """All complete lines."""
        found = []
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                line = json.loads(text)
            except ValueError:  # the last one, of a training that was killed while it wrote
                continue
            if isinstance(line, dict) and {"stage", "step"} <= set(line):
                found.append(line)
        return found

    def add(self, **values: Any) -> None:
        """Writes one line.

        Raises:
            TrainingCheckpointError: the disk is full, for example.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_text(values))
        except OSError as error:
            raise TrainingCheckpointError(f"cannot write {self.path}: {error.strerror or error}") from None


def _text(values: dict[str, Any]) -> str:
    """JSON has no NaN: null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(plain) + "\n"
