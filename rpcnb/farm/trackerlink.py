"""The way to a tracker: the exchanges of :mod:`rpcnb.farm.messages` over a socket, blocking or awaited."""

from __future__ import annotations

import asyncio
import contextlib
import select
import time
from typing import TYPE_CHECKING, Any

from rpcnb.errors import ConnectFailed, DeadlineExceeded, NotAnRpcServer, RemoteProtocolError
from rpcnb.farm.messages import GREETING, NOTHING, Frames, encode_frame
from rpcnb.link.aiolink import connect_awaiting
from rpcnb.link.dial import connect_socket, expired
from rpcnb.link.interrupt import TICK

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from rpcnb.farm.messages import Flow
    from rpcnb.link.interrupt import Guard
    from rpcnb.transport.address import Address
    from rpcnb.transport.deadline import Deadline

__all__ = ["TrackerLink", "converse"]

_PATIENCE = 1.0  # seconds without an answer, after which the user is told that we wait
_SECONDS = 10.0


def _ended(address: Address, greeted: bool) -> ConnectFailed:
    if greeted:
        return ConnectFailed(str(address), "queue", "the tracker closed the connection")
    return NotAnRpcServer(str(address), "handshake", "it closed the connection without a tracker's answer")


def _wrong(address: Address, error: RemoteProtocolError) -> ConnectFailed:
    return NotAnRpcServer(str(address), "handshake", f"{error}; is this a tracker?")


def converse(
    address: Address, flow: Flow, deadline: Deadline, guard: Guard, waits: Callable[[], object] | None = None
) -> Any:
    """Perform one exchange over a connection of its own; interruptible. Leaving early leaves the tracker's queue.

    Args:
        address: The tracker.
        flow: What to say.
        deadline: Of the whole exchange.
        guard: The operation's.
        waits: Called once if the tracker keeps us waiting.

    Raises:
        ConnectFailed: There is no tracker, or it went away.
        DeadlineExceeded: It did not answer in time.
    """
    sock = connect_socket(address, deadline, guard)
    try:
        return _Blocking(sock, address, deadline, guard, waits).run(flow)
    finally:
        sock.close()


class _Blocking:
    """A connection to a tracker that blocks its caller."""

    def __init__(
        self,
        sock: socket.socket,
        address: Address,
        deadline: Deadline,
        guard: Guard,
        waits: Callable[[], object] | None,
    ) -> None:
        self._sock = sock
        self._address = address
        self._deadline = deadline
        self._guard = guard
        self._waits = waits
        self._frames = Frames(of_tracker=True)
        self._poll = select.poll()

    def run(self, flow: Flow) -> Any:
        try:
            self._send(GREETING)
            while not self._frames.greeted:
                self._receive()
            step = next(flow)
            while True:
                if step is not None:
                    self._send(encode_frame(step))
                while (reply := self._frames.next_value()) is NOTHING:
                    self._receive()
                step = flow.send(reply)
        except StopIteration as end:
            return end.value
        except RemoteProtocolError as error:
            raise _wrong(self._address, error) from None
        except OSError as error:
            if isinstance(error, (ConnectFailed, DeadlineExceeded)):
                raise
            raise ConnectFailed(str(self._address), "queue", f"{error.strerror}") from None

    def _wait(self, events: int) -> None:
        self._poll.register(self._sock, events)
        since = time.monotonic()
        while not self._guard.poll(self._poll, min(self._deadline.left(), TICK)):
            if self._waits is not None and time.monotonic() - since > _PATIENCE:
                waits, self._waits = self._waits, None
                waits()

    def _send(self, data: bytes) -> None:
        while data:
            self._wait(select.POLLOUT)
            data = data[self._sock.send(data) :]

    def _receive(self) -> None:
        self._wait(select.POLLIN)
        data = self._sock.recv(65536)
        if not data:
            raise _ended(self._address, self._frames.greeted)
        self._frames.receive_data(data)


class TrackerLink:
    """A connection to a tracker for coroutines; exchanges run one after the other."""

    def __init__(self, sock: socket.socket, address: Address) -> None:
        self._sock = sock
        self._address = address
        self._frames = Frames(of_tracker=True)
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, address: Address, deadline: Deadline) -> TrackerLink:
        """Connect and shake hands.

        Raises:
            ConnectFailed: There is no tracker.
        """
        link = cls(await connect_awaiting(address, deadline), address)
        try:
            await asyncio.wait_for(link._greet(), deadline.left())
        except (asyncio.TimeoutError, DeadlineExceeded):
            link.close()
            raise expired(str(address), "handshake", deadline.exceeded()) from None
        except BaseException:
            link.close()
            raise
        return link

    async def _greet(self) -> None:
        await self._send(GREETING)
        while not self._frames.greeted:
            await self._receive()

    async def run(self, flow: Flow, seconds: float | None = _SECONDS) -> Any:
        """Perform an exchange; after an error or a cancellation the connection is of no use any more.

        Raises:
            ConnectFailed: The tracker went away.
            TimeoutError: It did not answer within ``seconds``.
        """
        async with self._turn:
            return await asyncio.wait_for(self._run(flow), seconds)

    async def _run(self, flow: Flow) -> Any:
        try:
            step = next(flow)
            while True:
                if step is not None:
                    await self._send(encode_frame(step))
                while (reply := self._frames.next_value()) is NOTHING:
                    await self._receive()
                step = flow.send(reply)
        except StopIteration as end:
            return end.value
        except RemoteProtocolError as error:
            raise _wrong(self._address, error) from None

    async def _send(self, data: bytes) -> None:
        try:
            await self._loop.sock_sendall(self._sock, data)
        except OSError as error:
            raise ConnectFailed(str(self._address), "queue", f"{error.strerror}") from None

    async def _receive(self) -> None:
        try:
            data = await self._loop.sock_recv(self._sock, 65536)
        except OSError as error:
            raise ConnectFailed(str(self._address), "queue", f"{error.strerror}") from None
        if not data:
            raise _ended(self._address, self._frames.greeted)
        try:
            self._frames.receive_data(data)
        except RemoteProtocolError as error:
            raise _wrong(self._address, error) from None

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._sock.close()
