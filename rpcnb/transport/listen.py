"""Listening: the first free port of a range, and accepting without ever spinning or stopping."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from tornado.ioloop import PeriodicCallback

from rpcnb.errors import AccessDenied
from rpcnb.transport import forks
from rpcnb.transport.address import is_loopback, show_address
from rpcnb.transport.loopthread import LoopThread, call_in_loop
from rpcnb.transport.refusals import Refusals
from rpcnb.values import StaysHere

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from tornado.ioloop import IOLoop
    from typing_extensions import Self

__all__ = ["Acceptor", "Service", "listen"]

log = logging.getLogger(__name__)

_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_AT_ONCE = 64  # connections accepted per turn of the loop
_SWEEP = 5.0  # seconds between two looks for refusals to be logged


def listen(host: str, port: int, port_end: int) -> list[socket.socket]:
    """Bind the first free port of the range.

    Raises:
        ValueError: ``port`` is not one.
        OSError: None is free, or the host is not of this machine.
    """
    if not isinstance(port, int) or not 0 <= port < 65536:
        raise ValueError(f"expected a port of 0 to 65535, got {port!r}")
    last: OSError | None = None
    for number in range(port, max(port_end, port + 1)) if port else (0,):
        try:
            return [_bind(host, number)]
        except OSError as error:  # noqa: PERF203  # each port may be taken
            if error.errno != errno.EADDRINUSE:
                raise
            last = error
    tried = (
        f"port {port} on {host} is taken"
        if port_end <= port + 1
        else f"ports {port} to {port_end - 1} on {host} are taken"
    )
    raise OSError(errno.EADDRINUSE, f"no free port: {tried}") from last


def _bind(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    sock = socket.socket(family, kind, protocol)
    try:
        if os.name != "nt":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(1024)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class Acceptor:
    """Accepts connections on a loop, from when it is made (on the loop) until it is closed.

    Args:
        io_loop: The loop.
        listeners: Listening sockets, closed with it.
        name: Of the service, for messages.
        admit: Called with each new socket and its address.
        exhausted: Called when the process has no descriptors left; true if a connection was ended for that.
    """

    def __init__(
        self,
        io_loop: IOLoop,
        listeners: list[socket.socket],
        name: str,
        admit: Callable[[socket.socket, tuple[Any, ...]], object],
        exhausted: Callable[[], object],
    ) -> None:
        self._io_loop = io_loop
        self._listeners = listeners
        self._name = name
        self._admit = admit
        self._exhausted = exhausted
        self._refusals = Refusals(log, time.monotonic)
        self._closed = False
        for listener in listeners:
            self._resume(listener)

    def _resume(self, listener: socket.socket) -> None:
        if not self._closed:
            self._io_loop.add_handler(listener, self._accept, self._io_loop.READ)

    def _accept(self, listener: Any, events: int) -> None:
        spared = False
        for _ in range(_AT_ONCE):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_DESCRIPTORS:
                    return
                if not spared and self._exhausted():
                    spared = True
                    continue
                self._pause(listener, error)
                return
            spared = False
            self._admit(sock, address)

    def _pause(self, listener: socket.socket, error: OSError) -> None:
        """Stop accepting for a moment when the process has no descriptors left, instead of spinning."""
        self._refusals.note("everybody", f"{self._name}: cannot accept: {error.strerror}; trying again in a moment")
        self._io_loop.remove_handler(listener)
        self._io_loop.call_later(0.2, self._resume, listener)

    def close(self) -> None:
        """Stop listening; on the loop."""
        self._closed = True
        for listener in self._listeners:
            self._io_loop.remove_handler(listener)
            listener.close()


class Service(StaysHere):
    """What a tracker and a proxy have in common: a port, a loop, an end.

    Args:
        host: Address to listen on.
        port: First port to try; 0 for any free one.
        port_end: Ports up to this one, exclusive, are tried when ``port`` is taken.
        silent: Log at level DEBUG instead of INFO.
        insecure: Allow to listen beyond loopback.
        loop: A running tornado IOLoop to live on; by default one in a daemon thread of its own.

    Attributes:
        refusals: What is logged of those who were refused.

    Raises:
        AccessDenied: Beyond loopback without ``insecure``.
        OSError: No port of the range is free.
    """

    kind = "service"
    warning = ""  # what it means to listen beyond loopback

    def __init__(self, host: str, port: int, port_end: int, silent: bool, insecure: bool, loop: IOLoop | None) -> None:
        if not is_loopback(host) and not insecure:
            raise AccessDenied(f"a {self.kind} on {host} {self.warning}; insecure=True (--insecure) allows it")
        self._level = logging.DEBUG if silent else logging.INFO
        self.host = host
        self.closed = False
        self.ended = threading.Event()
        self.refusals = Refusals(logging.getLogger(type(self).__module__), time.monotonic)
        listeners = listen(host, port, port_end)
        self.port = int(listeners[0].getsockname()[1])
        self._own_loop = LoopThread(f"rpcnb-{self.kind}") if loop is None else None
        self.io_loop: IOLoop = loop if loop is not None else self._own_loop.io_loop  # type: ignore[union-attr]  # one is set
        try:
            call_in_loop(self.io_loop, lambda: self._listen(listeners))
        except BaseException:
            for listener in listeners:
                listener.close()
            if self._own_loop is not None:
                self._own_loop.stop()
            raise
        self._listeners = listeners
        forks.tell(self)
        log.log(self._level, "%s listens on %s", self.kind, self.address)

    def forked(self) -> None:
        """In a forked child: peers, listeners and the loop are the parent's."""
        self.closed = True
        for listener in self._listeners:
            listener.close()
        self.io_loop.asyncio_loop.stop()

    def _listen(self, listeners: list[socket.socket]) -> None:
        self._start()
        self._acceptor = Acceptor(self.io_loop, listeners, self.kind, self._admit, self._give_way)
        self._refusals_timer = PeriodicCallback(self.refusals.sweep, _SWEEP * 1000)
        self._refusals_timer.start()

    def _start(self) -> None:
        """Begin; on the loop."""

    def _admit(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        """Take a new connection; on the loop."""
        raise NotImplementedError

    def _give_way(self) -> bool:
        """End a connection that can be spared, if there is one; on the loop."""
        raise NotImplementedError

    def _stop(self) -> None:
        """End everything; on the loop."""
        raise NotImplementedError

    @property
    def address(self) -> str:
        """``host:port``."""
        return show_address(self.host, self.port)

    def close(self) -> None:
        """Stop listening, end all connections, and return when everything is released. Idempotent."""
        if self.closed:
            return
        self.closed = True
        call_in_loop(self.io_loop, self._end)
        if self._own_loop is not None:
            self._own_loop.stop()
        log.log(self._level, "%s on %s closed", self.kind, self.address)

    def _end(self) -> None:
        self._refusals_timer.stop()
        self._acceptor.close()
        self._stop()
        self.ended.set()

    terminate = close  # TVM's word

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}, {'closed' if self.closed else 'running'}>"
