"""Random operations on the sequences of a context, whose references go through the same."""

from __future__ import annotations

import copy

import numpy as np
from hypothesis import strategies as st

from reference.policies import BoundedReference
from support.native_context import Context, Refused

N_SEQ = 3
Operation = tuple[str, int, int]

_sequences = st.integers(0, N_SEQ - 1)
_operation = st.one_of(
    st.tuples(st.just("feed"), _sequences, st.integers(1, 70)),
    st.tuples(st.just("feed one by one"), _sequences, st.integers(1, 20)),
    st.tuples(st.just("feed together"), st.integers(0, N_SEQ - 2), st.integers(1, 30)),
    st.tuples(st.just("take back"), _sequences, st.integers(1, 40)),
    st.tuples(st.just("abort"), _sequences, st.integers(0, 60)),
    st.tuples(st.just("copy"), _sequences, _sequences),
    st.tuples(st.just("reload"), _sequences, _sequences),
    st.tuples(st.just("reload all"), st.just(0), st.just(0)),
    st.tuples(st.just("clear"), st.just(0), st.just(0)),
)
operations = st.lists(_operation, min_size=1, max_size=10)


def follow(c: Context, new: BoundedReference, todo: list[Operation], n_ubatch: int, n_vocab: int) -> None:
    """What is kept follows the reference of each sequence after every operation, and the logits after every ubatch.

    `new` is the reference of an empty sequence. A ubatch that is aborted has not happened, but for the rebase before it; if it
    was to evict, the sequence is cleared, as it has to be.
    """
    rng = np.random.default_rng(0)
    references = [copy.deepcopy(new) for _ in range(N_SEQ)]

    def feed(fed: tuple[int, ...], n: int) -> None:
        tokens = {s: rng.integers(3, n_vocab, n).tolist() for s in fed}
        logits = c.decode_many(tokens)
        for s in fed:
            expected = references[s].feed(tokens[s])
            assert references[s].adopt(c.positions(s)) < 1e-2
            np.testing.assert_allclose(logits[s], expected, rtol=0, atol=0.05)

    for name, a, b in todo:
        if name == "feed":
            for n in [n_ubatch] * (b // n_ubatch) + [b % n_ubatch]:
                feed((a,), n) if n else None
        elif name == "feed one by one":
            for _ in range(b):
                feed((a,), 1)
        elif name == "feed together" and n_ubatch > 1:
            feed((a, a + 1), min(b, n_ubatch // 2))
        elif name == "take back":
            n_left = max(references[a].n_seen - b, 0)
            assert c.seq_rm(a, n_left) == references[a].truncate(n_left)
        elif name == "abort":
            tokens = rng.integers(3, n_vocab, min(1 + b % 7, n_ubatch)).tolist()
            try:
                with c.aborting(b):
                    c.decode(tokens, a)
            except Refused:
                references[a].make_room(len(tokens))
                if c.stats(a).broken:
                    assert c.seq_rm(a, 0)
                    references[a] = copy.deepcopy(new)
            else:
                references[a].feed(tokens)
                assert references[a].adopt(c.positions(a)) < 1e-2
        elif name == "copy":
            c.seq_cp(a, b)
            references[b] = copy.deepcopy(references[a])
        elif name == "reload":
            assert c.load(c.save(a), b)
            references[b] = copy.deepcopy(references[a])
        elif name == "reload all":
            assert c.load(c.save())
        elif name == "clear":
            c.clear()
            references = [copy.deepcopy(new) for _ in range(N_SEQ)]
        for s, reference in enumerate(references):
            assert c.n_seen(s) == reference.n_seen
            np.testing.assert_equal(c.positions(s), reference.kept)
            np.testing.assert_equal(c.rotary(s), reference.rotary)
            assert c.stats(s).n_rebases == reference.n_rebases
