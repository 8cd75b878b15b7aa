"""Recurrent parts of tiny models: a state of fixed size instead of cached keys and values.

They forget slowly, so that what they hold of a whole text can be seen in the logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tiny.config import Draw, TinyConfig, Weights

N_CONV = 4  # tokens that a convolution reads
N_STATE, N_GROUP, N_SSM_HEAD = 16, 2, 4  # of a head; heads that share what they read; heads
RANK = 4  # of the step sizes of mamba


def _decay(draw: Draw, *shape: int) -> np.ndarray:
    """What a state loses per step, as an exponent."""
    return -draw.rng.uniform(0.05, 0.5, shape).astype(np.float32)


def metadata(c: TinyConfig, n_inner: int, n_rank: int = N_SSM_HEAD, n_group: int = N_GROUP) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": N_CONV, "ssm.inner_size": n_inner, "ssm.state_size": N_STATE, "ssm.time_step_rank": n_rank,
        "ssm.group_count": n_group,
    }  # fmt: skip


def mamba(c: TinyConfig, draw: Draw) -> Weights:
    """As jamba has it, with norms."""
    n_inner = 2 * c.n_embd
    return {
        "ssm_in": draw.matrix(2 * n_inner, c.n_embd),
        "ssm_conv1d": draw.matrix(n_inner, N_CONV), "ssm_conv1d.bias": draw.normal(n_inner, std=0.1),
        "ssm_x": draw.matrix(RANK + 2 * N_STATE, n_inner),
        "ssm_dt": draw.matrix(n_inner, RANK), "ssm_dt.bias": draw.normal(n_inner, std=0.1) - 1,
        "ssm_a": _decay(draw, n_inner, N_STATE), "ssm_d": draw.norm(n_inner), "ssm_out": draw.matrix(c.n_embd, n_inner),
    } | {f"ssm_{x}_norm": draw.norm(n) for x, n in (("dt", RANK), ("b", N_STATE), ("c", N_STATE))}  # fmt: skip


def mamba2(c: TinyConfig, draw: Draw) -> Weights:
    n_inner = 2 * c.n_embd
    n_conv = n_inner + 2 * N_GROUP * N_STATE
    return {
        "ssm_in": draw.matrix(n_inner + n_conv + N_SSM_HEAD, c.n_embd),
        "ssm_conv1d": draw.matrix(n_conv, N_CONV), "ssm_conv1d.bias": draw.normal(n_conv, std=0.1),
        "ssm_dt.bias": draw.normal(N_SSM_HEAD, std=0.1) - 1, "ssm_a": _decay(draw, N_SSM_HEAD, 1),
        "ssm_d": draw.normal(N_SSM_HEAD, 1), "ssm_norm": draw.norm(n_inner).reshape(N_GROUP, -1),
        "ssm_out": draw.matrix(c.n_embd, n_inner),
    }  # fmt: skip


def delta_net(c: TinyConfig, draw: Draw, *, joint: bool = False) -> Weights:
    """Gated delta net. `joint`: one matrix for what is written and what is forgotten."""
    n_key, n_value = N_GROUP * N_STATE, N_SSM_HEAD * N_STATE
    n_conv = 2 * n_key + n_value
    rates = {f"ssm_{x}": draw.matrix(N_SSM_HEAD, c.n_embd) for x in ("beta", "alpha")}
    return {
        "attn_qkv": draw.matrix(n_conv, c.n_embd), "attn_gate": draw.matrix(n_value, c.n_embd),
        "ssm_conv1d": draw.matrix(n_conv, N_CONV), "ssm_dt.bias": draw.normal(N_SSM_HEAD, std=0.1) - 1,
        "ssm_a": _decay(draw, N_SSM_HEAD), "ssm_norm": draw.norm(N_STATE), "ssm_out": draw.matrix(c.n_embd, n_value),
    } | ({"ssm_ba": np.concatenate(list(rates.values()))} if joint else rates)  # fmt: skip


def short_convolution(c: TinyConfig, draw: Draw) -> Weights:
    return {
        "shortconv.conv": draw.matrix(c.n_embd, N_CONV), "shortconv.in_proj": draw.matrix(3 * c.n_embd, c.n_embd),
        "shortconv.out_proj": draw.matrix(c.n_embd, c.n_embd),
    }  # fmt: skip


def kimi_delta(c: TinyConfig, draw: Draw) -> Weights:
    """Kimi's delta attention: each component of a key forgets at a rate of its own."""
    n_inner = c.n_head * N_STATE
    w = {f"attn_{x}": draw.matrix(n_inner, c.n_embd) for x in "qkv"}
    w |= {f"ssm_conv1d_{x}": draw.matrix(n_inner, N_CONV).reshape(n_inner, 1, N_CONV) for x in "qkv"}
    for x in "fg":
        w |= {f"ssm_{x}_a": draw.matrix(N_STATE, c.n_embd), f"ssm_{x}_b": draw.matrix(n_inner, N_STATE)}
    return w | {
        "ssm_beta": draw.matrix(c.n_head, c.n_embd), "ssm_a": _decay(draw, c.n_head, 1),
        "ssm_dt.bias": draw.normal(n_inner, std=0.1) - 1, "ssm_norm": draw.norm(N_STATE),
        "attn_output": draw.matrix(c.n_embd, n_inner),
    }  # fmt: skip


def kimi_delta_whole(c: TinyConfig, draw: Draw) -> Weights:
    """The same as Kimi K3 and Ling 3 have it: one matrix for the gate, and a rate of forgetting between two bounds."""
    n_inner = c.n_head * N_STATE
    w = kimi_delta(c, draw)
    gate = {"ssm_g": draw.matrix(n_inner, c.n_embd), "ssm_a": _decay(draw, c.n_head) * 4}
    if c.arch == "bailingmoe3":
        gate = {"ssm_g_a": gate["ssm_g"], "ssm_f_a": draw.matrix(n_inner, c.n_embd), "ssm_a": -gate["ssm_a"][:, None]}
        del w["ssm_f_b"]
    del w["ssm_g_a"], w["ssm_g_b"]
    return w | gate


def lightning(c: TinyConfig, draw: Draw) -> Weights:
    """MiniMax's linear attention, which forgets at fixed rates."""
    n_inner = c.n_head * c.head_dim
    return {
        "attn_norm_2": draw.norm(n_inner), "attn_qkv": draw.matrix(3 * n_inner, c.n_embd),
        "attn_gate": draw.matrix(n_inner, c.n_embd), "attn_output": draw.matrix(c.n_embd, n_inner),
    }  # fmt: skip


def plamo_mamba(c: TinyConfig, draw: Draw) -> Weights:
    """As PLaMo 2 has it. What is named with an ending "." has none in the file."""
    n_inner, n_rate = 2 * c.n_embd, 64
    return {
        "ssm_in": draw.matrix(2 * n_inner, c.n_embd), "ssm_conv1d": draw.matrix(n_inner, N_CONV),
        "ssm_x": draw.matrix(n_rate + 2 * N_STATE, n_inner), "ssm_dt": draw.matrix(N_SSM_HEAD, n_rate),
        "ssm_dt.bias": draw.normal(N_SSM_HEAD, std=0.1) - 1, "ssm_a": _decay(draw, N_SSM_HEAD),
        "ssm_d": draw.normal(N_SSM_HEAD), "ssm_out": draw.matrix(c.n_embd, n_inner),
        "ssm_dt_norm.": draw.norm(n_rate), "ssm_b_norm.": draw.norm(N_STATE), "ssm_c_norm.": draw.norm(N_STATE),
    }  # fmt: skip
