"""A server that is killed while it works, and started again: saved slots go on where they were.

A file of a slot has no checkpoints. So where the next prompt spells the last answer with other tokens than it was made of, which tokenizers
do now and then, there is nothing to go back to, and the conversation is read again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..report import Report, Row, Verdict
from .client import Kind, ServerError, running
from .load import AGAIN, Conversation, Names

COLUMNS = ("slot", "seen", "new", "evaluated", "mixed")
TURNS = 4  # of each conversation before


def run_outlive(kind: Kind, model: Path, threads: int, slots: int, meta: Row, tell: Callable[[str], Any] = lambda _: None) -> Report:
    """One conversation a slot; all are saved, the server is killed in the middle of an answer, and the next one loads them."""
    report = Report("serve-outlive", {**meta, "slots": slots, "turns": TURNS})
    names = Names()
    talks = [Conversation(names, seed=slot, slot=slot) for slot in range(slots)]
    with tempfile.TemporaryDirectory() as folder:
        saving = replace(kind, options=(*kind.options, "--slot-save-path", folder))
        with running(saving, model, threads) as server:
            started = time.monotonic()
            for slot, talk in enumerate(talks):
                tell(f"conversation {slot + 1} of {slots}")
                for _ in range(TURNS):
                    talk.turn(server, started)
                server.slot(slot, "save", f"{slot}.bin")

            def answer() -> None:
                with contextlib.suppress(ServerError):
                    server.chat([{"role": "user", "content": "Tell me a long story."}], 10_000, slot=0)

            working = threading.Thread(target=answer)
            working.start()
            time.sleep(0.5)
            os.kill(server.pid, getattr(signal, "SIGKILL", signal.SIGTERM))  # which ends it as hard on Windows
            working.join()
        tell("killed; the next one loads what was saved")
        with running(saving, model, threads) as server:
            started = time.monotonic()
            for slot, talk in enumerate(talks):
                server.slot(slot, "restore", f"{slot}.bin")
                turn = talk.turn(server, started)
                row = {"slot": slot, "seen": talk.known, "new": turn.new, "evaluated": turn.evaluated, "mixed": turn.mixed}
                report.rows.append(row)
    again = sum(row["evaluated"] - row["new"] > AGAIN for row in report.rows)
    report.verdicts.append(Verdict(f"conversations that read more than {AGAIN:.0f} tokens again after the restart", again))
    return report
