"""The process's I/O thread: finishes what blocked callers left behind.

A blocking caller owns its link's socket while it waits. When it leaves and replies are still owed (calls that were
only submitted, an interrupted copy), the link is adopted here until nothing is owed. The thread also sends the frees
that finalizers have noted, within a tenth of a second, and closes sessions that were dropped. It starts with the
first link that needs it and is a daemon.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rpcnb.net.link import Link

__all__ = ["IO_THREAD", "IOThread"]

log = logging.getLogger(__name__)

_FLUSH_EVERY = 0.1


class IOThread:
    """Adopts links; one per process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._arrivals: deque[Link] = deque()
        self.watched: weakref.WeakSet[Link] = weakref.WeakSet()  # links whose finalizers may leave work
        self._wake: int = -1

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            reader, self._wake = os.pipe()
            os.set_blocking(reader, False)
            os.set_blocking(self._wake, False)
            self._thread = threading.Thread(target=self._run, args=(reader,), name="rpcnb-io", daemon=True)
            self._thread.start()

    def adopt(self, link: Link) -> None:
        """Drive ``link`` until nothing is owed or a blocking caller takes it back."""
        self._start()
        self._arrivals.append(link)
        self._signal()

    def watch(self, link: Link) -> None:
        """Look after the finalizers of ``link``."""
        self._start()
        self.watched.add(link)
        if len(self.watched) == 1:
            self._signal()  # it may be sleeping without end

    def _signal(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake, b"\0")

    def _run(self, wake: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(wake, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(_FLUSH_EVERY if self.watched else None):
                    if key.data is None:
                        with contextlib.suppress(BlockingIOError):
                            os.read(wake, 4096)
                    else:
                        selector.unregister(key.fileobj)
                        self._drive(selector, key.data)
                while self._arrivals:
                    self._drive(selector, self._arrivals.popleft())
                for link in list(self.watched):
                    try:
                        link.housekeeping()
                    except Exception:  # noqa: PERF203  # one link's trouble is not another's
                        log.exception("housekeeping of %s failed", link.peer)

    def _drive(self, selector: selectors.BaseSelector, link: Link) -> None:
        """Move bytes of an adopted link, and watch it again if more is to come."""
        events = link.step_in_background()
        if events and link.wire.sock.fileno() >= 0:
            with contextlib.suppress(KeyError):
                selector.unregister(link.wire.sock)
            with contextlib.suppress(OSError, ValueError):
                selector.register(link.wire.sock, events, link)


def _new_thread() -> None:
    """Begin anew in a forked child: threads do not survive a fork."""
    global IO_THREAD
    IO_THREAD = IOThread()


IO_THREAD = IOThread()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_thread)
