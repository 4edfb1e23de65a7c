"""An async session's link: all I/O in callbacks of the running event loop.

A waiter that is cancelled abandons its ticket; no byte is ever read or written in a task of the user's, so no
cancellation can tear the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import TYPE_CHECKING, Any

from rpcnb.errors import ConnectFailed, DeadlineExceeded, NotAnRpcServer, RpcError, WrongLoop
from rpcnb.link.dial import ends_head, expired, explain_errno, found_hosts, greet, look_up, no_resource, secured
from rpcnb.link.look import LookAgain
from rpcnb.link.wire import Ticket, Wire, stop_waiting
from rpcnb.protocol.shortcut import write_call
from rpcnb.transport import forks
from rpcnb.transport.sockets import tune
from rpcnb.transport.within import within

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rpcnb.link.dial import ClientKey, SessionTicket
    from rpcnb.protocol.handshake import KeyText
    from rpcnb.protocol.messages import Request
    from rpcnb.transport.address import Address
    from rpcnb.transport.deadline import Deadline

__all__ = ["AsyncLink", "connect_awaiting", "dial"]

_FLUSH_EVERY = 0.1


class AsyncLink:
    """An async session's way to its server; belongs to one event loop."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.peer = wire.peer
        self.garbage = wire.garbage
        self.lane = 0  # number among its session's connections
        self.ticket: SessionTicket | None = None  # what further connections of its session present
        # Told of calls that were given up in the middle, to cancel them at the server.
        self.on_abandoned: Callable[[int, list[int]], object] | None = None
        self.on_tick: Callable[[], object] | None = None  # called ten times a second
        self.loop = asyncio.get_running_loop()
        self._writing = False
        self._keep_alive: Callable[[float], object] | None = getattr(wire.sock, "keep_alive", None)  # a WebSocket's
        self._descriptor = wire.sock.fileno()
        wire.before_close = self._stop_watching
        if wire.is_stock:
            wire.on_more = LookAgain(wire, self.soon, self._flush_soon).more
        self.loop.add_reader(wire.sock, self._readable)
        forks.tell(self)
        self._housekeeper: asyncio.TimerHandle | None = None
        self._dropped: Any = None  # what else is to be closed with it, as nobody has the session any more
        self.housekeeping()

    def send(self, request: Request) -> Ticket:
        """Queue ``request``, frees of finalizers in front of it, and send what the socket takes."""
        wire = self.wire
        with wire.lock:
            wire.queue_garbage()
            ticket = wire.queue(request)
            if not self._writing:
                self._flush()
        return ticket

    send_soon = send  # a loop's turn sends many at once as it is

    def call(self, handle: int, args: tuple[Any, ...]) -> Ticket | None:
        """Send a call the short way if all its arguments are plain; None when nothing has been sent."""
        packet = write_call(handle, args)
        wire = self.wire
        if packet is None or wire.ended is not None:
            return None
        with wire.lock:
            if wire.tickets or wire.out or wire.garbage or wire.held:
                wire.queue_garbage()
                ticket = wire.queue_call(packet, handle)
            else:
                ticket = wire.send_call(packet, handle)
                if not wire.out and wire.ended is None:
                    return ticket
            if not self._writing:
                self._flush()
        return ticket

    def _flush(self) -> None:
        """Send; then watch for writability exactly while something is left."""
        blocked = not self.wire.flush()
        if blocked != self._writing and self.wire.ended is None:
            self._writing = blocked
            if blocked:
                self.loop.add_writer(self.wire.sock, self._writable)
            else:
                self.loop.remove_writer(self.wire.sock)

    def _flush_soon(self) -> None:
        """Send on what the socket did not take."""
        with self.wire.lock:
            if self.wire.out and not self._writing:
                self._flush()

    def _writable(self) -> None:
        with self.wire.lock:
            self._flush()

    def _readable(self) -> None:
        wire = self.wire
        with wire.lock:
            wire.fill()
            if wire.out and not self._writing:
                self._flush()  # what waited for a reply

    def _stop_watching(self) -> None:
        """Stop watching a socket that is about to be closed: its number may be another one's soon."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0 and not self.loop.is_closed():
            self.loop.remove_reader(descriptor)
            self.loop.remove_writer(descriptor)

    @property
    def runs_elsewhere(self) -> bool:
        """Tell whether the link's loop runs in another thread: then only it may touch the link."""
        try:
            return self.loop.is_running() and asyncio.get_running_loop() is not self.loop
        except RuntimeError:
            return self.loop.is_running()

    def check_loop(self, name: str) -> None:
        """Refuse to be used by another event loop than its own.

        Raises:
            WrongLoop: The text names both.
        """
        here = asyncio.get_running_loop()
        if here is not self.loop:
            state = ", which is closed" if self.loop.is_closed() else ""
            raise WrongLoop(
                f"{name} belongs to the event loop {self.loop!r} in which it was opened{state}; this is {here!r}: "
                "open a session here (await rpcnb.connect_async), or use rpcnb.connect, which needs no loop"
            )

    def forked(self) -> None:
        """In a forked child: this connection, and what its loop watches, is the parent's."""
        self._descriptor = -1
        self.wire.forked()

    async def wait(self, ticket: Ticket) -> None:
        """Return when ``ticket`` is done."""
        if not ticket.done:
            await self.settled(ticket)

    def settled(self, ticket: Ticket) -> asyncio.Future[None]:
        """Return what is done when ``ticket`` is, which it is not yet."""
        future: asyncio.Future[None] = self.loop.create_future()

        def wake() -> None:
            if not (future.done() or self.loop.is_closed()):
                future.set_result(None)

        ticket.waker = wake
        return future

    def abandon(self, tickets: list[Any]) -> None:
        """Give up an operation's tickets; what is owed is received and dropped as it comes."""
        calls = stop_waiting(self.wire, tickets)
        if calls and self.on_abandoned is not None and not self.loop.is_closed():
            self.on_abandoned(self.lane, calls)

    def resume_when_done(self, ticket: Ticket, operation: Any) -> bool:
        """Have ``operation.resume()`` called when ``ticket`` is done; True if it is done already."""
        if ticket.done:
            return True
        ticket.waker = lambda: self.loop.is_closed() or self.loop.call_soon(operation.resume)
        return False

    def soon(self, seconds: float, function: Callable[[], object]) -> None:
        """Call ``function`` after some time."""
        self.loop.call_later(seconds, function)

    def settle_in_background(self) -> None:
        """Nothing is to be done: the loop receives what is owed."""

    def housekeeping(self) -> None:
        """Send the frees that finalizers noted, every tenth of a second while there are any."""
        if self._dropped is not None:
            for one in (*self._dropped, self):
                one.close()
            return
        if self.on_tick is not None:
            self.on_tick()
        if self.wire.ended is not None or self.loop.is_closed():
            return
        if self._keep_alive is not None:
            self._keep_alive(time.monotonic())
        if self.garbage:
            with self.wire.lock:
                self.wire.queue_garbage()
                if not self._writing:
                    self._flush()
        self._housekeeper = self.loop.call_later(_FLUSH_EVERY, self.housekeeping)

    def drop(self, others: Sequence[Any]) -> None:
        """Close it soon, and others with it: for finalizers, which take no lock and may run in any thread."""
        self._dropped = others
        if self.loop.is_closed():  # nobody else uses it
            self.wire.sock.close()

    def fail(self, error: RpcError) -> None:
        """End the connection with ``error`` for everybody who waits."""
        if self.runs_elsewhere:
            self.loop.call_soon_threadsafe(self.fail, error)
            return
        with self.wire.lock:
            if self.wire.ended is None:
                self.wire.fail(error)

    def conclude(self, error: RpcError) -> None:
        """Tell everybody who waits why the connection was lost; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self._conclude, error)

    def _conclude(self, error: RpcError) -> None:
        with self.wire.lock:
            self.wire.conclude(error)

    def close(self) -> None:
        """Say goodbye and close; idempotent, never waits, from any thread."""
        if self.runs_elsewhere:
            self.loop.call_soon_threadsafe(self.close)
            return
        if self._housekeeper is not None:
            self._housekeeper.cancel()
            self._housekeeper = None
        with self.wire.lock:
            self.garbage.clear()
            self.wire.shutdown()


async def dial(address: Address, key: ClientKey, deadline: Deadline) -> tuple[socket.socket, KeyText]:
    """Resolve, connect and shake hands within ``deadline``."""
    sock = await connect_awaiting(address, deadline)
    try:
        seconds = deadline.left()
        return sock, await within(_shake_hands(sock, key, str(address)), seconds)
    except (asyncio.TimeoutError, DeadlineExceeded):
        sock.close()
        raise expired(str(address), "handshake", deadline.exceeded()) from None
    except BaseException:
        sock.close()
        raise


async def connect_awaiting(address: Address, deadline: Deadline) -> Any:
    """Resolve and connect within ``deadline``; to a WebSocket too."""
    with no_resource(str(address), "connect"):
        return await _connect_awaiting(address, deadline)


async def _connect_awaiting(address: Address, deadline: Deadline) -> Any:
    phase = "resolve"
    try:
        seconds = deadline.left()
        found = found_hosts(address, await within(_look_up(address), seconds))
        phase = "connect"
        sock = await _connect(found, address, deadline)
        if not (address.is_web or address.is_secure):
            return sock
        phase = "handshake"
        try:
            if address.is_secure:
                seconds = deadline.left()
                sock = await within(_secure(sock, address, deadline), seconds)
            if address.is_web:
                seconds = deadline.left()
                return await within(_upgrade(sock, address), seconds)
        except BaseException:  # also what has not begun when it is cancelled
            sock.close()
            raise
        return sock
    except (asyncio.TimeoutError, DeadlineExceeded):
        raise expired(str(address), phase, deadline.exceeded()) from None


async def _look_up(address: Address) -> Any:
    return await _reported(lambda report: look_up(address, report))


async def _reported(begin: Callable[[Callable[[Any], object]], object]) -> Any:
    """Await what a thread reports once."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def report(found: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            loop.call_soon_threadsafe(settle, found)

    def settle(found: Any) -> None:
        if not future.done():
            future.set_result(found)

    begin(report)
    return await future


