"""A tornado IOLoop in a daemon thread of its own: where a server lives, also inside a notebook kernel.

A loop on the kernel's own thread would be dead while a cell blocks (jupyter-facts 1).
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from tornado.ioloop import IOLoop

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LoopThread", "call_in_loop"]

T = TypeVar("T")


class LoopThread:
    """A running IOLoop; ``stop()`` ends it and waits for its thread.

    Raises:
        OSError: No loop can be made: there are no descriptors left.
    """

    def __init__(self, name: str) -> None:
        ready: Future[IOLoop] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name=name, daemon=True)
        self._thread.start()
        self.io_loop = ready.result()

    @staticmethod
    def _run(ready: Future[IOLoop]) -> None:
        try:
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            io_loop = IOLoop.current()
        except BaseException as error:  # no descriptors, say: who waits for the loop learns that
            ready.set_exception(error)
            return
        loop.call_soon(ready.set_result, io_loop)
        owner = os.getpid()
        try:
            io_loop.start()
        finally:
            if os.getpid() != owner:  # a coroutine has forked, and its child has come to its end here
                os._exit(0)
            asyncio.set_event_loop(None)
            pending = asyncio.all_tasks(loop)
            for task in pending:
                task.cancel()
            if pending:
                loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            loop.call_soon(loop.stop)
            loop.run_forever()  # one turn more, in which a transport that was closed lets its socket go
            io_loop.close(all_fds=False)

    def stop(self) -> None:
        """End the loop; from its own thread without waiting."""
        self.io_loop.add_callback(self.io_loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(5)


def call_in_loop(io_loop: IOLoop, function: Callable[[], T], timeout: float = 10.0) -> T:
    """Run ``function`` on the loop's thread and return its result; directly if this is that thread."""
    asyncio_loop: Any = io_loop.asyncio_loop
    try:
        here = asyncio.get_running_loop() is asyncio_loop
    except RuntimeError:
        here = False
    if here or not asyncio_loop.is_running():
        return function()
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    asyncio_loop.call_soon_threadsafe(run)
    return outcome.result(timeout)
