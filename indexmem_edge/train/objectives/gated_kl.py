"""The objective of IndexMem++ (method section 7): the model with gates in its attention should say what it says without.

Gradients flow through the frozen decoder into the networks. What is kept for them is a layer's activations, or beyond
`RECOMPUTE` tokens its input alone; attention and logits are computed block by block in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.sample import Sample
from ..model.attention import Heads, causal
from .gated import Pins, gated_attention
from .losses import reverse_kl
from .objective import Objective

RECOMPUTE = 4096
POSITIONS = 384  # of a sequence whose outputs are compared: all that answer a question, the others drawn


# What the history of a row weighs together, in entries: about the budget that the training imagines. It is drawn for each
# sequence, so that the order of entries is right at large budgets and at small ones. The released scorers had 256.
MASSES = (64.0, 128.0, 256.0)


class GatedKL(Objective):
    name = "gated-kl"
    mass = MASSES[-1]

    @torch.no_grad()
    def held_out_loss(self, samples: Sequence[Sample]) -> float:
        """Reverse KL on held-out samples at the mean mass: recall counts every head alike, outputs do not."""
        self.mass = sum(MASSES) / len(MASSES)
        losses = [float(self.loss(sample, np.random.default_rng(i))) for i, sample in enumerate(samples)]
        return sum(losses) / len(losses)

    def backward(self, samples: Sequence[Sample], step: int, seed: int) -> dict[str, float]:
        rng = np.random.default_rng((seed, step))
        total = 0.0
        for sample in samples:
            self.mass = float(rng.choice(MASSES))
            loss = self.loss(sample, rng) / len(samples)
            loss.backward()
            total += float(loss.detach())
        scales = [float(module.gate_scale.detach()) for module in self.modules]
        return {"loss": total, "gate_scale": sum(scales) / len(scales)}

    def loss(self, sample: Sample, rng: np.random.Generator) -> Tensor:
        """Reverse KL of one sequence, answers counted by their weight."""
        tokens = torch.from_numpy(sample.tokens).long().to(self.device)[None]
        with torch.no_grad():
            teacher = self.decoder(tokens)[0]
        student = self.decoder(tokens, self._attend, recompute=tokens.shape[1] > RECOMPUTE)[0]
        where, weight = self._positions(sample, rng)
        where, weight = where.to(self.device), weight.to(self.device)
        head, bias = self.decoder.output
        softcap = self.decoder.config.logit_softcap
        return reverse_kl(student[where], teacher[where], head, weight, bias=bias, softcap=softcap)

    def _attend(self, heads: Heads) -> Tensor:
        module = self.module_of(heads.layer)
        if module is None:
            return causal(heads)
        positions = torch.arange(heads.hidden.shape[1], device=self.device)
        e, rate = module.intercept(heads.hidden[0], positions)
        pins = Pins(self.sinks, self.window, self.mass)
        age_scale = module.constants.get("age_scale", 1.0)
        return gated_attention(heads.q[0], heads.k[0], heads.v[0], e, rate, module.gate_scale, heads.scale, age_scale, pins)[None]

    def _positions(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Positions whose outputs are compared, and their weights; only those that have a history."""
        first = self.sinks + self.window
        heavy = np.flatnonzero(sample.weight > 1)
        heavy = heavy[heavy >= first]
        light = np.setdiff1d(np.arange(first, len(sample.tokens)), heavy)
        light = rng.permutation(light)[: max(POSITIONS - len(heavy), 0)]
        where = np.concatenate([heavy, light]).astype(np.int64)
        return torch.from_numpy(where), torch.from_numpy(sample.weight[where])
