"""The order of operations that name the same thing of a server.

Operations travel on several connections and overlap; those that name the same tensor, module or object keep the order
in which they were submitted. Each operation *holds* what it names until it has ended and nothing of it is on the way
any more; a later one waits for the holds before it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from rpcnb.protocol.messages import CallFunc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Hold", "Order", "moves_data", "names_of", "release_when_drained"]


def names_of(things: Iterable[Any]) -> frozenset[int]:
    """Return the handles of the tensors, modules and objects among ``things``."""
    found = set()
    for thing in things:
        meta = getattr(thing, "meta", None)
        if meta is not None and hasattr(meta, "data"):
            found.add(meta.data)
        elif type(thing).__name__ in _HELD:
            found.add(thing.handle)
    return frozenset(found)


_HELD = frozenset({"RemoteModule", "RemoteObject", "AsyncRemoteModule"})


class Hold:
    """What one operation names, until it is released.

    Attributes:
        names: Handles.
        queued: It travels in one request on the session's first connection, so such ones need not wait for each other.
    """

    __slots__ = ("_order", "_then", "names", "queued", "released")

    def __init__(self, order: Order, names: frozenset[int], queued: bool) -> None:
        self._order = order
        self._then: list[Callable[[], object]] = []
        self.names = names
        self.queued = queued
        self.released = False

    def then(self, function: Callable[[], object]) -> bool:
        """Have ``function`` called at the release; False if that has been already."""
        with self._order.lock:
            if self.released:
                return False
            self._then.append(function)
            return True

    def release(self) -> None:
        """Let later operations begin. Idempotent."""
        with self._order.lock:
            if self.released:
                return
            self.released = True
            for name in self.names:
                if self._order.last.get(name) is self:
                    del self._order.last[name]
            then, self._then = self._then, []
        for function in then:
            function()


def release_when_drained(hold: Hold, link: Any, owed: Iterable[Any]) -> None:
    """Release a hold once the given up tickets ``owed`` are done: their bytes are still on the way."""
    _Draining(hold, link, iter(list(owed))).resume()


class _Draining:
    __slots__ = ("_hold", "_link", "_owed")

    def __init__(self, hold: Hold, link: Any, owed: Iterator[Any]) -> None:
        self._hold = hold
        self._link = link
        self._owed = owed

    def resume(self) -> None:
        """Go on with the next ticket; called when the one before is done."""
        for ticket in self._owed:
            if not self._link.resume_when_done(ticket, self):
                return
        self._hold.release()


def moves_data(ticket: Any) -> bool:
    """Tell whether a ticket's bytes may still reach the server's memory after it was given up."""
    return not ticket.done and type(ticket.request) is not CallFunc


class Order:
    """Who holds what in one session."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.last: dict[int, Hold] = {}

    def enter(self, names: frozenset[int], queued: bool) -> tuple[Hold, list[Hold]]:
        """Take the place of an operation.

        Returns:
            Its hold, and those that must be released before it may begin.
        """
        hold = Hold(self, names, queued)
        if not names:
            return hold, []
        with self.lock:
            before = {self.last[name] for name in names if name in self.last}
            self.last.update(dict.fromkeys(names, hold))
        return hold, [one for one in before if not (queued and one.queued)]

    def earlier(self, names: frozenset[int]) -> list[Hold]:
        """Return the holds that an operation beside the order must wait for."""
        with self.lock:
            return list({self.last[name] for name in names if name in self.last})

    def holder(self, name: int) -> Hold | None:
        """Return who holds ``name`` last."""
        return self.last.get(name)
