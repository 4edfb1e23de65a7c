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
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rpcnb.transport import forks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Job", "MainThread", "Runner", "Worker"]

log = logging.getLogger(__name__)

_STEPS = 1000  # of a loop, in which an exception that another thread has set arrives
_AGAIN = 0.2  # seconds after which a signal that was not noticed is sent again


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
        self._shields = 0  # that the job is in
        self._held = False
        self._worker = 0  # the thread that runs the job
        self._closed = False

    def submit(self, job: Job) -> None:
        """Run ``job`` when those before it have ended."""
        self._jobs.put(job)

    def interrupt(self, job: Job) -> None:
        """Raise KeyboardInterrupt in ``job`` if it is the one that runs; from any thread."""
        with self._lock:
            if self._current is job:
                self._strike(job)

    def _strike(self, job: Job) -> None:
        if self._shields:
            self._held = True
        else:
            self._raise(job)

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Let no interrupt strike inside: what sends a cell's output must not be torn. It strikes at the end."""
        if threading.get_ident() != self._worker:  # a thread of the cell's, which no interrupt is meant for
            yield
            return
        with self._lock:
            self._held = self._take_back() or self._held
            self._shields += 1
        try:
            yield
        finally:
            with self._lock:
                self._shields -= 1
                held = self._held and not self._shields
                if held:
                    self._held = False
            if held:
                raise KeyboardInterrupt

    def _raise(self, job: Job) -> None:
        raise NotImplementedError

    def _perform(self, job: Job) -> None:
        begun, over = self._closed, False
        self._worker = threading.get_ident()
        while not over:
            try:
                if not begun:
                    begun = True
                    self._current = job
                    job.run()
                self._settle()
                over = True
            except KeyboardInterrupt:  # noqa: PERF203  # it must come to its end
                log.debug("an interrupt came when its cell had just ended")
            except BaseException:
                log.exception("a remote cell could not be run")
        try:
            job.finish()
        except BaseException:  # the next cell is another client's
            log.exception("a remote cell's outcome could not be told")

    def _settle(self) -> None:
        """Let no interrupt come from now on."""
        with self._lock:
            self._current = None
            self._take_back()
            self._shields, self._held = 0, False

    def _take_back(self) -> bool:
        """Take an interrupt back that is on its way; False if there is none. In the job's thread, with the lock."""
        return False

    def close(self) -> None:
        """End what runs, and begin nothing more: what waits is answered as cancelled."""
        self._closed = True
        self._jobs.put(None)
        with self._lock:
            if self._current is not None:
                self._strike(self._current)


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
        forks.tell(self)
        forks.hold_back([signal.SIGUSR1])
        threading.Thread(target=await_end, name="rpcnb-end", daemon=True).start()
        try:
            while (job := self._jobs.get()) is not None:
                self._perform(job)
        finally:
            signal.signal(signal.SIGUSR1, before)

    def forked(self) -> None:
        """In a child that a cell has forked: the signal is not ours there."""
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    def _raise(self, job: Job) -> None:
        self._wanted = job
        self._signal()

    def _signal(self) -> None:
        """Send the signal; again until it is noticed: one that slips in just before a system call does not end it."""
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        timer = threading.Timer(_AGAIN, self._signal_again)
        timer.daemon = True
        timer.start()

    def _signal_again(self) -> None:
        with self._lock:
            if self._wanted is not None and self._wanted is self._current:
                self._signal()

    def _on_signal(self, *_: Any) -> None:
        wanted, self._wanted = self._wanted, None
        if wanted is not None and wanted is self._current:  # else it has ended, or has been taken back
            raise KeyboardInterrupt

    def _take_back(self) -> bool:
        wanted, self._wanted = self._wanted, None
        return wanted is not None


class Worker(Runner):
    """Runs cells in a thread of its own, started with the first one."""

    def __init__(self) -> None:
        super().__init__()
        self._thread: threading.Thread | None = None
        self._sent = False

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
        assert self._thread is not None
        self._sent = True
        identity = ctypes.c_ulong(self._thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(KeyboardInterrupt))

    def _take_back(self) -> bool:
        # Setting no exception instead would be simpler, but leaves Python 3.11 signalled for ever: a traced thread
        # (coverage, a debugger) then never gets past its next function's first line.
        if not self._sent:
            return False
        self._sent = False
        try:
            for _ in range(_STEPS):
                pass
        except KeyboardInterrupt:
            return True
        return False  # it had arrived before
