"""What a forked child must not share with its parent: connections, listeners, epolls, signals.

A child inherits every descriptor and no thread. What registers here is told in the child, before anything else runs
there: it lets its copies go without a word to the other side, and is of no use from then on.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Protocol

__all__ = ["tell"]


class Forked(Protocol):
    """What wants to know."""

    def forked(self) -> None:
        """Let go of what is the parent's; called in a forked child, where locks may be held by nobody."""


_things: weakref.WeakSet[Forked] = weakref.WeakSet()


def tell(thing: Forked) -> None:
    """Call ``thing.forked()`` in children that are forked from now on, as long as it lives."""
    _things.add(thing)


def _in_child() -> None:
    for thing in list(_things):
        with contextlib.suppress(Exception):  # one's trouble is not another's
            thing.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
