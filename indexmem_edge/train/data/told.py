"""Facts as people tell them in passing: in prose, letters, dialogue, on notes and forms. Told one way and asked for another.

Unlike the facts of `generated`, which say what they are, these look like the book that they stand in: what makes them worth
keeping is a name with something exact beside it. `{who}` is the person or thing, `{thing}` what it has, `{value}` what that is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import words
from .relations import RELATIONS, Family

_HAS = (
    "\n\nThe {thing} of {who} is", "\n\nThe {thing} of {who} was", "\nWhat is the {thing} of {who}? It is",
    "\n{who} has the {thing}",
    "\nQuestion: which {thing} does {who} have?\nAnswer: The {thing} of {who} is", "\n\n{who}, {thing}:", "\n{who}'s {thing} is",
    "\n\nSomebody asks for the {thing} of {who}. The answer is",
)  # fmt: skip
_HAVING: tuple[Family, ...] = (
    Family((  # prose
        " The {thing} of {who} was {value}, and nobody thought of changing it.", " {who} had been given the {thing} {value}.",
        " Everyone in the house knew that the {thing} of {who} was {value}.", " On the card of {who} stood the {thing} {value}.",
        " {value}, that was the {thing} of {who}.", " When they asked {who} for the {thing}, the answer was {value}.",
        " In those days {who} still had the {thing} {value}.", " It was under the {thing} {value} that one found {who}.",
    ), _HAS),
    Family((  # letters
        "\n\nMy dear {other}, I must not forget: the {thing} of {who} is now {value}. Your faithful {third}\n\n",
        " The letter closed with the words: \"{who} has another {thing}, it is {value}.\"",
        "\n\nP.S. The {thing} of {who} is {value}.\n\n", "\n\nTo {other}: please use {value} as the {thing} of {who}. {third}\n\n",
        " In a letter to {other} one reads that the {thing} of {who} was {value}.",
    ), _HAS),
    Family((  # dialogue
        ' "And the {thing} of {who}?" "It is {value}," said {other}.', ' "You will find {who} under the {thing} {value}," she said.',
        ' {other} whispered: "The {thing} of {who} is {value}."', ' "What is the {thing} of {who}?" asked {other}. "{value}."',
        ' "Tell {other} that the {thing} of {who} is {value}," he said.', ' "{value}," answered {other}, "is the {thing} of {who}."',
    ), _HAS),
    Family((  # notes and forms
        "\n\nNote: {who}, {thing} {value}\n\n", "\n{thing} of {who}: {value}\n", "\n* {who} ({thing} {value})\n",
        "\n{who} | {thing} | {value}\n", "\nName: {who}\n{thing}: {value}\n", "\nREMINDER. {who}: {value} ({thing}).\n", "\n- {thing}, {who}: {value}\n",
    ), _HAS),
)  # fmt: skip


RELATED = 0.25  # share of facts that are relations


@dataclass(frozen=True)
class Told:
    telling: str
    asking: str
    value: str


def told(n: int, rng: np.random.Generator, held_out: bool) -> list[Told]:
    """n facts about n persons or things, each in its own wording."""
    people = words.distinct(words.person, 3 * n, rng)
    found = []
    for i in range(n):
        names = {"who": people[i], "other": people[n + i], "third": people[2 * n + i]}
        if rng.random() < RELATED:
            relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
            family, value = relation.family, relation.draw(rng)
        else:
            family, value = _HAVING[int(rng.integers(len(_HAVING)))], words.value(rng)
            if rng.random() < 0.3:
                names["who"] = f"the {words.two_words(rng)}"
        names |= {"thing": str(rng.choice(words.THINGS)), "value": value}
        telling, asking = (
            wordings[-1] if held_out else str(rng.choice(wordings[:-1])) for wordings in (family.tellings, family.askings)
        )
        said, asked = telling.format(**names), _sentence_case(asking.format(**names))
        found.append(Told(said if said.strip().startswith(value) else _sentence_case(said), asked, value))
    return found


def _sentence_case(text: str) -> str:
    """The first letter large: names of things begin with a small one."""
    start = len(text) - len(text.lstrip())
    return text[:start] + text[start : start + 1].upper() + text[start + 1 :]
