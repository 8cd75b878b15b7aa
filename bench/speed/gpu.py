"""The bounded cache on a GPU: does it compute what the CPU computes, wherever model and cache lie, and how fast is it?

    indexmem bench gpu check -m model.gguf
    indexmem bench gpu speed -m model.gguf
    indexmem bench gpu speed --geometry qwen3-8b --kv-budget 4096 --depths 2048,8192,32768,131072
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np

from indexmem_edge.native import api
from indexmem_edge.native.ggml import ggml_function

from .. import synthetic
from ..machine import describe
from ..report import Report, Verdict
from ..runner import BenchError, Model, Setup, System, library, llama_cpp
from ..text import TokenStream, read_text
from . import run as speed_bench

PREFILL, DECODE = 1024, 96  # tokens of the check: those before its logits are looked at, and those of single steps
BUDGET = 512
CHECK_COLUMNS = ("system", "placement", "kl", "nll", "nll_change", "same_top", "kept_alike", "noise")
SPEED_COLUMNS = (
    "system",
    "budget",
    "depth",
    "kv_bytes",
    "prefill_tps",
    "decode_tps",
    "decode_vs_flash",
    "prefill_vs_flash",
    "graphs_built",
    "captures_made",
    "captures_dropped",
)


@dataclass(frozen=True)
class Placement:
    name: str
    gpu_layers: int | None  # None: all
    offload: bool  # of the cache


@dataclass
class Outcome:
    """What a system computed at a placement."""

    log_probs: np.ndarray  # [DECODE, n_vocab]
    nll: float
    kept: list[np.ndarray]  # positions, of each layer and KV head


def placements(model: Model) -> list[Placement]:
    """The first is what the others are compared with."""
    half = llama_cpp.llama_model_n_layer(model.raw.model) // 2
    return [
        Placement("CPU", 0, False),
        Placement("GPU", None, True),
        Placement(f"{half} layers on the GPU", half, True),
        Placement("GPU, cache on the CPU", None, False),
    ]


def systems(threads: int) -> list[Setup]:
    """The first is the stock cache, which says how much of a difference is the arithmetic of the model itself."""
    base = Setup(policy="streaming", budget=BUDGET, window=64, threads=threads, ubatch=256)
    stock = Setup(n_ctx=PREFILL + DECODE, threads=threads, ubatch=256)
    policies = [name for name in api.policies() if name not in ("full", "indexer")]
    return [
        stock,
        *(replace(base, policy=name) for name in policies),
        replace(base, memory="centroid"),
        replace(base, policy="knorm", memory="centroid"),
        replace(base, cache_type="q8_0"),
        replace(base, policy="snapkv", cache_type="q8_0"),
    ]


def label(setup: Setup) -> str:
    return setup.label + ("" if setup.cache_type == "f16" else f", {setup.cache_type}")


def run_system(model: Model, setup: Setup, tokens: list[int]) -> Outcome:
    """Prefill, then single steps with the tokens of the text, so that all systems see the same."""
    rows = []
    with System(model, setup) as system:
        system.feed(tokens[:PREFILL], last_logits=True)
        for token in tokens[PREFILL : PREFILL + DECODE]:
            assert system.logits is not None
            rows.append(system.logits)
            system.step(token)
        kept = kept_positions(system) if setup.budget else []
    logits = np.stack(rows).astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    nll = -log_probs[np.arange(DECODE), tokens[PREFILL : PREFILL + DECODE]].mean()
    return Outcome(log_probs, float(nll), kept)


def kept_positions(system: System) -> list[np.ndarray]:
    n_layer = llama_cpp.llama_model_n_layer(system.model.raw.model)
    heads = [(il, h) for il in range(n_layer) for h in range(api.library().indexmem_n_head_kv(system.ctx, il))]
    return [api.positions(system.ctx, il, h) for il, h in heads]


def compare(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Differences of two outcomes: the mean KL divergence of the next token, and what each head kept."""
    kl = (np.exp(expected.log_probs) * (expected.log_probs - found.log_probs)).sum(axis=1).mean()
    both = zip(found.kept, expected.kept, strict=True)
    alike = [np.intersect1d(a, b).size / max(a.size, b.size, 1) for a, b in both]
    return {
        "kl": float(kl),
        "nll": found.nll,
        "nll_change": found.nll - expected.nll,
        "same_top": float((found.log_probs.argmax(axis=1) == expected.log_probs.argmax(axis=1)).mean()),
        "kept_alike": float(np.mean(alike)) if alike else 1.0,
    }


