"""A chat window on a local model whose memory does not grow: python app.py -m model.gguf

Needs indexmem-edge and Python's tkinter (Debian: apt install python3-tk), and for files that are dropped into the window
tkinterdnd2 (pip install tkinterdnd2); without it there is the button.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

from window import Window

from indexmem_edge import Llama, demo_model


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat window on a local model.")
    parser.add_argument("-m", "--model", help="GGUF file (default: the demo model)")
    parser.add_argument("--kv-budget", type=int, default=1024, help="entries that the cache keeps (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="length of an answer at most (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=_data_folder(), help="where chats are kept (default: %(default)s)")
    args = parser.parse_args()
    window = Window(
        lambda warn: Llama(args.model or demo_model(), kv_budget=args.kv_budget, kv_warn=warn, verbose=False),
        args.folder,
        max_tokens=args.max_tokens,
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, the end of the session: as if the window was closed
        signal.signal(number, lambda *_: window.close())
    window.run()


def _data_folder() -> Path:
    """Where programs of this user keep what they have to remember."""
    return Path(os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "indexmem-desktop"


if __name__ == "__main__":
    main()
