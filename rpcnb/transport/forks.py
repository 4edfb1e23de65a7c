"""What a forked child must not share with its parent: connections, listeners, epolls, signals.

A child inherits every descriptor and no thread. What registers here is told in the child, before anything else runs
there: it lets its copies go without a word to the other side, and is of no use from then on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["hold_back", "tell"]


class Forked(Protocol):
    """What wants to know."""

    def forked(self) -> None:
        """Let go of what is the parent's; called in a forked child, where locks may be held by nobody."""


_things: weakref.WeakSet[Forked] = weakref.WeakSet()


def tell(thing: Forked) -> None:
    """Call ``thing.forked()`` in children that are forked from now on, as long as it lives."""
    _things.add(thing)


_held_back: set[int] = set()
_mask = threading.local()


def hold_back(signals: Iterable[int]) -> None:
    """Hold these signals back around each fork, until the child has been told: their handlers are the parent's."""
    _held_back.update(signals)


def _before() -> None:
    if _held_back:
        _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _held_back)


def _let_through() -> None:
    before: Any = _mask.__dict__.pop("before", None)
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_child() -> None:
    for thing in list(_things):
        with contextlib.suppress(Exception):  # one's trouble is not another's
            thing.forked()
    _let_through()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_let_through, after_in_child=_in_child)
