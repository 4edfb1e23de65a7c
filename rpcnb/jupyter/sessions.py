"""The sessions of this kernel by address and name, and the demo board it started."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import rpcnb
from rpcnb.command.board import DemoBoard
from rpcnb.errors import KeyMismatch

if TYPE_CHECKING:
    from rpcnb.client.session import Session

__all__ = ["BOOK", "SessionBook"]


@dataclass
class SessionBook:
    """What the magics know; one per kernel.

    Attributes:
        sessions: Open sessions by name, the latest last.
        board: The demo board, once ``%rpc_connect demo`` has started it.
        tokens: Tokens that were asked for and accepted, by address.
        asked: Addresses whose token was asked for.
    """

    sessions: dict[str, Session] = field(default_factory=dict)
    board: DemoBoard | None = None
    tokens: dict[str, str] = field(default_factory=dict, repr=False)
    asked: set[str] = field(default_factory=set)
    _opened: dict[tuple[str, str, str], Session] = field(default_factory=dict)

    @property
    def current(self) -> Session | None:
        """The session that was connected to last and is still open."""
        self._forget_closed()
        return next(reversed(self.sessions.values()), None)

    def _forget_closed(self) -> None:
        for name, session in list(self.sessions.items()):
            if session.state in ("closed", "lost"):
                del self.sessions[name]
        # A lost one is opened again when its address is connected to; a closed one is another's to be.
        self._opened = {where: one for where, one in self._opened.items() if one.state != "closed"}

    def find(self, name: str | None) -> Session:
        """Return a session by name, or the current one.

        Raises:
            LookupError: There is none.
        """
        self._forget_closed()
        found = self.current if name is None else self.sessions.get(name)
        if found is None:
            lost = self._lost(name)
            if lost is not None:
                raise LookupError(f"{lost.name} was lost ({lost.ended_by}); %rpc_connect {lost.peer} opens it again")
            known = ", ".join(self.sessions) or "none is open"
            raise LookupError(f"no session {name or ''} ({known}); connect with %rpc_connect".replace("  ", " "))
        return found

    def restart(self, name: str | None) -> Session:
        """Open a session, or the current one, afresh, also one that was lost; it is the current one then.

        Raises:
            LookupError: There is none.
        """
        self._forget_closed()
        open_one = self.current if name is None else self.sessions.get(name)
        session = open_one or self._lost(name) or self.find(name)
        session.reconnect()
        self._make_current(session)
        return session

    def _make_current(self, session: Session) -> None:
        self.sessions.pop(session.name, None)
        self.sessions[session.name] = session  # the latest

    def _lost(self, name: str | None) -> Session | None:
        return next((one for one in reversed(self.lost) if name in (None, one.name)), None)

    def demo_address(self) -> str:
        """Return the demo board's address, starting it if it does not run."""
        if self.board is None or not self.board.alive:
            self.board = DemoBoard("40M,2ms")
        return self.board.address

    def connect(self, address: str, *, key: str, name: str | None, new: bool, **options: Any) -> tuple[Session, str]:
        """Return the live session with an address, key and name; open a lost one again; or open a new one.

        Returns:
            The session, and ``connected``, ``still connected`` or ``reconnected``.
        """
        if address == "demo":
            address, key = self.demo_address(), "demo"
        self._forget_closed()
        where = (address, key, name or "")
        known = self._known(where)
        if known is not None and not new:
            word = "still connected"
            if known.state == "lost":
                try:
                    known.reconnect()
                    word = "reconnected"
                except KeyMismatch:
                    if options.get("token") is None:
                        raise
                    word = ""  # the server has another token now, and it was given: another session
            if word:
                self._make_current(known)
                return known, word
        session = rpcnb.connect(address, key=key, **options)
        if name:
            if name in self.sessions:
                self.sessions.pop(name).close()
            session.name = name
        self.sessions[session.name] = session
        self._opened[where] = session
        return session, "connected"

    def _known(self, where: tuple[str, str, str]) -> Session | None:
        """Return the session of an address, key and name; without a name the latest one of that address and key."""
        if where[2]:
            return self._opened.get(where)
        return next((one for known, one in reversed(self._opened.items()) if known[:2] == where[:2]), None)

    @property
    def lost(self) -> list[Session]:
        """Sessions whose connection ended, which connecting to their address opens again."""
        return [session for session in self._opened.values() if session.state == "lost"]

    def close(self, name: str | None = None) -> list[str]:
        """Close one session, or the current one; returns the names closed."""
        session = self.find(name)
        session.close()
        self._forget_closed()
        return [session.name]

    def close_all(self) -> list[str]:
        """Close every session and the demo board; returns the names closed."""
        names = list(self.sessions)
        for session in self.sessions.values():
            session.close()
        self._forget_closed()
        if self.board is not None:
            self.board.close()
            self.board = None
        return names


BOOK = SessionBook()
