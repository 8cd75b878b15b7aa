"""Facts that are told once in a long text and asked for much later, without disturbing the reading.

A fact is a sentence with a person, who is in it alone, and a value that cannot be guessed. It stands between two sentences of
a book. The question is asked after so many more tokens, from a copy of the state that is put back afterwards.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .endless_arms import counts
from .endless_text import Books
from .report import Row
from .runner import Model, System
from .stats import tps

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
_HORSES = """Bandit Blizzard Bramble Brigadier Buttercup Captain Chestnut Cinnamon Comet Corporal Daisy Domino Duchess Ginger Goblin
Hercules Juniper Jupiter Lightning Magpie Merlin Midnight Nutmeg Orion Pepper Phantom Pilgrim Primrose Saffron Sergeant
Snowball Sorrel Sparrow Sultan Tempest Thistle Trooper Vulcan Whisper Zephyr""".split()
_TRADES = """baker barber beekeeper blacksmith bookbinder brewer butcher carpenter chandler clockmaker cobbler cooper
dentist draper fiddler fisherman furrier gardener glazier goldsmith grocer hatter jeweller locksmith mason
miller notary plumber potter printer saddler sculptor shepherd tailor tanner thatcher weaver""".split()
_MONTHS = """January February March April May June July August September October November December""".split()
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
    """Wordings of one kind of fact; {who} is the person, {what} the value."""

    name: str
    draw: Draw
    tellings: tuple[str, ...]
    asking: str
    answer: str  # up to the value


KINDS = (
    Kind(
        "debt",
        _number(1000, 99999),
        (
            "{who} still owed the bank {what} dollars.",
            "In the ledger of the bank {what} dollars stood against the name of {who}.",
            "It was no secret that {who} had a debt of {what} dollars at the bank.",
        ),
        "How many dollars did {who} owe the bank?",
        "{who} owed the bank",
    ),
    Kind(
        "cabin",
        _number(100, 999),
        (
            "On the steamer {who} slept in cabin {what}.",
            "The steward had put {who} into cabin {what} of the steamer.",
            "Cabin {what} of the steamer had been taken by {who}.",
        ),
        "In which cabin of the steamer did {who} sleep?",
        "On the steamer {who} slept in cabin",
    ),
    Kind(
        "birthday",
        lambda rng: f"{rng.randint(4, 20)}th of {rng.choice(_MONTHS)}",
        (
            "{who} was born on the {what}.",
            "The birthday of {who} fell on the {what}.",
            "Every year on the {what} there was a cake for the birthday of {who}.",
        ),
        "On which day was {who} born?",
        "{who} was born on the",
    ),
    Kind(
        "town",
        _one_of(_TOWNS),
        (
            "{who} had grown up in {what}.",
            "As a child {who} had lived in {what}.",
            "It was in {what} that {who} had spent a happy childhood.",
        ),
        "In which town did {who} grow up?",
        "{who} grew up in",
    ),
    Kind(
        "horse",
        _one_of(_HORSES),
        (
            "The horse of {who} was called {what}.",
            "{who} rode a mare by the name of {what}.",
            "{what} was the name that {who} had given to the horse.",
        ),
        "What was the horse of {who} called?",
        "The horse of {who} was called",
    ),
    Kind(
        "trade",
        _one_of(_TRADES),
        (
            "{who} made a living as a {what}.",
            "By trade {who} was a {what}.",
            "{who} had learned to be a {what}, and worked as one.",
        ),
        "What was the trade of {who}?",
        "By trade {who} was a",
    ),
    Kind(
        "password",
        lambda rng: " ".join(rng.sample(_PASSWORDS, 2)),
        (
            "The sentry let {who} pass at the words {what}.",
            'To the sentry {who} had to whisper "{what}" at the gate.',
            "At the gate the sentry heard the words {what} from {who}.",
        ),
        "At which words did the sentry let {who} pass?",
        "The sentry let {who} pass at the words",
    ),
)


@dataclass(frozen=True)
class Fact:
    kind: str
    telling: str
    question: str  # and the answer up to the value
    value: str


def facts(n: int, seed: str) -> list[Fact]:
    """`n` facts about as many persons."""
    rng = random.Random(seed)
    first, last = rng.sample(_FIRST, len(_FIRST)), rng.sample(_LAST, len(_LAST))
    round_size = min(len(first), len(last))  # persons before names come again, in other pairs
    out: list[Fact] = []
    while len(out) < n:
        again, i = divmod(len(out), round_size)
        name = f"{first[(i + again) % len(first)]} {last[i]}"
        kind = rng.choice(KINDS)
        words = {"who": name, "what": kind.draw(rng)}
        question = f"\n\nQuestion: {kind.asking}\nAnswer: {kind.answer}"
        telling = rng.choice(kind.tellings)
        out.append(Fact(kind.name, telling.format(**words), question.format(**words), words["what"]))
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
