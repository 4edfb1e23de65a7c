"""The floor: a client without a protocol, and how every client takes times."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Raw", "quantiles", "timed"]


def quantiles(times: list[float]) -> dict[str, float]:
    """Return median, 10th and 99th percentile."""
    times.sort()
    return {f"p{part}": times[len(times) * part // 100] for part in (10, 50, 99)}


def timed(function: Callable[[], Any], count: int) -> dict[str, float]:
    """Call ``count`` times; return the quantiles of the single calls."""
    clock = time.perf_counter
    times = []
    for _ in range(count):
        start = clock()
        function()
        times.append(clock() - start)
    return quantiles(times)


class Raw:
    """The floor: a blocking socket and no protocol."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.memory = memoryview(bytearray(1))

    def null(self, count: int) -> Any:
        """Ping-pong of a null call's sizes."""
        sock, ping, pong = self.sock, bytes(24), bytearray(32)

        def call() -> None:
            sock.sendall(ping)
            sock.recv_into(pong)

        return timed(call, count)

    small = null

    def _copy(self, nbytes: int, up: bool) -> None:
        self.sock.sendall(struct.pack("<qqq", nbytes if up else -nbytes, 0, 0))
        if up:
            self.sock.sendall(self.memory[:nbytes])
            left = 32
            while left:
                left -= len(self.sock.recv(left))
            return
        left = nbytes
        while left:
            left -= self.sock.recv_into(self.memory[nbytes - left : nbytes])

    def up(self, nbytes: int, count: int) -> Any:
        """Send."""
        if len(self.memory) < nbytes:
            self.memory = memoryview(bytearray(nbytes))
        self._copy(nbytes, True)
        return timed(lambda: self._copy(nbytes, True), count)

    def down(self, nbytes: int, count: int) -> Any:
        """Receive."""
        if len(self.memory) < nbytes:
            self.memory = memoryview(bytearray(nbytes))
        self._copy(nbytes, False)
        return timed(lambda: self._copy(nbytes, False), count)
