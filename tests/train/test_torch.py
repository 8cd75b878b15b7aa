"""Without PyTorch: one line that says what to install. This runs with and without it."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest

from indexmem_edge.errors import TorchMissing
from indexmem_edge.train.torch_extra import require_torch


def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(TorchMissing, match=r"not installed: .*pip install torch") as error:
        require_torch()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (ModuleNotFoundError("No module named 'sympy'", name="sympy"), "lacks the module sympy"),
        (ImportError("libtorch.so: cannot open\nshared object"), r"does not start \(libtorch.so: cannot open\)"),
        (OSError(""), "no reason given"),
    ],
)
def test_it_is_broken(monkeypatch: pytest.MonkeyPatch, reason: Exception, message: str) -> None:
    real = builtins.__import__

    def broken(name: str, *args: Any) -> Any:
        if name == "torch":
            raise reason
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(TorchMissing, match=message) as error:
        require_torch()
    assert "reinstall" in str(error.value) and "\n" not in str(error.value)


def test_it_is_there() -> None:
    pytest.importorskip("torch")
    require_torch()
