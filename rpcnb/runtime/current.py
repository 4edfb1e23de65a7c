"""What a registered function can ask about the call it is serving.

::

    @rpcnb.register_func("demo.search")
    def search(limit):
        for candidate in range(limit):
            if rpcnb.cancelled():        # the client gave the call up, or is gone
                return None
            ...
"""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CALL", "SESSION", "Cancellable", "cancelled", "run_in"]


class Cancellable(Protocol):
    """What tells whether a call was given up."""

    @property
    def cancelled(self) -> bool:
        """Tell whether nobody waits any more."""


SESSION: contextvars.ContextVar[Any] = contextvars.ContextVar("rpcnb_session", default=None)
CALL: contextvars.ContextVar[Cancellable | None] = contextvars.ContextVar("rpcnb_call", default=None)


def cancelled() -> bool:
    """Inside a registered function: tell whether its client has cancelled the call, let it time out, or is gone.

    A plain function that takes long asks this now and then; a coroutine gets ``CancelledError`` instead, and a
    callback function looks at ``done.cancelled``. Elsewhere it is False.
    """
    call = CALL.get()
    return call is not None and call.cancelled


def run_in(context: contextvars.Context, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call ``function`` in a copy of ``context``, with the session and the call of the present one."""
    return context.copy().run(_enter, SESSION.get(), CALL.get(), function, args)


def _enter(session: Any, call: Cancellable | None, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    SESSION.set(session)
    CALL.set(call)
    return function(*args)
