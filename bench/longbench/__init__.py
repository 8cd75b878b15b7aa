"""LongBench: the official files, read, cut to a length and scored as its authors publish.

    tasks.py    which score a task has, and what of an answer counts
    scores.py   the published scores
    files.py    data and prompts as they are handed out, and what a sample is
"""
