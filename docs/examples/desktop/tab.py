"""One tab: what was said, and where the next question is typed."""

from __future__ import annotations

import tkinter as tk
from collections.abc import Iterator
from contextlib import contextmanager
from tkinter import ttk
from tkinter.scrolledtext import ScrolledText
from typing import TYPE_CHECKING

from chats import Chat

if TYPE_CHECKING:
    from controller import Controller

_COLOURS = {"you": "#1f5fa8", "model": "#7a4a00", "document": "#666666"}


class Tab(ttk.Frame):
    """Shows a chat, and tells the controller what is done to it."""

    def __init__(self, parent: tk.Misc, chat: Chat, controller: Controller) -> None:
        super().__init__(parent, padding=6)
        self._chat, self._controller = chat, controller
        self.said = ScrolledText(self, wrap="word", height=18, state="disabled", font="TkTextFont", padx=8, pady=6)
        self.document = ttk.Label(self, foreground=_COLOURS["document"])
        self.progress = ttk.Progressbar(self, maximum=1.0)
        self.entry = tk.Text(self, wrap="word", height=3, font="TkTextFont", padx=6, pady=4)
        buttons = ttk.Frame(self)
        self.send = ttk.Button(buttons, text="Send", command=self._send)
        self.stop = ttk.Button(buttons, text="Stop", command=lambda: controller.stop(chat))
        self.regenerate = ttk.Button(buttons, text="Regenerate", command=lambda: controller.regenerate(chat))
        self._lay_out(buttons)
        for name, colour in _COLOURS.items():
            self.said.tag_configure(name, foreground=colour, font="TkHeadingFont" if name != "document" else "TkTextFont")
        self.entry.bind("<Return>", self._send)
        self.entry.bind("<Shift-Return>", lambda _: None)  # which makes a line
        self.entry.bind("<Escape>", lambda _: controller.stop(chat))
        self._at_end = True  # what is new is seen, unless somebody has scrolled up to read
        for event in ("<MouseWheel>", "<Button-4>", "<Button-5>", "<KeyRelease>"):
            self.said.bind(event, lambda _: self.after_idle(self._scrolled))
        self.said.vbar.bind("<ButtonRelease-1>", lambda _: self.after_idle(self._scrolled))
        self.said.bind("<Configure>", lambda _: self._follow())

    def _lay_out(self, buttons: ttk.Frame) -> None:
        self.columnconfigure(0, weight=1)
        self.rowconfigure(0, weight=1)
        self.said.grid(row=0, column=0, columnspan=2, sticky="nsew")
        self.document.grid(row=1, column=0, sticky="w", pady=(4, 0))
        self.progress.grid(row=1, column=1, sticky="e", pady=(4, 0))
        self.entry.grid(row=2, column=0, sticky="ew", pady=(4, 0))
        buttons.grid(row=2, column=1, sticky="ns", padx=(6, 0), pady=(4, 0))
        for button in (self.send, self.stop, self.regenerate):
            button.pack(fill="x")

    def show(self) -> None:
        """All of the chat as it is now."""
        chat = self._chat
        self._write_all()
        self.document["text"] = (
            f"reading {chat.reading}…" if chat.reading else f"{chat.document.name}: ask about it" if chat.document else ""
        )
        self.progress.grid_remove()
        self.send.state(["disabled" if chat.busy else "!disabled"])
        self.stop.state(["!disabled" if chat.busy else "disabled"])
        self.regenerate.state(["!disabled" if chat.can_regenerate else "disabled"])
        if chat.draft and not self.typed:
            self.entry.insert("1.0", chat.draft)
            chat.draft = ""

    def piece(self, text: str) -> None:
        """Some more text of the answer."""
        self.progress.grid_remove()
        with self._writing():
            self.said.insert("end", text)

    def read(self, done: int, total: int) -> None:
        """How much of a prompt has been read."""
        self.progress["value"] = done / total
        self.progress.grid()

    @property
    def typed(self) -> str:
        return self.entry.get("1.0", "end-1c").strip()

    def _write_all(self) -> None:
        chat = self._chat
        with self._writing():
            self.said.delete("1.0", "end")
            for i, message in enumerate(chat.messages):
                self._heading("you" if message["role"] == "user" else "model")
                if i in chat.documents:
                    self.said.insert("end", f"[{chat.documents[i].name}]\n", "document")
                self.said.insert("end", chat.shown(i))
            if chat.messages and chat.messages[-1]["role"] == "user":
                self._heading("model")
                self.said.insert("end", chat.answer)

    def _heading(self, who: str) -> None:
        first = self.said.index("end-1c") == "1.0"
        self.said.insert("end", ("" if first else "\n\n") + f"{who.capitalize()}\n", who)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Only the program writes here. Who has scrolled up to read stays there."""
        top = self.said.index("@0,0")
        self.said.configure(state="normal")
        yield
        self.said.configure(state="disabled")
        self.said.yview(top)
        self._follow()

    def _follow(self) -> None:
        if self._at_end:
            self.said.see("end")

    def _scrolled(self) -> None:
        self._at_end = self.said.yview()[1] >= 1.0

    def _send(self, _: object = None) -> str:
        if self.typed and not self._chat.busy:
            question = self.typed
            self.entry.delete("1.0", "end")
            self._controller.send(self._chat, question)
        return "break"  # Return does not make a line
