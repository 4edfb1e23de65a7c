"""Making an event-driven stock server look at its input again.

TVM's event-driven handler (browsers' tvmjs, custom hosts) looks at its input when bytes arrive, and not while a request
is parked; when that completes, it answers and looks at nothing. A request that arrived meanwhile stays in its buffer
until further bytes come, and its greeting does not tell such a server from a stock one that blocks, which is best kept
busy by sending ahead. So the client sends ahead to both; when a reply has come, others are owed and nothing follows for
a moment, it sends a cheap request, whose bytes make such a server look. To the other kind it is one more look-up.

Source:
    RPCEndpoint::HandleUntilReturnEvent and ServerAsyncIOEventHandler, src/runtime/rpc/rpc_endpoint.cc, protocol 0.8.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rpcnb.link.wire import LOOK_AGAIN, Wire

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LookAgain"]

_MOMENT = 0.005  # seconds: longer than replies of a busy server follow each other, shorter than anybody notices


class LookAgain:
    """Watches one connection to a stock server.

    Args:
        wire: The connection.
        soon: Calls a function after some seconds.
        settle: Has what is owed received, if nobody is at it.
    """

    def __init__(
        self, wire: Wire, soon: Callable[[float, Callable[[], object]], object], settle: Callable[[], object]
    ) -> None:
        self._wire = wire
        self._soon = soon
        self._settle = settle
        self._armed = False
        self._received = 0

    def more(self) -> None:
        """Note that a reply has come and others are owed. With the wire's lock."""
        if not self._armed:
            self._arm()

    def _arm(self) -> None:
        self._armed = True
        self._received = self._wire.bytes_received
        self._soon(_MOMENT, self._look)

    def _look(self) -> None:
        wire = self._wire
        with wire.lock:
            self._armed = False
            if wire.ended is not None or not wire.owed:
                return
            if wire.out or wire.bytes_received != self._received:
                self._arm()  # bytes are on the way, or replies follow by themselves
                return
            wire.queue(LOOK_AGAIN).abandoned = True
            wire.flush()
        self._settle()
