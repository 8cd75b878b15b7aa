"""Errors of requests, as OpenAI's clients read them: whose fault one is, and how it is said in the middle of a stream.

llama-cpp-python's server calls this (native/patches/0023). By itself it takes every error for its own, and a client asks again; and
of a stream, whose status has been sent by then, it says nothing more.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

from ..errors import BudgetError, BudgetExhausted, RequestError

_OF_THE_REQUEST = (RequestError, BudgetError, BudgetExhausted)  # asked again, it would fail again


def is_of_the_request(error: Exception) -> bool:
    """Whether the status is 400; 500 otherwise."""
    return isinstance(error, _OF_THE_REQUEST)


def as_answer(error: Exception) -> dict[str, Any]:
    """What stands under `error` in an answer."""
    kind = "invalid_request_error" if is_of_the_request(error) else "internal_server_error"
    return {"message": str(error), "type": kind, "param": None, "code": None}


def as_event(error: Exception) -> dict[str, Any]:
    """The last event of a stream that has failed. Where the server is to blame, its log gets the trace."""
    if not is_of_the_request(error):
        traceback.print_exception(type(error), error, error.__traceback__, file=sys.stderr)
    return {"error": as_answer(error)}
