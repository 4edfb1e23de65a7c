"""How long to wait before one tries again: longer each time, and never all at the same moment."""

from __future__ import annotations

import random

__all__ = ["Backoff"]


class Backoff:
    """Seconds to wait, from one failure to the next.

    Args:
        first: After the first failure.
        most: At most.
    """

    def __init__(self, first: float = 0.2, most: float = 5.0) -> None:
        self._first = first
        self._most = most
        self._next = first

    def reset(self) -> None:
        """Note a success."""
        self._next = self._first

    def next(self) -> float:
        """Note a failure; returns the seconds to wait: half of the step fixed, half by chance."""
        step, self._next = self._next, min(self._most, self._next * 2)
        return step * (0.5 + random.random() / 2)
