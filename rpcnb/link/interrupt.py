"""Waiting that Ctrl-C ends and that loses nothing.

``KeyboardInterrupt`` may strike between any two bytecodes, so also between ``sock.send`` and the line that notes how
much was sent: up to 96 % of interrupts lost such counts when tried. A :class:`Guard` stands around one whole
operation on the main thread. It replaces SIGINT's handler by one that only counts, and that raises only while the
operation waits. Code inside needs no tricks; after each bulk piece it looks at :attr:`Guard.hits`.

Only Python's default handler is replaced, and handlers that merely queue the signal on a loop which the operation
blocks (ipykernel's for cells with ``await``, asyncio's Runner). A foreign handler, ``SIG_IGN`` and other threads are
left alone. In a callback or task that is not the notebook cell's own, ``KeyboardInterrupt`` would end the kernel's
loop: there the guard calls the old handler and raises ``CancelledError``.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the wrapper in `signal` takes 6.5 us a pair, this 0.55 us
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["Guard", "drain", "watch"]

_SIGINT = int(_signal.SIGINT)
_DEFAULT = _signal.default_int_handler
# A signal that slips in just before the system call is noticed at the next tick.
TICK = 0.25
_TICK_MS = int(TICK * 1000)

T = TypeVar("T")
_main = threading.main_thread().ident
_woken: socket.socket | None = None  # where the kernel's wake-up bytes arrive, with `%load_ext rpcnb`


def _after_fork() -> None:
    global _main
    _main = threading.get_ident()
    if isinstance(getattr(_signal.getsignal(_SIGINT), "__self__", None), Guard):
        _signal.signal(_SIGINT, _DEFAULT)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _queues_only(handler: Any) -> bool:
    """Tell whether a handler only posts to the loop that the operation blocks."""
    handler = getattr(handler, "func", handler)  # asyncio.Runner installs a partial
    module = getattr(handler, "__module__", None)
    name = getattr(getattr(handler, "__func__", handler), "__qualname__", "")
    return (module == "ipykernel.ipkernel" and "_cancel_on_sigint" in name) or (
        module == "asyncio.runners" and "_on_sigint" in name
    )


def _in_foreign_task() -> bool:
    """Tell whether KeyboardInterrupt would leave through an event loop: in a callback, or not the cell's own task."""
    asyncio = sys.modules["asyncio"]  # some loop has installed its handler
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return False
    return task is None or "run_cell" not in getattr(task.get_coro(), "__qualname__", "")


def watch(reader: socket.socket | None) -> None:
    """Look at the bytes that signals write, too: of those that came between two calls of a cell with ``await``."""
    global _woken
    _woken = reader


def drain() -> bool:
    """Take these bytes; True if an interrupt was among them."""
    if _woken is None:
        return False
    try:
        return _SIGINT in _woken.recv(4096)
    except (BlockingIOError, OSError):
        return False


class Guard:
    """One operation's protection; a context manager.

    Attributes:
        hits: Interrupts that came while the operation was not waiting.
    """

    __slots__ = ("_old", "_waiting", "hits")

    def __init__(self) -> None:
        self._old: Any = None
        self._waiting = False
        self.hits = 0

    def __enter__(self) -> Guard:
        if threading.get_ident() == _main:
            handler = _signal.getsignal(_SIGINT)
            if handler is _DEFAULT or _queues_only(handler):
                self._old = _signal.signal(_SIGINT, self._on_signal)
                if _woken is not None and handler is not _DEFAULT and drain():
                    self.hits = 1  # it came before this call, and is only queued on the loop that we block
        return self

    def _on_signal(self, signum: int, frame: object) -> None:
        if self._waiting:
            self._waiting = False
            raise KeyboardInterrupt
        self.hits += 1

    def wait(self, waits: Callable[[float], T], seconds: float) -> T:
        """Call ``waits`` with at most ``seconds``; the only place where an interrupt is raised.

        Args:
            waits: Something that blocks for up to the seconds it is given.
            seconds: How long to wait at most; the caller loops, as this also returns at every tick.

        Raises:
            KeyboardInterrupt: The user interrupted.
        """
        if self._old is None:
            return waits(seconds)
        try:
            self._waiting = True
            if self.hits:
                raise KeyboardInterrupt
            return waits(min(seconds, TICK))
        finally:
            self._waiting = False

    def poll(self, poller: Any, seconds: float) -> list[tuple[int, int]]:
        """Poll, as :meth:`wait`; on the path of every call."""
        if self._old is None:
            ready: list[tuple[int, int]] = poller.poll(seconds * 1000)
            return ready
        try:
            self._waiting = True
            if self.hits:
                raise KeyboardInterrupt
            ready = poller.poll(_TICK_MS if seconds >= TICK else seconds * 1000)
            return ready
        finally:
            self._waiting = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if one came; between the pieces of a bulk copy."""
        if self.hits:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        old = self._old
        if old is None:
            return
        self._old = None
        _signal.signal(_SIGINT, old)
        interrupted = kind is KeyboardInterrupt
        if not interrupted and not (self.hits and kind is None):
            return
        drain()  # else it would count twice
        if old is not _DEFAULT and _in_foreign_task():
            old(_SIGINT, None)  # the cell is cancelled as ever
            raise sys.modules["asyncio"].CancelledError("interrupted") from None
        if not interrupted:
            raise KeyboardInterrupt  # it came too late to stop the operation
