"""One side of a conversation after the handshake, as bytes: what arrives, what may be said, what is owed.

The driver (a socket, an event handler, a test) moves bytes; the endpoint says where they go::

    view = endpoint.get_buffer()          # or endpoint.receive_data(data)
    endpoint.received(sock.recv_into(view))
    while (message := endpoint.next_message()) is not None:
        ...                               # a server answers: endpoint.send(Return(...)) -> buffers

How bytes become messages is the :mod:`reader <rpcnb.protocol.reader>`'s business; here is what may be said when.

A server answers one request at a time: while one is in progress ``next_message`` returns None and later requests
wait, in order. A client may have many requests on the way; ``owed`` holds them until their replies come.

Source:
    RPCEndpoint::EventHandler, src/runtime/rpc/rpc_endpoint.cc, protocol 0.8.0.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from rpcnb.errors import LocalProtocolError, RemoteProtocolError, RpcError
from rpcnb.protocol.codes import Limits, Role
from rpcnb.protocol.messages import (
    CallFunc,
    CopyAck,
    CopyFromRemote,
    CopyToRemote,
    InitServer,
    Malformed,
    Raised,
    Return,
    Shutdown,
    Syscall,
    encode_packet,
)
from rpcnb.protocol.peerlimits import PeerLimits
from rpcnb.protocol.reader import PacketReader, Sink

if TYPE_CHECKING:
    from collections.abc import Callable

    from rpcnb.protocol.messages import Message, Reply, Request
    from rpcnb.protocol.sequence import Buffer
    from rpcnb.values import Value

__all__ = ["TRANSITIONS", "Endpoint", "Sink", "State"]


class State(str, Enum):  # str: its hash is C's, and the table below is on the path of every call
    """Where a conversation stands."""

    IDLE = "idle"
    BUSY = "busy"
    CLOSED = "closed"


_IDLE, _BUSY, _CLOSED = State.IDLE, State.BUSY, State.CLOSED  # a member by its class's name costs a look-up


class Kind(str, Enum):
    """What a message is to the conversation."""

    REQUEST = "request"
    REPLY = "reply"
    SHUTDOWN = "shutdown"


_REQUEST, _REPLY = Kind.REQUEST, Kind.REPLY


# Which (sender, kind) is legal where, and where it leads. A server that speaks unasked can only be announcing that
# the session's time is over.
TRANSITIONS: dict[State, dict[tuple[Role, Kind], State]] = {
    State.IDLE: {
        (Role.CLIENT, Kind.REQUEST): State.BUSY,
        (Role.CLIENT, Kind.SHUTDOWN): State.CLOSED,
        (Role.SERVER, Kind.REPLY): State.IDLE,
        (Role.SERVER, Kind.SHUTDOWN): State.CLOSED,
    },
    State.BUSY: {
        (Role.CLIENT, Kind.REQUEST): State.BUSY,
        (Role.CLIENT, Kind.SHUTDOWN): State.CLOSED,
        (Role.SERVER, Kind.REPLY): State.IDLE,
        (Role.SERVER, Kind.SHUTDOWN): State.CLOSED,
    },
    State.CLOSED: {},
}

_KINDS: dict[type, Kind] = {
    InitServer: Kind.REQUEST,
    CallFunc: Kind.REQUEST,
    Syscall: Kind.REQUEST,
    CopyFromRemote: Kind.REQUEST,
    CopyToRemote: Kind.REQUEST,
    Return: Kind.REPLY,
    Raised: Kind.REPLY,
    CopyAck: Kind.REPLY,
    Shutdown: Kind.SHUTDOWN,
}


class Endpoint(PacketReader):
    """One side of a conversation; arguments as :class:`~rpcnb.protocol.reader.PacketReader`."""

    def __init__(
        self,
        role: Role,
        limits: Limits | None = None,
        sink_for: Callable[[int, list[Value], int], Sink | None] | None = None,
    ) -> None:
        super().__init__(role, limits, sink_for)
        self.state = State.IDLE
        self.takes = PeerLimits()  # what the peer takes: the driver knows from its handshake
        self._error: RpcError | None = None
        self._eof = False

    def receive_eof(self) -> None:
        """Note the end of the peer's stream; ``next_message`` raises if it cut a packet."""
        self._eof = True

    def next_message(self) -> Message | None:
        """Return the next thing the peer said, or None if more bytes, or our own reply, must come first.

        Raises:
            RemoteProtocolError: The peer broke the rules; the endpoint is closed and raises it ever after.
        """
        if self._error is not None:
            raise self._error.again()
        if self._start == self._end and self._payload_message is None and not self._eof:
            return None  # nothing has arrived since the last one
        if self.role is Role.SERVER and self.state is not State.IDLE and self._payload_message is None:
            return None  # one request at a time; later ones wait, in order
        try:
            message = self._take()
            if message is not None:
                return self._accept(message)
        except RpcError as error:
            self._close(error)
            raise
        if self._eof and self._inside_packet:
            cut = RemoteProtocolError("the peer's stream ended inside a packet")
            self._close(cut)
            raise cut
        return None

    @property
    def _inside_packet(self) -> bool:
        """Tell whether the stream's end would cut a packet; whole requests behind one in progress are not cut."""
        if self.state is State.CLOSED:
            return False
        if self._payload_left or self._parser is not None:
            return True
        return self._start != self._end and (self.role is Role.CLIENT or self.state is State.IDLE)

    def _accept(self, message: Message) -> Message | None:
        """Check a received message against the table and what is owed, and move the state."""
        kind = _KINDS.get(type(message))
        if self.role is Role.SERVER:
            if kind is None:  # Malformed or PayloadEnd
                self.state = State.BUSY
                return message
            self.state = self._after(Role.CLIENT, kind)
            if kind is Kind.SHUTDOWN:
                self._start = self._end
            return message
        if kind is _REPLY and self.owed:
            request = self.owed.popleft()
            if not self.owed and self.state is State.BUSY:
                self.state = State.IDLE
            if (type(message) is CopyAck) != (type(request) is CopyFromRemote) and type(message) is not Raised:
                raise RemoteProtocolError(f"expected the reply to {_name(request)}, got {_name(message)}")
            return message
        if isinstance(message, Malformed):
            raise RemoteProtocolError(f"expected a reply, got {message.error}") from message.error
        if isinstance(message, Raised):
            return message  # unasked: the session's time is over
        if kind is Kind.SHUTDOWN:
            self.state = State.CLOSED
            return message
        raise RemoteProtocolError(f"expected nothing while no request is on the way, got {_name(message)}")

    def _after(self, sender: Role, kind: Kind) -> State:
        """Return the state after ``sender`` has said something of this kind, or raise if that is not legal."""
        after = TRANSITIONS[self.state].get((sender, kind))
        if after is None:
            name, error = ("we", LocalProtocolError) if sender is self.role else ("the peer", RemoteProtocolError)
            raise error(f"{name} cannot send a {kind.value} while the conversation is {self.state.value}")
        return after

    def _close(self, error: RpcError) -> None:
        self._error = error.again()
        self.state = State.CLOSED
        self._parser = None
        self._payload = None

    # -- decoding ----------------------------------------------------------------------------------------------

    def note_sent(self, request: Request) -> None:
        """Client: note a request whose bytes were made elsewhere (the short way)."""
        if self.state is _CLOSED:
            self._after(Role.CLIENT, Kind.REQUEST)  # raises
        self.state = _BUSY
        self.owed.append(request)

    def note_answered(self) -> None:
        """Client: note that the first reply that was owed has been read elsewhere (the short way)."""
        self.owed.popleft()
        if not self.owed and self.state is _BUSY:  # not closed by our own shutdown meanwhile
            self.state = _IDLE

    def send(self, message: Message) -> list[Buffer]:
        """Return the bytes of ``message`` and note it; a refused one changes nothing.

        Returns:
            Buffers to be sent in order; bulk data is the caller's own memory, not a copy.

        Raises:
            LocalProtocolError: The message is not legal now.
            ArgumentError: A value cannot travel.
            LimitExceeded: A result is larger than the client takes.
        """
        kind = _KINDS[type(message)]
        after = self._after(self.role, kind)
        if kind is _REPLY:
            message = self.takes.fit(message)  # type: ignore[arg-type]  # a reply, by its kind
        buffers = encode_packet(message)
        self.state = after
        if kind is _REQUEST:
            self.owed.append(message)  # type: ignore[arg-type]  # a request, by its kind
        return buffers


def _name(message: Request | Reply | Message) -> str:
    return message.code.name if isinstance(message, Syscall) else type(message).__name__
