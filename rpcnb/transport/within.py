"""Awaiting within a time limit."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["within"]

T = TypeVar("T")


async def within(work: Coroutine[Any, Any, T], seconds: float | None) -> T:
    """Await ``work`` for so many seconds at most; it has ended when this returns or raises, however that is.

    ``asyncio.wait_for`` of Python 3.10 and 3.11 forgets the exception of work that fails in the moment in which it is
    cancelled, which the loop then reports as never retrieved; and it can lose a cancellation.

    Raises:
        TimeoutError: asyncio's: the time is over, the work was cancelled.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(_look)
    try:
        await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
        if task.cancelled():
            raise asyncio.TimeoutError
    return task.result()  # also of work that was done in the very moment in which it was cancelled


def _look(task: asyncio.Task[Any]) -> None:
    """Note that somebody knows how it ended."""
    if not task.cancelled():
        task.exception()
