"""The schedule of the learning rate, and several processes that train as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny

torch = pytest.importorskip("torch")

import indexmem_edge
from indexmem_edge.errors import TrainingError
from indexmem_edge.native import find
from indexmem_edge.train import checkpoints, processes
from indexmem_edge.train.processes import Accelerated, Processes, launched, open_processes
from indexmem_edge.train.run import train
from indexmem_edge.train.schedule import lr_multiplier
from support.training import Calm, small_options, stub_tools

# the schedule


def test_the_schedule_of_the_authors() -> None:
    # lr_multiplier of their 600 steps: at the edges of its three parts
    golden = {
        0: 0.016666668, 1: 0.033333335, 58: 0.98333335, 59: 1.0, 60: 1.0, 420: 1.0, 421: 0.9944413, 422: 0.98888266,
        423: 0.98332405, 597: 0.01611732, 598: 0.010558659, 599: 0.005,
    }  # fmt: skip
    for step, value in golden.items():
        assert lr_multiplier(step, 600) == pytest.approx(value, abs=1e-6)
    for steps in (1, 2, 3, 10, 11, 300):
        found = [lr_multiplier(step, steps) for step in range(steps)]
        assert 0 < min(found) and max(found) == 1.0 and found.index(1.0) == max(1, steps // 10) - 1
    assert lr_multiplier(9, 10) == pytest.approx(0.005)


# several processes


class TwoAlike:
    """An accelerator whose other process has no gradients, the number 0, and rank 1."""

    device, process_index, num_processes = torch.device("cpu"), 0, 2

    def reduce(self, tensor: Any, reduction: str) -> Any:
        return tensor / 2 if reduction == "mean" else tensor

    def wait_for_everyone(self) -> None:
        pass


def test_gradients_are_averaged() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (1,))]
    parameters[0].grad, parameters[2].grad = torch.arange(6.0).reshape(2, 3), torch.ones(1)
    processes = Accelerated(TwoAlike())
    assert processes.average(parameters, [3.0, 1.0]) == [1.5, 0.5] and (processes.rank, processes.world) == (0, 2)
    grads = [p.grad.tolist() for p in parameters if p.grad is not None]
    assert grads == [[[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]], [0.0] * 4, [0.5]]
    assert processes.from_main(0.25) == 0.25 and processes.main
    alone = Processes("cpu")
    assert alone.average([], [1.0]) == [1.0] and alone.main and alone.world == 1


def test_several_processes_need_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(TrainingError, match="one of 2 processes.*pip install"):
        open_processes("cpu")


def test_as_many_processes_as_gpus_that_can_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    there: list[Any] = [object()]
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: there[0])
    assert [processes.to_launch("auto", batch) for batch in (16, 12, 4, 7)] == [8, 6, 4, 7]
    assert processes.to_launch("cpu", 8) == 1 and "multiple of 8" in processes.unused("cuda")
    there[0] = None
    assert processes.to_launch("auto", 8) == 1 and "pip install accelerate" in processes.unused("auto")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert processes.to_launch("auto", 8) == 1 and not processes.is_main() and processes.unused("auto") == ""


_WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from support.training import Calm, small_options, stub_tools
from indexmem_edge.train.run import train
folder = Path(sys.argv[2])
result = train(small_options(folder / "m.gguf", folder, out=folder / "two.gguf", objective=("follow",)),
               tools=stub_tools(objectives={"follow": Calm}))
print("wrote" if result else "helped")
"""


@pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")
def test_two_processes_train_what_one_does(tiny: Tiny, tmp_path: Path) -> None:
    """Through accelerate and gloo, where accelerate is installed."""
    pytest.importorskip("accelerate")
    import socket

    from safetensors.torch import load_file

    (tmp_path / "m.gguf").write_bytes(tiny("llama")[0].read_bytes())
    options = small_options(tmp_path / "m.gguf", tmp_path, out=tmp_path / "one.gguf", objective=("follow",))
    train(options, tools=stub_tools(objectives={"follow": Calm}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(indexmem_edge.__file__).parents[1])
    common = {
        **os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
    }  # fmt: skip
    command = [sys.executable, "-c", _WORKER, str(Path(__file__).parents[1]), str(tmp_path)]
    started = [
        subprocess.Popen(
            command, env={**common, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE, text=True, cwd=root
        )
        for rank in "01"
    ]
    assert [p.communicate(timeout=60)[0].split() for p in started] == [["wrote"], ["helped"]]
    one, two = (load_file(tmp_path / run / checkpoints.NAME) for run in ("one.train", "two.train"))
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-4)
