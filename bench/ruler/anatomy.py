"""A sample taken apart again, from its text alone: what is fixed in it, what is hidden, and what the answer must be.

It shares nothing with the code that makes samples, so that it can judge them and the official ones alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..runner import BenchError

_NEEDLE = re.compile(r"One of the special magic (?:numbers|uuids) for (.+?) is: ([0-9a-f-]+)\.")
_ASKED = re.compile(r"for (.+) mentioned in the provided text")
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ASSIGNED = re.compile(r"^VAR (\w+) = (?:VAR (\w+)|(\d+))", re.MULTILINE)
_LIST = re.compile(r"\b1\. .*$", re.MULTILINE)
_ITEM = re.compile(r"(\d+)\. (.+?)(?= \d+\. |$)")
_CODED = re.compile(r"coded words\. (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Anatomy:
    template: str  # the text with names, values and hay masked
    parts: str  # how many of what, as far as it is the same in every sample of a task
    depths: tuple[float, ...]  # where what is asked for begins: shares of the context's characters
    answers: tuple[str, ...]  # what a reader must answer


def take_apart(task: str, text: str, answer_prefix: str) -> Anatomy:
    """
    Args:
        text: `input` of a sample, the question being its last line.

    Raises:
        BenchError: it is not a sample of the task, or no task of RULER.
    """
    parsers = {"niah": _needles, "vt": _chains, "cwe": _common, "fwe": _frequent}
    parse = parsers.get(task.split("_")[0])
    if parse is None:
        raise BenchError(f"unknown task {task}: its name begins with one of {', '.join(parsers)}")
    try:
        return parse(text, answer_prefix)
    except (IndexError, KeyError, ValueError) as error:
        raise BenchError(f"this is not a sample of {task} ({error}): {text[:60]!r} ... {text[-60:]!r}") from None


def _needles(text: str, answer_prefix: str) -> Anatomy:
    head, rest = text.split("\n", 1)
    context, question = rest.rsplit("\n", 1)
    found = list(_NEEDLE.finditer(context))
    asked = _ASKED.findall(question)[0]
    keys = re.split(r", and |, ", asked)
    masked = ", ".join(["KEY"] * (len(keys) - 1) + ["and KEY"]) if len(keys) > 1 else "KEY"
    hay = _NEEDLE.sub("", context)
    alone = sum(bool(_NEEDLE.fullmatch(line)) for line in context.split("\n")) == len(found)
    if not hay.strip():
        kind, n = "needles", "many"
    else:
        kind, n = ("noise" if set(hay.split("\n")) <= {"", _NOISE} else "essay"), str(len(found))
    n_keys = n if n == "many" else str(len({m[1] for m in found}))
    template = "\n".join((head, f"<{kind}>", question + answer_prefix)).replace(asked, masked)
    return Anatomy(
        template,
        f"{n} needles, {n_keys} keys, {len(keys)} asked, {'alone in a line' if alone else 'between sentences'}",
        tuple(m.start() / len(context) for m in found if m[1] in keys),
        tuple(m[2] for key in keys for m in found if m[1] == key),
    )


def _chains(text: str, answer_prefix: str) -> Anatomy:
    example, asked = re.split(r"\n\n(?=Memorize)", text)
    names = dict.fromkeys(m[1] for m in _ASSIGNED.finditer(text))
    masked = text + answer_prefix
    for name in names:
        masked = re.sub(rf"\b{name}\b", "V" * len(name), masked)
    masked = re.sub(r"\b\d{5}\b", "00000", masked)
    begin = len(masked) - len(asked) - len(answer_prefix)
    worked, rest = masked[:begin], masked[begin:]
    worked = re.sub(rf"(?:{re.escape(_NOISE)}\n)+", lambda m: f"<{m[0].count(_NOISE)} noise>\n", worked)
    rest = re.sub(rf"(?:{re.escape(_NOISE)}\n)+", "", rest)  # a statement may be the first line, or not
    context = asked.rsplit("\n", 1)[0]
    said = list(_ASSIGNED.finditer(context))
    value = re.findall(r"the value (\d+)", asked)[0]
    return Anatomy(
        worked + rest,
        f"{len(said)} statements, {len(_ASSIGNED.findall(example))} in the example",
        tuple(m.start() / len(context) for m in said),
        tuple(solve(((m[1], m[2] or m[3]) for m in said), value)),
    )


def solve(assignments: Iterable[tuple[str, str]], value: str) -> list[str]:
    """Names that have the value at the end, in the order of their assignments (name, value or other name)."""
    known: dict[str, str] = {}
    for name, right in assignments:
        known[name] = known.get(right, right)
    return [name for name, held in known.items() if held == value]


def _common(text: str, answer_prefix: str) -> Anatomy:
    lists = [_ITEM.findall(m[0]) for m in _LIST.finditer(text)]
    example, answer, asked = lists
    for items in lists:
        if [int(n) for n, _ in items] != list(range(1, len(items) + 1)):
            raise ValueError("the numbers of a list do not count from 1")
    inner, counts = Counter(w for _, w in example), Counter(w for _, w in asked)
    if {word for word, _ in inner.most_common(10)} != {word for _, word in answer}:
        raise ValueError("the worked example is answered wrongly")
    often, others = counts.most_common(10), sorted({n for _, n in counts.most_common()[10:]})
    return Anatomy(
        _LIST.sub("<list>", text) + answer_prefix,
        f"10 words {_times({n for _, n in often})}, others {_times(others)}; "
        + ", ".join(
            f"{n} words {_times([times])}" for times, n in sorted(Counter(inner.values()).items(), reverse=True)
        )
        + " in the example",
        (),
        tuple(word for word, _ in often),
    )


def _times(counts: Iterable[int]) -> str:
    return " or ".join(f"{n} times" for n in sorted(counts))


def _frequent(text: str, answer_prefix: str) -> Anatomy:
    words = _CODED.findall(text)[0].split(" ")
    counts = [n for _, n in Counter(words).most_common()]
    # floor(top / rank^2) gives these counts for some top, or the frequencies fall otherwise
    low = max(n * rank**2 for rank, n in enumerate(counts, 1))
    high = min((n + 1) * rank**2 for rank, n in enumerate(counts, 1))
    sizes = sorted({len(word) for word in words})
    top = [word for word, _ in Counter(word for word in words if set(word) != {"."}).most_common(3)]
    return Anatomy(
        _CODED.sub("coded words. <words>", text) + answer_prefix,
        f"words of {sizes} letters, frequency {'of 1 / rank^2' if low < high else 'of another law'}",
        (),
        tuple(top),
    )