def verdict(setup: Setup, row: dict[str, Any]) -> list[Verdict]:
    """What is kept by position alone is the same everywhere; what is kept by numbers may differ where they nearly tie."""
    name = f"{row['system']}, {row['placement']}"
    if not setup.budget:
        return [Verdict(f"{name}: KL divergence from the CPU", row["kl"], 0.05, at_most=True)]
    exact = setup.policy in ("streaming", "random")
    bound = 3 * row["noise"] + (0.002 if exact else 0.05)
    return [
        Verdict(f"{name}: entries kept as on the CPU", row["kept_alike"], 1.0 if exact else 0.9),
        Verdict(f"{name}: KL divergence from the CPU", row["kl"], bound, at_most=True),
    ]


def run_check(path: Path, where: list[Placement], setups: list[Setup], out: Path, name: str = "cuda-check") -> Report:
    how = f"{PREFILL} tokens, then {DECODE} single steps"
    meta = describe(path.name, library(), setups[0].threads, how=how, device=devices())
    report = Report(name, meta)
    tokens: list[int] = []
    expected: dict[Setup, Outcome] = {}
    noise: dict[Placement, float] = {}
    for place in where:
        model = Model(path, place.gpu_layers)
        tokens = tokens or TokenStream(model.tokens(read_text(None))).take(PREFILL + DECODE)
        for setup in setups:
            print(f"check: {place.name}: {label(setup)}", flush=True)
            found = run_system(model, replace(setup, offload=place.offload), tokens)
            if place == where[0]:
                expected[setup] = found
                continue
            difference = compare(found, expected[setup])
            noise.setdefault(place, difference["kl"])
            row = report.add(
                policy=setup.policy,
                budget=setup.budget,
                system=label(setup),
                placement=place.name,
                noise=noise[place],
                **difference,
            )
            report.verdicts += verdict(setup, row)
            report.save(out)
        model.close()
    return report


def devices() -> str:
    """Names of the devices that ggml found."""
    count = ggml_function("ggml_backend_dev_count", ctypes.c_size_t)
    get = ggml_function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    describe_device = ggml_function("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
    return ", ".join(describe_device(get(i)).decode("utf-8", "replace").strip() for i in range(count()))


def require_gpu() -> None:
    """Raises:
        BenchError: there is none, or not one that can hold a bounded cache.
    """
    if not llama_cpp.llama_supports_gpu_offload():
        raise BenchError(f"no GPU: this build of the library has found {devices()}")
    if not api.policies_on(0):  # GPUs come before the CPU
        raise BenchError(f"the first of these devices can hold no bounded cache: {devices()}")


def check(path: Path, out: Path, threads: int) -> Report:
    """The same logits as on the CPU, at every placement."""
    loaded = Model(path, 0)
    where = placements(loaded)
    loaded.close()
    return run_check(path, where, systems(threads), out)


def model_of(geometry: Optional[str], path: Optional[Path], cache: Optional[Path]) -> Path:
    """The model with random weights of that shape, written where there is none yet; without a shape `path`."""
    if geometry is None:
        assert path is not None
        return path
    if geometry not in synthetic.GEOMETRIES:
        raise BenchError(f"unknown geometry {geometry!r}: choose one of {', '.join(synthetic.GEOMETRIES)}")
    return synthetic.cached_model(synthetic.GEOMETRIES[geometry], folder=cache)


def speed(
    path: Path, name: str, budget: int, wanted: list[str], depths: list[int], out: Path, threads: int
) -> Report:
    """Decode and prefill at growing depths, of each policy/memory and unbounded."""
    setups = []
    for pair in wanted:
        policy, _, memory = pair.partition("/")
        setups.append(Setup(policy=policy, budget=budget, threads=threads, memory=memory or "off"))
    loaded = Model(path)
    report = speed_bench.run_speed(loaded, setups, depths, repeats=3, no_flash=False, name=f"cuda-speed-{name}-{budget}", out=out)
    report.meta["device"] = devices()
    report.verdicts = []  # the goals are those of the CPU
    loaded.close()
    return report
