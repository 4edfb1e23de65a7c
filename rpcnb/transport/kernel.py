"""The notebook kernel's own loop, on which functions with ``run="kernel"`` run; a blocking cell keeps them waiting.

A blocking call of such a function from the kernel's own thread would wait for itself for ever. Whoever waits there asks
now and then (:func:`refuse_deadlock`) whether what is owed to it waits for this very thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
import weakref
from typing import TYPE_CHECKING

from rpcnb.errors import DeadlockError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

__all__ = ["BUSY_AFTER", "KernelLoop", "refuse_deadlock"]

BUSY_AFTER = 0.2  # seconds: a loop that has not begun what was asked by then is held up by a cell


class KernelLoop:
    """Runs functions on a kernel's loop, and knows since when it has begun none of them.

    Args:
        loop: The loop, the caller's.
        waits: Tells whether the server keeps a client waiting for this loop: the client's address, and the number of
            a started call, or None for the reply to the oldest request on that connection.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, waits: Callable[[object, int | None], bool]) -> None:
        self._loop = loop
        self.thread = threading.get_ident()
        self.waits = waits
        _loops.add(self)
        self._numbers = itertools.count()
        self._waiting: dict[int, float] = {}  # when each was asked; atomic steps only, so no lock

    @classmethod
    def running(cls, waits: Callable[[object, int | None], bool]) -> KernelLoop | None:
        """Return the running loop, a notebook kernel's; None where there is none."""
        try:
            return cls(asyncio.get_running_loop(), waits)
        except RuntimeError:
            return None

    def __call__(self, function: Callable[[], None]) -> None:
        """Run ``function`` there; from any thread."""
        number = next(self._numbers)
        self._waiting[number] = time.monotonic()

        def begin() -> None:
            self._waiting.pop(number, None)
            function()

        self._loop.call_soon_threadsafe(begin)

    @property
    def busy_since(self) -> float | None:
        """``time.monotonic()`` of the oldest function that a blocking cell keeps waiting; None if none does."""
        since = min(list(self._waiting.values()), default=None)
        return since if since is not None and time.monotonic() - since > BUSY_AFTER else None


_loops: weakref.WeakSet[KernelLoop] = weakref.WeakSet()


def refuse_deadlock(sock: socket.socket | None, number: int | None) -> None:
    """Refuse to wait for a reply that only the waiting thread could bring about.

    Args:
        sock: The client's end of the connection that owes it; None if nothing has been asked yet.
        number: Of a started call, on a control lane; None for a reply on the connection itself.

    Raises:
        DeadlockError: A function with ``run="kernel"`` is waited for in the kernel's own thread.
    """
    me = threading.get_ident()
    for loop in [loop for loop in list(_loops) if loop.thread == me]:
        with contextlib.suppress(OSError):  # it has been closed meanwhile
            if sock is not None and loop.waits(sock.getsockname(), number):
                raise DeadlockError(
                    'this call waits for a function with run="kernel" of this very kernel, which a blocking cell keeps '
                    "from running; await it: await f.submit(...), or an awaited session (rpcnb.connect_async)"
                )
