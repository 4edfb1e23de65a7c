"""Time limits of whole operations."""

from __future__ import annotations

import time

from rpcnb.errors import DeadlineExceeded

__all__ = ["FOREVER", "NO_DEADLINE", "Deadline"]

FOREVER = 3600.0  # seconds: how long one waits at a time where there is no limit


class Deadline:
    """The time limit of one whole operation."""

    __slots__ = ("at", "operation", "start", "timeout")

    def __init__(self, timeout: float | None, operation: str) -> None:
        self.start = time.monotonic()
        self.timeout = timeout
        self.at = self.start + timeout if timeout is not None else None
        self.operation = operation

    def left(self) -> float:
        """Return the seconds left.

        Raises:
            DeadlineExceeded: There are none.
        """
        if self.at is None:
            return FOREVER
        left = self.at - time.monotonic()
        if left <= 0:
            raise self.exceeded()
        return left

    def allows(self, seconds: float) -> bool:
        """Tell whether there is so much time."""
        return self.at is None or self.at - time.monotonic() > seconds

    def exceeded(self) -> DeadlineExceeded:
        """Return the error that says the time is over."""
        return DeadlineExceeded(self.operation, time.monotonic() - self.start, self.timeout or 0.0)


NO_DEADLINE = Deadline(None, "")
