"""Where remote cells run, one at a time, and how the stop button reaches them.

``rpcnb serve`` has :class:`MainThread`: a signal to the main thread ends any call, also one that blocks in the
system. A kernel's own server has :class:`Worker`: its cells stop between two bytecodes only. The signal is SIGUSR1, so
that the operator's Ctrl-C stays the end of the server.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import signal
import threading
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Job", "MainThread", "Runner", "Worker"]

log = logging.getLogger(__name__)


class Job(Protocol):
    """One cell, as a runner sees it."""

    def run(self) -> None:
        """Run it; a KeyboardInterrupt may come at any moment."""

    def finish(self) -> None:
        """Answer, undisturbed."""


class Runner:
    """Runs jobs one at a time; the base of both."""

    prompt = False  # an interrupt ends what blocks, too

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._current: Job | None = None

    def submit(self, job: Job) -> None:
        """Run ``job`` when those before it have ended."""
        self._jobs.put(job)

    def interrupt(self, job: Job) -> None:
        """Raise KeyboardInterrupt in ``job`` if it is the one that runs; from any thread."""
        with self._lock:
            if self._current is job:
                self._raise(job)

    def _raise(self, job: Job) -> None:
        raise NotImplementedError

    def _perform(self, job: Job) -> None:
        try:
            self._current = job
            job.run()
        except KeyboardInterrupt:
            log.debug("an interrupt came when its cell had just ended")
        while not self._settled():
            pass
        job.finish()

    def _settled(self) -> bool:
        """Let no interrupt come from now on; False if one came just then."""
        try:
            with self._lock:
                self._current = None
                self._take_back()
            return True
        except KeyboardInterrupt:  # pragma: no cover  # a matter of a microsecond
            return False

    def _take_back(self) -> None:
        """Take back an interrupt that has not arrived."""

    def close(self) -> None:
        """End what runs, and do nothing more."""
        self._jobs.put(None)
        with self._lock:
            if self._current is not None:
                self._raise(self._current)


class MainThread(Runner):
    """Runs cells in the main thread, which has nothing else to do."""

    prompt = True

    def __init__(self) -> None:
        super().__init__()
        self._wanted: Job | None = None

    def run(self, wait: Callable[[], object]) -> None:
        """Run jobs until ``wait``, called in a thread of its own, has returned."""

        def await_end() -> None:
            wait()
            self.close()

        before = signal.signal(signal.SIGUSR1, self._on_signal)
        threading.Thread(target=await_end, name="rpcnb-end", daemon=True).start()
        try:
            while (job := self._jobs.get()) is not None:
                self._perform(job)
        finally:
            signal.signal(signal.SIGUSR1, before)

    def _raise(self, job: Job) -> None:
        self._wanted = job
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _on_signal(self, *_: Any) -> None:
        wanted, self._wanted = self._wanted, None
        if wanted is not None and wanted is self._current:  # else it has ended meanwhile
            raise KeyboardInterrupt


class Worker(Runner):
    """Runs cells in a thread of its own, started with the first one."""

    def __init__(self) -> None:
        super().__init__()
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        """Run ``job`` when those before it have ended."""
        super().submit(job)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rpcnb-cells", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._perform(job)

    def _raise(self, job: Job) -> None:
        _set_exception(self._thread, ctypes.py_object(KeyboardInterrupt))

    def _take_back(self) -> None:
        _set_exception(self._thread, None)


def _set_exception(thread: threading.Thread | None, what: Any) -> None:
    if thread is not None and thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), what)
