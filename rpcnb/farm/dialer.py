"""Asking a tracker for a board and opening a session with it; and where this process waits for one."""

from __future__ import annotations

import asyncio
import getpass
import os
import socket
import sys
import weakref
from typing import TYPE_CHECKING, Any

from rpcnb.errors import ConnectFailed, KeyMismatch
from rpcnb.farm.messages import is_word, request_board
from rpcnb.farm.trackerlink import TrackerLink, converse
from rpcnb.link.dial import ClientKey
from rpcnb.link.dialer import OPEN_SECONDS, Dialer
from rpcnb.link.hosts import find_secret
from rpcnb.protocol.secret import hidden
from rpcnb.transport.address import Address, show_address
from rpcnb.transport.deadline import Deadline
from rpcnb.transport.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.farm.messages import Flow
    from rpcnb.link.interrupt import Guard
    from rpcnb.link.link import Link
    from rpcnb.protocol.codes import Limits
    from rpcnb.protocol.handshake import KeyText

__all__ = ["TrackedDialer", "converse_awaiting", "known_trackers", "note_asker", "places_in_queues"]

_WRONG_KEYS = 2  # a match key may be stale once; a missing token is missing every time


def _user() -> str:
    """Return who asks, for others to see who has a board."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container without a user database
        name = "somebody"
    return f"{name}@{socket.gethostname()}"


_waiting: weakref.WeakSet[_Waiting] = weakref.WeakSet()
_askers: weakref.WeakSet[Any] = weakref.WeakSet()  # who knows a tracker: sessions with one, and their boards' dialers


def note_asker(asker: Any) -> None:
    """Note who knows a tracker (its ``tracker``), as long as it lives."""
    _askers.add(asker)


def places_in_queues() -> list[tuple[str, str, int, int]]:
    """Return where this process waits for boards: tracker, key, place (0: not told) and length of the queue."""
    return [one.at for one in _waiting.copy() if not one.over]


def known_trackers() -> list[Address]:
    """Return the trackers that this process has asked and still holds."""
    known = (one.tracker for one in _askers.copy())
    return list({(one.host, one.port): Address(one.host, one.port, "", "tracker") for one in known}.values())


class _Waiting:
    """Says on standard error that one waits, and which place in the queue one has."""

    def __init__(self, key: str, tracker: Address, told: Callable[[int, int], object] | None) -> None:
        self._key = key
        self._where = show_address(tracker.host, tracker.port)
        self._told = told
        self._said = False
        self.at = self._where, key, 0, 0
        self.over = False
        _waiting.add(self)

    def place(self, place: int, length: int) -> None:
        self._said = True
        self.at = self._where, self._key, place, length
        if self._told is not None:
            self._told(place, length)
        else:
            self._say(f"place {place} of {length}")

    def no_word(self) -> None:
        """Tell that there is no answer yet: a stock tracker says nothing of places."""
        if not self._said and self._told is None:
            self._say("none is free yet")

    def _say(self, text: str) -> None:
        if os.environ.get("RPCNB_NONINTERACTIVE") != "1":
            sys.stderr.write(printable(f"waiting for a board {self._key!r} of {self._where}: {text}") + "\n")


class TrackedDialer(Dialer):
    """Asks a tracker for a board and opens a session with it.

    Args:
        tracker: Where to ask; its ``key`` is the kind of board.
        priority: The higher, the earlier.
        session_timeout: Seconds after which the board ends the session; 0 for never.
        max_retry: Boards to try.
        constructor: Name and arguments of the session constructor.
        token: The boards' token, if they have one; those of this user on this machine are found without it.
        extensions: Offer rpcnb's extensions to tracker and board.
        told: Called with the place in the queue and its length while one waits.
        lanes: Further connections at most.
        depth: Requests on the way on one connection at most.
        limits: What the board may send.
    """

    patient = True

    def __init__(
        self,
        tracker: Address,
        priority: float = 1,
        session_timeout: float = 0,
        max_retry: int = 5,
        constructor: tuple[Any, ...] = (),
        token: str | None = None,
        extensions: bool = True,
        told: Callable[[int, int], object] | None = None,
        lanes: int = 3,
        depth: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(tracker, ClientKey(tracker.key, limits=limits), constructor, lanes, depth)
        self.tracker = tracker
        self._priority = priority
        self._session_timeout = session_timeout
        self._max_retry = max_retry
        self._token = hidden(token)
        self._extensions = extensions
        self._told = told
        self._failed = self._wrong_keys = 0
        _askers.add(self)

    def _ask(self) -> tuple[Flow, _Waiting]:
        waiting = _Waiting(self.tracker.key, self.tracker, self._told)
        told, user = (waiting.place, _user()) if self._extensions else (None, "")
        return request_board(self.tracker.key, user, self._priority, told), waiting

    def _aim(self, host: str, port: int, match_key: str) -> None:
        """Take what the tracker has handed out.

        Raises:
            ConnectFailed: It cannot be used: a stock tracker passes on whatever a board has said.
        """
        if not (is_word(host) and is_word(match_key)):
            raise ConnectFailed(
                str(self.tracker), "queue", f"address or match key of a board at {host[:40]!r} is not one"
            )
        token = self._token
        if token is None and self._extensions:
            token = find_secret(Address(host, port, self.tracker.key))
        self.address = Address(host, port, self.tracker.key)
        self.key = ClientKey(match_key, self._session_timeout, token, self._extensions, self.key.limits)

    def _note_failure(self, error: ConnectFailed) -> None:
        """Count a board that could not be had; raise when it is enough."""
        self._failed += 1
        self._wrong_keys += isinstance(error, KeyMismatch)
        if self._failed >= self._max_retry or self._wrong_keys >= _WRONG_KEYS:
            times = "once" if self._failed == 1 else f"{self._failed} times"
            text = f"a board {self.tracker.key!r} of {self.tracker} was tried {times} and could not be used"
            seen = error.seen.replace(self.key.key, self.tracker.key)  # never the match key, which is a ticket
            raise type(error)(error.address, error.phase, f"{text}; the last time: {seen}") from None

    def open(self, deadline: Deadline, guard: Guard) -> tuple[Link, KeyText]:
        """Ask, wait, and open the session; ``deadline`` holds for all of it."""
        self._failed = self._wrong_keys = 0
        while True:
            flow, waiting = self._ask()
            try:
                found = converse(self.tracker, flow, deadline, guard, waiting.no_word)
            finally:
                waiting.over = True
            try:
                self._aim(*found)
                return super().open(_sooner(deadline, f"connect to {self.address}"), guard)
            except ConnectFailed as error:
                self._note_failure(error)

    async def open_awaiting(self, deadline: Deadline) -> tuple[Any, KeyText]:
        """Do as :meth:`open`, awaited."""
        self._failed = self._wrong_keys = 0
        while True:
            flow, waiting = self._ask()
            try:
                found = await converse_awaiting(self.tracker, flow, deadline)
            finally:
                waiting.over = True
            try:
                self._aim(*found)
                return await super().open_awaiting(_sooner(deadline, f"connect to {self.address}"))
            except ConnectFailed as error:
                self._note_failure(error)


def _sooner(deadline: Deadline, what: str) -> Deadline:
    """Return the limit for opening a connection: a board must answer in time, however long one may wait for it."""
    return Deadline(min(OPEN_SECONDS, deadline.left()), what)


async def converse_awaiting(tracker: Address, flow: Flow, deadline: Deadline) -> Any:
    """Perform one exchange with a tracker over a connection of its own, awaited."""
    link = await TrackerLink.open(tracker, _sooner(deadline, f"connect to {tracker}"))
    try:
        return await link.run(flow, None if deadline.at is None else deadline.left())
    except asyncio.TimeoutError:
        raise deadline.exceeded() from None
    finally:
        link.close()
