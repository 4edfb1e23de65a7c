"""Running the coroutines of registered functions, on a given loop or on one of our own."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from functools import cache
from typing import TYPE_CHECKING, Any

from rpcnb.runtime.completion import call_cancelled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rpcnb.runtime.completion import Done

__all__ = ["later_anywhere", "spawn_anywhere", "spawn_on", "thread_anywhere"]


def spawn_on(loop: asyncio.AbstractEventLoop, awaitable: Awaitable[Any], done: Done) -> Callable[[], object]:
    """Run ``awaitable`` as a task of ``loop``, from any thread, in the caller's context.

    Returns:
        What cancels it, from any thread.
    """
    tasks: list[asyncio.Task[Any]] = []
    cancelled = False

    async def run() -> Any:
        try:
            return await awaitable
        except SystemExit as error:  # it would end the loop, and so every session
            raise RuntimeError(f"the function called sys.exit({_code_of(error)})") from error
        except KeyboardInterrupt as error:  # likewise, unless it is meant for the loop of the main thread
            if threading.current_thread() is threading.main_thread():
                raise
            raise RuntimeError("the function raised KeyboardInterrupt") from error

    def start() -> None:
        if cancelled:
            getattr(awaitable, "close", lambda: None)()
            done.error(asyncio.CancelledError())
            return
        task = loop.create_task(run())
        tasks.append(task)
        task.add_done_callback(_report)

    def _report(task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            done.error(call_cancelled())
        elif (error := task.exception()) is not None:
            done.error(error)
        else:
            done(task.result())

    def cancel() -> None:
        nonlocal cancelled
        cancelled = True
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])

    try:
        here = asyncio.get_running_loop() is loop
    except RuntimeError:
        here = False
    if here:
        start()
    else:
        loop.call_soon_threadsafe(start, context=contextvars.copy_context())
    return cancel


def _code_of(error: SystemExit) -> str:
    try:
        return repr(error.code)
    except BaseException:  # also a further SystemExit
        return "..."


def spawn_anywhere(awaitable: Awaitable[Any], done: Done) -> Callable[[], object]:
    """Run ``awaitable`` on the running loop, or else on a loop thread of this process's own."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        loop = _background_loop()
    return spawn_on(loop, awaitable, done)


def later_anywhere(seconds: float, function: Callable[[], object]) -> Callable[[], object]:
    """Call ``function`` after some seconds, in a thread; returns what cancels that."""
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()
    return timer.cancel


def thread_anywhere(function: Callable[[], None]) -> None:
    """Run ``function`` in a thread of its own."""
    threading.Thread(target=function, name="rpcnb-call", daemon=True).start()


@cache
def _background_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rpcnb-tasks", daemon=True).start()
    return loop
