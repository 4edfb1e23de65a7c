"""The proxy: joins a client and a server that both dial in, over TCP or WebSocket, and forwards between them.

::

    with rpcnb.Proxy(port=9090, web_port=8888) as proxy:
        board = rpcnb.Server("127.0.0.1", proxy.port, key="rpi", is_proxy=True)
        session = rpcnb.connect("127.0.0.1", proxy.port, key="rpi")

Who is joined with whom is decided in :mod:`rpcnb.farm.pairing`; here are the sockets. What one side sends is
received into one buffer and sent on at once; what the other side does not take is kept, at most one buffer, and nothing
more is received until it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING, Any

from rpcnb.errors import RemoteProtocolError
from rpcnb.farm.pairing import DUPLICATE, MISMATCH, WAITS, Pairing
from rpcnb.farm.registration import Offer, Registration
from rpcnb.protocol.handshake import Handshake, KeyText, hello, refusal
from rpcnb.transport.address import tracker_pair
from rpcnb.transport.halfopen import HalfOpen, within_descriptors
from rpcnb.transport.listen import Service
from rpcnb.transport.sockets import tune

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tornado.ioloop import IOLoop

__all__ = ["Proxy"]

log = logging.getLogger(__name__)

_PIECE = 1 << 20  # bytes received at once
_TURNS = 4  # pieces per turn of the loop, so that one pair does not keep the others waiting
_HANDSHAKE = 10.0  # seconds for the key
_LINGER = 30.0  # seconds for the last bytes of a pair
_PEERS = 4096  # that shake hands or wait
_HALF_OPEN = 1024  # of them, that shake hands: a whole farm may come at once
_SIDES = 65536  # in all
_SHOWN = 1000  # letters of the keys that a tracker is told: it takes 4096, and 16 KiB of JSON
_NOW: int = getattr(socket, "MSG_DONTWAIT", 0)


class _Side:
    """One peer: its handshake, its wait, then half of a pair."""

    def __init__(self, proxy: Proxy, sock: Any, address: tuple[Any, ...]) -> None:
        self.name = f"{address[0]}:{address[1]}" if address else "local"
        self.host = str(address[0]) if address else "local"
        self.text = ""
        self.other: _Side | None = None
        self.closed = False
        self._proxy = proxy
        self._loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._sock = sock
        self._fd = sock.fileno()
        self._handshake = Handshake()
        self._out = memoryview(b"")  # what this side has not taken yet
        self._ending = False  # it is closed when that is gone
        tune(sock)
        self._timer = self._loop.call_later(_HANDSHAKE, self._late)
        self._loop.add_reader(self._fd, self._readable)

    # -- handshake -----------------------------------------------------------------------------------------------

    def _late(self) -> None:
        log.debug("proxy: %s did not present a key in time", self.name)
        self.close()

    def _readable(self) -> None:
        try:
            if self.other is not None:
                self._forward(self.other)
            else:
                self._shake_hands()
        except RemoteProtocolError as error:
            self._proxy.refusals.note(self.host, f"proxy: {self.name}: {error}")
            self.close()
        except OSError as error:
            log.debug("proxy: %s: %s", self.name, error)
            self.close()
        except Exception:
            log.exception("proxy: connection of %s failed", self.name)
            self.close()

    def _shake_hands(self) -> None:
        try:
            data = self._sock.recv(4096, _NOW)
        except (BlockingIOError, InterruptedError):
            return
        if not data:
            self.close()
            return
        found = None if self.text else self._handshake.receive_data(data)
        if self.text or (found is not None and (not isinstance(found, str) or self._handshake.rest)):
            raise RemoteProtocolError("expected nothing behind the key before a peer is found")
        if isinstance(found, str):
            self.text = found
            self._timer.cancel()
            self._proxy.greeted(self)

    def wait(self, seconds: float) -> None:
        """Wait for the other peer, so long."""
        self._timer = self._loop.call_later(seconds, self._waited, seconds)

    def _waited(self, seconds: float) -> None:
        log.info("proxy: nobody came for %s within %g s", self.name, seconds)
        self.refuse()

    def refuse(self, *, duplicate: bool = False) -> None:
        """Say why, and close."""
        with contextlib.suppress(OSError):
            self._sock.send(refusal(duplicate), _NOW)
        self.close()

    # -- forwarding ----------------------------------------------------------------------------------------------

    def join(self, other: _Side) -> None:
        """Forward between this peer and ``other`` from now on; each learns the other's key text."""
        for one, two in ((self, other), (other, self)):
            one._timer.cancel()
            one.other = two
        for one, two in ((self, other), (other, self)):
            one._send(memoryview(hello(two.text)))

    def _forward(self, other: _Side) -> None:
        """Receive, and pass on at once."""
        buffer = self._proxy.buffer
        for _ in range(_TURNS):
            try:
                count = self._sock.recv_into(buffer, _PIECE, _NOW)
            except (BlockingIOError, InterruptedError):
                return
            if not count:
                self.close()
                return
            self._proxy.forwarded += count
            other._send(buffer[:count])
            if other._out or other.closed:
                return

    def _send(self, data: memoryview) -> None:
        """Send what this side takes; keep the rest, and let the other side wait meanwhile."""
        if self._out:
            self._out = memoryview(bytes(self._out) + data)
            return
        left = self._try(data)
        if left:
            self._out = memoryview(bytes(left))
            self._loop.add_writer(self._fd, self._writable)
            if self.other is not None:
                self._loop.remove_reader(self.other._fd)

    def _try(self, data: memoryview) -> memoryview:
        try:
            while data:
                data = data[self._sock.send(data, _NOW) :]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._out = memoryview(b"")
            self.close()
            return memoryview(b"")
        return data

    def _writable(self) -> None:
        self._out = self._try(self._out)
        if self._out or self.closed:
            return
        self._loop.remove_writer(self._fd)
        if self._ending:
            self.close()
        elif self.other is not None:
            self._loop.add_reader(self.other._fd, self.other._readable)

    # -- end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End this connection, and the other of the pair when it has got everything."""
        if self.closed:
            return
        self.closed = True
        self._timer.cancel()
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._sock.close()
        self._proxy.forget(self)
        if self.other is not None:
            self.other._end_soon()

    def _end_soon(self) -> None:
        if self.closed:
            return
        if not self._out:
            self.close()
            return
        self._ending = True
        self._loop.remove_reader(self._fd)
        self._timer = self._loop.call_later(_LINGER, self.close)


