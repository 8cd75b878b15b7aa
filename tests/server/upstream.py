#!/usr/bin/env python3
"""llama.cpp's own tests of its server, run against ours with and without a budget.

    python tests/server/upstream.py --kv-budget 4096 [--out docs/server-tests.md] [pytest options, such as -k slot]

The tests come out of the source distribution that the library is built from. They download small models, which is not done here:
the demo model takes the place of each. Tests that ask for what only those models do fail then, with or without a budget; what
counts are those that pass without a budget and fail with one. It takes the packages that tools/server/tests/requirements.txt
names (`pip install pytest requests openai prometheus-client filelock aiohttp wget`).
"""

from __future__ import annotations

import argparse
import collections
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "native"))

import prepare_source

FOLDER = "vendor/llama.cpp/tools/server/tests/"
WRAPPER = """\
#!{python}
import os, sys
arguments, skip = [], False
for word in sys.argv[1:]:
    if skip or word in ("--hf-repo", "--hf-file"):
        skip = not skip
        continue
    arguments.append(word)
if "--models-dir" not in arguments and "--models-preset" not in arguments and len(arguments) < len(sys.argv) - 1:
    arguments += ["-m", {model!r}]
if "--embedding" in arguments or "--reranking" in arguments:
    os.environ.pop("LLAMA_ARG_KV_BUDGET", None) # of text that is generated
os.execv({server!r}, [{server!r}, *arguments])
"""


def unpack(folder: Path) -> Path:
    """The tests of the source distribution, in `folder`."""
    with tarfile.open(prepare_source.find_archive()) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if member.isfile() and name.startswith(FOLDER):
                target = folder / name[len(FOLDER) :]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    return folder


def run(tests: Path, budget: int, options: list[str]) -> dict[str, tuple[str, str]]:
    """{test: (passed, failed or skipped; the line that says why)}"""
    report = tests / f"report-{budget}.xml"
    environment = dict(os.environ, LLAMA_SERVER_BIN_PATH=str(tests / "server"), LLAMA_CACHE=str(tests / "models"))
    if budget:
        environment["LLAMA_ARG_KV_BUDGET"] = str(budget)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "unit", *options]
    subprocess.run(command, cwd=tests, env=environment)
    found = {}
    for case in xml.parse(report).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        status = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
        why = "" if bad is None else (bad.get("message") or "").splitlines()[0][:100]
        found[f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = status, why
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-budget", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="write the table here")
    arguments, options = parser.parse_known_args()

    from indexmem_edge.models.demo import demo_model
    from indexmem_edge.native.find import program

    server = program("llama-server")
    if server is None:
        sys.exit("the server has not been built: make server")
    with tempfile.TemporaryDirectory() as temp:
        tests = unpack(Path(temp))
        wrapper = tests / "server"
        wrapper.write_text(WRAPPER.format(python=sys.executable, model=str(demo_model()), server=str(server)))
        wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
        before, after = run(tests, 0, options), run(tests, arguments.kv_budget, options)
    lines = table(before, after, arguments.kv_budget)
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(before: dict[str, tuple[str, str]], after: dict[str, tuple[str, str]], budget: int) -> list[str]:
    """Counts per file, and each test that a budget changes."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, (status, _) in after.items():
        was = before.get(name, ("missing", ""))[0]
        kind = "passed" if status == was == "passed" else "neither" if status == was else f"{was}, then {status}"
        counts[name.partition("::")[0]][kind] += 1
    kinds = ["passed", "neither", *sorted({k for c in counts.values() for k in c} - {"passed", "neither"})]
    heads = {"passed": "passed with and without a budget", "neither": "failed or skipped with and without: another model is wanted"}
    lines = [f"| tests of | {' | '.join(heads.get(k, k) for k in kinds)} |", "|---|" + "--:|" * len(kinds)]
    lines += [f"| {name} | {' | '.join(str(c[k]) for k in kinds)} |" for name, c in sorted(counts.items())]
    total: collections.Counter[str] = sum(counts.values(), collections.Counter())
    lines += [f"| all | {' | '.join(str(total[k]) for k in kinds)} |", ""]
    for name, (status, why) in sorted(after.items()):
        if before.get(name, ("", ""))[0] != status:
            lines.append(f"* {name}: {before.get(name, ('missing', ''))[0]}, with a budget of {budget} {status}: {why}")
    return lines


if __name__ == "__main__":
    main()
