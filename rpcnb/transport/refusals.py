"""Log lines that strangers can cause, summed up: nobody shall fill a disk, or hide what matters, by being refused."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

__all__ = ["Refusals"]

_WINDOW = 60.0  # seconds
_ADDRESSES = 256  # told apart; all further ones are summed up together


class _Window:
    """What has been refused to one address since its last line."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.count = 0
        self.latest = ""


class Refusals:
    """Logs the first refusal of an address at once, then one line a minute that counts the others; in any thread.

    Args:
        log: Where to.
        clock: Seconds.
    """

    def __init__(self, log: logging.Logger, clock: Callable[[], float]) -> None:
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[str, _Window] = {}

    def note(self, host: str, text: str) -> None:
        """Note that a peer at ``host`` has been refused; ``text`` says who refused whom, and why."""
        self.sweep()
        now = self._clock()
        with self._lock:
            if host not in self._windows and len(self._windows) >= _ADDRESSES:
                host = ""
            window = self._windows.get(host)
            if window is not None:
                window.count += 1
                window.latest = text
                return
            self._windows[host] = _Window(now + _WINDOW)
        self._log.warning("%s", text)

    def sweep(self) -> None:
        """Log what has been counted for a minute, and forget addresses that were quiet for one; call now and then."""
        now = self._clock()
        lines = []
        with self._lock:
            for host, window in list(self._windows.items()):
                if now < window.until:
                    continue
                if not window.count:
                    del self._windows[host]
                    continue
                lines.append((window.latest, window.count, host or "other addresses"))
                self._windows[host] = _Window(now + _WINDOW)
        for latest, count, whose in lines:
            more = f" ... and {count - 1} more of {whose} in the last minute" if count > 1 else ""
            self._log.warning("%s%s", latest, more)