class _ProxyRegistration(Registration):
    """Keeps the servers that wait at a proxy in a tracker's list."""

    def __init__(self, proxy: Proxy, tracker: tuple[str, int], level: int) -> None:
        self._proxy = proxy
        super().__init__("proxy", tracker, level)

    def _info(self) -> dict[str, Any]:
        keys = ",".join(self._proxy.pairing.keys)
        shown = keys if len(keys) <= _SHOWN else f"{keys[:_SHOWN]}..."
        return {"key": f"server:proxy[{shown}]", "addr": [None, self._proxy.port]}

    def _next_offer(self) -> Offer | None:
        found = self._proxy.pairing.issue()
        return None if found is None else Offer(found[0], self._proxy.port, found[1])

    def _withdraw(self, match_key: str) -> None:
        self._proxy.pairing.withdraw(match_key)

    def left(self, match_keys: Sequence[str]) -> None:
        """Note that a server with these match keys waits no longer."""
        for match_key in match_keys:
            self._used(match_key)
        self.changed()


class Proxy(Service):
    """A proxy; it listens when the constructor returns. TVM's words, and some of our own.

    Args:
        host: Address to listen on.
        port: First port to try; 0 for any free one.
        port_end: Ports up to this one, exclusive, are tried when ``port`` is taken.
        web_port: Listen for WebSockets too, at path ``/ws`` of this port; 0 for any free one.
        timeout_client: Seconds a client waits for its server.
        timeout_server: Seconds a server waits for its client.
        tracker_addr: Host and port of a tracker that hands the waiting servers out.
        index_page: HTML file to serve at ``/`` of the web port.
        resource_files: Further files: pairs of folder and file.
        silent: Log at level DEBUG instead of INFO.
        allow_origin: Host names under which browsers may reach the web port, besides numbers and our own.
        insecure: Allow to listen beyond loopback. Servers behind a proxy check their own tokens.
        loop: A running tornado IOLoop to live on; by default one in a daemon thread of its own.

    Attributes:
        forwarded: Bytes so far.

    Raises:
        AccessDenied: Beyond loopback without ``insecure``.
        OSError: No port is free.
    """

    kind = "proxy"
    warning = "lets everybody reach the servers behind it; those without a token are open to all"

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 9090,
        port_end: int = 9199,
        web_port: int | None = None,
        timeout_client: float = 600,
        timeout_server: float = 600,
        tracker_addr: tuple[str, int] | str | None = None,
        index_page: str | None = None,
        resource_files: Sequence[tuple[str, str]] | None = None,
        *,
        silent: bool = False,
        allow_origin: Sequence[str] = (),
        insecure: bool = False,
        loop: IOLoop | None = None,
    ) -> None:
        self.buffer = memoryview(bytearray(_PIECE))
        self.forwarded = 0
        self.pairing: Pairing[_Side] = Pairing(tracked=tracker_addr is not None)
        self._sides: set[_Side] = set()
        self._half_open: HalfOpen[_Side] = HalfOpen(_Side.close, _HALF_OPEN)
        self._timeouts = {"client": timeout_client, "server": timeout_server}
        self._tracker = None if tracker_addr is None else tracker_pair(tracker_addr)
        self._registration: _ProxyRegistration | None = None
        self._web: Any = None
        self._web_port = web_port
        self._pages = _pages(index_page, resource_files or ())
        self._allow_origin = allow_origin
        super().__init__(host, port, port_end, silent, insecure, loop)

    @property
    def web_port(self) -> int | None:
        """Port of the WebSocket; None if there is none."""
        port: int | None = None if self._web is None else self._web.port
        return port

    @property
    def waiting(self) -> int:
        """Peers that wait for another."""
        return len(self.pairing)

    @property
    def pairs(self) -> int:
        """Pairs between which it forwards."""
        return sum(side.other is not None for side in list(self._sides)) // 2

    def _start(self) -> None:
        if self._web_port is not None:
            from rpcnb.server.web import WebPort

            self._web = WebPort(
                self.host,
                self._web_port,
                self._admit,
                self._allow_origin,
                self._pages,
                "proxy",
                refusals=self.refusals,
            )
        if self._tracker is not None:
            self._registration = _ProxyRegistration(self, self._tracker, self._level)

    def _admit(self, sock: Any, address: tuple[Any, ...]) -> None:
        host = str(address[0]) if address else "local"
        if not self._half_open.admits(host):
            self._turn_away(sock, host, "too many unfinished handshakes")
        elif self._is_full() and not self._half_open.drop_oldest():
            self._turn_away(sock, host, f"{self.waiting} peers wait, {self.pairs} pairs are joined")
        else:
            try:
                side = _Side(self, sock, address)
            except OSError:
                sock.close()
                return
            self._sides.add(side)
            self._half_open.add(side, host)

    def _is_full(self) -> bool:
        """Tell whether no other peer may wait, or the process has few descriptors left."""
        waiting = len(self._half_open) + self.waiting
        return waiting >= within_descriptors(_PEERS, 0.4) or len(self._sides) >= within_descriptors(_SIDES, 0.6)

    def _turn_away(self, sock: Any, host: str, why: str) -> None:
        self.refusals.note(host, f"proxy: refused {host}: {why}")
        sock.close()

    def _give_way(self) -> bool:
        return self._half_open.drop_oldest()

    def greeted(self, side: _Side) -> None:
        """Join a peer that has presented its key with another, or let it wait."""
        self._half_open.forget(side)
        found = self.pairing.arrive(side, side.text)
        if isinstance(found, _Side):
            log.log(self._level, "proxy: joins %s and %s", side.name, found.name)
            self._changed(found)
            side.join(found)
        elif found == WAITS:
            side.wait(self._timeouts[KeyText.parse(side.text).role])
            self._changed(side)
        else:
            assert found in (DUPLICATE, MISMATCH)
            self.refusals.note(side.host, f"proxy: refused {side.name}: {found}")
            side.refuse(duplicate=found == DUPLICATE)

    def _changed(self, side: _Side) -> None:
        """Have the tracker told of a server that waits, or waits no longer."""
        if self._registration is not None:
            self._registration.left(list(self.pairing.match_keys_of(side)))

    def forget(self, side: _Side) -> None:
        """Note that a connection has ended."""
        self._sides.discard(side)
        self._half_open.forget(side)
        match_keys = list(self.pairing.match_keys_of(side))
        self.pairing.leave(side)
        if self._registration is not None and side.other is None:
            self._registration.left(match_keys)

    def _stop(self) -> None:
        for part in (self._registration, self._web):
            if part is not None:
                part.close()
        for side in list(self._sides):
            side.close()


def _pages(index: str | None, resources: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return path and file of what the web port serves besides the WebSocket."""
    pages = [("/", index)] if index else []
    for folder, file in resources:
        name = file.replace("\\", "/").rpartition("/")[2]
        pages.append((f"/{folder.strip('/')}/{name}".replace("//", "/"), file))
    return pages
