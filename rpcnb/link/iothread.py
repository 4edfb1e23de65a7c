"""The process's I/O thread: finishes what blocked callers left behind.

A blocking caller owns its link's socket while it waits. When it leaves and replies are still owed (calls that were
only submitted, an interrupted copy), the link is adopted here until nothing is owed. The thread also sends the frees
that finalizers have noted, within a tenth of a second, and closes sessions that were dropped. It starts with the
first link that needs it and is a daemon.
"""

from __future__ import annotations

import atexit
import contextlib
import heapq
import logging
import os
import selectors
import threading
import time
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.link.wire import Wire

__all__ = ["IO_THREAD", "IOThread", "Timer"]

log = logging.getLogger(__name__)

_FLUSH_EVERY = 0.1


class Adopted(Protocol):
    """A link, as this thread drives it."""

    wire: Wire

    def step_in_background(self) -> int:
        """Move bytes if nobody pumps; returns the selector events to wait for, 0 to let the link go."""

    def housekeeping(self) -> None:
        """Look after the session, and send the frees that finalizers noted."""


class Closable(Protocol):
    """What can be closed."""

    def close(self) -> None:
        """End it."""


class Timer:
    """Something the I/O thread does at a time, unless it is cancelled."""

    __slots__ = ("at", "function")

    def __init__(self, at: float, function: Callable[[], object]) -> None:
        self.at = at
        self.function: Callable[[], object] | None = function

    def cancel(self) -> None:
        """Forget it."""
        self.function = None

    def __lt__(self, other: Timer) -> bool:
        return self.at < other.at


class IOThread:
    """Adopts links; one per process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._arrivals: deque[Adopted] = deque()
        self.watched: weakref.WeakSet[Adopted] = weakref.WeakSet()  # links whose finalizers may leave work
        # Links whose sessions were dropped; finalizers append here, without a lock and without I/O.
        self.dropped: deque[Closable] = deque()
        self._calls: deque[Callable[[], object]] = deque()
        self._timers: list[Timer] = []
        self._wake: int = -1
        self._next_look = 0.0  # when the links are looked after again
        self._kept: list[Adopted] = []

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            reader, self._wake = os.pipe()
            os.set_blocking(reader, False)
            os.set_blocking(self._wake, False)
            self._thread = threading.Thread(target=self._run, args=(reader,), name="rpcnb-io", daemon=True)
            self._thread.start()

    def adopt(self, link: Adopted) -> None:
        """Drive ``link`` until nothing is owed or a blocking caller takes it back."""
        self._start()
        self._arrivals.append(link)
        self._signal()

    def call(self, function: Callable[[], object]) -> None:
        """Call ``function`` in this thread, soon."""
        self._start()
        self._calls.append(function)
        self._signal()

    def call_at(self, at: float, function: Callable[[], object]) -> Timer:
        """Call ``function`` when ``time.monotonic()`` is ``at``."""
        timer = Timer(at, function)
        self.call(lambda: heapq.heappush(self._timers, timer))
        return timer

    def is_current(self) -> bool:
        """Tell whether the caller runs in this thread."""
        return threading.current_thread() is self._thread

    def watch(self, link: Adopted) -> None:
        """Look after the finalizers of ``link``."""
        self._start()
        self.watched.add(link)
        self._signal()  # it may be sleeping without end

    def keep(self) -> None:
        """Hold the links of sessions that nobody closed until the process is over, when its sockets end with it.

        The end of an interpreter drops its objects in no order, without calling what looks after them; a socket that
        is dropped then warns of having been left open. This thread's frame, which is never left, keeps what is here.
        """
        self._kept = self._all_watched()

    def _signal(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake, b"\0")

    def _run(self, wake: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(wake, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(self._patience()):
                    if key.data is None:
                        with contextlib.suppress(BlockingIOError):
                            os.read(wake, 4096)
                    else:
                        self._do(partial(self._drive, selector, key.data, key))
                while self._arrivals:
                    self._do(partial(self._drive, selector, self._arrivals.popleft()))
                while self._calls:
                    self._do(self._calls.popleft())
                while self._timers and self._timers[0].at <= time.monotonic():
                    self._do(heapq.heappop(self._timers).function)
                if self._next_look <= time.monotonic():
                    self._next_look = time.monotonic() + _FLUSH_EVERY
                    self._forget_ended(selector)
                    for link in self._all_watched():
                        self._do(link.housekeeping)
                while self.dropped:
                    self._do(self.dropped.popleft().close)

    @staticmethod
    def _forget_ended(selector: selectors.BaseSelector) -> None:
        """Stop watching links that were closed: their sockets' numbers may be others' by now."""
        for key in list(selector.get_map().values()):
            if key.data is not None and key.data.wire.ended is not None:
                with contextlib.suppress(KeyError, ValueError, OSError):
                    selector.unregister(key.fileobj)

    def _all_watched(self) -> list[Adopted]:
        while True:
            try:
                return list(self.watched)
            except RuntimeError:  # noqa: PERF203  # another thread opened or closed a session meanwhile
                continue

    def _patience(self) -> float | None:
        """Return how long nothing is to be done."""
        looks = self.watched or self.dropped
        seconds = max(0.0, self._next_look - time.monotonic()) if looks else None
        if self._timers:
            left = max(0.0, self._timers[0].at - time.monotonic())
            seconds = left if seconds is None else min(seconds, left)
        return seconds

    @staticmethod
    def _do(function: Callable[[], object] | None) -> None:
        """Call ``function``; one's trouble is not another's."""
        try:
            if function is not None:
                function()
        except Exception:
            log.exception("%s failed in the I/O thread", getattr(function, "__qualname__", function))

    def _drive(self, selector: selectors.BaseSelector, link: Adopted, key: selectors.SelectorKey | None = None) -> None:
        """Move bytes of an adopted link, and watch it further if more may come."""
        events = link.step_in_background()
        if key is not None and events == key.events:
            return
        with contextlib.suppress(KeyError, ValueError):  # closed and replaced meanwhile
            selector.unregister(link.wire.sock if key is None else key.fileobj)
        if events and link.wire.sock.fileno() >= 0:
            with contextlib.suppress(OSError, ValueError):  # another thread closed it just now
                selector.register(link.wire.sock, events, link)


def _new_thread() -> None:
    """Begin anew in a forked child: threads do not survive a fork."""
    global IO_THREAD
    IO_THREAD = IOThread()


IO_THREAD = IOThread()
atexit.register(lambda: IO_THREAD.keep())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_thread)
