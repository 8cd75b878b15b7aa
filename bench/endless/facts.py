"""Facts that are told once in a long text and asked for much later, without disturbing the reading.

A fact is a sentence with a person, who is in it alone, and a value that cannot be guessed. It stands between two sentences of
a book. The question is asked after so many more tokens, from a copy of the state that is put back afterwards. It is the sentence
again, up to the value: in other words a small model does not find it even if nothing has been evicted.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..report import Row
from ..runner import Model, System
from ..stats import tps
from .arms import counts
from .reading import Books

SPARE = 8  # tokens that an answer may have beyond those of the value

# fmt: off
_FIRST = """Abigail Ambrose Agatha Barnaby Beatrix Caleb Cordelia Cyril Delia Desmond Edith Elias Esther Fabian Flora Gideon Greta
Harriet Hector Ida Ignatius Imogen Jasper Judith Kenelm Lavinia Leopold Lucinda Magnus Matilda Mortimer Nathaniel Octavia Oswald
Penelope Philippa Quentin Ramona Rosalind Rufus Sabina Silas Sybil Tabitha Theodore Ursula Vernon Winifred Xavier Zachary""".split()
_LAST = """Ashdown Babcock Bellweather Birtwhistle Blackadder Cardew Carraway Chisholm Crabtree Culpepper Dalrymple Dunstable
Eddington Fairweather Farthingale Fotheringay Gadsby Gillespie Goodfellow Hathersage Heathcote Hollingworth Inskip Jessop
Kettleborough Kingsley Lanyon Lockwood Longbottom Makepeace Merriweather Nettleship Oglethorpe Osgood Pemberton Pettigrew
Postlethwaite Quimby Ravenscroft Rowntree Saltonstall Somerville Tattersall Thistlewood Trelawney Underhill Vandermeer
Wagstaff Whittaker Yelverton""".split()
_TOWNS = """Aberdeen Antwerp Basel Bergen Bologna Bristol Calais Cologne Cork Dresden Dundee Exeter Florence Geneva Genoa Ghent
Gothenburg Granada Hamburg Hanover Havana Krakow Leipzig Lisbon Lyons Malaga Mantua Marseilles Nantes Naples Odessa Oporto
Palermo Parma Plymouth Prague Ravenna Riga Rouen Salamanca Salzburg Seville Smyrna Stockholm Toledo Trieste Turin Utrecht
Verona Zurich""".split()
_NAMES = """Bandit Blizzard Bramble Brigadier Buttercup Captain Chestnut Cinnamon Comet Corporal Daisy Domino Duchess Ginger Goblin
Hercules Juniper Jupiter Lightning Magpie Merlin Midnight Nutmeg Orion Pepper Phantom Pilgrim Primrose Saffron Sergeant
Snowball Sorrel Sparrow Sultan Tempest Thistle Trooper Vulcan Whisper Zephyr""".split()
_PASSWORDS = """autumn cannon clover coffee dagger ember feather flint garnet goblet granite hemlock honey ivy jasmine kestrel
lavender lemon lily marble mustard nightingale oyster parsley pearl pigeon plum quartz raven rosemary sapphire scarlet sparrow
sugar sulphur tulip turnip velvet vinegar walnut""".split()
# fmt: on

Draw = Callable[[random.Random], str]


def _number(low: int, high: int) -> Draw:
    return lambda rng: str(rng.randint(low, high))


def _one_of(words: Sequence[str]) -> Draw:
    return lambda rng: rng.choice(words)


@dataclass(frozen=True)
class Kind:
    """A sentence about {who}, up to the value, and what may follow it."""

    name: str
    draw: Draw
    said: str
    rest: str = "."


# Many, because a small model answers with the value of another fact of the same kind, whoever is asked for.
KINDS = (
    Kind("locker", _number(10000, 99999), "The locker number of {who} is"),
    Kind("telephone", _number(10000, 99999), "The telephone number of {who} was", ", as everybody in the office knew."),
    Kind("account", _number(1000, 9999), "The account of {who} at the bank had the number"),
    Kind("room", _number(100, 999), "{who} could be found in room number", " of the hotel."),
    Kind("ticket", _number(10000, 99999), "The lottery ticket of {who} had the number", " and won nothing."),
    Kind("passport", _number(10000, 99999), "The passport of {who} bears the number"),
    Kind("library", _number(1000, 9999), "In the library {who} has the reader's card"),
    Kind("regiment", _number(100, 999), "As a soldier {who} served in the regiment number", " for three years."),
    Kind("debt", _number(1000, 9999), "The debts of {who} came to", " dollars in all."),
    Kind("wagon", _number(1000, 9999), "The luggage of {who} travelled in wagon"),
    Kind("pew", _number(100, 999), "At church the family of {who} sat in pew"),
    Kind("telescope", _number(1000, 9999), "The star that was discovered by {who} is listed as number"),
    Kind("dog", _one_of(_NAMES), "The dog of {who} is called"),
    Kind("boat", _one_of(_NAMES), "The boat that belonged to {who} was named"),
    Kind("home", _one_of(_TOWNS), "{who} lives in", ", and has lived there for many years."),
    Kind("school", _one_of(_TOWNS), "{who} had gone to school in", " as a boy or girl."),
    Kind("word", _one_of(_PASSWORDS), "The secret word of {who} is", ", but do not tell it to anybody."),
    Kind("seal", _one_of(_PASSWORDS), "The seal on the letters of {who} showed a"),
)
LEADS = ("", "", "By the way: ", "This much was certain: ", "They had told me before: ", "Let me say it only once: ")


@dataclass(frozen=True)
class Fact:
    kind: str
    telling: str
    question: str  # the beginning of the sentence, up to the value
    value: str


def facts(n: int, seed: str) -> list[Fact]:
    """`n` facts about as many persons."""
    rng = random.Random(seed)
    first, last = rng.sample(_FIRST, len(_FIRST)), rng.sample(_LAST, len(_LAST))
    round_size = min(len(first), len(last))  # persons before names come again, in other pairs
    out: list[Fact] = []
    kinds: list[Kind] = []  # left of a round: none comes again before all have come
    while len(out) < n:
        again, i = divmod(len(out), round_size)
        name = f"{first[(i + again) % len(first)]} {last[i]}"
        if not kinds:
            kinds = rng.sample(KINDS, len(KINDS))
        kind = kinds.pop()
        words = {"who": name, "what": kind.draw(rng)}
        said = kind.said.format(**words)
        out.append(Fact(kind.name, f"{rng.choice(LEADS)}{said} {words['what']}{kind.rest}", f"\n\n{said}", words["what"]))
    return out


def identity() -> str:
    """Another one when words or wordings have changed: answers to other questions cannot be compared."""
    return hashlib.sha256(repr(facts(200, "identity")).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Ask:
    after: int  # tokens of the story
    fact: int
    distance: int  # tokens since it was told, as they were wanted


@dataclass
class Story:
    tokens: list[int]
    facts: list[Fact]
    told: list[int]  # where each fact begins
    asks: list[Ask]  # in the order of their places


def story(books: Books, tokens: int, first: int, every: int, distances: Sequence[int], seed: int, sample: int) -> Story:
    """A passage with a fact at about `first`, and at every `every` tokens from there, as long as one can be asked for."""
    model, passage = books.model, books.passage(sample, tokens)
    places = range(first, tokens - min(distances), every)
    found = facts(len(places), f"{seed}/{sample}")
    out = Story(model.tokens("", bos=True), found, [], [])
    ends, at = [], 0
    for place, fact in zip(places, found):
        cut = books.sentence_end(passage, max(at, place - (len(out.tokens) - at)))
        out.tokens += passage[at:cut]
        out.told.append(len(out.tokens))
        out.tokens += model.tokens(" " + fact.telling)
        ends.append(len(out.tokens))
        at = cut
    out.tokens += passage[at : at + tokens - len(out.tokens)]
    for i, end in enumerate(ends):
        for distance in distances:
            if end + distance <= len(out.tokens):
                out.asks.append(Ask(books.sentence_end(out.tokens, end + distance), i, distance))
    out.asks.sort(key=lambda ask: (ask.after, ask.fact))
    return out


def run_facts(system: System, told: Story, advance: Callable[[int], None]) -> Row:
    """Reads the story; at each question a copy of the state answers."""
    times, answers = [], []
    for ask in told.asks:
        if ask.after > system.seen:
            times += system.feed(told.tokens[system.seen : ask.after])
        fact = told.facts[ask.fact]
        answers.append({"fact": ask.fact, "kind": fact.kind, "distance": ask.distance, **_answer(system, fact)})
        advance(ask.after)
    return {"answers": answers, "prefill_tps": tps(times), **counts(system)}


def _answer(system: System, fact: Fact) -> Row:
    """Likelihood of the value, and whether a greedy answer has it; the system is as before afterwards."""
    model, before = system.model, system.save()
    value = model.tokens(" " + fact.value)
    system.feed(model.tokens(fact.question), last_logits=True)
    asked = system.save()
    nll = float(system.nll(value).mean())
    system.restore(asked)
    text = _greedy(model, system, fact.value, len(value) + SPARE)
    system.restore(before)
    return {"nll": nll, "found": has(text, fact.value), "text": text}


def _greedy(model: Model, system: System, value: str, n: int) -> str:
    """At most `n` tokens, up to the end of a line or a little further than the value."""
    out: list[int] = []
    for _ in range(n):
        token = system.greedy()
        if model.is_end(token):
            break
        out.append(token)
        text = model.text(out)
        if "\n" in text.lstrip() or (has(text, value) and not text.casefold().endswith(value.casefold())):
            break  # a value at the end may be the beginning of a longer one
        system.step(token)
    return model.text(out)


def has(text: str, value: str) -> bool:
    """Whether the value is in the text, and not as a part of a longer number or word."""
    low, value = text.casefold(), value.casefold()
    at = low.find(value)
    while at >= 0:
        around = low[at - 1 : at] + low[at + len(value) : at + len(value) + 1]
        if not any(c.isalnum() for c in around):
            return True
        at = low.find(value, at + 1)
    return False
