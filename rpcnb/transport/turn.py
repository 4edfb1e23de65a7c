"""Whose turn it is to do something that must not be done twice at once, such as opening a connection."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rpcnb.errors import DeadlockError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rpcnb.transport.deadline import Deadline

__all__ = ["Turn"]

_LOOK = 0.25  # seconds between two looks, so that Ctrl-C ends the wait


class Turn:
    """A lock that is waited for within a time limit, and never by the thread that has it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0

    def locked(self) -> bool:
        """Tell whether somebody is at it."""
        return self._lock.locked()

    @contextmanager
    def held(self, deadline: Deadline, what: str) -> Iterator[None]:
        """Take the turn; another thread may be at it.

        Raises:
            DeadlineExceeded: It was for too long.
            DeadlockError: This very thread is at it, and a signal's handler or a finalizer asks in the middle.
        """
        if self._owner == threading.get_ident():
            raise DeadlockError(f"{what}: this thread is opening a connection of it already")
        while not self._lock.acquire(timeout=min(_LOOK, deadline.left())):
            pass
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = 0
            self._lock.release()
