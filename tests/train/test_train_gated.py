"""Gated attention and its objective: against the golden vectors of the authors, the equations, and automatic gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file

from indexmem_edge.train.indexers.scorers import KVzap, Retention
from indexmem_edge.train.model.decoder import causal
from indexmem_edge.train.objectives import gated, losses
from indexmem_edge.train.objectives.gated import Pins, gated_attention, gated_dense
from indexmem_edge.train.objectives.gated_kl import GatedKL
from reference.random_decoder import modules_of, random_decoder, random_sample

GOLDEN = Path(__file__).parents[1] / "golden"
PINS, SCALE, AGE_SCALE = Pins(4, 12, 256.0), 0.25, 96.0


def close(name: str, found: torch.Tensor, expected: torch.Tensor, share: float = 1e-5) -> None:
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    assert error < share, f"{name}: {error:.2e} of the largest"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "training.safetensors")


@pytest.fixture
def scorer() -> Retention:
    """Layer 0 of the authors' checkpoint."""
    checkpoint = torch.load(GOLDEN / "indexmem_tiny.pt", weights_only=True)
    c = checkpoint["scorer_config"]
    constants = {name: c[name] for name in ("mid_dim", "norm_eps", "pos_slope", "age_scale", "decay")}
    module = Retention(c["hidden_size"], c["n_heads"], constants)
    module.load_state_dict({k[2:]: v for k, v in checkpoint["scorers"].items() if k.startswith("0.")})
    return module


@pytest.mark.parametrize("attention", [gated_attention, gated_dense])
def test_output_and_gradients_are_those_of_the_authors(attention, golden, scorer) -> None:  # type: ignore[no-untyped-def]
    hidden = golden["hidden"][0]
    e, rate = scorer.intercept(hidden, torch.arange(len(hidden)))
    qkv = (golden[name][0] for name in "qkv")
    out = attention(*qkv, e, rate, scorer.gate_scale, SCALE, AGE_SCALE, PINS)
    close("output", out, golden["output"][0])
    (out * golden["upstream"][0]).sum().backward()
    for name, parameter in scorer.named_parameters():
        close(name, parameter.grad, golden[f"grad.{name}"])


def test_the_normaliser_is_that_of_the_authors(golden, scorer) -> None:  # type: ignore[no-untyped-def]
    hidden = golden["hidden"][0]
    e, rate = scorer.intercept(hidden, torch.arange(len(hidden)))
    for h in range(len(e)):
        block = gated._Block(0, len(hidden), e[h], rate[h], scorer.gate_scale, AGE_SCALE, PINS)
        close(f"head {h}", block.lse[:, 0], golden["history_lse"][0, h])


def test_divergences_are_those_of_the_authors(golden) -> None:  # type: ignore[no-untyped-def]
    student, teacher = (golden[f"kl_{name}"].flatten(0, 1) for name in ("student", "teacher"))
    for rows in (1, 5, 1000):
        close("reverse", losses.reverse_kl(student, teacher, golden["kl_head"], rows=rows), golden["reverse_kl"])


def test_the_bias_of_an_output_matrix_counts() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, 5, generator=draw)
    head, bias = torch.randn(11, 5, generator=draw), 2 * torch.randn(11, generator=draw)
    s, t = ((h @ head.T + bias).log_softmax(-1) for h in (student, teacher))
    close("with a bias", losses.reverse_kl(student, teacher, head, rows=3, bias=bias), (s.exp() * (s - t)).sum(-1).mean())


def operands(total: int, heads: int = 2, group: int = 3, dim: int = 8, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(heads * group, total, dim), (heads, total, dim), (heads, total, dim), (heads, total), (heads, total)]
    q, k, v, e, rate = (torch.randn(shape, generator=draw) for shape in shapes)
    return [t.requires_grad_() for t in (q, k, v, 2 * e, -rate.exp(), torch.tensor([1.3]))]


