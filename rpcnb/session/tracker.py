"""Asking a tracker for boards: :func:`connect_tracker`, and sessions with what it hands out.

::

    tracker = rpcnb.connect_tracker("farm:9190")
    print(tracker.text_summary())
    with tracker.request("rpi", session_timeout=60) as session:
        session.fn.demo.add(1, 2)

Every question uses a connection of its own, so a tracker that was started again is no trouble, and giving up (Ctrl-C, a
time limit) leaves the queue at once.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import socket
import sys
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from rpcnb.errors import ConnectFailed, KeyMismatch, SessionLost, SessionTimeout
from rpcnb.net.address import Address, parse_address, show_address
from rpcnb.net.dial import ClientKey
from rpcnb.net.interrupt import Guard
from rpcnb.net.link import Deadline
from rpcnb.net.runfiles import token_for
from rpcnb.net.trackerlink import TrackerLink, converse
from rpcnb.protocol.tracker import ask_summary, request_board
from rpcnb.session.lanes import OPEN_SECONDS, Dialer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rpcnb.net.link import Link
    from rpcnb.protocol.handshake import KeyText
    from rpcnb.protocol.tracker import Flow
    from rpcnb.session.aio import AsyncSession
    from rpcnb.session.session import Session

__all__ = [
    "AsyncTrackerSession",
    "TrackedDialer",
    "TrackerSession",
    "connect_tracker",
    "connect_tracker_async",
    "known_trackers",
    "places_in_queues",
]

T = TypeVar("T")

_SECONDS = 10.0
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
            sys.stderr.write(f"waiting for a board {self._key!r} of {self._where}: {text}\n")


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
    """

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
    ) -> None:
        super().__init__(tracker, ClientKey(tracker.key), constructor, lanes, depth)
        self.tracker = tracker
        self._priority = priority
        self._session_timeout = session_timeout
        self._max_retry = max_retry
        self._token = token
        self._extensions = extensions
        self._told = told
        self._failed = self._wrong_keys = 0
        _askers.add(self)

    def _ask(self) -> tuple[Flow, _Waiting]:
        waiting = _Waiting(self.tracker.key, self.tracker, self._told)
        told, user = (waiting.place, _user()) if self._extensions else (None, "")
        return request_board(self.tracker.key, user, self._priority, told), waiting

    def _aim(self, host: str, port: int, match_key: str) -> None:
        """Take what the tracker has handed out."""
        token = token_for(host, port, self.tracker.key, self._token)
        self.address = Address(host, port, self.tracker.key)
        self.key = ClientKey(match_key, self._session_timeout, token, self._extensions)

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
                self._aim(*converse(self.tracker, flow, deadline, guard, waiting.no_word))
            finally:
                waiting.over = True
            try:
                return super().open(_sooner(deadline, f"connect to {self.address}"), guard)
            except ConnectFailed as error:
                self._note_failure(error)

    async def open_awaiting(self, deadline: Deadline) -> tuple[Any, KeyText]:
        """Do as :meth:`open`, awaited."""
        self._failed = self._wrong_keys = 0
        while True:
            flow, waiting = self._ask()
            try:
                self._aim(*await _converse_awaiting(self.tracker, flow, deadline))
            finally:
                waiting.over = True
            try:
                return await super().open_awaiting(_sooner(deadline, f"connect to {self.address}"))
            except ConnectFailed as error:
                self._note_failure(error)


def _sooner(deadline: Deadline, what: str) -> Deadline:
    """Return the limit for opening a connection: a board must answer in time, however long one may wait for it."""
    return Deadline(min(OPEN_SECONDS, deadline.left()), what)


async def _converse_awaiting(tracker: Address, flow: Flow, deadline: Deadline) -> Any:
    link = await TrackerLink.open(tracker, _sooner(deadline, f"connect to {tracker}"))
    try:
        return await link.run(flow, None if deadline.at is None else deadline.left())
    except asyncio.TimeoutError:
        raise deadline.exceeded() from None
    finally:
        link.close()


