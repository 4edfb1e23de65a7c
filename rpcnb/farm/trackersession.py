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

import contextlib
import os
from typing import TYPE_CHECKING, Any, TypeVar

from rpcnb.client.opening import connect, connect_async, open_session, open_session_async
from rpcnb.errors import ConnectFailed, DeadlineExceeded, SessionLost, SessionTimeout
from rpcnb.farm.devices import show_devices
from rpcnb.farm.dialer import TrackedDialer, converse_awaiting, note_asker
from rpcnb.farm.messages import ask_summary
from rpcnb.farm.summary import read_port
from rpcnb.farm.trackerlink import converse
from rpcnb.link.interrupt import Guard
from rpcnb.transport.address import Address, parse_address, show_address
from rpcnb.transport.deadline import Deadline
from rpcnb.values import StaysHere

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rpcnb.client.aio import AsyncSession
    from rpcnb.client.jobs import AsyncJob, Job
    from rpcnb.client.session import Session

__all__ = [
    "AsyncTrackerSession",
    "TrackerSession",
    "connect_tracker",
    "connect_tracker_async",
    "tracker_of_environment",
]

T = TypeVar("T")

_SECONDS = 10.0


class _TrackerSessionBase(StaysHere):
    """What the blocking and the awaited tracker session share.

    Attributes:
        address: Of the tracker.
    """

    def __init__(self, address: Address, extensions: bool = True) -> None:
        self.address = self.tracker = address
        self._extensions = extensions
        note_asker(self)

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

    @staticmethod
    def _boards(summary: dict[str, Any], key: str) -> list[tuple[str, int]]:
        """Return where the boards of a key are."""
        served = f"server:{key}"
        return [server["addr"] for server in summary["server_info"] if server["key"] == served and server["addr"]]

    def _no_job(self, key: str, name: str, count: int) -> LookupError:
        boards = "1 board" if count == 1 else f"{count} boards"
        return LookupError(f"none of the {boards} {key!r} of {self.address} has a job {name!r}, or the token is wrong")

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
            in seconds). If more is known than fits into an answer, ``left_out`` says how many entries of each there are
            besides. What boards say of themselves in another shape than this is left out.

        Raises:
            ConnectFailed: There is no tracker.
        """
        deadline = Deadline(timeout, f"summary of {self.address}")
        with Guard() as guard:
            found: dict[str, Any] = converse(self.address, ask_summary(self._extensions), deadline, guard)
        return found

    def text_summary(self, *, timeout: float | None = _SECONDS) -> str:
        """Return the summary as tables to read."""
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
        dialer = self._dialer(key, priority, session_timeout, max_retry, session_constructor_args, token, told, lanes)
        return open_session(dialer, key, Deadline(timeout, f"request a board {key!r} of {self.address}"))

    def find_job(self, key: str, name: str, *, token: str | None = None, timeout: float | None = _SECONDS) -> Job:
        """Find a detached job again, on whichever board of a key it runs or ran: also one that it keeps busy.

        The job has a session of its own, which can do nothing else: ``job.session``, to be closed when it is done with.

        Args:
            key: Kind of board.
            name: Of the job.
            token: The boards' token, if they want one.
            timeout: Seconds for each board.

        Raises:
            LookupError: No board that can be reached has such a job.
            ConnectFailed: There is no tracker.
        """
        boards = self._boards(self.summary(timeout=timeout), key)
        for host, port in boards:
            with contextlib.suppress(ConnectFailed, DeadlineExceeded):
                session = connect(host, port, key, token=token, timeout=timeout)
                try:
                    return session.jobs[name]
                except KeyError:
                    session.close()
        raise self._no_job(key, name, len(boards))

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
        found: dict[str, Any] = await converse_awaiting(self.address, ask_summary(self._extensions), deadline)
        return found

    async def text_summary(self, *, timeout: float | None = _SECONDS) -> str:
        """Return the summary as tables to read."""
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
        dialer = self._dialer(key, priority, session_timeout, max_retry, session_constructor_args, token, told, lanes)
        return await open_session_async(dialer, key, Deadline(timeout, f"request a board {key!r} of {self.address}"))

    async def find_job(
        self, key: str, name: str, *, token: str | None = None, timeout: float | None = _SECONDS
    ) -> AsyncJob:
        """Find a detached job again; as :meth:`TrackerSession.find_job`."""
        boards = self._boards(await self.summary(timeout=timeout), key)
        for host, port in boards:
            with contextlib.suppress(ConnectFailed, DeadlineExceeded):
                session = await connect_async(host, port, key, token=token, timeout=timeout)
                try:
                    return await session.jobs.get(name)
                except KeyError:
                    await session.close()
        raise self._no_job(key, name, len(boards))

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


def tracker_of_environment() -> tuple[str, int]:
    """Return the tracker that TVM's tools ask by default: ``TVM_TRACKER_HOST`` and ``TVM_TRACKER_PORT``.

    Raises:
        ValueError: The port is none.
    """
    port = os.environ.get("TVM_TRACKER_PORT", "9190")
    try:
        return os.environ.get("TVM_TRACKER_HOST") or "127.0.0.1", read_port(port)
    except ValueError:
        raise ValueError(f"expected a port in TVM_TRACKER_PORT, got {port!r}") from None


def _address(url: str | None, port: int) -> Address:
    if url is None:
        return Address(*tracker_of_environment(), "", "tracker")
    found = parse_address(url if "://" in url else f"tracker://{url}", port)
    if found.scheme != "tracker":
        raise ValueError(f"address {url!r} is not a tracker's; expected host:port or tracker://host:port")
    return Address(found.host, found.port, found.key, "tracker")


def connect_tracker(
    url: str | None = None, port: int = 9190, *, extensions: bool = True, timeout: float | None = _SECONDS
) -> TrackerSession:
    """Reach a tracker, rpcnb's or stock TVM's.

    Args:
        url: Host, ``host:port`` or ``tracker://host:port``; by default what ``TVM_TRACKER_HOST`` and
            ``TVM_TRACKER_PORT`` say, else this machine's.
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
    url: str | None = None, port: int = 9190, *, extensions: bool = True, timeout: float | None = _SECONDS
) -> AsyncTrackerSession:
    """Reach a tracker from coroutines; arguments and errors as :func:`connect_tracker`."""
    session = AsyncTrackerSession(_address(url, port), extensions)
    await session.summary(timeout=timeout)
    return session
