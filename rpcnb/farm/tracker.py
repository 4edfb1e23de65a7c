"""The tracker: hands out boards by key, to rpcnb's and stock TVM's clients alike.

::

    with rpcnb.Tracker(port=9190) as tracker:
        board = rpcnb.Server(port=0, key="rpi", tracker_addr=("127.0.0.1", tracker.port))
        session = rpcnb.connect(f"tracker://127.0.0.1:{tracker.port}/rpi")

What it decides is in :mod:`rpcnb.farm.tracking`; here are the sockets. A peer that breaks the rules loses its own
connection, with one line in the log.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING, Any

from tornado.iostream import IOStream, StreamClosedError

from rpcnb.errors import RemoteProtocolError
from rpcnb.farm.messages import GREETING, NOTHING, Frames, encode_frame, parse_request
from rpcnb.farm.tracking import Tracking
from rpcnb.transport.halfopen import within_descriptors
from rpcnb.transport.listen import Service
from rpcnb.transport.sockets import tune

if TYPE_CHECKING:
    import socket

    from tornado.ioloop import IOLoop

__all__ = ["Tracker"]

log = logging.getLogger(__name__)

_SWEEP = 0.5  # seconds
_HANDSHAKE = 10.0  # seconds for the magic word
_UNREAD = 4 << 20  # bytes of replies that a peer may leave unread
_RATE, _BURST = 1000.0, 2000.0  # requests a second of one connection, and at once
_PAGE = 4096.0  # bytes, said or answered, that cost as much as a request
_TURN = 0.002  # seconds that one connection may keep the others waiting
_CONNECTIONS = 16384
_LOOKED_AT = 512  # connections, of which one is ended when there are too many: all would take milliseconds


class _Client:
    """One connection; it is read as fast as it may ask, by number and by bytes."""

    def __init__(self, tracker: Tracker, sock: socket.socket, address: tuple[Any, ...]) -> None:
        self.host = str(address[0]) if address else ""
        self.name = f"{address[0]}:{address[1]}" if address else "local"
        self._tracker = tracker
        self._frames = Frames()
        self._known = False
        self._allowance = _BURST
        self._since = self._turn = time.monotonic()
        tune(sock)
        self._stream: IOStream = IOStream(sock, max_write_buffer_size=_UNREAD)
        self._overtime = tracker.io_loop.call_later(_HANDSHAKE, self._greeting_late)

    def _greeting_late(self) -> None:
        if not self._known:
            self.close()

    def send(self, value: Any) -> None:
        """Send a value; a peer that does not read is dropped."""
        self.send_frame(encode_frame(value))

    def send_frame(self, frame: bytes) -> None:
        """Send a frame that has been made already; likewise."""
        if self._stream.closed():
            return
        self._allowance -= len(frame) / _PAGE
        try:
            sent = self._stream.write(frame)
        except Exception as error:  # a full buffer, a closed socket
            self._refused(f"dropped: {error or type(error).__name__}")
            self._stream.close()  # the reader notices, and forgets the rest
            return
        sent.add_done_callback(lambda future: future.exception())

    def _refused(self, text: str) -> None:
        self._tracker.refusals.note(self.host, f"tracker: {self.name} {text}")

    async def run(self) -> None:
        """Serve this connection until its end."""
        try:
            while True:
                data = await self._stream.read_bytes(65536, partial=True)
                self._allowance -= len(data) / _PAGE
                self._frames.receive_data(data)
                if self._frames.greeted and not self._known:
                    self._known = True
                    self._stream.write(GREETING).add_done_callback(lambda future: future.exception())
                    self._tracker.tracking.arrive(self)
                while (value := self._frames.next_value()) is not NOTHING:
                    await self._wait_for_allowance()
                    if self._stream.closed():
                        return
                    self._tracker.tracking.handle(self, parse_request(value))
                await self._let_others()
        except RemoteProtocolError as error:
            self._refused(f"was refused: {error}")
        except StreamClosedError:
            pass
        except Exception:
            log.exception("tracker: connection of %s failed", self.name)
        finally:
            self.close()

    async def _wait_for_allowance(self) -> None:
        """Wait while this peer has asked for more than it may."""
        now = time.monotonic()
        self._allowance = min(_BURST, self._allowance + (now - self._since) * _RATE) - 1
        self._since = now
        if self._allowance < 0:
            await asyncio.sleep(-self._allowance / _RATE)
        await self._let_others()

    async def _let_others(self) -> None:
        """Let the loop serve others, now and then: what has come already is read and answered without a pause."""
        if time.monotonic() - self._turn > _TURN:
            await asyncio.sleep(0)
            self._turn = time.monotonic()

    def close(self) -> None:
        """End the connection; what it offered and asked for goes with it."""
        self._tracker.io_loop.remove_timeout(self._overtime)
        self._stream.close()
        self._tracker.forget(self)


class Tracker(Service):
    """A tracker; it listens when the constructor returns.

    Args:
        host: Address to listen on.
        port: First port to try; 0 for any free one.
        port_end: Ports up to this one, exclusive, are tried when ``port`` is taken.
        silent: Log at level DEBUG instead of INFO.
        reuse_addr: TVM's; always so.
        timeout: TVM's; unused.
        insecure: Allow to listen beyond loopback: whoever reaches it sees the boards, and gets those that have no
            token of their own.
        loop: A running tornado IOLoop to live on; by default one in a daemon thread of its own.

    Raises:
        AccessDenied: Beyond loopback without ``insecure``.
        OSError: No port of the range is free.
    """

    kind = "tracker"
    warning = "lets everybody see the boards, and use those without a token"

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 9190,
        port_end: int = 9199,
        silent: bool = False,
        reuse_addr: bool = True,
        timeout: float | None = None,
        *,
        insecure: bool = False,
        loop: IOLoop | None = None,
    ) -> None:
        self.tracking = Tracking(time.monotonic, self._asked_to_stop)
        self._clients: dict[_Client, asyncio.Task[None] | None] = {}
        super().__init__(host, port, port_end, silent, insecure, loop)

    @property
    def stop_key(self) -> str:
        """What a peer must present to end it."""
        return self.tracking.stop_key

    @property
    def boards(self) -> list[dict[str, Any]]:
        """What each connection that offers boards is doing; see :meth:`TrackerSession.summary`."""
        found: list[dict[str, Any]] = self.tracking.summary(boards=True)["boards"]
        return found

    def _start(self) -> None:
        self._sweeper = asyncio.ensure_future(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP)
            try:
                self.tracking.sweep()
            except Exception:
                log.exception("tracker: looking after the queues failed")

    def _admit(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        if len(self._clients) >= within_descriptors(_CONNECTIONS, 0.75) and not self._give_way():
            host = str(address[0]) if address else "local"
            self.refusals.note(host, f"tracker: refused {host}: {len(self._clients)} connections are open")
            sock.close()
            return
        try:
            client = _Client(self, sock, address)
        except OSError:
            sock.close()
            return
        self._clients[client] = None
        self._clients[client] = asyncio.ensure_future(client.run())

    def _give_way(self) -> bool:
        """End the oldest connection that is of the least use; never one that offers or asks."""
        clients = list(self._clients)
        if len(clients) > _LOOKED_AT:
            clients = random.sample(clients, _LOOKED_AT)
        least = min(clients, key=self.tracking.use_of, default=None)
        if least is None or self.tracking.use_of(least) > 1:
            return False
        least.close()
        return True

    def forget(self, client: _Client) -> None:
        """Note that a connection has ended."""
        self._clients.pop(client, None)
        self.tracking.leave(client)

    def _asked_to_stop(self) -> None:
        log.log(self._level, "tracker on %s ends: it was asked to", self.address)
        self.io_loop.call_later(0.05, self._end_by_request)  # behind its answer

    def _end_by_request(self) -> None:
        if not self.closed:
            self.closed = True
            self._end()
            if self._own_loop is not None:
                self._own_loop.stop()

    def _stop(self) -> None:
        self._sweeper.cancel()
        for client, task in list(self._clients.items()):
            client.close()
            if task is not None:
                task.cancel()

    @property
    def address_pair(self) -> tuple[str, int]:
        """Host and port, as TVM's ``tracker_addr`` wants them."""
        return self.host, self.port
