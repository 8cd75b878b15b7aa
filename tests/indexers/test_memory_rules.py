"""The latent memories of one head: the rules of the NumPy reference, PyTorch's, and the native ops on arrays."""

from __future__ import annotations

import numpy as np
import pytest

from reference.memories import CentroidMemory, random_residual
from support import native_ops


@pytest.mark.parametrize("n_slots", [1, 3, 16, 64])
def test_one_entry_at_a_time_the_rules_of_writing_are_one(n_slots: int) -> None:
    keys, values = np.random.default_rng(n_slots).standard_normal((2, 50, 12))
    ours, method = (CentroidMemory(n_slots, 12, 12) for _ in range(2))
    for k, v in zip(keys, values):
        ours.write(k[None], v[None])
    method.write_one_by_one(keys, values)
    np.testing.assert_array_equal(ours.counts, method.counts)
    np.testing.assert_allclose(ours.keys, method.keys, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.values, method.values, rtol=0, atol=1e-12)


def test_entries_that_leave_together_do_not_see_each_other() -> None:
    """Three keys of a line: the second would pull the slot of the first past the third, were they written in turn."""
    keys = np.array([[0.0], [10.0], [4.0], [5.2]])
    ours, method = (CentroidMemory(2, 1, 1) for _ in range(2))
    ours.write(keys, keys)
    method.write_one_by_one(keys, keys)
    np.testing.assert_allclose(ours.keys[:, 0], [2.0, 7.6])
    np.testing.assert_allclose(method.keys[:, 0], [(0 + 4 + 5.2) / 3, 10])


@pytest.mark.parametrize("group,n_feature,head_dim", [(1, 8, 16), (3, 24, 64), (4, 5, 33)])
def test_residual_memory_in_numpy_pytorch_and_native(group: int, n_feature: int, head_dim: int) -> None:
    torch = pytest.importorskip("torch")
    from reference.memories_torch import ResidualMemory

    n_head, draw = 2, np.random.default_rng(3)
    memory = random_residual(2, head_dim, n_feature, seed=5)
    ours, theirs = [memory.head(1, head_dim) for _ in range(n_head)], ResidualMemory(memory, 1)
    state = theirs.start(n_head, head_dim)
    native = np.zeros((1, n_head, head_dim + 1, n_feature), np.float32)
    q = draw.standard_normal((n_head * group, 7, head_dim)).astype(np.float32)
    kept = draw.standard_normal(q.shape).astype(np.float32)
    unchanged = theirs(state, torch.from_numpy(q), torch.from_numpy(kept))
    np.testing.assert_array_equal(unchanged, kept, "nothing was written")
    for n in (1, 40, 3):
        k, v = draw.standard_normal((2, n_head, n, head_dim)).astype(np.float32)
        state = theirs.write(state, torch.from_numpy(k), torch.from_numpy(v))
        plan, ctl = native_ops.plan_of(np.tile(np.arange(n), (1, n_head, 1))), native_ops.ctl(1, n_evict=n)
        arguments = (native, memory.phi[1], k[None], v[None], plan, ctl)
        native = native_ops.residual(*arguments, rate=ours[0].eta, decay=ours[0].decay)
        for h in range(n_head):
            ours[h].write(k[h].astype(np.float64), v[h].astype(np.float64))
            np.testing.assert_allclose(state[0][h], ours[h].matrix, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(state[1][h], ours[h].normaliser, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(native[0, h, :-1].T, ours[h].matrix, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(native[0, h, -1], ours[h].normaliser, rtol=1e-4, atol=1e-4)
    out = theirs(state, torch.from_numpy(q), torch.from_numpy(kept)).numpy()
    for head in range(n_head * group):
        read = ours[head // group].gate * ours[head // group].read(q[head].astype(np.float64))
        np.testing.assert_allclose(out[head], kept[head] + read, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_slots", [1, 5, 64])
@pytest.mark.parametrize("groups", [[1] * 9, [4, 30, 1], [40, 40], [70]], ids=str)
def test_native_centroid_op(n_slots: int, groups: list[int]) -> None:
    """Two sequences of three heads, an f16 cache of 90 slots, some of which leave."""
    shape, draw = (2, 3), np.random.default_rng(4)
    rows = [CentroidMemory(n_slots, 16, 8) for _ in np.ndindex(shape)]
    means, count = np.full((*shape, n_slots, 24), np.nan, np.float32), np.zeros((*shape, n_slots), np.float32)
    for n in groups:
        k, v = (draw.standard_normal((*shape, 90, d)).astype(np.float16) for d in (16, 8))
        gone = np.stack([np.sort(draw.permutation(90)[:n]) for _ in rows]).reshape(*shape, n)
        means, count = native_ops.centroid(means, count, k, v, native_ops.plan_of(gone), native_ops.ctl(2, n_evict=n))
        for row, (s, h) in zip(rows, np.ndindex(shape)):
            row.write(k[s, h, gone[s, h]].astype(np.float64), v[s, h, gone[s, h]].astype(np.float64))
            np.testing.assert_array_equal(count[s, h], row.counts)
            held = row.counts > 0
            expected = np.concatenate((row.keys, row.values), axis=-1)
            np.testing.assert_allclose(means[s, h][held], expected[held], rtol=0, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_native_attention_with_slots(softcap: float) -> None:
    """Biases given as counts and as a mask; the soft cap is of the product alone."""
    draw, (n_seq, n_head, n_slots, n_kv) = np.random.default_rng(6), (2, 2, 5, 150)
    q = draw.standard_normal((n_seq * n_head, 3, 4, 16)).astype(np.float32) * 2
    k, v = draw.standard_normal((2, n_seq * n_head, n_kv, 16)).astype(np.float32)
    count = draw.integers(0, 30, (n_seq, n_head, n_slots)).astype(np.float32)
    mask = np.where(draw.random((n_seq, 4, n_kv)) < 0.7, 0, -np.inf)
    mask[..., :n_slots] = 0
    logits = 0.5 * np.einsum("sgtd,snd->sgtn", q.astype(np.float64), k)
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    logits += np.repeat(mask, n_head, axis=0)[:, None]
    with np.errstate(divide="ignore"):
        logits[..., :n_slots] += np.log(count.reshape(-1, 1, 1, n_slots))
    weights = np.exp(logits - np.logaddexp.reduce(logits, axis=-1)[..., None])
    expected = np.einsum("sgtn,snd->stgd", weights, v)
    per_head = np.repeat(mask, n_head, axis=0)
    counted = native_ops.attend(q, k, v, per_head, count.reshape(-1, n_slots), 0.5, softcap)
    np.testing.assert_allclose(counted, expected, rtol=0, atol=1e-5)
    biased = native_ops.bias(mask, count)
    np.testing.assert_allclose(native_ops.attend(q, k, v, biased, None, 0.5, softcap), expected, rtol=0, atol=5e-3)
