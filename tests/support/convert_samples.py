"""Small checkpoints of every source format, made up here, with the tensors that a sidecar must then hold.

A sample is the files to name, what a person has to add, and the expected checkpoint: kind, constants, and per layer the
names of docs/sidecar.md with float32 arrays in PyTorch order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from indexmem_edge.convert import ReadOptions

GOLDEN = Path(__file__).parents[1] / "golden"
D, H, LAYERS = 64, 3, 2  # embedding length, KV heads
HEAD_DIM, N_HEAD = 16, 9

Layers = list[dict[str, np.ndarray]]


@dataclass
class Sample:
    format: str
    paths: list[Path]
    kind: str
    constants: dict[str, Any]
    layers: Layers
    memory: str = "none"
    memory_constants: dict[str, Any] = field(default_factory=dict)
    options: ReadOptions = field(default_factory=ReadOptions)


def draw(seed: int = 0) -> Any:
    """draw(*shape) -> float32 normals; every call gives new ones."""
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.standard_normal(shape).astype(np.float32)


def save_torch(path: Path, content: Any) -> Path:
    """Saves nested dicts and lists with their arrays as tensors."""
    import torch

    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.copy())
        if isinstance(value, dict):
            return {k: convert(v) for k, v in value.items()}
        return [convert(v) for v in value] if isinstance(value, list) else value

    torch.save(convert(content), path)
    return path


def save_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    save_file(tensors, path)
    return path


def load_torch(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=True, map_location="cpu")


def golden(name: str) -> Sample:
    """A checkpoint that the authors' code wrote: `tiny`, `tiny_bf16`, `tiny_linear`, `tiny_nodecay`, `tiny_legacy`."""
    path = GOLDEN / f"indexmem_{name}.pt"
    content = load_torch(GOLDEN / f"indexmem_{name.replace('_legacy', '')}.pt")
    config = content["scorer_config"]
    layers: Layers = [{}, {}]
    for key, tensor in content["scorers"].items():
        layer, _, param = key.partition(".")
        layers[int(layer)][param] = tensor.float().numpy()
    constants = {k: config[k] for k in ("mid_dim", "norm_eps", "pos_slope", "age_scale", "decay")}
    constants |= {"trunk": config["kind"], "gate_scale": [float(layer.pop("gate_scale")[0]) for layer in layers]}
    return Sample("indexmem-legacy" if "legacy" in name else "indexmem", [path], "retention", constants, layers)


def pairwise_layers(n_i: int = 4, d_i: int = 8) -> Layers:
    new = draw(1)
    affine = {f"{x}_norm.{part}": (d_i,) for x in "qk" for part in ("weight", "bias")}
    shapes = {
        "w_q.weight": (n_i * d_i, D), "w_q.bias": (n_i * d_i,), "w_k.weight": (d_i, D), "w_k.bias": (d_i,),
        "weights_proj.weight": (n_i, D), "weights_proj.bias": (n_i,), **affine,
    }  # fmt: skip
    return [{name: new(*shape) for name, shape in shapes.items()} for _ in range(LAYERS)]


def v1(folder: Path, parts: str = "indexer+memory", files: int = 1, torch: bool = True, **options: Any) -> Sample:
    """`parts`: indexer, memory or both, in one file or two, with torch.save or as safetensors."""
    new, layers = draw(2), pairwise_layers()
    states: list[dict[str, np.ndarray]] = [{}, {}]
    gates: dict[str, list[float]] = {"gate_logit": [], "eta_raw": [], "decay_logit": []}
    for i in range(LAYERS):
        prefix = f"model.layers.{i}.self_attn"
        states[0] |= {f"{prefix}.indexer.{name}": array for name, array in layers[i].items()}
        layers[i]["phi_proj.weight"] = new(5, HEAD_DIM)
        states[1][f"{prefix}.kvpress_memory.phi_proj.weight"] = layers[i]["phi_proj.weight"]
        for name, values in gates.items():
            scalar = new(1)
            values.append(float(scalar[0]))
            states[1][f"{prefix}.kvpress_memory.{name}"] = scalar.reshape(()) if name == "gate_logit" else scalar
    has = [part in parts for part in ("indexer", "memory")]
    states = [state for state, there in zip(states, has) if there]
    if files == 1:
        states = [{k: v for state in states for k, v in state.items()}]
    suffix, save = ("pt", save_torch) if torch else ("safetensors", save_safetensors)
    paths = [save(folder / f"v1-{i}.{suffix}", state) for i, state in enumerate(states)]
    for layer in layers:
        for name in list(layer):
            if not has[name == "phi_proj.weight"]:
                del layer[name]
    constants = {"head_count": 4, "head_dim": 8, "norm_eps": 1e-5, "reduce": "mean", "query_count": 128}
    memory = {"feature_dim": 5, "head_dim": HEAD_DIM, "eps": 1e-6, **gates, "enabled": [True] * LAYERS}
    return Sample(
        "v1", paths, "pairwise" if has[0] else "none", constants if has[0] else {}, layers,
        "residual" if has[1] else "none", memory if has[1] else {}, ReadOptions(**{"kv_heads": H, **options}),
    )  # fmt: skip


def kvzap(folder: Path, mid_dim: int = 32, as_folder: bool = True) -> Sample:
    new, path = draw(3), folder / "kvzap"
    path.mkdir()
    layers: Layers = []
    state = {}
    for i in range(LAYERS):
        out = {"out_proj.weight": new(H, mid_dim or D), "out_proj.bias": new(H)}
        into = {"in_proj.weight": new(mid_dim, D), "in_proj.bias": new(mid_dim)} if mid_dim else {}
        layers.append({**into, **out})
        state |= {f"layers.{i}.{'2.' if mid_dim else ''}{k[9:]}": v for k, v in out.items()}
        state |= {f"layers.{i}.0.{k[8:]}": v for k, v in into.items()}
    config = {
        "input_dim": D,
        "output_dim": H,
        "n_modules": LAYERS,
        "hidden_dim": mid_dim or None,
        "model_type": "kvzap",
    }
    (path / "config.json").write_text(json.dumps(config))
    weights = save_safetensors(path / "model.safetensors", state)
    return Sample("kvzap", [path if as_folder else weights], "kvzap", {"mid_dim": mid_dim}, layers)


def fast_kvzip(folder: Path, groups: int = 3, dim: int = 16, bases: int = 2) -> Sample:
    new = draw(4)
    shapes = {
        "q_proj.weight": (H * groups * dim, D), "q_proj.bias": (H * groups * dim,), "k_proj.weight": (H * dim, D),
        "q_norm.weight": (dim,), "k_norm.weight": (dim,), "k_base": (H, bases, dim), "b": (H, groups),
    }  # fmt: skip
    layers = [{name: new(*shape) for name, shape in shapes.items()} for _ in range(LAYERS)]
    state = [{k: v[:, None] if k in ("k_base", "b") else v for k, v in layer.items()} for layer in layers]
    path = save_torch(folder / "fast.pt", {"module": state, "args": {"lr": 0.1}})
    constants = {"group_count": groups, "dim": dim, "base_count": bases, "norm_eps": 1e-6}
    return Sample("fast-kvzip", [path], "fast_kvzip", constants, layers)
