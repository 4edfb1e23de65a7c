"""The client's side of one connection: bytes in, bytes out, tickets for the replies that are owed.

A :class:`Wire` never waits. Whoever may touch the socket (a blocked caller, the I/O thread, an event loop) calls
:meth:`Wire.flush` and :meth:`Wire.fill` when it is ready; all under :attr:`Wire.lock`.

An exchange that its caller gave up does not end the session: the rest of an upload is sent as zeros, the data of a
download goes nowhere, and the reply is dropped when it comes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any

from rpcnb.errors import ForkedSession, RemoteProtocolError, RpcError, SessionClosed, SessionLost, SessionTimeout
from rpcnb.protocol.codes import Code, Role
from rpcnb.protocol.endpoint import Endpoint, State
from rpcnb.protocol.flows import TIMEOUT_PREFIX, undo
from rpcnb.protocol.messages import CallFunc, CopyFromRemote, CopyToRemote, Raised, Shutdown, Syscall, encode_packet
from rpcnb.protocol.shortcut import NOT_PLAIN, read_result, write_call
from rpcnb.transport.spin import receiving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rpcnb.protocol.codes import Limits
    from rpcnb.protocol.handshake import KeyText
    from rpcnb.protocol.messages import Reply, Request
    from rpcnb.protocol.sequence import Buffer
    from rpcnb.transport.address import Address

__all__ = ["LOOK_AGAIN", "PIECE", "Ticket", "Wire", "make_wire", "stop_waiting"]

log = logging.getLogger(__name__)

PIECE = 4 << 20  # bytes per system call at most: an interrupt is looked for between two of them
_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)
_NOW: int = getattr(socket, "MSG_DONTWAIT", 0)
# How long a caller waits in the receiving call itself, as SO_RCVTIMEO (until the second timer tick, 8 ms): a poll
# before it costs 2 us. An interrupt or another thread's word is noticed after that.
_MOMENT = struct.pack("ll", 0, 1000)
_GATHER = 64  # buffers per system call
_BULK = 1 << 16  # buffers from here on are counted
_CALL = CallFunc(0)  # stands for every call made the short way: only what kind of request it is matters
# What makes an event-driven stock server look at its input (link/look.py): nobody waits for the reply.
LOOK_AGAIN = Syscall(Code.GET_GLOBAL_FUNC, ("rpcnb.look_again",))
_ZEROS = memoryview(bytes(1 << 20))


class Ticket:
    """A reply that is owed.

    Attributes:
        reply: The reply, once ``done``.
        error: Why there will be none, once ``done``.
        waker: Called when done, by whoever received the reply; then forgotten, as it holds an operation, which may
            hold the ticket.
        abandoned: Nobody waits; what the reply brings is released.
        taken: Its reply belongs to the operation that waited, with whatever it brought.
        moved: Bytes of its bulk data that have moved, either way.
        value: For a call made the short way: the plain result, or NOT_PLAIN if there is a ``reply`` instead.
        ordinal: Which request of its connection it is, kInitServer being the first.
        handle: Of the function that a call made the short way is of; 0 for all others.
    """

    __slots__ = (
        "abandoned", "done", "error", "handle", "moved", "ordinal", "reply", "request", "taken", "value", "waker",
    )  # fmt: skip

    def __init__(self, request: Request | None, handle: int = 0) -> None:
        self.request = request
        self.handle = handle
        self.reply: Reply | None = None
        self.error: Exception | None = None
        self.done = False
        self.abandoned = False
        self.taken = False
        self.value: Any = None
        self.moved = 0
        self.ordinal = 0
        self.waker: Callable[[], object] | None = None

    def owed_at(self, sock: socket.socket) -> tuple[socket.socket | None, int | None]:
        """Return which connection owes it, where ``sock`` is waited on, and the number if it is a started call."""
        return sock, None

    @property
    def failure(self) -> Exception:
        """Why there is no reply."""
        assert self.error is not None
        return self.error

    @property
    def called(self) -> int:
        """The handle of the function that it is a call of; 0 if it is none."""
        return self.handle or (self.request.handle if type(self.request) is CallFunc else 0)

    def result(self) -> Reply:
        """Take the reply, or raise what ended the wait for it."""
        self.taken = True
        if self.reply is None:
            raise self.failure
        return self.reply


class Wire:
    """One connection of a client, driven from outside.

    Args:
        sock: Connected, non-blocking.
        endpoint: The client's side of the conversation.
        peer: How errors name the peer.
    """

    def __init__(self, sock: socket.socket, endpoint: Endpoint, peer: str) -> None:
        self.sock = sock
        self.endpoint = endpoint
        self.peer = peer
        self.lock = threading.RLock()  # a signal's handler or a finalizer may come while its own thread has it
        self.tickets: deque[Ticket] = deque()
        self.out: deque[tuple[Buffer, Ticket | None]] = deque()
        # Requests that release things; finalizers append here, without a lock and without I/O.
        self.garbage: deque[Request] = deque()
        # Requests on the way at most; None for any number. Stock's event-driven servers stall behind a parked one.
        self.depth: int | None = None
        self.held: deque[list[tuple[Buffer, Ticket | None]]] = deque()  # requests that must not be sent yet
        self.ended: RpcError | None = None
        # Finds out why it was lost, and has it concluded then.
        self.inquire: Callable[[SessionLost], object] | None = None
        self.asking = False  # that goes on
        self.is_parents = False  # this process was forked: the connection stays the parent's
        self.requests = 0  # sent so far
        self.bytes_sent = 0
        self.bytes_received = 0
        self.is_stock = False  # the peer is not rpcnb
        self.on_more: Callable[[], object] | None = None  # called when a reply has come and others are owed
        self.before_close: Callable[[], object] | None = None  # called before the socket's number may be another's
        # Tells whether this very thread has the lock: in a signal's handler, or a finalizer.
        self.is_in_step: Callable[[], bool] = self.lock._is_owned  # type: ignore[attr-defined]  # not in the stub
        self._send = sock.send
        self._receive = sock.recv_into
        self._has_more: Callable[[], bool] | None = getattr(sock, "has_more", None)  # of TLS
        # For each wait of a moment what to call as `recv_into`; for the pump alone, without lock. None: it cannot wait.
        self.waits: Iterator[Callable[..., int]] | None = None

    def wait_in_receive(self) -> None:
        """Let the pump wait in receiving, where the system can still be asked not to."""
        if _NOW:
            self.sock.setblocking(True)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _MOMENT)
            self.waits = receiving(self._receive)

    # -- all below: with the lock held -----------------------------------------------------------------------------

    def queue(self, request: Request) -> Ticket:
        """Queue a request and return the ticket of its reply.

        Raises:
            ArgumentError: A value cannot travel; nothing is queued.
            SessionLost: The connection has ended; or SessionClosed, SessionTimeout.
        """
        if self.ended is not None:
            return self._queue_in_vain(Ticket(request))
        ticket = Ticket(request)
        buffers = self.endpoint.send(request)
        self.requests += 1
        ticket.ordinal = self.requests
        self.tickets.append(ticket)
        payload = request.payload if type(request) is CopyToRemote else None
        parts = [(buffer, ticket if buffer is payload or len(buffer) >= _BULK else None) for buffer in buffers]
        self._post(parts)
        return ticket

    def _post(self, parts: list[tuple[Buffer, Ticket | None]]) -> None:
        """Have a request sent, when its turn comes; its ticket is noted."""
        if self.depth is None or len(self.tickets) <= self.depth:
            self.out.extend(parts)
        else:
            self.held.append(parts)

    def _note_call(self, handle: int) -> Ticket:
        """Note a call made the short way; returns the ticket of its reply."""
        self.endpoint.note_sent(_CALL)
        ticket = Ticket(_CALL, handle)
        ticket.value = NOT_PLAIN
        self.requests += 1
        ticket.ordinal = self.requests
        self.tickets.append(ticket)
        return ticket

    def send_call(self, packet: bytes, handle: int) -> Ticket:
        """Send a call whose packet has been made by the short way; nothing else waits to be sent."""
        ticket = self._note_call(handle)
        try:
            sent = self._send(packet, _NOW)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._drain_then_fail(error)
            return ticket
        self.bytes_sent += sent
        if sent < len(packet):
            self.out.append((memoryview(packet)[sent:], None))
        return ticket

    def queue_call(self, packet: bytes, handle: int) -> Ticket:
        """Queue a call whose packet has been made by the short way.

        Raises:
            SessionLost: The connection has ended; or SessionClosed, SessionTimeout.
        """
        if self.ended is not None:
            return self._queue_in_vain(Ticket(_CALL, handle))
        ticket = self._note_call(handle)
        self._post([(packet, None)])
        return ticket

    def _queue_in_vain(self, ticket: Ticket) -> Ticket:
        """Have a ticket settled with the others once it is known why the connection was lost; else raise that."""
        assert self.ended is not None
        if not self.asking:
            raise self.ended.again()
        ticket.value = NOT_PLAIN
        self.tickets.append(ticket)
        return ticket

    def queue_calls(self, handle: int, calls: list[tuple[Any, ...]]) -> list[Ticket]:
        """Queue many calls of one function, plain ones by the short way and all in as few buffers as can be.

        Raises:
            ArgumentError: A value cannot travel; nothing is queued.
        """
        if self.ended is not None:
            return [self._queue_in_vain(Ticket(_CALL, handle)) for _ in calls]
        packets = [write_call(handle, args) or b"".join(encode_packet(CallFunc(handle, args))) for args in calls]
        if self.depth is not None:
            return [self.queue_call(packet, handle) for packet in packets]
        tickets = [self._note_call(handle) for _ in calls]
        self.out.append((b"".join(packets), None))
        return tickets

    def queue_garbage(self) -> None:
        """Queue the releases that were noted; their replies are dropped."""
        while self.garbage and self.ended is None:
            self.queue(self.garbage.popleft())

    def flush(self) -> bool:
        """Send what the socket takes, one piece at most of bulk data; returns True if nothing is left."""
        out = self.out
        while out:
            try:
                if len(out) == 1:
                    buffer = out[0][0]
                    sent = self._send(buffer if len(buffer) <= PIECE else memoryview(buffer)[:PIECE], _NOW)
                else:
                    sent = self.sock.sendmsg(_gather(out), (), _NOW)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                self._drain_then_fail(error)
                return True
            self.bytes_sent += sent
            if len(out) == 1 and sent == len(out[0][0]) and out[0][1] is None:
                out.popleft()
            elif not self._consume(sent):
                return False
        return True

    def _consume(self, sent: int) -> bool:
        """Drop ``sent`` bytes from the output; returns False if they ended inside a buffer."""
        out = self.out
        while sent:
            buffer, ticket = out[0]
            if ticket is not None:
                ticket.moved += min(sent, len(buffer))
            if sent < len(buffer):
                out[0] = (memoryview(buffer)[sent:], ticket)
                return False
            sent -= len(buffer)
            out.popleft()
        return True

    def fill(self) -> bool:
        """Receive, and settle the tickets whose replies are complete; False if nothing had come."""
        got = self._fill()
        if self._has_more is not None:
            self._fill_rest()
        return got

    def _fill_rest(self) -> None:
        """Receive what is kept where no poll sees it."""
        assert self._has_more is not None
        while self.ended is None and self._has_more():
            self._fill()

    def _fill(self) -> bool:
        # A stock server has no TCP_NODELAY: each reply after the first waits for our delayed ACK (44 ms) without it.
        if self.is_stock and _QUICKACK is not None and len(self.tickets) != 1:
            with contextlib.suppress(OSError):  # not TCP: a program's; or it has just ended, which receiving tells
                self.sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        view = self.endpoint.get_buffer()
        try:
            count = self._receive(view, min(len(view), PIECE), _NOW)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self.lost(error)
            return False
        if len(self.tickets) == 1 and self.tickets[0].value is NOT_PLAIN:
            self.take_value(view, count)
        else:
            self.take(count)
        return True

    def lost(self, error: OSError) -> None:
        """End the connection after a system call has failed."""
        self._lose(f"{self.peer}: {error.strerror or error}")

    def take(self, count: int) -> None:
        """Go on with ``count`` bytes that have been received into the endpoint's buffer."""
        endpoint, tickets = self.endpoint, self.tickets
        if count == 0:
            self._ended_by_peer()
            return
        self.bytes_received += count
        endpoint.received(count)
        while tickets and tickets[0].value is NOT_PLAIN:
            value = endpoint.take_result()
            if value is NOT_PLAIN:
                break
            self._settle_plainly(value)
        if endpoint.idle:
            return
        if endpoint.bulk_left or count > _BULK:
            self._count_received(count)
        self.settle()

    def take_value(self, view: memoryview, count: int) -> Any:
        """Go on with what has been received into ``view`` while one ticket is owed, of a call made the short way.

        Returns:
            The plain result if it is settled by that; else NOT_PLAIN.
        """
        value = read_result(view, count) if self.endpoint.idle else NOT_PLAIN
        if value is NOT_PLAIN:
            self.take(count)
        else:
            self.bytes_received += count
            self._settle_plainly(value)
        if self._has_more is not None:
            self._fill_rest()
        return value

    def _settle_plainly(self, value: Any) -> None:
        """Settle the first ticket, of a call made the short way, with its plain result."""
        ticket = self.tickets.popleft()
        self.endpoint.note_answered()
        ticket.value = value
        ticket.done = True
        if self.held:
            self.out.extend(self.held.popleft())
        if self.tickets and self.on_more is not None:
            self.on_more()
        waker = ticket.waker
        if waker is not None:
            ticket.waker = None
            waker()

    def _count_received(self, nbytes: int) -> None:
        """Note that a part of the first reply's bulk data has come."""
        if self.tickets:
            self.tickets[0].moved += nbytes

    def settle(self) -> None:
        """Settle the tickets whose replies have arrived."""
        endpoint = self.endpoint
        try:
            while (message := endpoint.next_message()) is not None:
                if type(message) is Shutdown:
                    self._ended_by_peer()
                    return
                if type(message) is Raised and message.text.startswith(TIMEOUT_PREFIX):
                    self.fail(SessionTimeout(message.text.removeprefix(TIMEOUT_PREFIX)))
                    return
                if not self.tickets:
                    raise RemoteProtocolError(f"expected nothing, got {message}")
                ticket = self.tickets.popleft()
                ticket.reply = message  # type: ignore[assignment]  # the endpoint lets only replies through
                ticket.done = True
                if self.held:
                    self.out.extend(self.held.popleft())
                if self.tickets and self.on_more is not None:
                    self.on_more()
                waker = ticket.waker
                if waker is not None:
                    ticket.waker = None
                    waker()
                elif ticket.abandoned and ticket.request is not None:
                    self.garbage.extend(undo(ticket.request, ticket.result()))
                if not self.tickets and not endpoint.buffered:
                    return  # behind the last reply there may be the word that the session's time is over
        except RpcError as error:
            self.fail(error)

    def _ended_by_peer(self) -> None:
        self.endpoint.receive_eof()
        self._lose(f"{self.peer} closed the connection")

    def _during(self) -> str:
        request = self.tickets[0].request if self.tickets else None
        if request is None:
            return ""
        code = getattr(request, "code", None)
        return f" during {code.name if code is not None else type(request).__name__}"

    def _drain_then_fail(self, error: OSError) -> None:
        """A send failed; what the peer said before it closed (a time limit, say) may still be readable."""
        self.out.clear()
        while self.ended is None:
            view = self.endpoint.get_buffer()
            try:
                count = self._receive(view, min(len(view), PIECE), _NOW)
            except OSError:
                count = 0
            if count == 0:
                self._lose(f"{self.peer}: {error.strerror or error}")
                return
            self.endpoint.received(count)
            self.settle()

    def _lose(self, how: str) -> None:
        """The connection has ended under us; where somebody can be asked why, what is owed waits for that."""
        if self.asking:
            return
        error = SessionLost(f"session lost: {how}{self._during()}")
        if self.inquire is None or self.ended is not None:
            self.fail(error)
            return
        self.asking = True
        self.ended = error.again()
        self._release()
        self.inquire(error)

    def conclude(self, error: RpcError) -> None:
        """Settle what is owed with the reason why the connection was lost."""
        if self.asking:
            self.asking = False
            self.ended = error.again()
            self.fail(error)

    def fail(self, error: RpcError) -> None:
        """End the connection; everything owed is settled with ``error``."""
        if self.ended is None:
            self.ended = error.again()  # without the frames that it came through
        self._release()
        tickets, self.tickets = self.tickets, deque()
        for ticket in tickets:
            ticket.error = self.ended.again()
            ticket.done = True
            waker = ticket.waker
            if waker is not None:
                ticket.waker = None
                waker()

    def _release(self) -> None:
        """Let go of the socket and of what was to be sent."""
        self.out.clear()
        self.held.clear()
        if self.before_close is not None:
            self.before_close()
        self.sock.close()

    def forked(self) -> None:
        """In a forked child: let go of the socket without a word to the peer, whose session is the parent's."""
        self.lock = threading.RLock()
        self.is_in_step = self.lock._is_owned  # type: ignore[attr-defined]  # not in the stub
        self.before_close = None
        self.is_parents = True
        if self.ended is None:
            self.sock = _let_go(self.sock)
            self.fail(
                ForkedSession(
                    f"this connection to {self.peer} was opened before a fork and belongs to the parent process; "
                    "open a session in the child (rpcnb.connect)"
                )
            )

    def abandon(self, ticket: Ticket) -> None:
        """Give up waiting for ``ticket``: its memory is neither read nor written any more."""
        if ticket.done:
            if ticket.reply is not None and ticket.request is not None and not (ticket.taken or ticket.abandoned):
                self.garbage.extend(undo(ticket.request, ticket.reply))
            ticket.abandoned = True
            return
        ticket.waker = None
        ticket.abandoned = True
        request = ticket.request
        if isinstance(request, CopyFromRemote):
            self.endpoint.discard(request)
        elif isinstance(request, CopyToRemote):
            self._zero_rest(ticket)
            request.payload = b""
        elif isinstance(request, CallFunc) and request.sink is not None:
            request.sink.drop()

    def _zero_rest(self, ticket: Ticket) -> None:
        """Replace what is not yet sent of an upload's data by zeros: framing stays whole, user memory is let go."""
        self.out = deque(self._without(ticket, self.out))
        self.held = deque(self._without(ticket, parts) for parts in self.held)

    @staticmethod
    def _without(ticket: Ticket, parts: Iterable[tuple[Buffer, Ticket | None]]) -> list[tuple[Buffer, Ticket | None]]:
        kept: list[tuple[Buffer, Ticket | None]] = []
        for buffer, owner in parts:
            if owner is not ticket or not isinstance(buffer, memoryview):
                kept.append((buffer, owner))
                continue
            left = len(buffer)
            while left:
                part = _ZEROS[: min(left, len(_ZEROS))]
                kept.append((part, None))
                left -= len(part)
        return kept

    def shutdown(self) -> None:
        """Say goodbye as far as the socket takes it at once, and close."""
        if self.ended is not None:
            return
        if not self.out and self.endpoint.state is not State.CLOSED:
            try:
                for buffer in self.endpoint.send(Shutdown()):
                    self._send(buffer, _NOW)
            except (OSError, RpcError):
                pass  # the peer sees the end of the stream instead
        self.fail(SessionClosed("this session is closed"))

    @property
    def owed(self) -> list[Ticket]:
        """The replies that are owed to operations."""
        return [ticket for ticket in list(self.tickets) if ticket.request is not LOOK_AGAIN]

    def behind(self, tickets: Iterable[Ticket]) -> str:
        """Say what an operation with these tickets may be waiting for, where that is another's; or nothing."""
        first = next(iter(self.owed), None)
        mine = [ticket for ticket in tickets if not ticket.done]
        if first is None or not mine or any(ticket is first for ticket in mine):
            return ""
        code = getattr(first.request, "code", None)
        name = code.name if code is not None else type(first.request).__name__
        return f"{self.peer} has not answered an earlier {name} yet, behind which this waits"

    @property
    def busy(self) -> bool:
        """Tell whether anything is to be sent or is owed."""
        return bool(self.tickets or self.out)


