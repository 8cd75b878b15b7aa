"""Frozen weights that stay as a file stores them: the numbers, what lies in memory, and that nothing else changes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from conftest import Tiny

torch = pytest.importorskip("torch")

from indexmem_edge.train.model import feedforward
from indexmem_edge.train.model.decoder import Decoder
from indexmem_edge.train.model.gguf_weights import load_gguf
from indexmem_edge.train.model.quantised import _DEQUANTISE, Quantised, StoredWeights, can_stay

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, per_row: int) -> np.ndarray:
    """Any bytes are blocks; scales among them are infinite or NaN at times."""
    return np.random.default_rng(int(kind)).integers(0, 256, (rows, per_row * gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)


@pytest.mark.parametrize("kind", _DEQUANTISE, ids=lambda kind: kind.name)
def test_numbers_are_those_of_the_package_gguf(kind: gguf.GGMLQuantizationType) -> None:
    blocks = random_blocks(kind, 37, 3)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, kind)
    found = Quantised(torch.from_numpy(blocks), kind, expected.shape, torch.float32).numbers()
    np.testing.assert_array_equal(found.numpy(), expected)
    assert np.isfinite(expected).any()


@pytest.mark.parametrize("kind", _DEQUANTISE, ids=lambda kind: kind.name)
def test_parts_and_stacks_have_the_rows_that_are_theirs(kind: gguf.GGMLQuantizationType) -> None:
    blocks, row = torch.from_numpy(random_blocks(kind, 6, 2)), 2 * gguf.GGML_QUANT_SIZES[kind][0]
    whole = Quantised(blocks, kind, (6, row), torch.float32)
    parts = whole.split([1, 3, 2])
    assert [part.shape for part in parts] == [(1, row), (3, row), (2, row)]
    torch.testing.assert_close(torch.cat([part.numbers() for part in parts]), whole.numbers(), rtol=0, atol=0, equal_nan=True)
    stack = Quantised(blocks, kind, (2, 3, row), torch.float32).numbers()
    torch.testing.assert_close(stack.flatten(0, 1), whole.numbers(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ["llama", "phi3", "qwen3moe"])
def test_a_decoder_computes_the_same_from_blocks(tiny: Tiny, arch: str, dtype: torch.dtype) -> None:
    """phi3 has fused matrices, qwen3moe stacks of experts."""
    path, _ = tiny(arch, tensor_type="Q8_0")
    decoder = load_gguf(path, dtype)
    stored = decoder.weights.stored
    assert any(isinstance(w, Quantised) for w in stored.values())
    whole = Decoder(decoder.config, {name: w.clone() for name, w in decoder.weights.items()})
    assert not any(isinstance(w, Quantised) for w in whole.weights.stored.values())
    torch.testing.assert_close(decoder(TOKENS), whole(TOKENS))  # a product may be added up in another order where rows lie elsewhere
    torch.testing.assert_close(decoder.logits(decoder(TOKENS)), whole.logits(whole(TOKENS)))


def test_what_every_token_reads_whole_is_not_in_blocks(tiny: Tiny) -> None:
    path, _ = tiny("llama", tensor_type="Q8_0", tied=False)
    stored = load_gguf(path).weights.stored
    for name in ("token_embd.weight", "output.weight"):
        assert isinstance(stored[name], torch.Tensor) and stored[name].dtype == torch.bfloat16
        assert not can_stay(name, gguf.GGMLQuantizationType.Q8_0)


def test_another_dtype_is_computed_from_the_same_blocks(tiny: Tiny) -> None:
    path, _ = tiny("llama", tensor_type="Q8_0")
    decoder = load_gguf(path, torch.bfloat16).to("cpu", torch.float32)
    exact = load_gguf(path, torch.float32)
    name = "blk.0.attn_q.weight"
    assert decoder.weights[name].dtype == torch.float32
    assert torch.equal(decoder.weights[name], exact.weights[name])


def test_asking_what_there_is_dequantises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Quantised) -> None:
        raise AssertionError("dequantised")

    kind = gguf.GGMLQuantizationType.Q4_0
    weights = StoredWeights({"blk.0.a": Quantised(torch.zeros(1, 18, dtype=torch.uint8), kind, (1, 32), torch.float32)})
    monkeypatch.setattr(Quantised, "numbers", fail)
    assert "blk.0.a" in weights and "b" not in weights and list(weights) == ["blk.0.a"] and len(weights) == 1
    with pytest.raises(AssertionError, match="dequantised"):
        weights["blk.0.a"]


def test_experts_are_computed_from_blocks_one_by_one() -> None:
    rng, kind = np.random.default_rng(5), gguf.GGMLQuantizationType.Q8_0
    stacks = []
    for shape in ((4, 64, 32), (4, 64, 32), (4, 32, 64)):
        stored = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), kind)
        stacks.append(Quantised(torch.from_numpy(stored).flatten(0, 1), kind, shape, torch.float32))
    x, router = (torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for shape in ((1, 9, 32), (4, 32)))
    found = feedforward.experts(x, router, 2, *stacks, feedforward.silu)
    torch.testing.assert_close(found, feedforward.experts(x, router, 2, *(w.numbers() for w in stacks), feedforward.silu))
    assert float(found.abs().max()) > 0


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_gradients_are_the_same_and_no_numbers_are_kept_for_them(tiny: Tiny, arch: str) -> None:
    path, _ = tiny(arch, tensor_type="Q8_0")
    decoder = load_gguf(path, torch.float32)
    whole = Decoder(decoder.config, {name: w.clone() for name, w in decoder.weights.items()})
    matrices = {w.shape for w in decoder.weights.stored.values() if isinstance(w, Quantised)}
    matrices |= {shape[1:] for shape in matrices if len(shape) == 3} | {shape[::-1] for shape in matrices}
    found, kept = [], []
    for one in (decoder, whole):
        seen: list[tuple[int, ...]] = []

        def keep(t: torch.Tensor, seen: list[tuple[int, ...]] = seen) -> torch.Tensor:
            seen.append(tuple(t.shape))
            return t

        gate = torch.ones((), requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = one.layer(0, one.embed(TOKENS) * gate, torch.arange(TOKENS.shape[1])).square().sum()
        loss.backward()
        assert gate.grad is not None
        found.append(float(gate.grad))
        kept.append(sum(shape in matrices for shape in seen))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] != 0
    assert kept[0] == 0 < kept[1], "autograd keeps numbers of frozen matrices"
