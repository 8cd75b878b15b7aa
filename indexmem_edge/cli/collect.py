"""Options that several commands share: the fields of a dataclass."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

if sys.version_info >= (3, 11):
    from typing import get_type_hints
else:
    from typing_extensions import get_type_hints

Command = Callable[..., Any]


def collecting(kind: type, argument: str) -> Callable[[Command], Command]:
    """Gives a command every field of the dataclass `kind` as an option, collected in its argument `argument`."""

    def decorate(command: Command) -> Command:
        own_hints = get_type_hints(command, include_extras=True)
        hints = get_type_hints(kind, include_extras=True)
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [
            p.replace(kind=keyword, annotation=own_hints[name])
            for name, p in inspect.signature(command).parameters.items()
            if name != argument
        ]
        shared = [inspect.Parameter(f.name, keyword, default=f.default, annotation=hints[f.name]) for f in fields(kind)]

        @functools.wraps(command)
        def run(**given: Any) -> Any:
            collected = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
            return command(**given, **{argument: collected})

        run.__signature__ = inspect.Signature(own + shared)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in own + shared}
        del run.__wrapped__
        return run

    return decorate
