"""Generated text of what eviction usually loses: facts among other text, lists, assignments, repetitions; questions after.

A sample is a context with facts in it, then questions about them with their answers, in words that vary: what is asked
must be learned, not the wording. Keys, values and places are drawn, so no two samples share a fact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import words
from .sample import Sample
from .told import told

Tokenize = Callable[[str], list[int]]
Filler = Callable[[int], list[int]]  # n -> n tokens of a book

ANSWER_WEIGHT = 10.0
ASKED = 6  # facts of a sample that are asked about; one cannot know which


@dataclass(frozen=True)
class Fact:
    """`text` is somewhere in the context; `question` and `answer` come after it."""

    text: str
    question: str
    answer: str


def generate(tokenize: Tokenize, filler: Filler, length: int, rng: np.random.Generator, held_out: bool = False) -> Sample:
    """One sample of at most `length` tokens. Those held out use wordings that training never sees."""
    kind = str(rng.choice(list(KINDS), p=[weight for _, weight in KINDS.values()]))
    return KINDS[kind][0](_Draft(tokenize, filler, length, rng, held_out), kind)


class _Draft:
    """Tokens of the context, and the questions after it."""

    def __init__(self, tokenize: Tokenize, filler: Filler, length: int, rng: np.random.Generator, held_out: bool) -> None:
        self.tokenize, self.filler, self.length, self.rng, self.held_out = tokenize, filler, length, rng, held_out

    def one_of(self, wordings: tuple[str, ...]) -> str:
        """A wording; the last of them is for held-out samples alone."""
        return wordings[-1] if self.held_out else str(self.rng.choice(wordings[:-1]))

    def noise(self, n: int) -> list[int]:
        """n tokens that say little: a few short sentences, again and again."""
        sentences = [_sentence(self.rng) for _ in range(int(self.rng.integers(2, 7)))]
        block = self.tokenize(" " + " ".join(sentences) + str(self.rng.choice(["", "\n"])))
        return (block * (n // len(block) + 1))[:n]

    def sample(
        self,
        kind: str,
        opening: str,
        facts: list[Fact],
        haystack: Callable[[int], list[int]],
        questions: Sequence[Fact] = (),
    ) -> Sample:
        """Puts facts, in their order, at random places of the haystack; asks `questions`, or about some facts in another order. Where
        the haystack is a book, the sample says where they stand.
        """
        rng = self.rng
        about = questions or [facts[i] for i in rng.permutation(len(facts))[:ASKED]]
        asked = [(self.tokenize(fact.question), self.tokenize(" " + fact.answer)) for fact in about]
        texts = [self.tokenize(facts[i].text) for i in range(len(facts))]
        head = self.tokenize(opening) if opening else []
        room = self.length - len(head) - sum(map(len, texts)) - sum(len(q) + len(a) + 1 for q, a in asked)
        if room < 0 and questions:
            return facts_in_prose(self, "facts_in_prose")
        if room < 0:  # fewer facts fit into a short sample
            return self.sample(kind, opening, facts[: len(facts) // 2], haystack)
        hay = haystack(room)
        cuts = sorted(int(c) for c in rng.integers(0, room + 1, len(texts)))
        tokens, last, spans = list(head), 0, []
        for cut, text in zip(cuts, texts):
            tokens += hay[last:cut]
            spans.append((len(tokens), len(tokens) + len(text)))
            tokens += text
            last = cut
        tokens += hay[last:]
        return self.close(kind, tokens, asked, told=spans if haystack == self.filler else ())

    def close(
        self,
        kind: str,
        tokens: list[int],
        asked: list[tuple[list[int], list[int]]],
        heavy: float = ANSWER_WEIGHT,
        told: Sequence[tuple[int, int]] = (),
    ) -> Sample:
        start, weight = len(tokens), [1.0] * len(tokens)
        newline = self.tokenize("\n")
        for question, answer in asked:
            tokens = tokens + question + answer + newline
            # position t predicts t + 1
            weight += [1.0] * (len(question) - 1) + [heavy] * (len(answer) + 1) + [1.0] * len(newline)
        n = min(len(tokens), self.length)
        return Sample(np.asarray(tokens[:n], np.int32), np.asarray(weight[:n], np.float32), start, kind, tuple(told))


def _sentence(rng: np.random.Generator) -> str:
    a, n = (lambda: rng.choice(words.ADJECTIVES)), (lambda: rng.choice(words.NOUNS))
    return str(rng.choice([
        f"The {n()} is {a()}.", f"A {a()} {n()} stands by the {n()}.", f"Nothing happens near the {n()}.",
        f"The {a()} {n()} and the {a()} {n()} are here.", f"It is {a()} today.", f"We walk to the {n()} and back.",
        f"Once more the {n()}.", f"They look at the {a()} {n()}.",
    ]))  # fmt: skip


_OPENINGS = (
    "", "", "Remember what the following text says about numbers and codes. You will be asked later.\n",
    "Some facts are hidden in the text below. Keep them in mind.\n", "Read this carefully; questions follow at the end.\n\n",
    "Here is a document. Note all identifiers in it.\n", "Memorise every secret that the next pages mention.\n",
)  # fmt: skip
_TELLING = (
    " The {thing} for {key} is {value}.", " The {thing} of {key} is: {value}.", " {key} has the {thing} {value}.",
    " Note that the {thing} for {key} is {value}.", "\n{key}: {value}\n", " One {thing} of {key} is {value}.",
    " Remember: {key} = {value}.", " By the way, the {thing} of the {key} is {value}.", "\n[{thing}] {key} -> {value}\n",
    " For {key}, use the {thing} {value}.", " As for {key}, its {thing} turned out to be {value}.",
    " Among the {thing}s, the one for {key} reads: {value}.", " {value} is the {thing} of {key}.",
)  # fmt: skip
_ASKING = (
    "\nWhat is the {thing} for {key}? The {thing} for {key} is", "\nQuestion: what is the {thing} of {key}?\nAnswer:",
    "\nTell me the {thing} of {key}.\nThe {thing} of {key} is:", "\nQ: {key}, {thing}?\nA:", "\nThe {thing} of {key} is",
    "\nWhich {thing} does {key} have in the text? It is", "\n{key}:",
    "\nWhich {thing} belongs to {key}, according to the text? The {thing} that belongs to {key} is",
)  # fmt: skip


def _facts(d: _Draft, n: int) -> list[Fact]:
    """n facts; in most samples they are of one kind and in one wording, so that only their keys tell them apart."""
    alike = d.rng.random() < 0.7
    telling, asking, thing = d.one_of(_TELLING), d.one_of(_ASKING), d.rng.choice(words.THINGS)
    if alike:
        form = words.value_form(d.rng)
        keys, values = words.distinct(words.key_form(d.rng), n, d.rng), [form(d.rng) for _ in range(n)]
    else:
        keys, values = words.distinct(words.key, n, d.rng), [words.value(d.rng) for _ in range(n)]
    facts = []
    for key, value in zip(keys, values):
        if not alike:
            telling, asking, thing = d.one_of(_TELLING), d.one_of(_ASKING), d.rng.choice(words.THINGS)
        names = {"thing": thing, "key": key, "value": value}
        facts.append(Fact(telling.format(**names), asking.format(**names), value + "."))
    return facts


def _count(d: _Draft) -> int:
    return int(d.rng.choice([1, 2, 3, 4, 6, 8, 12]))


_ASKING_SEVERAL = (
    "\nWhat are the {thing}s of {keys}? They are", "\nQuestion: the {thing}s for {keys}?\nAnswer:",
    "\nName every {thing} of {keys}.\nThe {thing}s of {keys} are:", "\nThe {thing}s that belong to {keys}, in this order:",
    "\nList the {thing}s of {keys} as the text has them. Here they are:",
)  # fmt: skip


def several(d: _Draft, kind: str) -> Sample:
    """One question for the values of several keys, or for all values of one, among others that are not asked for."""
    rng, telling, thing = d.rng, d.one_of(_TELLING), str(d.rng.choice(words.THINGS))
    n, others, form = int(rng.integers(2, 5)), int(rng.integers(0, 5)), words.value_form(rng)
    keys = words.distinct(words.key_form(rng), n + others, rng)
    same = rng.random() < 0.4
    if same:
        keys[:n] = [keys[0]] * n
    facts = [Fact(telling.format(thing=thing, key=key, value=value), "", value) for key in keys for value in [form(rng)]]
    places = rng.permutation(len(facts))
    wanted = [i for i in places if i < n] if same else range(n)  # values of one key in the order that they are told in
    asked = d.one_of(_ASKING_SEVERAL).format(thing=thing, keys=_enumerated(list(dict.fromkeys(keys[:n]))))
    question = Fact("", asked, _enumerated([facts[i].answer for i in wanted]) + ".")
    haystack = d.noise if rng.random() < 0.3 else d.filler
    return d.sample(kind, d.one_of(_OPENINGS), [facts[i] for i in places], haystack, [question])


def _enumerated(items: list[str]) -> str:
    return ", ".join(items[:-1]) + (" and " if len(items) > 1 else "") + items[-1]


def facts_in_prose(d: _Draft, kind: str) -> Sample:
    return d.sample(kind, d.one_of(_OPENINGS), _facts(d, _count(d)), d.filler)


def facts_in_noise(d: _Draft, kind: str) -> Sample:
    return d.sample(kind, d.one_of(_OPENINGS), _facts(d, _count(d)), d.noise)


def facts_in_chat(d: _Draft, kind: str) -> Sample:
    """Things a person mentions in passing, asked for much later."""
    telling = (
        "\nUser: My {key} has the {thing} {value}.\nAssistant: I will remember that.\n",
        "\nUser: please keep in mind that the {thing} of my {key} is {value}\nAssistant: Noted.\n",
        "\nUser: I moved to {key} last year, my {thing} is now {value}.\nAssistant: Thank you.\n",
        "\nUser: Put down {value} as the {thing} for {key}.\nAssistant: Done.\n",
    )
    asking = (
        "\nUser: What was the {thing} of my {key} again?\nAssistant: It is", "\nUser: {thing} of {key}?\nAssistant:",
        "\nUser: Which {thing} did I mention for {key}?\nAssistant: You said that it is",
    )  # fmt: skip
    facts = []
    for _ in range(_count(d)):
        names = {"thing": d.rng.choice(words.THINGS), "key": words.key(d.rng), "value": words.value(d.rng)}
        facts.append(Fact(d.one_of(telling).format(**names), d.one_of(asking).format(**names), names["value"]))
    return d.sample(kind, "", facts, d.filler)


def facts_in_passing(d: _Draft, kind: str) -> Sample:
    """Few of them, as people tell them, in a book that goes on as if nothing had been said."""
    found = told(int(d.rng.choice([1, 2, 3, 4])), d.rng, d.held_out)
    return d.sample(kind, "", [Fact(one.telling, one.asking, one.value + ".") for one in found], d.filler)


def listing(d: _Draft, kind: str) -> Sample:
    """A list of keys and values between text; some of them are asked for."""
    form = d.one_of(("{key}: {value}\n", "{key} = {value};\n", '"{key}": "{value}",\n', "{key},{value}\n", "- {key}: {value}\n", "{key} | {value}\n"))
    n = int(d.rng.integers(5, 25))
    pairs = [(words.key(d.rng), words.value(d.rng)) for _ in range(n)]
    lines = [d.tokenize(form.format(key=k, value=v)) for k, v in pairs]
    picks = d.rng.permutation(n)[:8]
    asked = [(d.tokenize(form.format(key=pairs[i][0], value="@").split("@")[0].rstrip()), d.tokenize(" " + pairs[i][1])) for i in picks]
    room = d.length - sum(map(len, lines)) - sum(len(q) + len(a) + 1 for q, a in asked) - 2
    if room < 0:
        return facts_in_prose(d, "facts_in_prose")
    before = int(d.rng.integers(0, room + 1))
    hay = d.filler(room)
    newline = d.tokenize("\n")
    return d.close(kind, hay[:before] + newline + sum(lines, []) + hay[before:] + newline, asked)


def assignments(d: _Draft, kind: str) -> Sample:
    """Variables that are given values, or the values of others."""
    rng = d.rng
    names: list[str] = []
    values: dict[str, str] = {}
    form = d.one_of(("\nVAR {a} = {b}\n", " let {a} be {b}. ", "\n{a} := {b}\n", "\nset {a} {b}\n", "\nASSIGN {b} TO {a}\n"))
    facts = []
    for _ in range(int(rng.integers(3, 9))):
        name = "".join(chr(65 + i) for i in rng.integers(0, 26, int(rng.integers(3, 6))))
        source = str(rng.choice(names)) if names and rng.random() < 0.4 else words.digits(rng, 5)
        names.append(name)
        values[name] = values.get(source, source)
        asking = d.one_of(("\nThe value of {a} is", "\nQuestion: What is {a}?\nAnswer: {a} =", "\nWhich value was assigned to {a}? It was"))
        facts.append(Fact(form.format(a=name, b=source), asking.format(a=name), values[name]))
    return d.sample(kind, d.one_of(_OPENINGS), facts, d.noise if rng.random() < 0.5 else d.filler)


def frequent(d: _Draft, kind: str) -> Sample:
    """A list of words of which some come often; which?"""
    rng = d.rng
    pool = [str(w) for w in rng.permutation(words.NOUNS + words.ADJECTIVES)] if rng.random() < 0.5 else [
        words.invented(rng) for _ in range(200)
    ]
    often, rare = pool[: int(rng.integers(2, 8))], pool[8:]
    share = rng.uniform(0.3, 0.7)
    drawn: list[str] = []
    tokens: list[int] = []
    i = 0
    room = d.length - max(len(d.tokenize(", ".join(often))) + 80, 120)  # question and answer fit behind it
    numbered = rng.random() < 0.5
    while len(tokens) < room:
        i += 1
        word = str(rng.choice(often if rng.random() < share else rare))
        drawn.append(word)
        tokens += d.tokenize(f" {i}. {word}" if numbered else f" {word}")
    counts = sorted(often, key=lambda w: -drawn.count(w))
    question = d.one_of(("\nWhich words are the most frequent above? They are:", "\nQuestion: the most common words?\nAnswer:", "\nThe words that appear most often in this list are:"))
    return d.close(kind, tokens, [(d.tokenize(question), d.tokenize(" " + ", ".join(counts)))])


def repetition(d: _Draft, kind: str) -> Sample:
    """A passage, other text, and the passage once more, word by word."""
    n = int(d.rng.integers(max(d.length // 16, 8), max(d.length // 4, 9)))
    passage, room = d.filler(n), d.length - 2 * n - 16
    before = int(d.rng.integers(0, room + 1))
    hay = d.filler(room)
    asking = d.one_of(("\nOnce more, word by word:\n", "\nI repeat:\n", "\nAs was said above:\n"))
    return d.close(kind, hay[:before] + passage + hay[before:], [(d.tokenize(asking) + passage[:4], passage[4:])], heavy=2.0)


KINDS: dict[str, tuple[Callable[[_Draft, str], Sample], float]] = {
    "facts_in_passing": (facts_in_passing, 0.34),
    "facts_in_prose": (facts_in_prose, 0.20),
    "facts_in_noise": (facts_in_noise, 0.13),
    "facts_in_chat": (facts_in_chat, 0.07),
    "several": (several, 0.10),
    "listing": (listing, 0.05),
    "assignments": (assignments, 0.04),
    "frequent": (frequent, 0.02),
    "repetition": (repetition, 0.05),
}
