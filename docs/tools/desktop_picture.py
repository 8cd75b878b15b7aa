"""Makes docs/images/desktop.png: the desktop example on a display that nobody sees, after a conversation with the demo model.

Needs Xvfb and Python's tkinter (Debian: apt install xvfb python3-tk) and Pillow: python docs/tools/desktop_picture.py
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import ImageGrab

from indexmem_edge import Llama, demo_model

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "docs" / "examples" / "desktop")]
from support.display import virtual_display  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "desktop.png"
NEWS = """\
News from Port Elden. The storm has passed and the harbour is open again. The lighthouse was painted green this spring, and
Maren Holt has become its keeper. The ferry to the islands now leaves at seven in the morning and comes back at noon. The school
will have its summer feast on the old pier in July, with music and a race of small boats. The bakery in Mill Street is looking
for a baker. Old books can be left at the library, which sells them for a new roof.
"""
Steps = Iterator[Callable[[], object]]


def conversation(window: Any, news: Path) -> Steps:
    """What a person does, and after each of it what there is to wait for."""

    def idle() -> bool:
        return not any(chat.busy for chat in window.controller.chats)

    def ask(question: str) -> Callable[[], bool]:
        window.controller.send(window.chat, question)
        return idle

    yield lambda: window.status["text"] == "ready"
    window.notebook.select(1)
    window.root.update()
    yield ask("Name three rivers in Africa.")
    window.notebook.select(0)
    window.root.update()
    window.dropped(window.root.tk.call("list", str(news)))
    yield idle
    yield ask("Who is the keeper of the lighthouse?")
    window.controller.regenerate(window.chat)
    yield idle
    yield ask("At what time does the ferry leave?")
    window.tab(window.chat).entry.insert("1.0", "What happens in July?")
    shown = time.monotonic()
    yield lambda: time.monotonic() > shown + 0.5  # until all of it has been drawn


def make(display: str, folder: Path) -> None:
    os.environ["DISPLAY"] = display
    from window import Window

    news = folder / "news.txt"
    news.write_text(NEWS, encoding="utf-8")
    window = Window(
        lambda warn: Llama(demo_model(), kv_budget=256, kv_warn=warn, verbose=False, seed=1),
        folder / "kept",
        max_tokens=64,
        temperature=0.0,
    )
    window.root.geometry("780x620+0+0")
    window.start()
    for done in conversation(window, news):
        while not done():
            window.root.dooneevent()
    window.root.update()
    PICTURE.parent.mkdir(exist_ok=True)
    ImageGrab.grab(xdisplay=display).crop((0, 0, 780, 620)).save(PICTURE, optimize=True)
    window.controller.close()
    window.root.mainloop()


if __name__ == "__main__":
    with virtual_display() as display, tempfile.TemporaryDirectory() as folder:
        make(display, Path(folder))
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size:,} bytes")
