"""RULER: samples of its tasks, made here for any length and tokenizer, read, and scored.

    samples.py   what a sample is: reading and writing files, scoring
    words.py     keys, values and words that samples are made of
    essay.py     a book as a haystack
    prompt.py    what tasks build, and the largest that fits a length
    needles.py   niah_*: needles in noise, in an essay or among other needles
    chains.py    vt: chains of variables
    lists.py     cwe and fwe: the most frequent words
    questions.py qa_*: questions about documents, out of files of SQuAD and HotpotQA
    generate.py  all of them into a folder
    anatomy.py   a sample taken apart again, knowing nothing of how it was made
    compare.py   are the samples of two folders built alike?
"""

from .samples import GENERATE, Sample, load, score, split_question, tasks

__all__ = ["GENERATE", "Sample", "load", "score", "split_question", "tasks"]
