"""What PyInstaller has to know to put this package into a program: the hook beside this file.

PyInstaller finds it by the entry point `pyinstaller40` of the installed package; a program needs no options for it.
"""

from __future__ import annotations

from pathlib import Path


def hook_folders() -> list[str]:
    """The folder with the hook, as PyInstaller asks for it."""
    return [str(Path(__file__).parent)]
