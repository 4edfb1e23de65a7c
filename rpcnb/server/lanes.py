"""Lanes at the server: further connections of a session.

A client that offers rpcnb's extensions gets, with the server's key text, a ticket ``-session=<id>.<secret>``. Another
connection that presents it (and ``-lane=<number>``) in the place of a match key and token shares the session's
functions, memory and files. It ends with the session; its own end ends nothing else.
"""

from __future__ import annotations

import hmac
import secrets
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from rpcnb.protocol.handshake import KeyText

C = TypeVar("C")  # a connection

__all__ = ["LANE", "MOST_LANES", "TICKET", "Lanes"]

TICKET, LANE = "-session", "-lane"
MOST_LANES = 7  # of a session; more are refused


@dataclass
class _Session(Generic[C]):
    secret: str
    main: C
    lanes: dict[int, C] = field(default_factory=dict)


class Lanes(Generic[C]):
    """The sessions of one server that lanes may join."""

    def __init__(self) -> None:
        self._sessions: dict[str, _Session[C]] = {}
        self._ended: deque[str] = deque(maxlen=256)  # tickets of sessions that ended lately

    def came_late(self, key: KeyText) -> bool:
        """Tell whether a lane that is refused was on its way when its session ended: nobody guesses there."""
        given = key.options.get(TICKET, "").encode()
        return any([hmac.compare_digest(given, one.encode()) for one in self._ended])  # noqa: C419  # in constant time

    def issue(self, main: C) -> str:
        """Return the ticket of a session that has just been admitted."""
        name, secret = secrets.token_hex(8), secrets.token_urlsafe(16)
        self._sessions[name] = _Session(secret, main)
        return f"{name}.{secret}"

    def find(self, key: KeyText) -> tuple[C, int] | None:
        """Return the connection that a lane's key text names and the lane's number; None if it is not right."""
        name, _, secret = key.options.get(TICKET, "").partition(".")
        found = self._sessions.get(name)
        right = hmac.compare_digest(secret.encode(), (found.secret if found else secrets.token_urlsafe(16)).encode())
        number = key.options.get(LANE, "")
        if found is None or not right or not (number.isdecimal() and 0 < int(number) <= MOST_LANES):
            return None
        return found.main, int(number)

    def join(self, main: C, number: int, lane: C) -> C | None:
        """Note a lane; returns the earlier connection of this number, which it replaces."""
        for session in self._sessions.values():
            if session.main is main:
                before, session.lanes[number] = session.lanes.get(number), lane
                return before
        return None

    def leave(self, connection: C) -> list[C]:
        """Forget a connection that has ended; returns the lanes that end with it."""
        for name, session in self._sessions.items():
            if session.main is connection:
                del self._sessions[name]
                self._ended.append(f"{name}.{session.secret}")
                return list(session.lanes.values())
            for number, lane in session.lanes.items():
                if lane is connection:
                    del session.lanes[number]
                    return []
        return []