async def _connect(found: list[Any], address: Address, deadline: Deadline) -> socket.socket:
    loop = asyncio.get_running_loop()
    last = "no address"
    for family, kind, protocol, _, where in found:
        sock = socket.socket(family, kind, protocol)
        try:
            tune(sock)
            await asyncio.wait_for(loop.sock_connect(sock, where), deadline.left())
            return sock
        except OSError as error:
            sock.close()
            if isinstance(error, (TimeoutError, RpcError)):
                raise
            last = explain_errno(error.errno or 0, address)
        except BaseException:
            sock.close()
            raise
    raise ConnectFailed(str(address), "connect", last)


async def _upgrade(sock: socket.socket, address: Address) -> Any:
    """Ask for a WebSocket."""
    from rpcnb.transport.websocket import WebSocket, check_answer, upgrade_request

    request, expected = upgrade_request(address)
    await asyncio.get_running_loop().sock_sendall(sock, request)
    head = bytearray()
    while not ends_head(sock, head, address):
        await _readable(sock)
    check_answer(address, bytes(head), expected)
    return WebSocket(sock, client=True)


async def _secure(sock: socket.socket, address: Address, deadline: Deadline) -> socket.socket:
    from rpcnb.transport.tls import secure

    return secured(address, await _reported(lambda report: secure(sock, address, deadline.left(), report)))


async def _readable(sock: socket.socket) -> None:
    """Wait until there is something to receive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await future
    finally:
        loop.remove_reader(sock)


async def _shake_hands(sock: socket.socket, key: ClientKey, address: str) -> KeyText:
    loop = asyncio.get_running_loop()
    steps = greet(key, address)
    data = b""
    try:
        while True:
            out = steps.send(data) if data else next(steps)
            if out is not None:
                await loop.sock_sendall(sock, out)
                data = b""
                continue
            try:
                data = await loop.sock_recv(sock, 4096)
            except OSError as error:
                raise NotAnRpcServer(address, "handshake", f"{error.strerror}") from None
            if not data:
                steps.send(b"")
    except StopIteration as end:
        result: KeyText = end.value
        return result
