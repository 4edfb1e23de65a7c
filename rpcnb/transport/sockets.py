"""What every connection of ours has set."""

from __future__ import annotations

import logging
import socket

__all__ = ["tune"]

log = logging.getLogger(__name__)

# A cut cable is noticed within 60 s: idle 20 s, then every 4 s. The user timeout ends it, also for data that is not
# acknowledged; the kernel looks at it with the next probe only (60 s were 61.7 s, tests/soak/cable.py).
_KEEPALIVE = (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 4), ("TCP_KEEPCNT", 10), ("TCP_USER_TIMEOUT", 52_000))


def tune(sock: socket.socket) -> None:
    """Set what every connection of ours has: no Nagle, and keep-alive that notices a dead peer within a minute."""
    sock.setblocking(False)
    options = [(socket.IPPROTO_TCP, "TCP_NODELAY", 1), (socket.SOL_SOCKET, "SO_KEEPALIVE", 1)]
    options += [(socket.IPPROTO_TCP, name, value) for name, value in _KEEPALIVE]
    for level, name, value in options:
        number = getattr(socket, name, None)
        if number is not None:
            try:
                sock.setsockopt(level, number, value)
            except OSError:
                log.debug("option %s is not available on this socket", name)
