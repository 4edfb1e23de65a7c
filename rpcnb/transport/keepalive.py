"""Keeps the quiet WebSockets of a loop alive: of a server, of a proxy, and of a server that waits at a proxy."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING

from tornado.ioloop import PeriodicCallback

from rpcnb.transport import websocket

if TYPE_CHECKING:
    from rpcnb.transport.websocket import WebSocket

__all__ = ["KeepAlive"]


class KeepAlive:
    """Looks after WebSockets, from when it is made (on a loop) until it is closed; they may be used in any thread."""

    def __init__(self) -> None:
        self._sockets: weakref.WeakSet[WebSocket] = weakref.WeakSet()
        self._timer = PeriodicCallback(self._look, min(1.0, websocket.PING_EVERY / 4) * 1000)
        self._timer.start()

    def add(self, sock: WebSocket) -> None:
        """Look after ``sock`` until nobody holds it any more."""
        self._sockets.add(sock)

    def _look(self) -> None:
        now = time.monotonic()
        for sock in list(self._sockets):
            sock.keep_alive(now)

    def close(self) -> None:
        """End it; on the loop."""
        self._timer.stop()
