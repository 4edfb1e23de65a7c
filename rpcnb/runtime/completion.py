"""How an asynchronous operation ends: its ``done``, which takes the first outcome and may be told to stop."""

from __future__ import annotations

import asyncio
import functools
import threading
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rpcnb.errors import SessionClosed

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.values import Value

__all__ = ["Callback", "Done", "Stoppable", "bind", "call_cancelled", "errors_to_done", "is_ours"]


def is_ours(error: BaseException) -> bool:
    """Tell whether an error is meant for this process too: Ctrl-C reaches the main thread alone."""
    # Not isinstance: it asks the exception, whose answer may raise.
    return issubclass(type(error), KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


def call_cancelled() -> asyncio.CancelledError:
    """Return the error of a call that its client gave up."""
    return asyncio.CancelledError("the call was cancelled")


class Done(Protocol):
    """The completion of an asynchronous operation; exactly the first call counts."""

    @property
    def cancelled(self) -> bool:
        """Tell whether nobody waits any more."""

    def __call__(self, result: Any = None) -> None:
        """Complete with a result."""

    def error(self, error: BaseException) -> None:
        """Complete with an exception."""


class Stoppable:
    """A completion whose operation can be ended early for its client."""

    __slots__ = ("_stop", "_stopped")

    def __init__(self) -> None:
        self._stop: Callable[[], object] | None = None
        self._stopped = False

    @property
    def cancelled(self) -> bool:
        """Tell whether nobody waits for the result any more."""
        return self._stopped

    def bind(self, stop: Callable[[], object]) -> None:
        """Say what ends the operation early."""
        self._stop = stop
        if self._stopped:
            stop()

    def stop(self) -> None:
        """Cancel for the client: a coroutine ends by CancelledError; anything else is answered now, and may ask."""
        self._stopped = True
        if self._stop is not None:
            self._stop()
        else:
            self.error(call_cancelled())

    def error(self, error: BaseException) -> None:
        """Complete with an exception; each kind of completion says how."""


def bind(done: Done, stop: Callable[[], object]) -> None:
    """Tell a completion what ends its operation early, if it wants to know."""
    take = getattr(done, "bind", None)
    if take is not None:
        take(stop)


class Callback:
    """The ``done`` that a callback function receives: ``done(result)`` or ``done.error(exception)``, once."""

    __slots__ = ("_done", "_encode")

    def __init__(self, done: Done, encode: Callable[[Any], tuple[Value, ...]]) -> None:
        self._done = done
        self._encode = encode

    @property
    def cancelled(self) -> bool:
        """Tell whether the client is gone or has cancelled; the result will be dropped."""
        return self._done.cancelled

    def __call__(self, result: Any = None) -> None:
        """Complete the call with ``result``; what cannot be encoded becomes one remote exception."""
        if self._done.cancelled:
            self._done.error(SessionClosed("nobody waits for the result any more"))  # what the call used is given up
            return
        try:
            values = self._encode(result)
        except BaseException as error:  # of a result's own methods: SystemExit too
            self._done.error(error)
        else:
            self._done(values)

    def error(self, error: BaseException | str) -> None:
        """Complete the call with an exception (or a message)."""
        self._done.error(error if isinstance(error, BaseException) else RuntimeError(error))


Method = TypeVar("Method", bound="Callable[..., None]")


def errors_to_done(method: Method) -> Method:
    """Give what an asynchronous method raises to its ``done``: a subclass may run it late, where nobody looks."""

    @functools.wraps(method)
    def call(*args: Any) -> None:
        try:
            method(*args)
        except BaseException as error:
            args[-1].error(error)
            if is_ours(error):
                raise

    return call  # type: ignore[return-value]  # the same parameters
