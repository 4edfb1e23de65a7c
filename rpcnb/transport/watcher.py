"""Telling the loop which connections wait for input, from any thread, cheaply.

A worker that gives a session back to the loop must not pay for waking the loop. On Linux the connections sit in an
epoll of their own, one-shot, and the loop watches that epoll: re-arming is one system call and wakes nobody
(performance.md 7, variant c2). Elsewhere the loop is asked to watch the socket itself.
"""

from __future__ import annotations

import contextlib
import select
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from tornado.ioloop import IOLoop

__all__ = ["EpollWatcher", "LoopWatcher", "make_watcher"]

READ, WRITE = 1, 2
_BATCH = 128


class EpollWatcher:
    """Connections in an epoll that the loop watches.

    ``add`` and ``remove`` belong to the loop's thread; ``arm`` may be called by whoever owns the connection.
    """

    def __init__(self, io_loop: IOLoop) -> None:
        self._loop = io_loop
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[], None]] = {}
        io_loop.add_handler(self._epoll.fileno(), self._on_event, io_loop.READ)

    def add(self, fd: int, ready: Callable[[], None]) -> None:
        """Watch ``fd`` for input; ``ready`` is called once per arming, on the loop."""
        self._ready[fd] = ready
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT)

    def arm(self, fd: int, events: int) -> None:
        """Watch once more; 0 waits only for the peer's end."""
        mask = select.EPOLLONESHOT | select.EPOLLRDHUP
        if events & READ:
            mask |= select.EPOLLIN
        if events & WRITE:
            mask |= select.EPOLLOUT
        self._epoll.modify(fd, mask)

    def remove(self, fd: int) -> None:
        """Forget ``fd``; before it is closed, as its number will be another's."""
        if self._ready.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # somebody else has closed it: a function that closes all there are
                self._epoll.unregister(fd)

    def _on_event(self, fd: Any, events: int) -> None:
        for number, _ in self._epoll.poll(0, _BATCH):
            ready = self._ready.get(number)
            if ready is not None:
                ready()

    def forked(self) -> None:
        """In a forked child: let go of the epoll, which both processes share."""
        self._ready.clear()
        self._epoll.close()

    def close(self) -> None:
        """Stop watching everything."""
        self._loop.remove_handler(self._epoll.fileno())
        self._epoll.close()


class LoopWatcher:
    """The same through the loop's own handlers, for systems without epoll."""

    def __init__(self, io_loop: IOLoop) -> None:
        self._loop = io_loop
        self._ready: dict[int, Callable[[], None]] = {}
        self._armed: set[int] = set()

    def add(self, fd: int, ready: Callable[[], None]) -> None:
        """Watch ``fd`` for input; ``ready`` is called once per arming, on the loop."""
        self._ready[fd] = ready
        self._arm(fd, READ)

    def arm(self, fd: int, events: int) -> None:
        """Watch once more."""
        self._loop.asyncio_loop.call_soon_threadsafe(self._arm, fd, events)

    def _arm(self, fd: int, events: int) -> None:
        if fd not in self._ready:
            return
        mask = (self._loop.READ if events & READ else 0) | (self._loop.WRITE if events & WRITE else 0)
        if fd in self._armed:
            self._loop.update_handler(fd, mask | self._loop.ERROR)
        else:
            self._armed.add(fd)
            self._loop.add_handler(fd, self._on_event, mask | self._loop.ERROR)

    def _on_event(self, fd: Any, events: int) -> None:
        self._disarm(fd)
        self._ready[fd]()

    def _disarm(self, fd: int) -> None:
        if fd in self._armed:
            self._armed.discard(fd)
            self._loop.remove_handler(fd)

    def remove(self, fd: int) -> None:
        """Forget ``fd``."""
        self._disarm(fd)
        self._ready.pop(fd, None)

    def forked(self) -> None:
        """In a forked child: forget everything."""
        self._ready.clear()

    def close(self) -> None:
        """Stop watching everything."""
        for fd in list(self._armed):
            self._disarm(fd)


def make_watcher(io_loop: IOLoop) -> EpollWatcher | LoopWatcher:
    """Return the cheapest watcher that this system has."""
    return EpollWatcher(io_loop) if hasattr(select, "epoll") else LoopWatcher(io_loop)