class _TrackerSessionBase:
    """What the blocking and the awaited tracker session share.

    Attributes:
        address: Of the tracker.
    """

    def __init__(self, address: Address, extensions: bool = True) -> None:
        self.address = self.tracker = address
        self._extensions = extensions
        _askers.add(self)

    def _dialer(
        self,
        key: str,
        priority: float,
        session_timeout: float,
        max_retry: int,
        session_constructor_args: Sequence[Any] | None,
        token: str | None,
        told: Callable[[int, int], object] | None,
        lanes: int,
    ) -> TrackedDialer:
        where = Address(self.address.host, self.address.port, key, "tracker")
        constructor = tuple(session_constructor_args or ())
        return TrackedDialer(
            where, priority, session_timeout, max_retry, constructor, token, self._extensions, told, lanes
        )

    def close(self) -> None:
        """Do nothing: no connection is kept. For TVM's users."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {show_address(self.address.host, self.address.port)}>"


class TrackerSession(_TrackerSessionBase):
    """A tracker to ask; made by :func:`connect_tracker`. Safe to use from many threads."""

    def summary(self, *, timeout: float | None = _SECONDS) -> dict[str, Any]:
        """Return the state of all queues and boards.

        Returns:
            ``queue_info``: by key the numbers ``free`` (boards) and ``pending`` (requests that wait);
            ``server_info``: ``key`` and ``addr`` of every server. An rpcnb tracker adds ``boards``: for each
            connection that offers some, ``key`` (a list), ``addr``, ``state`` (``free``, ``busy``, ``unhealthy``),
            ``free`` (how many sessions), ``holders`` (``name``, ``key``, ``since`` in seconds) and ``rpcnb`` (what an
            rpcnb server says of itself: ``instance``, and of each of its ``sessions`` the ``peer`` and the ``limit``
            in seconds).

        Raises:
            ConnectFailed: There is no tracker.
        """
        deadline = Deadline(timeout, f"summary of {self.address}")
        with Guard() as guard:
            found: dict[str, Any] = converse(self.address, ask_summary(self._extensions), deadline, guard)
        return found

    def text_summary(self, *, timeout: float | None = _SECONDS) -> str:
        """Return the summary as tables to read."""
        from rpcnb.session.devices import show_devices

        return show_devices(self.summary(timeout=timeout))

    def request(
        self,
        key: str,
        priority: float = 1,
        session_timeout: float = 0,
        max_retry: int = 5,
        session_constructor_args: Sequence[Any] | None = None,
        *,
        token: str | None = None,
        timeout: float | None = None,
        told: Callable[[int, int], object] | None = None,
        lanes: int = 3,
    ) -> Session:
        """Wait for a board and open a session with it. Ctrl-C leaves the queue.

        Args:
            key: Kind of board.
            priority: Requests of higher priority are served first.
            session_timeout: Seconds after which the board ends the session; 0 for never.
            max_retry: Boards to try before giving up.
            session_constructor_args: As of :func:`rpcnb.connect`.
            token: The boards' token, if they want one.
            timeout: Seconds for everything, waiting included; None for as long as it takes.
            told: Called with the place in the queue (from 1) and its length whenever the place changes; by default it
                is said on standard error (not with ``RPCNB_NONINTERACTIVE=1``). Stock trackers do not tell it.
            lanes: As of :func:`rpcnb.connect`.

        Raises:
            ConnectFailed: There is no tracker, or none of the boards could be used; KeyMismatch if the token is wrong.
            DeadlineExceeded: No board was free in time.
        """
        from rpcnb.session.opening import open_session

        dialer = self._dialer(key, priority, session_timeout, max_retry, session_constructor_args, token, told, lanes)
        return open_session(dialer, key, Deadline(timeout, f"request a board {key!r} of {self.address}"))

    def request_and_run(
        self,
        key: str,
        func: Callable[[Session], T],
        priority: float = 1,
        session_timeout: float = 0,
        max_retry: int = 2,
        **options: Any,
    ) -> T:
        """Request a board, call ``func`` with the session, and close it; again if the board fails in between.

        Args:
            key: Kind of board.
            func: What to do; it may be called up to ``max_retry`` times.
            priority: As of :meth:`request`.
            session_timeout: Likewise; a session that ends for it is not tried again.
            max_retry: Boards to try.
            options: Further ones of :meth:`request`.

        Raises:
            SessionLost: The last board was lost too; or what :meth:`request` and ``func`` raise.
        """
        for left in range(max_retry - 1, -1, -1):
            with self.request(key, priority, session_timeout, **options) as session:
                try:
                    return func(session)
                except SessionTimeout:
                    raise
                except SessionLost:
                    if not left:
                        raise
        raise ValueError(f"expected max_retry of at least 1, got {max_retry}")


class AsyncTrackerSession(_TrackerSessionBase):
    """A tracker to ask from coroutines; made by :func:`connect_tracker_async`. The methods of the blocking twin."""

    async def summary(self, *, timeout: float | None = _SECONDS) -> dict[str, Any]:
        """Return the state of all queues and boards; as :meth:`TrackerSession.summary`."""
        deadline = Deadline(timeout, f"summary of {self.address}")
        found: dict[str, Any] = await _converse_awaiting(self.address, ask_summary(self._extensions), deadline)
        return found

    async def text_summary(self, *, timeout: float | None = _SECONDS) -> str:
        """Return the summary as tables to read."""
        from rpcnb.session.devices import show_devices

        return show_devices(await self.summary(timeout=timeout))

    async def request(
        self,
        key: str,
        priority: float = 1,
        session_timeout: float = 0,
        max_retry: int = 5,
        session_constructor_args: Sequence[Any] | None = None,
        *,
        token: str | None = None,
        timeout: float | None = None,
        told: Callable[[int, int], object] | None = None,
        lanes: int = 3,
    ) -> AsyncSession:
        """Wait for a board and open a session; as :meth:`TrackerSession.request`. Cancelling leaves the queue."""
        from rpcnb.session.opening import open_session_async

        dialer = self._dialer(key, priority, session_timeout, max_retry, session_constructor_args, token, told, lanes)
        return await open_session_async(dialer, key, Deadline(timeout, f"request a board {key!r} of {self.address}"))

    async def request_and_run(
        self,
        key: str,
        func: Callable[[AsyncSession], Any],
        priority: float = 1,
        session_timeout: float = 0,
        max_retry: int = 2,
        **options: Any,
    ) -> Any:
        """Request a board and await ``func(session)``; as :meth:`TrackerSession.request_and_run`."""
        for left in range(max_retry - 1, -1, -1):
            async with await self.request(key, priority, session_timeout, **options) as session:
                try:
                    return await func(session)
                except SessionTimeout:
                    raise
                except SessionLost:
                    if not left:
                        raise
        raise ValueError(f"expected max_retry of at least 1, got {max_retry}")


def _address(url: str, port: int) -> Address:
    found = parse_address(url if "://" in url else f"tracker://{url}", port)
    if found.scheme != "tracker":
        raise ValueError(f"address {url!r} is not a tracker's; expected host:port or tracker://host:port")
    return Address(found.host, found.port, found.key, "tracker")


def connect_tracker(
    url: str, port: int = 9190, *, extensions: bool = True, timeout: float | None = _SECONDS
) -> TrackerSession:
    """Reach a tracker, rpcnb's or stock TVM's.

    Args:
        url: Host, ``host:port`` or ``tracker://host:port``.
        port: Port, if the URL names none.
        extensions: Offer rpcnb's extensions; False makes us stock to the byte.
        timeout: Seconds to find out that there is one; None for no limit.

    Raises:
        ConnectFailed: There is none; NotAnRpcServer if something else listens there.
        ValueError: ``url`` is not an address.
    """
    session = TrackerSession(_address(url, port), extensions)
    session.summary(timeout=timeout)
    return session


async def connect_tracker_async(
    url: str, port: int = 9190, *, extensions: bool = True, timeout: float | None = _SECONDS
) -> AsyncTrackerSession:
    """Reach a tracker from coroutines; arguments and errors as :func:`connect_tracker`."""
    session = AsyncTrackerSession(_address(url, port), extensions)
    await session.summary(timeout=timeout)
    return session
