"""A session that performs everything on the next server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from runtime_wire import Client

from rpcnb.errors import SessionLost
from rpcnb.protocol.codes import Code
from rpcnb.protocol.messages import (
    CallFunc,
    CopyAck,
    CopyFromRemote,
    CopyToRemote,
    InitServer,
    Raised,
    Return,
    Shutdown,
    Syscall,
)
from rpcnb.runtime.environment import Environment
from rpcnb.runtime.forwarding import ForwardingSession
from rpcnb.values import CPU, NULL, Pointer, TensorMeta, dtype

META = TensorMeta(77, CPU, (4,), dtype("uint8"))
VOID = Return((None,))


class Next:
    """The connection to the next server; the test answers."""

    def __init__(self) -> None:
        self.owed: list[tuple[Any, Any]] = []
        self.closed = 0

    def exchange(self, request: Any, done: Any) -> None:
        self.owed.append((request, done))

    def close(self) -> None:
        self.closed += 1


class Hop:
    def __init__(self) -> None:
        self.next = Next()
        environment = Environment(constructors={"rpc.Connect": lambda *args: ForwardingSession(self.next)})
        self.client = Client(environment, init=InitServer(("rpc.Connect", "host", 9, "", False)))

    def ask(self, request: Any, answer: Any) -> Any:
        """Send a request, check that it parks, and answer it at the next server."""
        self.client.send(request)
        assert self.client.reply() is None
        assert self.client.servant.parked is not None
        ((onward, done),) = self.next.owed
        self.next.owed.clear()
        self.onward = onward
        assert done.cancelled is False
        if isinstance(answer, BaseException):
            done.error(answer)
        else:
            done(answer)
        return self.client.reply()


@pytest.fixture
def hop() -> Iterator[Hop]:
    hop = Hop()
    yield hop
    hop.client.send(Shutdown())
    assert hop.next.closed == 1


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (CallFunc(5, (1, "x", Pointer(7))), Return((68, Pointer(99)))),
        (Syscall(Code.GET_GLOBAL_FUNC, ("f",)), Return((Pointer(5),))),
        (Syscall(Code.GET_GLOBAL_FUNC, ("none",)), Return((NULL,))),
        (Syscall(Code.FREE_HANDLE, (Pointer(5),)), VOID),
        (Syscall(Code.DEV_GET_ATTR, (CPU, 0)), Return((1,))),
        (Syscall(Code.DEV_STREAM_SYNC, (CPU, NULL)), VOID),
        (Syscall(Code.COPY_AMONG_REMOTE, (META, META, NULL)), VOID),
    ],
)
def test_every_request_parks_and_passes_through_unchanged(hop: Hop, request_: Any, reply: Any) -> None:
    assert hop.ask(request_, reply) == reply
    assert hop.onward == request_


def test_copies_pass_their_bytes_through(hop: Hop) -> None:
    assert hop.ask(CopyToRemote(META, 4, b"abcd"), VOID) == VOID
    assert bytes(hop.onward.payload) == b"abcd"
    into = bytearray(4)
    hop.client.send(CopyFromRemote(META, 4, memoryview(into)))
    ((onward, done),) = hop.next.owed
    hop.next.owed.clear()
    onward.into[:] = b"wxyz"
    done(CopyAck())
    assert hop.client.reply() == CopyAck()
    assert into == b"wxyz"


@pytest.mark.parametrize(
    "request_",
    [CallFunc(5), Syscall(Code.DEV_GET_ATTR, (CPU, 0)), CopyFromRemote(META, 4), CopyToRemote(META, 4, b"1234")],
)
def test_an_exception_gains_one_prefix_per_hop(hop: Hop, request_: Any) -> None:
    reply = hop.ask(request_, Raised("abc"))
    assert reply == Raised("RPCError: Error caught from RPC call:\nabc")
    reply = hop.ask(request_, Raised(reply.text))
    assert reply.text == "RPCError: Error caught from RPC call:\n" * 2 + "abc"


def test_a_lost_next_server_is_an_error_of_this_one(hop: Hop) -> None:
    reply = hop.ask(CallFunc(5), SessionLost("session lost: next:9 closed the connection"))
    assert reply == Raised("session lost: next:9 closed the connection")


def test_a_client_that_leaves_closes_the_onward_session() -> None:
    hop = Hop()
    hop.client.send(CallFunc(5))
    ((_, done),) = hop.next.owed
    hop.client.servant.cancel()
    assert done.cancelled
    assert hop.next.closed == 1
    done(Return((1, 1)))
    assert hop.client.chunks == []
