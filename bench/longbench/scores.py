"""The scores of LongBench, as published: each takes an answer and one expected answer, and gives 0 to 1.

Summaries are scored by the package `rouge`, Chinese text is cut into words by `jieba`, as the published figures are; both come
with the extra `longbench`.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ..runner import BenchError

Score = Callable[[str, str, Sequence[str]], float]  # answer, expected answer, all classes of the task

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# of Chinese text, as the published scores leave it out: 《 is not among it, » is not either
_PUNCTUATION_ZH = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
_NUMBER = re.compile(r"\d+")
_COMMENTS = ("`", "#", "//")  # a line with one of them is not the line of code that was asked for


def qa_f1(answer: str, expected: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words, without case, punctuation and articles."""
    return _f1(_words(answer), _words(expected))


def qa_f1_zh(answer: str, expected: str, classes: Sequence[str] = ()) -> float:
    """The same of Chinese words."""
    found = ([_plain_zh(word) for word in _cut(text)] for text in (answer, expected))
    return _f1(*([word for word in words if word] for words in found))


def rouge(answer: str, expected: str, classes: Sequence[str] = ()) -> float:
    """F of ROUGE-L."""
    scorer = _package("rouge").Rouge()
    try:
        scores = scorer.get_scores([answer], [expected], avg=True)
    except (ValueError, RecursionError):  # an answer without a word
        return 0.0
    return float(scores["rouge-l"]["f"])


def rouge_zh(answer: str, expected: str, classes: Sequence[str] = ()) -> float:
    """F of ROUGE-L of Chinese words."""
    return rouge(" ".join(_cut(answer)), " ".join(_cut(expected)))


def classification(answer: str, expected: str, classes: Sequence[str]) -> float:
    """1 / number of classes that the answer names, if the right one is among them. Names within the right name do not count."""
    named = [name for name in classes if name in answer]
    for name in named:  # itself, as published: behind one that is taken out the next is passed over
        if name in expected and name != expected:
            named.remove(name)
    return 1 / len(named) if expected in named else 0.0


def retrieval(answer: str, expected: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the paragraph's."""
    return _share_of_numbers(answer, _paragraph(r"Paragraph (\d+)", expected))


def retrieval_zh(answer: str, expected: str, classes: Sequence[str] = ()) -> float:
    return _share_of_numbers(answer, _paragraph(r"段落(\d+)", expected))


def count(answer: str, expected: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the answer that are the expected one."""
    return _share_of_numbers(answer, expected)


def code(answer: str, expected: str, classes: Sequence[str] = ()) -> float:
    """How alike the first line of code and the expected one are, in whole per cent."""
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _COMMENTS)), "")
    if not line or not expected:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, expected).ratio()) / 100


def _f1(answer: Sequence[str], expected: Sequence[str]) -> float:
    same = sum((Counter(answer) & Counter(expected)).values())
    if not same:
        return 0.0
    precision, recall = same / len(answer), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return _ARTICLES.sub(" ", plain).split()


def _plain_zh(word: str) -> str:
    """Without case, spaces and punctuation of either writing."""
    kept = (c for c in word.lower() if c not in string.punctuation and c not in _PUNCTUATION_ZH)
    return "".join("".join(kept).split())


def _cut(text: str) -> list[str]:
    return list(_package("jieba").cut(text, cut_all=False))


def _paragraph(pattern: str, expected: str) -> str:
    found = re.search(pattern, expected)
    if not found:
        raise BenchError(f"expected the name of a paragraph as the answer, found {expected!r}: is this a file of LongBench?")
    return found[1]


def _share_of_numbers(answer: str, expected: str) -> float:
    numbers = _NUMBER.findall(answer)
    return numbers.count(expected) / len(numbers) if numbers else 0.0


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise BenchError(f"this task is scored with the package {name}: pip install {name}") from None
