"""A client whose server says what it likes, without sockets.

The first byte names what the client does (its highest bit: with a stock server), the second how the rest is cut: the
server's answers, which come as they are asked for; then the stream ends. With the operation 0 they are its handshake.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fuzz.promises import PromiseBroken, bounded, pieces
from rpcnb.client.base import SessionBase
from rpcnb.client.remote import RemoteFunction, RemoteTensor
from rpcnb.client.session import Session
from rpcnb.errors import RpcError
from rpcnb.link.dial import ClientKey, greet
from rpcnb.link.interrupt import Guard
from rpcnb.link.running import run_flow
from rpcnb.link.wire import Ticket, Wire, stop_waiting
from rpcnb.protocol.codes import Role
from rpcnb.protocol.endpoint import Endpoint
from rpcnb.protocol.handshake import EXTENSION, KeyText
from rpcnb.protocol.messages import CallFunc, CopyFromRemote
from rpcnb.protocol.shortcut import NOT_PLAIN
from rpcnb.transport.deadline import NO_DEADLINE, Deadline

__all__ = ["OPERATIONS", "one_input"]

_MOST = 1 << 16  # bytes of a tensor that a server may make us fetch: the user asks for that many in so many words


class _Answers:
    """Stands in the socket's place: whatever is sent, the next piece of the answers can be received."""

    def __init__(self, answers: Iterator[bytes]) -> None:
        self._answers = answers
        self._rest = b""

    def send(self, data: Any, flags: int = 0) -> int:
        return len(data)

    def sendmsg(self, buffers: Any, ancillary: Any = (), flags: int = 0) -> int:
        return sum(map(len, buffers))

    def recv_into(self, view: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        data = self._rest or next(self._answers, b"")
        count = min(len(data), nbytes or len(view))
        view[:count] = data[:count]
        self._rest = data[count:]
        return count

    def setsockopt(self, *args: Any) -> None:
        pass

    def close(self) -> None:
        pass


class _Link:
    """A link in one thread: waiting is receiving."""

    quick = False

    def __init__(self, answers: Iterator[bytes]) -> None:
        self.peer = "fuzz"
        self.wire = Wire(_Answers(answers), Endpoint(Role.CLIENT), self.peer)  # type: ignore[arg-type]  # a socket's stand-in
        self.garbage = self.wire.garbage

    def send(self, request: Any) -> Ticket:
        self.wire.queue_garbage()
        ticket = self.wire.queue(request)
        self.wire.flush()
        return ticket

    def call(self, handle: int, args: tuple[Any, ...]) -> Any:
        return NOT_PLAIN

    def exchange(self, request: Any, deadline: Deadline, guard: Guard) -> Ticket:
        ticket = self.send(request)
        self.wait(ticket, deadline, guard)
        return ticket

    def send_calls(self, handle: int, calls: list[tuple[Any, ...]]) -> list[Ticket]:
        tickets = self.wire.queue_calls(handle, calls)
        self.wire.flush()
        return tickets

    def wait(self, ticket: Ticket, deadline: Deadline, guard: Guard) -> None:
        while not ticket.done:
            self.wire.fill()

    def abandon(self, tickets: Any) -> None:
        stop_waiting(self.wire, tickets)

    def close(self) -> None:
        self.garbage.clear()
        self.wire.shutdown()


def _nothing(link: Any, lanes: object) -> None:
    pass


class _Session(Session):
    """A session that runs every flow here, and of which no thread knows."""

    def _attach(self, link: Any, answer: KeyText) -> None:
        SessionBase._attach(self, link, answer)
        self._finalizer = weakref.finalize(self, _nothing, link, self._lanes)

    def _run(self, make: Callable[..., Any], timeout: float | None, what: str, *args: Any, **options: Any) -> Any:
        with Guard() as guard:
            return run_flow(self._link, make(self._ops), NO_DEADLINE, guard)


def _fetch(thing: Any) -> None:
    """Read what a call returned, as a user would."""
    if isinstance(thing, RemoteTensor) and thing.nbytes <= _MOST:
        thing.numpy()
    elif isinstance(thing, RemoteFunction):
        thing(1)


def _call(session: Session) -> None:
    function = session.get_function("f")
    _fetch(function(1, 2.0, "text", b"bytes"))
    _fetch(function())


def _give_up(session: Session) -> None:
    """Abandon calls and copies, and go on."""
    link: Any = session._link
    into = memoryview(bytearray(64))
    tensor = session.empty((64,), "uint8")
    requests: list[Any] = [CallFunc(1), CopyFromRemote(tensor.meta, 64, into), CallFunc(2)]
    tickets = [link.send(request) for request in requests]
    link.abandon(tickets[:2])
    link.wait(tickets[2], NO_DEADLINE, Guard())
    if bytes(into) != bytes(64):
        raise PromiseBroken("expected the memory of a copy that was given up to be left alone")
    session.get_function("f")


def _copy(session: Session) -> None:
    tensor = session.array(np.arange(100, dtype="float32"))
    tensor.numpy()
    tensor.free()


# What a user may do; the number of each is the lowest bits of the first byte.
OPERATIONS: tuple[Callable[[Session], object], ...] = (
    _call,
    _copy,
    _give_up,
    lambda session: session.get_function("f").map([1, 2, 3]),
    lambda session: session.list_functions(),
    lambda session: session.upload(b"data", "name"),
    lambda session: session.download("name"),
    lambda session: session.listdir(),
    lambda session: session.load_module("name")["function"](1),
    lambda session: session.cpu().exist,
    lambda session: session.time_evaluator("f", session.cpu())(1),
    lambda session: session.run_cell("1"),
    lambda session: session.list_cells(),
    lambda session: session.get_variable("x"),
    lambda session: session.list_variables(),
    lambda session: session.status(),
    lambda session: session.remove("name"),
)


def one_input(data: bytes) -> None:
    """Do one thing with a server that answers this; only errors of rpcnb may come of it."""
    if len(data) < 2:
        return
    number, answers = data[0] & 0x7F, pieces(data[2:], data[1])
    with bounded(len(data)):
        if not number:
            _shake_hands(answers)
            return
        answer = KeyText("server", "", {} if data[0] & 0x80 else {"-rpcnb": EXTENSION})
        link = _Link(answers)
        session = _Session(link, "", answer)
        with contextlib.suppress(RpcError):
            OPERATIONS[(number - 1) % len(OPERATIONS)](session)
        ended = link.wire.ended
        if ended is not None and not isinstance(ended, RpcError):
            raise PromiseBroken(f"expected a typed end of the session, got {ended!r}")
        session.close()
        if link.wire.tickets:
            raise PromiseBroken("expected nothing to be owed on a connection that is closed")


def _shake_hands(answers: Iterator[bytes]) -> None:
    steps = greet(ClientKey("key"), "fuzz")
    try:
        next(steps)
        next(steps)
        for piece in answers:
            steps.send(piece)
        steps.send(b"")
        raise PromiseBroken("expected the end of the stream to end the handshake")
    except (RpcError, StopIteration):
        pass
