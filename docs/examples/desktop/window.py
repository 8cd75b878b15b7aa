"""The window: tabs, buttons, the meter, one line that says what happened. It decides nothing: the controller does."""

from __future__ import annotations

import tkinter as tk
from pathlib import Path
from tkinter import filedialog, ttk
from typing import Any

from chats import Chat
from controller import SUFFIX, Controller, Load
from meter import Meter
from tab import Tab

try:  # files that are dropped: Tk by itself does not know them
    from tkinterdnd2 import DND_FILES, TkinterDnD
except ImportError:
    TkinterDnD = None

_POLL = 30  # milliseconds
_SESSIONS = [("Chats", f"*{SUFFIX}")]


class Window:
    """A window with chats.

    Args:
        load, folder, sampling: see `Controller`.
    """

    def __init__(self, load: Load, folder: Path, **sampling: Any) -> None:
        self.root = TkinterDnD.Tk() if TkinterDnD else tk.Tk()
        self.root.title("indexmem-edge")
        if self.root.tk.call("tk", "windowingsystem") == "x11":
            ttk.Style().theme_use("clam")  # Tk looks as it did in 1990 there, and like the system elsewhere
        self.root.minsize(640, 420)
        self.root.report_callback_exception = self._broken
        self.root.protocol("WM_DELETE_WINDOW", self.close)
        self._open = True
        self._tabs: dict[Chat, Tab] = {}
        self.notebook = ttk.Notebook(self.root)
        self.meter = Meter(self.root)
        self.status = ttk.Label(self.root, text="loading the model…", wraplength=700)
        self.controller = Controller(load, self, folder, **sampling)
        self._lay_out()
        self.notebook.bind("<<NotebookTabChanged>>", lambda _: self._look())
        if TkinterDnD:
            self.root.drop_target_register(DND_FILES)
            self.root.dnd_bind("<<Drop>>", self._drop)

    def start(self) -> None:
        """Opens the chats, and has what the model does seen from now on."""
        self.controller.begin()
        self._poll()

    def run(self) -> None:
        """Until the window has been closed."""
        self.start()
        self.root.mainloop()

    def _lay_out(self) -> None:
        bar = ttk.Frame(self.root, padding=(6, 6, 6, 0))
        for text, command in (
            ("New", self.controller.new),
            ("Document…", self._choose_document),
            ("Open…", self._choose_session),
            ("Save as…", self._choose_name),
            ("Close tab", lambda: self.controller.remove(self.chat)),
        ):
            ttk.Button(bar, text=text, command=command).pack(side="left", padx=(0, 4))
        bar.pack(side="top", fill="x")
        self.status.pack(side="bottom", fill="x", padx=8, pady=(0, 6))
        self.meter.pack(side="bottom", fill="x", padx=8, pady=6)
        self.notebook.pack(side="top", fill="both", expand=True, padx=6, pady=6)

    def close(self) -> None:
        """What is left to do takes a moment, and nobody has to watch."""
        self.root.withdraw()
        self.controller.close()

    @property
    def chat(self) -> Chat:
        """The one that is looked at."""
        return self.controller.chats[self.notebook.index("current")]

    def tab(self, chat: Chat) -> Tab:
        return self._tabs[chat]

    def dropped(self, names: str) -> None:
        """Files were dropped: chats are opened, everything else is read. Names are a list as Tcl writes it."""
        for name in self.root.tk.splitlist(names):
            path = Path(name)
            if path.suffix == SUFFIX:
                self.controller.open(path)
            else:
                self.controller.read(self.chat, path)

    # what the controller has to say (see View)

    def added(self, chat: Chat) -> None:
        self._tabs[chat] = tab = Tab(self.notebook, chat, self.controller)
        self.notebook.add(tab, text=chat.title)
        self.notebook.select(tab)
        tab.entry.focus_set()

    def removed(self, chat: Chat) -> None:
        self._tabs.pop(chat).destroy()

    def show(self, chat: Chat) -> None:
        self._tabs[chat].show()
        self.notebook.tab(self._tabs[chat], text=chat.title)
        self._look()

    def piece(self, chat: Chat, text: str) -> None:
        self._tabs[chat].piece(text)
        self._look()

    def progress(self, chat: Chat, done: int, total: int) -> None:
        self._tabs[chat].read(done, total)

    def tell(self, text: str, error: bool = False) -> None:
        self.status.configure(text=text, foreground="#b00020" if error else "#444444")
        if error and self.root.state() == "withdrawn":
            self.root.deiconify()  # it was being closed, and something is wrong

    def closed(self) -> None:
        self._open = False
        self.root.destroy()

    # how it is done

    def _look(self) -> None:
        if self._tabs:
            self.meter.show(self.chat.stats)

    def _poll(self) -> None:
        try:
            self.controller.poll()
        finally:
            if self._open:
                self.root.after(_POLL, self._poll)

    def _broken(self, kind: type[BaseException], error: BaseException, trace: object) -> None:
        """A mistake in this program: shown, and the window goes on."""
        self.tell(f"{kind.__name__}: {error}", error=True)

    def _drop(self, event: Any) -> str:
        self.dropped(event.data)
        return str(event.action)  # the file is copied: it stays where it is

    def _choose_document(self) -> None:
        if name := filedialog.askopenfilename(parent=self.root, title="A text to ask about"):
            self.controller.read(self.chat, Path(name))

    def _choose_session(self) -> None:
        if name := filedialog.askopenfilename(parent=self.root, title="Open a chat", filetypes=_SESSIONS):
            self.controller.open(Path(name))

    def _choose_name(self) -> None:
        if name := filedialog.asksaveasfilename(parent=self.root, title="Save the chat", filetypes=_SESSIONS, defaultextension=SUFFIX):
            self.controller.save(self.chat, Path(name))
