"""Whether a server is still there.

A server that owes something (a reply, or the control lane's poll, which it answers within 20 s) and has said nothing
for 40 s is *unresponsive*: calls go on waiting, unless ``lost_after=`` ends the session. To a stock server, and where
there is no control lane, TCP's own progress is looked at instead: a stock server that works for an hour says nothing
meanwhile.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import TYPE_CHECKING, Any

from rpcnb import events
from rpcnb.errors import SessionLost

if TYPE_CHECKING:
    from rpcnb.client.owner import Owner

__all__ = ["Life", "unheard_by_tcp"]

SILENT_AFTER = 40.0  # seconds
OPEN_CONTROL_AFTER = 5.0  # seconds of waiting after which the control lane is opened, to hear whether the server lives
_TCP_INFO: int | None = getattr(socket, "TCP_INFO", None)
_LAST_ACK = struct.Struct("=I")
_LAST_ACK_AT = 56  # offset of tcpi_last_ack_recv, milliseconds, in Linux's struct tcp_info


def unheard_by_tcp(sock: socket.socket) -> float:
    """Return the seconds since the peer's system last acknowledged anything; 0 where the system does not tell."""
    if _TCP_INFO is None:
        return 0.0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _LAST_ACK_AT + 4)
    except (OSError, AttributeError):
        return 0.0
    return _LAST_ACK.unpack_from(info, _LAST_ACK_AT)[0] / 1000 if len(info) >= _LAST_ACK_AT + 4 else 0.0


class Life:
    """Watches one session; looked at ten times a second.

    Args:
        lost_after: Seconds of silence after which the session is lost; None: never.

    Attributes:
        silent: The server owes something and has been silent for too long.
    """

    def __init__(self, lost_after: float | None) -> None:
        self.silent = False
        self._lost_after = lost_after
        self._heard_at = time.monotonic()
        self._idle_at = self._heard_at
        self._received = -1
        self._told = "ready"

    def look(self, session: Owner) -> None:
        """See what has happened since the last look."""
        ops = session._ops
        wire, lanes = ops.link.wire, ops.lanes
        if wire.ended is not None:
            if wire.asking:
                return
            if lanes is not None and not lanes.closed:
                lanes.fail(wire.ended)
        else:
            self._listen(session, ops, wire, lanes)
        if session.observers and not session._told_end and session.state != self._told:
            before, self._told = self._told, session.state
            session._tell(events.SessionStateChanged, peer=session.peer, state=self._told, before=before)

    def _listen(self, session: Owner, ops: Any, wire: Any, lanes: Any) -> None:
        now = time.monotonic()
        control = lanes.opened if lanes is not None else None
        received = wire.bytes_received
        if lanes is not None:
            received += sum(link.wire.bytes_received for link in lanes.links())
        owed = bool(wire.owed)
        expects = owed or control is not None
        if not owed:
            self._idle_at = now
        if received != self._received or not expects:
            self._received = received
            self._heard_at = now
            self.silent = False
            return
        if lanes is not None and control is None and now - self._idle_at > OPEN_CONTROL_AFTER:
            lanes.open_soon()
        quiet = now - self._heard_at
        if quiet < SILENT_AFTER and (self._lost_after is None or quiet < self._lost_after):
            return
        if control is None:
            quiet = min(quiet, unheard_by_tcp(wire.sock))
        self.silent = quiet >= SILENT_AFTER
        if self._lost_after is not None and quiet >= self._lost_after:
            ops.link.fail(SessionLost(f"session lost: {session.peer} has said nothing for {quiet:.1f} s"))
