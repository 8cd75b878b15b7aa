"""What a person can have only one of, told without naming it: a home, a trade, a friend, what somebody cannot eat.

Beside numbers, which are worth keeping wherever they stand, these teach that names and common words can be, too. `{who}` is the person,
`{value}` what is asked for, `{other}` and `{third}` are people who have nothing to do with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import words
from .words import Form


@dataclass(frozen=True)
class Family:
    """Wordings that are alike; the last of each is for held-out samples alone."""

    tellings: tuple[str, ...]
    askings: tuple[str, ...]


@dataclass(frozen=True)
class Relation:
    """Something that a person can have only one of, told without naming it."""

    family: Family
    draw: Form


def _year(rng: np.random.Generator) -> str:
    return str(rng.integers(1650, 2030))


def _amount(rng: np.random.Generator) -> str:
    return words.digits(rng, int(rng.integers(3, 6)))


def _name(rng: np.random.Generator) -> str:
    return words.invented(rng).capitalize()


def _animal(rng: np.random.Generator) -> str:
    """Named after anything."""
    names = (words.FIRST_NAMES, words.ADJECTIVES, words.NOUNS, words.TREES)[int(rng.integers(4))]
    return str(rng.choice(names)).capitalize()


RELATIONS: tuple[Relation, ...] = (
    Relation(Family(
        (
            " {who} lives in {value} now.", " {who} had moved to {value} long ago.", " They went to {value}, where {who} lived.",
        ),
        ("\n\n{who} lives in", "\nWhere does {who} live? In", "\nQuestion: where is the home of {who}?\nAnswer: in"),
    ), words.one_of(words.PLACES)),
    Relation(Family(
        (
            " It was in {value} that {who} was born.", " {who}, who was born in {value}, sat down.",
            " The year in which {who} was born was {value}.",
        ),
        ("\n\n{who} was born in", "\nWhen was {who} born? In", "\nThe year of birth of {who} is"),
    ), _year),
    Relation(Family(
        (" {who} paid {value} dollars for it.", " For {value} dollars {who} sold the house.", " It cost {who} {value} dollars in the end."),
        (
            "\n\nThe sum that {who} paid, in dollars:", "\nHow many dollars was it for {who}? It was",
            "\nIn dollars, {who} had to do with a sum of",
        ),
    ), _amount),
    Relation(Family(
        (" The ship of {who} was called the {value}.", " {who} went on board the {value}.", " With the {value} {who} sailed home."),
        ("\n\nThe ship of {who} was called the", "\nWhich ship was that of {who}? The", "\n{who} sailed on the"),
    ), _name),
    Relation(Family(
        (
            ' "The word for {who} is {value}," said {other}.', " {who} was told to say {value} at the door.",
            " At the word {value} they let {who} in.",
        ),
        ("\n\nThe word for {who} is", "\nWhat does {who} say at the door? The words", "\nThey let {who} in at the words"),
    ), words.two_words),
    Relation(Family(
        (
            " {who} earned a living as a {value}.", ' "{who} is a {value}, as far as I know," said {other}.',
            " For thirty years {who} worked as a {value} in this town.", " My cousin {who} became a {value} after all.",
        ),
        ("\n\n{who} earned a living as a", "\nWhat is the trade of {who}? {who} is a", "\n{who} worked as a"),
    ), words.one_of(words.TRADES)),
    Relation(Family(
        (
            " {who} cannot eat {value}, it makes {who} ill.", ' "No {value} for {who}, please," said {other}.',
            "\nUser: My friend {who} must never be given {value}.\nAssistant: I will keep it in mind.\n",
            " The doctor has forbidden {who} to touch {value}.",
        ),
        ("\n\nWhat must {who} not eat? It is", "\nThe food that {who} cannot eat is", "\n{who} falls ill from"),
    ), words.one_of(words.FOODS)),
    Relation(Family(
        (
            " Of all dishes {who} liked {value} best.", " On Sundays {who} never ate anything but {value}.",
            ' "I know what {who} wants for dinner," said {other}, "{value}, as always."', " Nothing pleased {who} so much as {value}.",
        ),
        ("\n\nThe favourite dish of {who} is", "\nWhat does {who} like best? It is", "\n{who} would always eat"),
    ), words.one_of(words.FOODS)),
    Relation(Family(
        (
            " {who} married {value} in the spring.", " {value} was engaged to {who} at that time.",
            " The wedding of {who} and {value} was held in the old church.", " {who} would marry nobody but {value}.",
        ),
        ("\n\n{who} was married to", "\nWhom did {who} marry? It was", "\nThe name of the one whom {who} married is"),
    ), words.person),
    Relation(Family(
        (
            " The horse of {who} answered to the name of {value}.", " {who} rode through the gate on {value}, the old mare.",
            " {value} was the horse that {who} had bought.", " {who} saddled {value} and rode away.",
        ),
        ("\n\nThe horse of {who} was called", "\nWhat is the name of the horse of {who}? It is", "\nThe horse that {who} rode was"),
    ), _animal),
    Relation(Family(
        (
            " The cat of {who}, whom everybody called {value}, slept by the fire.", ' "Come here, {value}!" {who} called, and the cat came.',
            "\nUser: {who} has a new cat, {value}.\nAssistant: How nice.\n", " {who} had named the cat {value}.",
        ),
        ("\n\nThe cat of {who} is called", "\nQuestion: how does {who} call the cat?\nAnswer:", "\nThe cat that belongs to {who} is"),
    ), _animal),
    Relation(Family(
        (
            " {who} plays the {value} in the orchestra.", " One could hear {who} practise the {value} all night.",
            " {other} taught {who} to play the {value}.", " On the {value} nobody was as good as {who}.",
        ),
        ("\n\nThe instrument of {who} is the", "\nWhat does {who} play? The", "\n{who} could play the"),
    ), words.one_of(words.INSTRUMENTS)),
    Relation(Family(
        (
            " {who} had come all the way from {value} to see it.", " {who} was on the way to {value} when the letter came.",
            " The family of {who} stems from {value}.", " {who} had never been out of {value} before.",
        ),
        ("\n\n{who} came from", "\nWith which city has {who} to do? With", "\nThe city of {who} is"),
    ), words.one_of(words.CITIES)),
    Relation(Family(
        (
            " {who} will arrive in {value} on the next boat.", " They are going to meet {who} in {value}.",
            "\n\nTo {other}: {who} is expected in {value} soon. {third}\n\n", " In {value} {who} hopes to find work.",
        ),
        ("\n\n{who} will be found in", "\nWhere is {who} going? To", "\nThe place to look for {who} is"),
    ), words.one_of(words.CITIES)),
    Relation(Family(
        (
            " {who} spoke {value} at home.", " The language that {who} was brought up in was {value}.",
            ' "You must speak {value} with {who}," said {other}.', " {who} understood nothing but {value}.",
        ),
        ("\n\nThe language of {who} is", "\nWhich language does {who} speak? It is", "\nWith {who} one has to speak"),
    ), words.one_of(words.LANGUAGES)),
    Relation(Family(
        (
            " Behind the house of {who} grew a {value}.", " {who} had planted a {value} by the gate.",
            " One finds the house of {who} by the {value} in front of it.", " Under the {value} {who} used to sit and read.",
        ),
        ("\n\nThe tree of {who} is a", "\nWhat grew by the house of {who}? A", "\nIn the garden of {who} stood a"),
    ), words.one_of(words.TREES)),
    Relation(Family(
        (
            " {who} always wore a {value} coat.", " One knew {who} from afar by the {value} coat.",
            ' "{who} is the one in the {value} coat," whispered {other}.', " {who} had lost a coat, a {value} one.",
        ),
        ("\n\nThe coat of {who} was", "\nWhich colour had the coat of {who}? It was", "\nThe colour that {who} wore was"),
    ), words.one_of(words.COLOURS)),
    Relation(Family(
        (
            " {who} would come back on a {value}, it was said.", " Every {value} {who} went to the market.",
            "\nUser: Remind me that {who} comes on {value}.\nAssistant: Of course.\n", " On {value} one should not call on {who}.",
        ),
        ("\n\nThe day of {who} is", "\nOn which day of the week has {who} to do with it? On", "\nThe day that matters with {who} is"),
    ), words.one_of(words.WEEKDAYS)),
    Relation(Family(
        (
            " {who} has hidden it under the {value}.", " The key of {who} lies behind the {value}.",
            ' "Look into the {value}," {who} had said, "and you will find it."', " {who} left the letter in the {value}.",
        ),
        ("\n\nWhat {who} hid is near the", "\nWhere did {who} put it? It is by the", "\nTo find what {who} left one looks at the"),
    ), words.one_of(words.NOUNS)),
)  # fmt: skip
