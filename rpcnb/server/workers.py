"""Threads that run plain functions, so that a slow one delays nobody else.

A worker takes a whole session over (a *hot worker*: it reads, runs and replies on the socket itself) and gives it
back when the session has been quiet for a moment; a hop to a pool for every call would cost five times as much.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WorkerPool"]

log = logging.getLogger(__name__)

_IDLE_SECONDS = 10.0  # a surplus thread is kept this long: threads that exit at once churn (performance.md 7)


class WorkerPool:
    """Runs jobs in daemon threads, started as needed.

    Args:
        name: Prefix of the threads' names.
        running: Threads at most; further jobs wait.
        waiting: Of these, how many may wait for a session's next call.
        idle: Seconds for which a thread that has nothing to do is kept; None: as long as the pool.
    """

    def __init__(self, name: str, running: int = 256, waiting: int = 32, idle: float | None = _IDLE_SECONDS) -> None:
        self._name = name
        self._owner = os.getpid()
        self._limit = running
        self._idle_seconds = idle
        self._waiting_limit = waiting
        self._waiting = 0
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[Callable[[], None] | None]] = []
        self._backlog: deque[Callable[[], None]] = deque()
        self._threads: set[threading.Thread] = set()
        self._written_off = 0
        self._closed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` in a worker."""
        with self._lock:
            if self._idle:
                self._idle.pop().put(job)
                return
            if len(self._threads) >= self._limit + self._written_off:
                self._backlog.append(job)
                return
            thread = threading.Thread(target=self._run, args=(job,), name=f"{self._name}-worker", daemon=True)
            self._threads.add(thread)
        try:
            thread.start()
        except BaseException:  # no thread could be made: its place is free again
            with self._lock:
                self._threads.discard(thread)
            raise

    def write_off(self, count: int) -> None:
        """Let so many threads take no places: what they run goes on after its client has gone, perhaps for ever."""
        with self._lock:
            self._written_off = count

    def may_wait(self) -> bool:
        """Take one of the places for waiting workers; give it back with :meth:`waited`."""
        with self._lock:
            if self._waiting >= self._waiting_limit:
                return False
            self._waiting += 1
            return True

    def waited(self) -> None:
        """Give back the place of a waiting worker."""
        with self._lock:
            self._waiting -= 1

    def _run(self, job: Callable[[], None] | None) -> None:
        inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        while job is not None:
            try:
                job()
            except BaseException:  # the thread has a place to give back, and perhaps a backlog to work off
                log.exception("a worker's job failed")
            if os.getpid() != self._owner:  # a function has forked, and its child comes to its end here
                os._exit(0)
            job = self._next(inbox)
        with self._lock:
            self._threads.discard(threading.current_thread())

    def _next(self, inbox: queue.SimpleQueue[Callable[[], None] | None]) -> Callable[[], None] | None:
        with self._lock:
            if self._backlog:
                return self._backlog.popleft()
            if self._closed:
                return None
            self._idle.append(inbox)
        try:
            return inbox.get(timeout=self._idle_seconds)
        except queue.Empty:
            with self._lock:
                if inbox in self._idle:
                    self._idle.remove(inbox)
                    return None
            return inbox.get()  # a job was put just now

    def close(self, timeout: float) -> None:
        """End idle threads; wait up to ``timeout`` seconds for running ones."""
        with self._lock:
            self._closed = True
            for inbox in self._idle:
                inbox.put(None)
            self._idle.clear()
            threads = list(self._threads)
        until = time.monotonic() + timeout
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
