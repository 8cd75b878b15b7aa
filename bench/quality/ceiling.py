"""What selection alone can reach: the indexer beside an oracle that has seen question and answer, one layer group at a time.

In PyTorch, with the weights of the GGUF file: the context is read once with everything kept, then each policy chooses once
among all of its entries, the others are really left out, and question and answer are read. The oracle keeps what these
will attend to most; nothing that only chooses can be expected to do better. Where the indexer falls short of it, exchanging
the indexer's choice for the oracle's in a few layers at a time says which layers are to blame.

Layers that look at a window keep all that they see, whatever the budget: there is nothing to choose.

With slots, what was left out comes back as means (`slots`) that take the place of as many entries: what could a memory give?
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indexmem_edge.options import DEFAULT_SINKS, LEAST_WINDOW
from indexmem_edge.train.cache.eviction import pick
from indexmem_edge.train.cache.future import kept_mask
from indexmem_edge.train.cache.policies import POLICIES, Context
from indexmem_edge.train.from_sidecar import modules_from_sidecar
from indexmem_edge.train.model.attention import attention
from indexmem_edge.train.model.decoder import Decoder, Heads, causal
from indexmem_edge.train.model.load import fast_dtype, load_decoder

from .. import ruler
from ..machine import describe
from ..report import Report, Row
from ..runner import BenchError, Model, library
from ..text import read_text
from .slots import RUNNERS_UP, Held, slots_of
from .trial import split_tokens

ORACLE, FULL = "oracle", "full"
BOOK = "book"  # the task of a page that is read on
PAGE = 256  # tokens of it
COLUMNS = ("length", "ratio", "policy", "n", "score", "nll", "n_pages", "page_nll")
Cache = list[Held]  # of every layer


@dataclass(frozen=True)
class Question:
    """What is read after the context, and where in `answer` each expected string lies."""

    question: list[int]
    answer: list[int]
    spans: list[tuple[int, int]]


def read_context(decoder: Decoder, tokens: Sequence[int]) -> list[tuple[Context, Tensor]]:
    """Operands of every layer, and V [H, n, D], when the context has been read with everything kept."""
    found: list[tuple[Context, Tensor]] = []

    def attend(heads: Heads) -> Tensor:
        scale = decoder.config.scale
        found.append((Context(heads.layer, heads.hidden[0], heads.q[0], heads.k[0], scale), heads.v[0]))
        return causal(heads)

    decoder(torch.tensor([list(tokens)], device=decoder.device), attend)
    return found


def ask(decoder: Decoder, cache: Cache, n_seen: int, asked: Question) -> tuple[float, float, list[Tensor]]:
    """Reads question and answer after `cache`.

    Returns the share of expected strings of which every token is the likeliest, the answer's NLL (nats per token), and the
    attention that each entry got, [H, n] per layer without a window, summed over queries and the group.
    """
    c = decoder.config
    tokens = torch.tensor([asked.question + asked.answer], device=decoder.device)
    total, mass = tokens.shape[1], []

    def attend(heads: Heads) -> Tensor:
        old = cache[heads.layer]
        k, v = torch.cat((old.k[None], heads.k), 2), torch.cat((old.v[None], heads.v), 2)
        if heads.window:
            return attention(heads.q, k, v, heads.scale, heads.window)
        held = k.shape[2] - total
        seen = torch.ones(total, held + total, dtype=torch.bool, device=k.device).tril(held)
        q = heads.q[0].unflatten(0, (c.n_head_kv, c.group))
        s = (q @ k[0, :, None].mT).float() * c.scale
        if old.bias is not None:
            s[..., :held] += old.bias[:, None, None]
        p = s.masked_fill_(~seen, -torch.inf).softmax(-1)
        mass.append(p[..., :held].sum((1, 2)))
        return (p.to(v.dtype) @ v[0, :, None]).flatten(0, 1)[None]

    hidden = decoder(tokens, attend, first=n_seen)[0, len(asked.question) - 1 : -1]
    logits, answer = decoder.logits(hidden).float(), torch.tensor(asked.answer, device=decoder.device)
    right = (logits.argmax(-1) == answer).cpu().numpy()
    nll = float(F.cross_entropy(logits, answer))
    return float(np.mean([right[a:b].all() for a, b in asked.spans])), nll, mass


def everything(contexts: Sequence[tuple[Context, Tensor]]) -> Cache:
    return [Held(context.k, v) for context, v in contexts]


@dataclass(frozen=True)
class Slots:
    """A memory of `n` slots in the place of as many entries."""

    n: int
    among: str = "all"  # that left, or the `next` best of them alone, or `oracle`: all, by what question and answer will look at

    @property
    def name(self) -> str:
        return f"{self.n} slots" if self.among == "all" else f"{self.n} slots, {self.among}"


SLOTS = ("all", "next", ORACLE)


def compress(
    contexts: Sequence[tuple[Context, Tensor]],
    ranks: Sequence[Tensor],
    budget: int,
    windowed: Collection[int] = (),
    slots: Optional[Slots] = None,
    mass: Sequence[Tensor] = (),
) -> Cache:
    """The best `budget` entries of every layer and head; sinks and a window of at most a quarter are among them.

    Args:
        ranks: of the layers that are not `windowed`, in their order; the others keep everything.
        slots: so many entries fewer, and slots of what left in their place.
        mass: for slots of the oracle, as `ask` has it for the cache that keeps everything.
    """
    cache: Cache = []
    chosen = zip_longest(ranks, mass)
    n_slots = slots.n if slots else 0
    for context, v in contexts:
        if context.layer in windowed:
            cache.append(Held(context.k, v))
            continue
        (rank, looked_at), (heads, n, _) = next(chosen), context.k.shape
        rank = rank.expand(heads, -1)
        mask = kept_mask(rank, budget - n_slots, DEFAULT_SINKS, min(LEAST_WINDOW, budget // 4))
        kept = mask.nonzero()[:, 1].view(heads, -1)
        held = Held(pick(context.k, kept), pick(v, kept))
        if slots and n > budget:
            n_left = n - kept.shape[1]
            n_taken = min(n_slots * RUNNERS_UP, n_left) if slots.among == "next" else n_left
            taken = rank.masked_fill(mask, -torch.inf).topk(n_taken, -1).indices.sort(-1).values
            weight = looked_at.gather(1, taken) if slots.among == ORACLE else None
            held = _joined(held, slots_of(pick(context.k, taken), pick(v, taken), n_slots, weight))
        cache.append(held)
    return cache


def _joined(entries: Held, slots: Held) -> Held:
    assert slots.bias is not None
    bias = torch.cat((torch.zeros(entries.k.shape[:2], device=slots.bias.device), slots.bias), 1)
    return Held(torch.cat((entries.k, slots.k), 1), torch.cat((entries.v, slots.v), 1), bias)


@torch.no_grad()
def run_ceiling(
    model: Model,
    data: Path,
    lengths: Sequence[int],
    tasks: Sequence[str],
    samples: int,
    sidecars: Sequence[Path],
    budgets: Sequence[float],
    *,
    groups: int = 0,
    policies: Sequence[str] = (),
    slots: Sequence[int] = (),
    book: Optional[Path] = None,
    pages: int = 0,
    progress: Any = None,
    out: Path = Path("."),
) -> Report:
    """Scores of the full cache, the oracle, the indexers and `policies`; with `groups`, of exchanges in so many layer groups.

    With `slots`, also of memories of so many slots beside the oracle and the indexers, in three kinds; with `book`, the likelihood of
    pages that are read on, so many of each length.

    Raises:
        BenchError: all layers of the model look at a window; the book is too short.
    """
    dtype = fast_dtype(torch.device("cpu"))
    decoder = load_decoder(model.path, dtype)
    if not decoder.config.bounded:
        raise BenchError("there is nothing to choose in this model: all of its layers look at a window")
    indexers = {path.name.split(".")[0]: modules_from_sidecar(path, decoder.config) for path in sidecars}
    rows: list[Row] = []
    todo: list[tuple[int, str, int]] = [(length, task, i) for i in range(samples) for length in lengths for task in tasks]
    passages = _pages(model, book, lengths, pages) if book else {}
    todo += [(length, BOOK, i) for length in passages for i in range(pages)]
    task_bar = progress.add_task("ceiling", total=len(todo)) if progress else None
    for length, task, i in todo:
        found = [] if task == BOOK else ruler.load(data, length, task, i + 1)
        if task == BOOK or i < len(found):
            read = passages[length][i] if task == BOOK else question_of(model, found[i])
            trials = _trials(decoder, *read, indexers, policies, budgets, groups, slots)
            rows.extend({"length": length, "task": task, "sample": i, **row} for row in trials)
        if progress:
            progress.advance(task_bar)
    how = (
        f"PyTorch, weights of the file in {str(dtype).removeprefix('torch.')}; context read with everything kept, entries chosen once at its end and left "
        "out; question and answer teacher-forced; score: share of expected strings of which every token is the likeliest"
    )
    report = Report(
        "ceiling", describe(model.path.name, library(), torch.get_num_threads(), how=how, data=data.name, tasks=list(tasks))
    )
    report.rows = summarise(rows)
    report.singles = rows
    report.save(out)
    return report


def _trials(
    decoder: Decoder,
    context: list[int],
    asked: Question,
    indexers: Mapping[str, nn.ModuleList],
    policies: Sequence[str],
    budgets: Sequence[float],
    groups: int,
    slots: Sequence[int],
) -> Iterator[Row]:
    contexts, windowed = read_context(decoder, context), decoder.config.windowed
    bounded = [c for c, _ in contexts if c.layer not in windowed]
    n = len(context)
    score, nll, mass = ask(decoder, everything(contexts), n, asked)
    yield {"policy": FULL, "ratio": 1.0, "score": score, "nll": nll}
    ranks = {ORACLE: mass} | {name: [POLICIES[name](c) for c in bounded] for name in policies}
    for name, modules in indexers.items():
        ranks[name] = [m.ranks(c.hidden, c.positions, n - 1) for m, c in zip(modules, bounded)]
    for name in indexers:
        for a, b in layer_groups(len(bounded), groups):
            ranks[f"{name}, oracle in {bounded[a].layer} to {bounded[b - 1].layer}"] = [*ranks[name][:a], *mass[a:b], *ranks[name][b:]]
    for ratio in budgets:
        budget = int(np.ceil(ratio * n))
        for name, rank in ranks.items():
            memories: list[Optional[Slots]] = [None]
            if name in (ORACLE, *indexers):
                memories += [Slots(size, among) for size in slots for among in SLOTS if size < budget * 3 // 4 - DEFAULT_SINKS]
            for memory in memories:
                score, nll, _ = ask(decoder, compress(contexts, rank, budget, windowed, memory, mass), n, asked)
                yield {"policy": f"{name}, {memory.name}" if memory else name, "ratio": ratio, "score": score, "nll": nll}


def _pages(model: Model, book: Path, lengths: Sequence[int], n: int) -> dict[int, list[tuple[list[int], Question]]]:
    """Passages of `book`, of each length so many, evenly spaced, and what follows each."""
    tokens = model.tokens(read_text(book))
    found = {}
    for length in lengths:
        step = (len(tokens) - length - PAGE) // n
        if step < PAGE:
            raise BenchError(f"{book.name} has {len(tokens)} tokens, too few for {n} passages of {length}: take a longer book, or fewer --pages")
        found[length] = [(tokens[at : at + length - 1], Question(tokens[at + length - 1 : at + length], tokens[at + length :][:PAGE], [(0, PAGE)]))
                         for at in range(0, n * step, step)]  # fmt: skip
    return found


def question_of(model: Model, sample: ruler.Sample) -> tuple[list[int], Question]:
    """Tokens of the context, and the question with the true answer."""
    context, question = split_tokens(model, sample.context, sample.question)
    prompt = sample.context + sample.question
    answer = split_tokens(model, prompt, sample.answer)[1]
    spans, text = [], ""
    ends = np.cumsum([len(model.piece(token)) for token in answer])
    for expected in sample.said:
        begin = sample.answer.index(expected, len(text))
        text = sample.answer[: begin + len(expected)]
        spans.append((int(np.searchsorted(ends, len(sample.answer[:begin].encode()), "right")),
                      int(np.searchsorted(ends, len(text.encode()), "left")) + 1))  # fmt: skip
    return context, Question(question, answer, spans)


def layer_groups(n_layer: int, groups: int) -> list[tuple[int, int]]:
    edges = [n_layer * i // groups for i in range(groups + 1)] if groups else []
    return [(a, b) for a, b in zip(edges, edges[1:]) if b > a]


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Means over tasks of the means over samples, and of pages."""
    out = []
    for key in dict.fromkeys((row["length"], row["ratio"], row["policy"]) for row in rows):
        mine = [row for row in rows if (row["length"], row["ratio"], row["policy"]) == key]
        pages = [row["nll"] for row in mine if row["task"] == BOOK]
        mine = [row for row in mine if row["task"] != BOOK]
        by_task = [[row for row in mine if row["task"] == task] for task in dict.fromkeys(row["task"] for row in mine)]
        means = {what: float(np.mean([np.mean([row[what] for row in group]) for group in by_task])) for what in ("score", "nll")}
        page = {"n_pages": len(pages), "page_nll": float(np.mean(pages))} if pages else {}
        out.append({"length": key[0], "ratio": key[1], "policy": key[2], "n": len(mine), **means, **page})
    return sorted(out, key=lambda row: (row["length"], -row["ratio"], row["nll"]))


def plot(figure: Any, report: Report) -> None:
    """NLL of the answer over the budget, a line per policy, without exchanges and slots."""
    lengths = list(dict.fromkeys(row["length"] for row in report.rows))
    for axis, length in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths):
        here = [row for row in report.rows if row["length"] == length and "," not in row["policy"]]
        for policy in dict.fromkeys(row["policy"] for row in here):
            mine = sorted((row for row in here if row["policy"] == policy), key=lambda row: row["ratio"])
            if policy == FULL:
                axis.axhline(mine[0]["nll"], color="black", linestyle="--", label=FULL)
                continue
            axis.plot([100 * row["ratio"] for row in mine], [row["nll"] for row in mine], marker="o", label=policy)
        axis.set(xlabel="% of entries kept", ylabel=f"NLL of the answer, {length} tokens")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
