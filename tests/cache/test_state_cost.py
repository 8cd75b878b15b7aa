"""What states cost: memory while one is refused, and while one is loaded. Each is measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Tiny
from reference.indexers import random_indexer, write_sidecar
from support.states import N_HEADER

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def child(code: str, *arguments: object) -> str:
    """What a program prints that runs in a process of its own."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-c", "import indexmem_edge\n" + code, *map(str, arguments)]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


NUMBERS_THAT_LIE = """
import resource, struct, sys

from support.native_context import Context, llama_cpp, open_model

path, n_header, budget = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
said = []
with open_model(path) as model, Context(model, budget=budget) as c:
    log = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode()))
    llama_cpp.llama_log_set(log, None)
    c.decode(list(range(3, 20)))
    whole, one = c.save(), c.save(0)
    n_arch = 4 + len("llama")
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20),) * 2)  # gigabytes fail here, and not on everybody
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for state, seq, n_before in ((one, 0, 8), (whole, None, n_arch)):
        head = n_before + n_header
        fields = {"policy": n_before + 8, "sequences": head - 4}
        fields |= {name: head + 4 * i for i, name in enumerate(("seen", "held", "fixed", "pinned", "scored"), start=1)}
        if seq is None:
            fields["architecture"] = 0
        for name, at in fields.items():
            for n in (10**6, 3 * 10**7, 2 * 10**8, 2**31 - 1, 2**32 - 1):
                said.clear()
                assert not c.load(state[:at] + struct.pack("<I", n) + state[at + 4 :], seq), (name, n)
                error = "".join(line for line in said if "error" in line)
                assert "bad_alloc" not in error, (name, n, error)
                assert name == "architecture" or str(n) in error, (name, n, error)
    assert c.save() == whole
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
"""


def test_numbers_that_lie_take_no_memory(tiny: Tiny) -> None:
    """Between "too many" and "cannot be allocated": each is compared with what the context can hold, then used."""
    grown = child(NUMBERS_THAT_LIE, tiny("llama")[0], N_HEADER - 8, 40)
    assert int(grown) < 2048, f"{grown} KiB to refuse 17 tokens"


PEAK = """
import ctypes, sys

from support.native_context import Context, F32, llama_cpp, open_model

def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

with open_model(sys.argv[1]) as model, Context(model, budget=4096, n_ubatch=512, n_ctx=8192, type_k=F32, type_v=F32) as c:
    c.feed([3 + i % 250 for i in range(5000)], 512)
    size = llama_cpp.llama_state_seq_get_size(c.ctx, 0)
    state = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(c.ctx, state, size, 0) == size
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before = resident("VmRSS")
    assert llama_cpp.llama_state_seq_set_data(c.ctx, state, size, 0) == size
    assert llama_cpp.llama_state_seq_get_size(c.ctx, 0) == size
    print(size, (resident("VmHWM") - before) * 1024)
"""


def test_loading_takes_no_second_copy(tiny: Tiny) -> None:
    path, _ = tiny("llama", n_layer=1, n_head=8, n_head_kv=8, head_dim=128)
    size, peak = map(int, child(PEAK, path).split())
    assert size > 30 << 20
    assert peak < size / 8


FITTED = """
import ctypes, sys

from support.native_context import Context, llama_cpp, open_model

def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

path, sidecar, policy = sys.argv[1], sys.argv[2] or None, sys.argv[3]
with open_model(path) as model, Context(model, budget=96, window=16, policy="indexer" if sidecar else policy, sidecar=sidecar, n_ubatch=64, n_ctx=16384) as long:
    long.feed([3 + i % 250 for i in range(8000)], 64)
    state = long.save(0)
    with Context(model, budget=64, window=16, policy=policy, n_ubatch=64, n_ctx=16384) as short:
        open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
        before = resident("VmRSS")
        assert short.load(state, 0)
        print(resident("VmHWM") - before)
"""


@pytest.mark.parametrize("made_by, read_by", [("streaming", "streaming"), ("snapkv", "snapkv"), ("indexer", "streaming")])
def test_a_state_that_has_to_be_fitted_takes_no_memory_for_what_was_evicted(tiny: Tiny, tmp_path: Path, made_by: str, read_by: str) -> None:
    path, config = tiny("llama")
    sidecar = tmp_path / "a.indexmem.gguf" if made_by == "indexer" else ""
    if sidecar:
        write_sidecar(sidecar, random_indexer("retention-mlp", config.n_layer, config.n_embd, config.n_head_kv, 0), architecture=config.arch)
    grown = int(child(FITTED, path, sidecar, read_by))
    assert grown < 8192, f"{grown} KiB for a state of 96 entries, of a text of 8000 tokens"
