"""Lanes at the server: further connections of a session.

A client that offers rpcnb's extensions gets, with the server's key text, a ticket ``-session=<id>.<secret>``. Another
connection that presents it (and ``-lane=<number>``) in the place of a match key and token shares the session's
functions, memory and files. It ends with the session; its own end ends nothing else. Of a session that has proved a
token the ticket is ``<id>`` alone: its further connections prove that they know its secret (``protocol/proof.py``).
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from rpcnb.protocol.proof import NONCE, proof_of_end

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.protocol.handshake import KeyText

C = TypeVar("C")  # a connection

__all__ = ["ENDED", "LANE", "MOST_LANES", "TICKET", "Lanes"]

TICKET, LANE = "-session", "-lane"
ENDED = "-ended"  # asked of a server with a ticket: how the session has ended
_REMEMBERED = 256  # tickets of sessions that ended lately
MOST_LANES = 7  # of a session; more are refused


@dataclass
class _Session(Generic[C]):
    secret: str
    main: C
    proves: bool = False  # the secret is proved, not sent
    lanes: dict[int, C] = field(default_factory=dict)
    asked: list[Callable[[str], object]] = field(default_factory=list)  # who wants to know how it ends


class Lanes(Generic[C]):
    """The sessions of one server that lanes may join."""

    def __init__(self) -> None:
        self._sessions: dict[str, _Session[C]] = {}
        self._ended: dict[str, str] = {}  # tickets of sessions that ended lately, and how

    def came_late(self, key: KeyText) -> bool:
        """Tell whether a lane that is refused was on its way when its session ended: nobody guesses there."""
        name = key.options.get(TICKET, "")
        return self._how_ended(key) is not None or any(one.startswith(f"{name} ") for one in self._ended)

    def _how_ended(self, key: KeyText) -> str | None:
        given = key.options.get(TICKET, "")
        text = f"{given} {key.options[ENDED]}" if key.options.get(ENDED) else given
        found = [
            how for one, how in self._ended.items() if hmac.compare_digest(text.encode(), one.encode())
        ]  # all are compared
        return found[0] if found else None

    def when_ended(self, key: KeyText, tell: Callable[[str], object]) -> bool:
        """Call ``tell`` with how the session of a ticket has ended, now or once that is so; False: a wrong ticket."""
        how = self._how_ended(key)
        if how is not None:
            tell(how)
            return True
        found = self._session_to_tell(key)
        if found is not None and len(found.asked) < MOST_LANES:
            found.asked.append(tell)
        return found is not None

    def issue(self, main: C) -> str:
        """Return the ticket of a session that has just been admitted."""
        name, secret = secrets.token_hex(8), secrets.token_urlsafe(16)
        self._sessions[name] = _Session(secret, main)
        return f"{name}.{secret}"

    def announce(self, main: C) -> str:
        """Return the ticket of a session that is to prove a token; it can be found from :meth:`prove` on."""
        name = secrets.token_hex(8)
        self._sessions[name] = _Session("", main, proves=True)
        return name

    def prove(self, main: C, secret: str) -> None:
        """Note what the further connections of a session will prove."""
        for session in self._sessions.values():
            if session.main is main:
                session.secret = secret

    def find(self, key: KeyText) -> tuple[C, int, str] | None:
        """Find what a lane's key text names; None if it is not right.

        Returns:
            The session's connection, the lane's number, and the secret that the lane has still to prove, if any.
        """
        name, _, given = key.options.get(TICKET, "").partition(".")
        session = self._sessions.get(name)
        expected = session.secret if session is not None and not session.proves else secrets.token_urlsafe(16)
        known = hmac.compare_digest(given.encode(), expected.encode())
        number = key.options.get(LANE, "")
        if session is None or not (number.isdecimal() and 0 < int(number) <= MOST_LANES):
            return None
        if session.proves:
            return (session.main, int(number), session.secret) if session.secret and NONCE in key.options else None
        return (session.main, int(number), "") if known else None

    def _session_to_tell(self, key: KeyText) -> _Session[C] | None:
        """Find the session of which somebody wants to know how it ends, if he may."""
        name, _, given = key.options.get(TICKET, "").partition(".")
        found = self._sessions.get(name)
        expected = secrets.token_urlsafe(16)
        if found is not None and found.proves:
            given, expected = key.options[ENDED], proof_of_end(found.secret) if found.secret else expected
        elif found is not None:
            expected = found.secret
        return found if hmac.compare_digest(given.encode(), expected.encode()) else None

    def join(self, main: C, number: int, lane: C) -> C | None:
        """Note a lane; returns the earlier connection of this number, which it replaces."""
        for session in self._sessions.values():
            if session.main is main:
                before, session.lanes[number] = session.lanes.get(number), lane
                return before
        return None

    def leave(self, connection: C, how: str = "") -> list[C]:
        """Forget a connection that has ended, as ``how`` says; returns the lanes that end with it."""
        for name, session in self._sessions.items():
            if session.main is connection:
                del self._sessions[name]
                if not session.secret:  # it never was one: nothing is to be remembered of it
                    return []
                shown = f"{name} {proof_of_end(session.secret)}" if session.proves else f"{name}.{session.secret}"
                self._ended[shown] = how
                if len(self._ended) > _REMEMBERED:
                    del self._ended[next(iter(self._ended))]
                for tell in session.asked:
                    tell(how)
                return list(session.lanes.values())
            for number, lane in session.lanes.items():
                if lane is connection:
                    del session.lanes[number]
                    return []
        return []