def make_wire(sock: socket.socket, answer: KeyText, address: Address, depth: int | None, limits: Limits) -> Wire:
    """Return the client's side of a connection that has been greeted."""
    wire = Wire(sock, Endpoint(Role.CLIENT, limits), str(address))
    wire.is_stock = answer.features is None
    wire.depth = depth
    return wire


class _Closed:
    """Stands in the place of a socket that was the parent's."""

    def close(self) -> None:
        """Do nothing."""

    def fileno(self) -> int:
        """Return that there is none."""
        return -1


def _let_go(sock: Any) -> Any:
    """Close this process's descriptor of a socket, and say nothing on it (a WebSocket's own close says goodbye)."""
    number = sock.detach()
    if number >= 0:
        os.close(number)
    return _Closed()


def _gather(out: deque[tuple[Buffer, Ticket | None]]) -> list[Buffer]:
    """Return what one system call should send: some buffers, up to the first that is longer than a piece."""
    parts: list[Buffer] = []
    for buffer, _ in islice(out, _GATHER):
        if len(buffer) > PIECE:
            parts.append(memoryview(buffer)[:PIECE])
            break
        parts.append(buffer)
    return parts


def stop_waiting(wire: Wire, tickets: Iterable[Any]) -> list[int]:
    """Abandon the tickets of an operation that was given up.

    Returns:
        The ordinals of the calls among them that the server has not answered.
    """
    calls = []
    with wire.lock:
        for ticket in tickets:
            if not ticket.done and type(ticket.request) is CallFunc:
                calls.append(ticket.ordinal)
            wire.abandon(ticket)
    return calls if wire.ended is None else []
