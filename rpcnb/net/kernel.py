"""The notebook kernel's own loop, on which functions with ``run="kernel"`` run; a blocking cell keeps them waiting."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["KernelLoop"]

_BUSY_AFTER = 0.2  # seconds: a loop that has not begun what was asked by then is held up by a cell


class KernelLoop:
    """Runs functions on a kernel's loop, and knows since when it has begun none of them.

    Args:
        loop: The loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._numbers = itertools.count()
        self._waiting: dict[int, float] = {}  # when each was asked; atomic steps only, so no lock

    @classmethod
    def running(cls) -> KernelLoop | None:
        """Return the running loop, a notebook kernel's; None where there is none."""
        try:
            return cls(asyncio.get_running_loop())
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
        return since if since is not None and time.monotonic() - since > _BUSY_AFTER else None
