"""The part of a layer behind its attention: one gated network, or several of which a router chooses for each token."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantised import Matrix, linear

LEAST_WEIGHT = 2.0**-14  # what llama.cpp divides the weights of experts by at least: the smallest normal float16

Activation = Callable[[Tensor], Tensor]


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def route(x: Tensor, router: Tensor, n_used: int) -> tuple[Tensor, Tensor]:
    """The best experts of each token [N, n_used], and their shares, which sum to 1: x [N, d], router [E, d]."""
    shares, experts = F.linear(x.to(router.dtype), router).softmax(-1).topk(n_used, dim=-1)
    return experts, shares / shares.sum(-1, keepdim=True).clamp_min(LEAST_WEIGHT)


def experts(
    x: Tensor, router: Tensor, n_used: int, gate: Matrix, up: Matrix, down: Matrix, activation: Activation
) -> Tensor:
    """x [..., d] -> [..., d]; gate and up [E, n_ff, d], down [E, d, n_ff].

    An expert computes the tokens that chose it, all at once.
    """
    flat = x.flatten(0, -2)
    chosen, shares = route(flat, router, n_used)
    out = torch.zeros_like(flat, dtype=torch.promote_types(x.dtype, torch.float32))
    for e in chosen.unique().tolist():
        token, place = (chosen == e).nonzero(as_tuple=True)
        h = flat[token]
        said = linear(activation(linear(h, gate[e])) * linear(h, up[e]), down[e])
        out = out.index_add(0, token, said.to(out.dtype) * shares[token, place, None].to(out.dtype))
    return out.to(x.dtype).view_as(x)
