"""What is the same in all samples of the official RULER generators: text with names, values and hay masked, and parts.

Taken from their outputs at 2048, 4096 and 8192 tokens (25 samples of each task) by anatomy.py; and tools for tests.
"""

from __future__ import annotations

import re

from indexmem_edge.bench.ruler.words import Words

WORDS = Words(
    tuple(
        "able bold calm deep easy fair glad huge icy keen lazy mild neat odd pale rare shy tall vast wild zany".split()
    ),
    tuple(
        sorted(a + b for a in "bra dol fen gri kap lum mos nar pel sto".split() for b in "ad el in ok um yx".split())
    ),
    tuple("bake carry dance enjoy fetch greet hurry invite jump knit learn mend nod open plant read sing turn".split()),
    "a few words",
)


def count(text: str) -> int:
    """Tokens of a made-up tokenizer: words, and every other sign."""
    return len(re.findall(r"\w+|[^\w\s]", text))


class Words2Tokens:
    """A model as far as samples need one."""

    def tokens(self, text: str, bos: bool = False) -> list[int]:
        return [0] * (count(text) + bos)

    def tokenizer_identity(self) -> str:
        return "words"


_NUMBER = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{}\nWhat is the special magic number for KEY mentioned in the provided text? The special magic "
    "number for KEY mentioned in the provided text is"
)
_NUMBERS = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "numbers afterwards.\n<essay>\nWhat are all the special magic numbers for {0} mentioned in the provided text? The "
    "special magic numbers for {0} mentioned in the provided text are"
)
_UUID = (
    "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about the uuid "
    "afterwards.\n{}\nWhat is the special magic uuid for KEY mentioned in the provided text? The special magic uuid for "
    "KEY mentioned in the provided text is"
)
TEMPLATES = {
    "niah_single_1": _NUMBER.format("<noise>"),
    "niah_single_2": _NUMBER.format("<essay>"),
    "niah_single_3": _UUID.format("<essay>"),
    "niah_multikey_1": _NUMBER.format("<essay>"),
    "niah_multikey_2": _NUMBER.format("<needles>"),
    "niah_multikey_3": _UUID.format("<needles>"),
    "niah_multivalue": _NUMBERS.format("KEY"),
    "niah_multiquery": _NUMBERS.format("KEY, KEY, KEY, and KEY"),
    "vt": (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        "VAR VVV = 00000\n<3 noise>\nVAR VVV = VAR VVV \n<1 noise>\nVAR VVV = VAR VVV \n<1 noise>\n"
        "VAR VVV = VAR VVV \n<7 noise>\nVAR VVV = VAR VVV \n<2 noise>\n"
        "Question: Find all variables that are assigned the value 00000 in the text above. Answer: According to the "
        "chain(s) of variable assignment in the text above, 5 variables are assigned the value 00000, they are:  VVV VVV "
        "VVV VVV VVV\n\n"
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        "VAR VVVVV = 00000\nVAR VVVVV = VAR VVVVV \nVAR VVVVV = VAR VVVVV \nVAR VVVVV = VAR VVVVV \n"
        "VAR VVVVV = VAR VVVVV \n"
        "Question: Find all variables that are assigned the value 00000 in the text above. Answer: According to the "
        "chain(s) of variable assignment in the text above, 5 variables are assigned the value 00000, they are: "
    ),
    "cwe": (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n<list>\n"
        "Question: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often "
        "in the list are: <list>\n"
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n<list>\n"
        "Question: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often "
        "in the list are:"
    ),
    "fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. <words>\n"
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:"
    ),
}
_BETWEEN, _ALONE = "between sentences", "alone in a line"
PARTS = {
    "niah_single_1": f"1 needles, 1 keys, 1 asked, {_ALONE}",
    "niah_single_2": f"1 needles, 1 keys, 1 asked, {_BETWEEN}",
    "niah_single_3": f"1 needles, 1 keys, 1 asked, {_BETWEEN}",
    "niah_multikey_1": f"4 needles, 4 keys, 1 asked, {_BETWEEN}",
    "niah_multikey_2": f"many needles, many keys, 1 asked, {_ALONE}",
    "niah_multikey_3": f"many needles, many keys, 1 asked, {_ALONE}",
    "niah_multivalue": f"4 needles, 1 keys, 1 asked, {_BETWEEN}",
    "niah_multiquery": f"4 needles, 4 keys, 4 asked, {_BETWEEN}",
    "vt": "5 statements, 5 in the example",
    "fwe": "words of [3, 6] letters, frequency of 1 / rank^2",
}
CWE_PARTS = {  # by whether the length is below 4096
    True: "10 words 6 times, others 1 times; 10 words 3 times, 10 words 1 times in the example",
    False: "10 words 30 times, others 3 times; 10 words 10 times, 30 words 3 times in the example",
}
