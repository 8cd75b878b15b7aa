"""The page about llama.cpp's server tests: how many pass with and without a budget, and why the others fail."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Outcome(NamedTuple):
    """passed, failed or skipped; the line that says why; where it happened."""

    status: str
    why: str = ""
    trace: str = ""


Run = Mapping[str, Outcome]  # by test

# Why a test fails that has nothing to do with the cache: the first whose pattern is in its name, its message or its trace.
REASONS = {
    "an image model or an image from the network is wanted": r"vision|multimodal|mmproj|with_image|two_images|image_payload|local_media_file",
    "a download is wanted": r"urlopen error|Max retries exceeded|test_mcp_proxy|test_router_download_model|test_router_remote_preset",
    "the words of the model they were written for are wanted": r"match_regex|Suddenly|Whiskers",
    "its tokenizer or its chat template is wanted": (
        r"^assert \d+ [=>]=? ?\d+|<s> |with_bos|prompt_cache|long_input_prompt|ctx_shift_disabled_long_prompt|test_chat_template"
    ),
    "the demo model ends its answer earlier": r"assert 'stop' is None|test_ctx_shift_disabled_short_prompt|test_synth_ignores_target_tokens",
}
# Tests that pass without a budget and fail with one, and why that is as it should be.
EXPLAINED = {
    r"^test_speculative": "It starts the server with `-fa off`, and a bounded cache is read by flash attention, so that is refused. Without it drafts work.",
    r"test_clear_and_restore": "It wants one pool for all slots (`--kv-unified`), which idle slots are cleared out of. Here each has its own.",
    r"stream_vs_non_stream|with_tokens_input|n_probs_post": (
        "It wants the same from a prompt that is read at once as from one that was in the cache, or from two slots of one batch: sums are rounded "
        "differently there, and the demo model, with weights of 4 bits, makes other words of it."
    ),
    r"test_anthropic_tool_result": "The answer is drawn, and another one here: the model ends it at once.",
    r"without_tool_call": "The answer is drawn, and another one here: not of the format that the template asks for. Other seeds do that without a budget.",
}

HEAD = """\
# llama.cpp's own tests of its server

`tests/server/upstream.py` runs them against `llama-server` as it is built here, without a budget and with budgets. They are written for models
that they download; here the demo model takes the place of models of text, and a random BERT that of models of embeddings and rankings.
So some fail whatever the cache is: those that want the words, or count the tokens, of another model. Tests that llama.cpp marks as slow, which want
models of several GB, are left out, and with a budget those that fail without one. Servers of embeddings and rankings, which a budget is
not for, have none in either column. This page is what it writes (`--out`).
"""


def reason(name: str, outcome: Outcome) -> str:
    """Why a test was skipped, or failed."""
    if outcome.status == "skipped":
        return "skipped by itself"
    text = f"{name}\n{outcome.why}\n{outcome.trace}"
    message = outcome.why.removeprefix("AssertionError: ")
    for why, pattern in REASONS.items():
        if re.search(pattern, message) or re.search(pattern, text):
            return why
    return "another reason"


def page(runs: Mapping[int, Run]) -> str:
    """The whole page; the run with a budget of 0 is that without one."""
    plain, budgets = runs[0], [budget for budget in sorted(runs, reverse=True) if budget]
    lines = [HEAD, *_table(runs, budgets), ""]
    why: dict[str, list[str]] = collections.defaultdict(list)
    for name, outcome in sorted(plain.items()):
        if outcome.status != "passed":
            why[reason(name, outcome)].append(name)
    lines += ["Of those that do not pass without a budget:", ""]
    lines += [f"* {len(names)}: {kind}" for kind, names in sorted(why.items(), key=lambda item: -len(item[1]))]
    for budget in budgets:
        lines += ["", f"## What a budget of {budget} changes", "", *(_changes(plain, runs[budget]) or ["Nothing."])]
    return "\n".join(lines) + "\n"


def _table(runs: Mapping[int, Run], budgets: Iterable[int]) -> list[str]:
    """Tests that pass, by file."""
    files = sorted({name.partition("::")[0] for name in runs[0]})
    heads = ["tests", "without a budget", *(f"budget {budget}" for budget in budgets)]
    lines = ["| tests of | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]

    def passed(run: Run, file: str) -> str:
        ended = [o.status == "passed" for name, o in run.items() if name.startswith(file)]
        return str(sum(ended)) if run is runs[0] else f"{sum(ended)} of {len(ended)}"

    for label, file in [*((f.removeprefix("test_"), f"{f}::") for f in files), ("all", "")]:
        of_file = sum(name.startswith(file) for name in runs[0])
        lines.append(f"| {label} | {of_file} | " + " | ".join(passed(runs[b], file) for b in (0, *budgets)) + " |")
    return lines


def _changes(plain: Run, bounded: Run) -> list[str]:
    """A line for each test that does not end as it does without a budget."""
    lines = []
    for name, outcome in sorted(bounded.items()):
        before = plain.get(name, Outcome("missing")).status
        if before == outcome.status:
            continue
        known = next((why for pattern, why in EXPLAINED.items() if re.search(pattern, name)), None)
        message = " ".join(outcome.why.split())[:120]
        lines.append(f"* `{name}`: {before}, with the budget {outcome.status}. {known or message}")
    return lines