@pytest.mark.parametrize("decay", [True, False], ids=["decay", "no decay"])
@pytest.mark.parametrize("pins", [Pins(4, 12), Pins(0, 1, 3.0), Pins(2, 200), Pins(0, 7, 64.0)], ids=str)
@pytest.mark.parametrize("total", [1, 5, 63, 130])
def test_blocks_equal_the_equations(total: int, pins: Pins, decay: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated, "BLOCK", 32)
    grads = []
    for attention in (gated_attention, gated_dense):
        q, k, v, e, rate, g = given = operands(total)
        out = attention(q, k, v, e, rate if decay else None, g, 0.3, 50.0, pins)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads.append([out, *(torch.zeros_like(t) if t.grad is None else t.grad for t in given)])
    for name, a, b in zip(("out", "q", "k", "v", "e", "rate", "g"), *grads):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_history_weighs_what_it_should_and_a_constant_changes_nothing() -> None:
    q, k, v, e, rate, g = operands(60)
    history = slice(4, 60 - 12)  # of the last row
    for shift in (0.0, 5.0):
        block = gated._Block(0, 60, e[0] + shift, None, g, 1.0, Pins(4, 12, 40.0))
        assert block.gate[-1, history].exp().sum().item() == pytest.approx(40.0, rel=1e-4)
        assert (block.gate[-1, :4] == 0).all() and (block.gate[-1, -12:] == 0).all()


@pytest.mark.parametrize("recompute", [10_000, 1], ids=["kept", "recomputed"])
def test_the_loss_is_the_divergence_of_the_gated_model(recompute: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from indexmem_edge.train.objectives import gated_kl

    monkeypatch.setattr(gated_kl, "RECOMPUTE", recompute)
    decoder, sample = random_decoder(), random_sample(50)
    modules = modules_of(Retention, decoder, decay=True)
    objective = GatedKL(decoder, modules, 2, 8)
    loss = objective.loss(sample, np.random.default_rng(0))
    loss.backward()
    grads = [p.grad.clone() for p in modules.parameters()]
    modules.zero_grad()

    def attend(heads):  # type: ignore[no-untyped-def]
        module = modules[heads.layer]
        e, rate = module.intercept(heads.hidden[0], torch.arange(50))
        pins = Pins(2, 8, objective.mass)
        return gated_dense(heads.q[0], heads.k[0], heads.v[0], e, rate, module.gate_scale, decoder.config.scale, 16384.0, pins)[None]

    tokens = torch.from_numpy(sample.tokens).long()[None]
    with torch.no_grad():
        teacher = decoder.logits(decoder(tokens, causal))[0, 10:].log_softmax(-1)
    student = decoder.logits(decoder(tokens, attend))[0, 10:].log_softmax(-1)
    plain = (student.exp() * (student - teacher)).sum(-1).mean()
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-4)
    plain.backward()
    for found, parameter in zip(grads, modules.parameters()):
        torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("kind", [Retention, KVzap])
def test_training_lowers_the_loss_and_repeats_itself(kind: type) -> None:
    decoder, samples = random_decoder(), [random_sample(96, seed=i) for i in range(2)]
    ends = []
    for _ in range(2):
        modules = modules_of(kind, decoder)
        objective = GatedKL(decoder, modules, 2, 8)
        before = objective.held_out_loss(samples)
        optimizer = torch.optim.Adam(modules.parameters(), 1e-2)
        for step in range(12):
            optimizer.zero_grad()
            figures = objective.backward(samples, step, seed=3)
            optimizer.step()
        ends.append([p.detach().clone() for p in modules.parameters()])
        assert objective.held_out_loss(samples) < 0.97 * before and figures["loss"] > 0
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_answers_count_more_and_all_of_them_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from indexmem_edge.train.objectives import gated_kl

    monkeypatch.setattr(gated_kl, "POSITIONS", 20)
    sample = random_sample(100)
    sample.weight[[5, 40, 41, 90]] = 10.0
    where, weight = GatedKL(random_decoder(), torch.nn.ModuleList(), 2, 8)._positions(sample, np.random.default_rng(0))
    assert len(where) == 20 and where.min() >= 10  # position 5 has no history: nothing was evicted there
    assert {40, 41, 90} == set(where[weight == 10].tolist())
