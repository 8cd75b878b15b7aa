"""Where the program `indexmem` begins: with next to no imports, so that Ctrl-C is quiet while all others are on their way."""

from __future__ import annotations

import signal

from .streams import make_complete


def main() -> None:
    """Runs the command line. Ctrl-C before it begins, or when it has ended, ends the process without a traceback."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, as behind `&` in a script
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    make_complete()
    try:
        from .app import main as run

        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
