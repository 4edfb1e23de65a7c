"""Telling observers how an operation went."""

from __future__ import annotations

import asyncio
import itertools
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

from rpcnb import events
from rpcnb.errors import DeadlineExceeded

if TYPE_CHECKING:
    from rpcnb.client.owner import Owner

__all__ = ["Watch", "new_number"]

new_number = itertools.count(1).__next__
_GIVEN_UP = (CancelledError, asyncio.CancelledError, DeadlineExceeded, KeyboardInterrupt)


class Watch:
    """One operation while somebody observes; made when it is sent, or queued.

    Args:
        session: Whose operation.
        function: What it does, for people.
        number: Its number; None for one that is sent now.
    """

    def __init__(self, session: Owner, function: str, number: int | None = None) -> None:
        self._session = session
        self._function = function
        self._number = new_number() if number is None else number
        self._start = time.monotonic()
        kind = events.CallSent if number is None else events.CallQueued
        session._tell(kind, call=self._number, function=function)

    def sent(self) -> None:
        """Tell that a queued operation is on its way."""
        self._session._tell(events.CallSent, call=self._number, function=self._function)

    def running(self) -> None:
        """Tell that the server has begun."""
        self._session._tell(events.CallRunning, call=self._number, function=self._function)

    def ended(self, error: BaseException | None) -> None:
        """Tell of the end."""
        facts = {"call": self._number, "function": self._function, "seconds": time.monotonic() - self._start}
        if error is None:
            self._session._tell(events.CallFinished, **facts)
        elif isinstance(error, _GIVEN_UP):
            self._session._tell(events.CallCancelled, **facts)
        else:
            self._session._tell(events.CallFailed, error=str(error), **facts)
