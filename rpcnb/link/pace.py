"""How large the parts of a bulk transfer are.

Between rpcnb peers data moves in parts, several on the way, so that a transfer can be given up soon and other
requests of its connection need not wait for all of it. A part is what moves in a twentieth of a second.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["WHOLE", "Pace"]

_SECONDS = 0.05
WHOLE = 2 << 20  # bytes up to which a transfer is never cut
_LEAST, _FIRST, _MOST = 256 << 10, 1 << 20, 16 << 20


class Pace:
    """Sizes of parts, from the rate at which earlier ones moved.

    Args:
        clock: Seconds.

    Attributes:
        size: Bytes of the next part.
    """

    __slots__ = ("_clock", "_last", "size")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self.size = _FIRST

    def moved(self, nbytes: int) -> None:
        """Note that a part has arrived."""
        now = self._clock()
        rate = nbytes / max(now - self._last, 1e-6)
        self._last = now
        self.size = int(max(_LEAST, min(rate * _SECONDS, 2 * self.size, _MOST)))
