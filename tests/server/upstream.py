#!/usr/bin/env python3
"""llama.cpp's own tests of its server, run against ours with and without a budget.

    python tests/server/upstream.py [--kv-budget 0 192] [--out docs/server-tests.md] [--results FILE] [pytest options, such as -k slot]

The tests come out of the source distribution that the library is built from. They download small models, which is not done here:
upstream_models.py puts stand-ins into the cache that the server looks into. What counts are tests that pass without a budget and fail
with one. It takes the packages that tools/server/tests/requirements.txt names and pytest-timeout
(`pip install pytest pytest-timeout requests openai prometheus-client filelock aiohttp wget`), and about ten minutes a run.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "native"), str(ROOT / "tests")]

import prepare_source
from upstream_models import fill_cache, place_downloads
from upstream_table import Outcome, page

from indexmem_edge.models.demo import demo_model
from indexmem_edge.native.find import program
from support.serving import free_port

SOURCE = "vendor/llama.cpp/"
TESTS = "tools/server/tests"
WANTED = (f"{TESTS}/", "models/templates/")
SECONDS = 90  # of a test
PLUGIN = """\
import json, os, utils
utils.ServerPreset.load_all = staticmethod(lambda: None) # the models are there
utils.DEFAULT_REQUEST_TIMEOUT = 60

def pytest_collection_modifyitems(items):
    if os.environ.get("ONLY_TESTS"):
        with open(os.environ["ONLY_TESTS"]) as file:
            only = set(json.load(file))
        items[:] = [i for i in items if i.module.__name__.rpartition(".")[2] + "::" + i.name in only]
"""
WRAPPER = """\
#!{python}
import os, sys
if "--embedding" in sys.argv or "--reranking" in sys.argv:
    os.environ.pop("LLAMA_ARG_KV_BUDGET", None) # of text that is generated
os.execv({server!r}, [{server!r}, *sys.argv[1:]])
"""


def unpack(folder: Path) -> None:
    """The tests of the source distribution, and the chat templates that they read, in `folder` as they lie in llama.cpp."""
    with tarfile.open(prepare_source.find_archive()) as tar:
        for member in tar:
            name = member.name.partition(SOURCE)[2]
            if member.isfile() and name.startswith(WANTED):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())


def prepare(folder: Path, server: Path, model: Path) -> Path:
    """The tests with models, and a program `server` that starts ours; returns their folder."""
    unpack(folder)
    tests = folder / TESTS
    fill_cache(tests / "models", model)
    place_downloads(tests / "tmp", model)
    (tests / "stand_ins.py").write_text(PLUGIN, encoding="utf-8")
    wrapper = tests / "server"
    wrapper.write_text(WRAPPER.format(python=sys.executable, server=str(server)), encoding="utf-8")
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return tests


def run(tests: Path, budget: int, only: list[str], options: list[str]) -> dict[str, Outcome]:
    """{test: outcome} with a budget, or without where it is 0; of all tests, or only of some."""
    report, chosen = tests / f"report-{budget}.xml", tests / "only.json"
    chosen.write_text(json.dumps(only), encoding="utf-8")
    environment = dict(
        os.environ,
        LLAMA_SERVER_BIN_PATH=str(tests / "server"),
        LLAMA_CACHE=str(tests / "models"),
        LLAMA_ARG_OFFLINE="1",
        OMP_WAIT_POLICY="passive",
        PYTHONPATH=str(tests),
        PORT=str(free_port()),
        ONLY_TESTS=str(chosen) if only else "",
    )
    if budget:
        environment["LLAMA_ARG_KV_BUDGET"] = str(budget)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "stand_ins", "-m", "not slow"]
    command += [f"--timeout={SECONDS}", "--tb=short", f"--junitxml={report}", "unit", *options]
    subprocess.run(command, cwd=tests, env=environment)
    return dict(outcome(case) for case in xml.parse(report).iter("testcase"))


def outcome(case: xml.Element) -> tuple[str, Outcome]:
    """Name and outcome of a test in pytest's report."""
    bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
    name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
    if bad is None:
        return name, Outcome("passed")
    status = "skipped" if bad.tag == "skipped" else "failed"
    return name, Outcome(status, bad.get("message") or "", bad.text or "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-budget", type=int, nargs="+", default=[0, 4096, 192], help="budgets to run with; 0: without")
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--results", type=Path, help="keep the outcome of every test here, as JSON; a run with -k renews some")
    parser.add_argument("--no-run", action="store_true", help="only make the page, of the results that are there")
    arguments, options = parser.parse_known_args()

    server = program("llama-server")
    if server is None:
        sys.exit("the server has not been built: make server")
    runs: dict[int, dict[str, Outcome]] = {}
    if arguments.results and arguments.results.exists():
        read = json.loads(arguments.results.read_text(encoding="utf-8"))
        runs = {int(b): {name: Outcome(*values) for name, values in tests.items()} for b, tests in read.items()}
    if not arguments.no_run:
        with tempfile.TemporaryDirectory() as temp:
            tests = prepare(Path(temp), server, Path(demo_model()))
            for budget in arguments.kv_budget:
                # What fails without a budget has nothing to tell about one.
                only = [name for name, outcome in runs.get(0, {}).items() if outcome.status == "passed"] if budget else []
                runs[budget] = {**runs.get(budget, {}), **run(tests, budget, only, options)}
                if arguments.results:
                    arguments.results.write_text(json.dumps(runs, indent=1), encoding="utf-8")
    text = page(runs)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
