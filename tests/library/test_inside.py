"""What this package relies on inside of llama_cpp: a test for each, which fails when a release of it does otherwise."""

from __future__ import annotations

import gc
import inspect
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Tiny
from indexmem_edge import ModelClosed, RequestError, llama_cpp
from indexmem_edge._vendor.llama_cpp import _internals as internals
from indexmem_edge.native import find
from indexmem_edge.options import CacheOptions
from indexmem_edge.runtime import inside
from indexmem_edge.runtime.inside import Inside
from indexmem_edge.runtime.notices import Notices
from indexmem_edge.runtime.prompts import ChatPrompts

pytestmark = pytest.mark.skipif(find.library_file() is None, reason="the native library has not been built")

TOKENS = [3 + (7 * i * i + 5 * i) % 250 for i in range(40)]
OPTIONS = {"n_ctx": 256, "n_batch": 32, "n_ubatch": 16, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


@pytest.fixture(scope="module")
def path(tiny: Tiny) -> Path:
    return tiny("llama")[0]


@pytest.fixture
def base(path: Path) -> inside.Base:
    """llama_cpp's own class, with what `Base` overrides of it."""
    return inside.Base(str(path), **OPTIONS)


@pytest.fixture
def view(base: inside.Base) -> Inside:
    return Inside(base)


def test_the_release_that_this_was_written_for() -> None:
    assert llama_cpp.__version__ == find.LLAMA_CPP_PYTHON_VERSION == "0.3.36"


# the conversation


def test_the_history_is_the_beginning_of_an_array(base: inside.Base, view: Inside) -> None:
    assert (view.n_tokens, len(view.tokens), view.fresh) == (0, 256, False)
    base.eval(TOKENS)
    assert view.history.tolist() == view.tokens[: view.n_tokens].tolist() == TOKENS
    assert view.history.base is not None  # a view
    view.n_tokens = 10
    assert view.history.tolist() == TOKENS[:10]
    other = np.arange(200, dtype=np.intc)
    view.tokens = other
    assert base.input_ids is other


def test_what_has_been_evaluated_is_fresh_until_something_is_taken_out(base: inside.Base, view: Inside) -> None:
    base.eval(TOKENS)
    assert view.fresh
    base.reset()
    assert not view.fresh
    base.eval(TOKENS)
    prompt = list(base.generate(TOKENS, temp=0.0, stopping_criteria=llama_cpp.StoppingCriteriaList([lambda *_: True])))
    assert prompt == [] and view.fresh  # nothing was evaluated for it
    view.fresh = False
    calls: list[int] = []
    evaluate = llama_cpp.Llama.eval
    base.eval = lambda tokens: (calls.append(len(tokens)), evaluate(base, tokens))[1]
    next(base.generate(TOKENS, temp=0.0))
    assert calls == [1] and view.fresh  # the last token again, for its logits


def test_the_seed_of_the_next_call(base: inside.Base, view: Inside) -> None:
    assert view.seed == inside.DEFAULT_SEED == 0xFFFFFFFF  # of an application that gave none
    base.set_seed(5)
    assert view.seed == 5
    base.eval(TOKENS)
    tokens = []
    for seed in (1, 2, 3, 1):
        view.seed = seed
        tokens.append([base.sample(temp=50.0, top_k=0, min_p=0.0, top_p=1.0) for _ in range(4)])
    assert tokens[0] == tokens[3] and len(set(map(tuple, tokens))) == 3


# the model and its context


def test_handles_and_sizes(base: inside.Base, view: Inside) -> None:
    assert view.ctx == base.ctx and view.model == base.model
    assert view.vocab == llama_cpp.llama_model_get_vocab(base.model)
    assert view.memory == llama_cpp.llama_get_memory(base.ctx)
    assert view.loaded_model == base.model and view.has_context
    assert (view.n_ctx, view.n_vocab, view.n_batch) == (base.n_ctx(), base.n_vocab(), 32)
    assert view.n_ctx_train == llama_cpp.llama_model_n_ctx_train(base.model)
    assert view.adds_bos and not view.verbose and not view.logits_all


def test_how_far_a_constructor_got(tmp_path: Path, path: Path) -> None:
    half = inside.Base.__new__(inside.Base)
    with pytest.raises(ValueError, match="does not exist"):
        half.__init__(str(tmp_path / "none.gguf"), **OPTIONS)
    assert Inside(half).loaded_model is None and not Inside(half).has_context and inside.opened(half)
    half = inside.Base.__new__(inside.Base)
    with pytest.raises(ValueError, match="Failed to create llama_context"):
        half.__init__(str(path), **{**OPTIONS, "type_v": 2}, rope_scaling_type=0)  # quantised values need flash attention
    assert Inside(half).loaded_model is not None and not Inside(half).has_context


def test_the_batch_does_not_follow_n_ctx_where_it_must_not(path: Path) -> None:
    class Narrow(inside.Base):
        _one_sequence_per_token = True

    assert inside.Base(str(path), **OPTIONS)._batch.n_seq_max == 256
    narrow = Narrow(str(path), **OPTIONS)
    assert narrow._batch.n_seq_max == 1 and narrow.n_ctx() == 256
    narrow.eval(TOKENS)


def test_evaluating_by_hand_is_what_eval_does(base: inside.Base, view: Inside, path: Path) -> None:
    twin = inside.Base(str(path), **OPTIONS)
    twin.eval(TOKENS[:20])
    assert view.decode(TOKENS[:12], 0) == 0 and view.decode(TOKENS[12:20], 12) == 0
    found, expected = view.last_logits(), Inside(twin).last_logits()
    assert found is not None and expected is not None
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert view.decode([10**6], 20) != 0  # no such token: a code, no exception


def test_there_are_no_logits_before_anything_was_evaluated(view: Inside) -> None:
    assert view.last_logits() is None


def test_all_logits_are_rows_of_scores(path: Path) -> None:
    base = inside.Base(str(path), **OPTIONS, logits_all=True)
    view = Inside(base)
    base.eval(TOKENS[:30])
    assert view.logits_all and view.scores.shape == (256, view.n_vocab)
    np.testing.assert_array_equal(view.scores[:30], view.batch_logits(30))
    np.testing.assert_array_equal(view.scores[29], view.last_logits())
    view.scores = np.zeros((1, view.n_vocab), dtype=np.single)
    assert base.scores.shape == (1, view.n_vocab)


# sampling


@pytest.mark.parametrize("options", [{"temp": 0.0}, {"temp": 0.9, "repeat_penalty": 1.3}, {"temp": 1.5, "mirostat_mode": 2}])
def test_a_copy_of_logits_is_sampled_as_the_library_samples_its_own(base: inside.Base, view: Inside, options: dict[str, Any]) -> None:
    base.set_seed(3)
    base.eval(TOKENS)
    logits = view.last_logits()
    assert logits is not None
    ours, theirs = view.sampler(**options), view.sampler(**options)
    assert [inside.sample_from(logits, ours) for _ in range(20)] == [theirs.sample(base._ctx, -1) for _ in range(20)]


def test_a_stream_has_a_sampler_until_it_ends(base: inside.Base, view: Inside) -> None:
    assert view.stream_sampler is None
    stream = base.generate(TOKENS, temp=0.0)
    next(stream)
    left = view.stream_sampler
    assert left is not None and view.sampler(temp=1.0) is left
    with view.no_stream():
        assert view.stream_sampler is None and view.sampler(temp=1.0) is not left
    assert view.stream_sampler is left
    inside.end_stream(base, left)
    assert view.stream_sampler is None and left.sampler is None


def test_neither_samplers_nor_processors_of_logits_keep_a_llama(path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        base = inside.Base(str(path), **OPTIONS)
        processors = llama_cpp.LogitsProcessorList([lambda tokens, logits: logits])
        stream = base.generate(TOKENS, temp=0.0, logits_processor=processors)
        next(stream)
        sampler, gone = base._sampler, weakref.ref(base)
        custom = weakref.ref(sampler.custom_samplers[0][1])
        stream.close()
        del base
        assert gone() is None
        inside.free_sampler(sampler)
        assert custom() is None and sampler.sampler is None
    finally:
        gc.enable()


def test_the_signatures_that_calls_are_bound_to() -> None:
    assert list(inside.GENERATE.parameters)[:2] == ["self", "tokens"]
    assert {"reset", "grammar", "stopping_criteria"} <= set(inside.GENERATE.parameters)
    assert list(inside.SAMPLE.parameters)[-1] == "idx"
    assert {"max_tokens", "echo", "logprobs", "stream", "suffix", "grammar", "stopping_criteria"} <= set(inside.COMPLETE.parameters)
    assert {"tools", "tool_choice", "functions", "response_format"} <= set(inside.CHAT.parameters)
    assert "grammar" in inspect.signature(llama_cpp.Llama._init_sampler).parameters


def test_the_text_of_a_grammar() -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "a"')
    assert inside.grammar_text(grammar) == ('root ::= "a"', "root")
    with pytest.raises(RequestError, match="LlamaGrammar.from_string"):
        inside.grammar_text("root ::= ...")


# chat formats


def test_a_prompt_is_caught_on_its_way_to_the_model(base: inside.Base, view: Inside) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    expected = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert base.chat_format == "chat_template.default" and view.chat_function is base._chat_handlers[base.chat_format]
    caught = ChatPrompts(view, CacheOptions(), Notices(), False)
    assert base.detokenize(caught.prompt_of(messages), special=True).decode().removeprefix("<s>").strip() == expected.strip()
    base.chat_format = "chatml"
    assert view.chat_function is not base._chat_handlers["chat_template.default"] and caught.prompt_of(messages)
    base.chat_handler = lambda **_: "an answer without a prompt"
    assert caught.prompt_of(messages) is None
    assert base.n_tokens == 0


# the end


def test_a_closed_one_tells_so_whoever_reaches_for_its_parts(base: inside.Base) -> None:
    tokenizer = base.tokenizer()
    assert inside.opened(base)
    base.close()
    inside.shut(base)
    for ask in (base.n_ctx, base.n_vocab, base.token_eos, lambda: base.ctx, lambda: base.eval([5]), lambda: base.tokenizer().encode("A")):
        with pytest.raises(ModelClosed, match="has been closed"):
            ask()
    with pytest.raises(Exception, match="has been closed"):  # an ArgumentError of ctypes
        tokenizer.encode("Hello")
    base.close()


def test_one_that_was_left_is_freed_by_nobody(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = inside.Base(str(path), **OPTIONS)
    base.eval(TOKENS)
    freed: list[str] = []
    for name in ("llama_free", "llama_model_free", "llama_batch_free", "llama_sampler_free"):
        monkeypatch.setattr(internals.llama_cpp, name, lambda *_, name=name: freed.append(name))
    inside.leave(base)
    base.close()
    del base
    gc.collect()
    assert freed == []


def test_a_load_does_not_silence_the_process(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with internals.suppress_stdout_stderr(disable=False):
        print("heard", flush=True)
    assert capfd.readouterr().out == "heard\n"
