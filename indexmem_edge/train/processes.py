"""One process, or one for each GPU through Hugging Face accelerate.

Every process has all weights, takes its share of the sequences of a step, and averages gradients with the others before it
clips and steps; so all of them keep the same weights, and one writes the checkpoints. `indexmem train` starts the processes
itself where it sees several GPUs, by the same way as a person would on several machines:

    accelerate launch --num_processes 8 -m indexmem_edge train --model model.gguf ...
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import TrainingError

_HOW = "pip install accelerate"


class Processes:
    """This process alone."""

    rank, world = 0, 1

    def __init__(self, device: str = "auto") -> None:
        self.device = torch.device(_best() if device == "auto" else device)

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def average(self, parameters: Iterable[nn.Parameter], values: Sequence[float]) -> list[float]:
        """Averages the gradients of all processes, in place, and some numbers, which are returned."""
        return list(values)

    def from_main(self, value: float) -> float:
        """The value that the main process has."""
        return value

    def wait(self) -> None:
        """Until all processes are here."""


class Accelerated(Processes):
    """One of several processes, each of which has a device of its own."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.device = accelerator.device
        self.rank, self.world = accelerator.process_index, accelerator.num_processes

    def average(self, parameters: Iterable[nn.Parameter], values: Sequence[float]) -> list[float]:
        """One exchange for everything: a parameter without a gradient counts as zeros, as the others may have one."""
        parameters = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        told = torch.tensor(list(values), dtype=torch.float32, device=self.device)
        flat = torch.cat([*(g.detach().float().flatten() for g in grads), told])
        flat = self._accelerator.reduce(flat, reduction="mean")
        *parts, told = flat.split([*(g.numel() for g in grads), len(told)])
        for p, part in zip(parameters, parts):
            p.grad = part.view_as(p).to(p.dtype)
        return [float(value) for value in told]

    def from_main(self, value: float) -> float:
        mine = torch.tensor([value if self.main else 0.0], dtype=torch.float64, device="cpu")
        mine = mine.to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)
        return float(self._accelerator.reduce(mine, reduction="sum"))

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def open_processes(device: str) -> Processes:
    """The processes that this one is of: those of `accelerate launch`, or it alone.

    Raises:
        TrainingError: it was started as one of several and accelerate is missing, or there is no such device.
    """
    if launched() and int(os.environ["WORLD_SIZE"]) > 1:
        try:
            from accelerate import Accelerator  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise TrainingError(
                f"this is one of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE), which needs accelerate: {_HOW}"
            ) from None
        return Accelerated(Accelerator(cpu=device == "cpu"))
    check_device(device)
    return Processes(device)


def check_device(device: str) -> None:
    """Raises TrainingError if this machine, or this PyTorch, has no such device."""
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device in there and not there[device]():
        raise TrainingError(
            f"--device {device} is not there: PyTorch {torch.__version__} sees none. Leave --device out to use "
            f"{_best()}, or install a PyTorch for it"
        )


def launched() -> bool:
    """Whether something has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "").isdigit() and "RANK" in os.environ


def is_main() -> bool:
    """Whether this process is the one that talks, of those that were started together."""
    return not launched() or os.environ["RANK"] == "0"


def to_launch(device: str, batch: int) -> int:
    """How many processes this command should start instead of doing the work itself; 1: none.

    No more than there are GPUs, and such that the sequences of a step can be divided among them.
    """
    if _gpus(device) < 2 or importlib.util.find_spec("accelerate") is None:
        return 1
    return next(n for n in range(_gpus(device), 0, -1) if batch % n == 0)


def unused(device: str) -> str:
    """What to tell a person whose GPUs are not all used; empty if they are."""
    n = _gpus(device)
    if n < 2:
        return ""
    why = _HOW if importlib.util.find_spec("accelerate") is None else f"give a --batch that is a multiple of {n}"
    return f"one of {n} GPUs is used: to use all, {why}"


def _gpus(device: str) -> int:
    """GPUs for processes that this one could start."""
    if device not in ("auto", "cuda") or launched() or not torch.cuda.is_available():
        return 0
    return torch.cuda.device_count()


def launch(n: int, arguments: Sequence[str]) -> int:
    """Runs `indexmem <arguments>` in n processes, one for each GPU, and returns the exit status."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(n), "--num_machines", "1",
        *(["--multi_gpu"] if torch.cuda.is_available() else ["--cpu"]), "--mixed_precision", "no",
        "--dynamo_backend", "no", "-m", "indexmem_edge", *arguments,
    ]  # fmt: skip
    with subprocess.Popen(command) as child:  # Ctrl-C reaches the processes, which save and end; this one waits for them
        before = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            return child.wait()
        finally:
            signal.signal(signal.SIGINT, before)


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
