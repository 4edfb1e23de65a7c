"""How soon another thread gets the interpreter, while servers are open.

Where the process's main thread computes in Python, a call waits for one hand-over of the GIL: 5 ms at Python's own
switch interval, less at a shorter one. The interval is the process's, so several servers share it: the shortest wanted
holds, and what stood before comes back with the last one's end.
"""

from __future__ import annotations

import sys
import threading

__all__ = ["hold", "release"]

_lock = threading.Lock()
_wanted: list[float] = []
_before = 0.0
_ours = 0.0


def hold(seconds: float) -> None:
    """Want a switch interval of at most ``seconds``; end it with :func:`release`."""
    global _before
    with _lock:
        if not _wanted:
            _before = sys.getswitchinterval()
        _wanted.append(seconds)
        _apply()


def release(seconds: float) -> None:
    """Want it no longer; an interval that somebody else has set meanwhile stays."""
    with _lock:
        _wanted.remove(seconds)
        if sys.getswitchinterval() == _ours:
            _apply()


def _apply() -> None:
    global _ours
    sys.setswitchinterval(min([_before, *_wanted]))
    _ours = sys.getswitchinterval()
