"""How a lost session has ended: its server, where each session has a process of its own, knows, and is asked once.

The question is a connection with the session's ticket and ``-ended``; the answer is the server's key text with
``-ended=HOW``: ``signal:SIGSEGV``, ``exit:3``, ``memory``, ``cpu``, ``timeout:60``, ``closed``, or nothing.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from rpcnb.errors import RpcError, SessionCrashed, SessionTimeout
from rpcnb.link.dial import ClientKey, connect_socket, shake_hands
from rpcnb.link.interrupt import Guard
from rpcnb.transport.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.errors import SessionLost
    from rpcnb.link.dial import SessionTicket
    from rpcnb.transport.address import Address

__all__ = ["Inquiry", "session_expired"]

_PATIENCE = 0.45  # seconds
_CRASHES = ("signal", "exit", "memory", "cpu")


def session_expired(seconds: str) -> str:
    """Return stock's words for a session whose time is over."""
    return f'Your {float(seconds)}s session has expired, try to increase the "session_timeout" value.'


class Inquiry:
    """Asks for all connections of one session.

    Args:
        address: The server.
        ticket: The session's.
        call_owed: Names the call that has been owed for longest; empty if none is.
    """

    def __init__(self, address: Address, ticket: SessionTicket, call_owed: Callable[[], str]) -> None:
        self._address = address
        self._key = ClientKey.for_end(ticket)
        self._call_owed = call_owed
        self._lock = threading.Lock()
        self._waiting: list[tuple[Any, SessionLost]] | None = []
        self._asks = False
        self._how = ""
        self._function = ""

    def ask(self, link: Any, lost: SessionLost) -> None:
        """Conclude ``link``, which was lost, once it is known why: with ``lost``, or a better error."""
        with self._lock:
            waiting = self._waiting
            if waiting is not None:
                waiting.append((link, lost))
                if self._asks:
                    return
                self._asks = True
        if waiting is None:
            link.conclude(self._explained(lost))
            return
        self._function = self._call_owed()
        try:
            threading.Thread(target=self._run, name="rpcnb-inquiry", daemon=True).start()
        except RuntimeError:  # no more threads
            self._tell()

    def _run(self) -> None:
        with contextlib.suppress(RpcError, OSError):
            deadline = Deadline(_PATIENCE, f"ask {self._address}")
            with Guard() as guard:
                sock = connect_socket(self._address, deadline, guard)
                try:
                    answer = shake_hands(sock, self._key, str(self._address), deadline, guard)
                finally:
                    sock.close()
            self._how = answer.options.get("-ended", "")
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting or [], None
        for link, lost in waiting:
            link.conclude(self._explained(lost))

    def _explained(self, lost: SessionLost) -> RpcError:
        kind, _, fact = self._how.partition(":")
        if kind in _CRASHES:
            return SessionCrashed(str(self._address), self._how, self._function)
        if kind == "timeout":
            with contextlib.suppress(ValueError):
                return SessionTimeout(session_expired(fact))
        return lost
