"""Tokens are proved, not sent: over every way in, against whoever listens, replays, relays, or changes what is said."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import eventually
from rawpeer import INIT, FakeServer, RawClient, hello, packet

import rpcnb
from rpcnb import errors
from rpcnb.protocol.codes import Code
from rpcnb.protocol.messages import Return, Syscall
from rpcnb.protocol.proof import Proof
from rpcnb.server.isolation import Isolation

TOKEN = "canary-of-the-proofs-0123456789"
OFFER = "client: -rpcnb=1.0 -nonce=a-nonce-of-ours"
Serve = Callable[..., Any]


class Relay:
    """Passes everything on, keeps it, and changes what it is told to; as a stranger on the way does.

    Args:
        port: Of the server.
        change: Gets what one side has said and whether that was the client; returns what the other hears.
    """

    def __init__(self, port: int, change: Callable[[bytes, bool], bytes] = lambda data, _: data) -> None:
        self.heard: list[bytes] = []
        self.heard_of_client: list[bytes] = []
        self._port, self._change = port, change
        self._socks: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._socks += [client, server]
                for one, other, said in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pass_on, args=(one, other, said), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, said_by_client: bool) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self.heard.append(data)
                if said_by_client:
                    self.heard_of_client.append(data)
                other.sendall(self._change(data, said_by_client))
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for sock in (self._listener, *self._socks):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@pytest.fixture
def relay() -> Iterator[Callable[..., Relay]]:
    made: list[Relay] = []

    def start(*args: Any) -> Relay:
        made.append(Relay(*args))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def isolated() -> Iterator[Callable[[], Any]]:
    made: list[Any] = []

    def start() -> Any:
        isolation = Isolation(load=[str(Path(__file__).with_name("isolatedboard.py"))])
        made.append(rpcnb.Server(port=0, web_port=0, silent=True, token=TOKEN, isolate=isolation))
        return made[0]

    yield start
    for one in made:
        one.close()


@pytest.mark.parametrize("isolate", [False, True], ids=["shared", "isolated"])
@pytest.mark.parametrize("web", [False, True], ids=["tcp", "ws"])
def test_who_listens_hears_neither_token_nor_ticket(
    serve: Serve, isolated: Callable[[], Any], relay: Callable[..., Relay], isolate: bool, web: bool
) -> None:
    server = isolated() if isolate else serve(token=TOKEN, web_port=0)
    between = relay(server.web_port if web else server.port)
    secrets = [TOKEN]
    with rpcnb.connect(f"ws://{between.address}/ws" if web else between.address, token=TOKEN) as session:
        function = session.get_function("b.add" if isolate else "rpc.test.addone")
        assert function.submit(*((1, 1) if isolate else (1,))).result(10) == 2
        array = np.arange(1 << 18)
        assert (session.array(array).numpy() == array).all()
        ticket = session._lanes.ticket
        assert ticket.proved
        secrets.append(ticket.secret)
        assert len(server.lanes._sessions) == 1
    said = b"".join(between.heard)
    assert ticket.name.encode() in said or web  # a WebSocket's client masks what it says
    for secret in secrets:
        assert secret.encode() not in said
        assert bytes.fromhex(secret) not in said if re.fullmatch("[0-9a-f]+", secret) else True


def test_an_awaited_session_proves_too(
    serve: Serve, relay: Callable[..., Relay], caplog: pytest.LogCaptureFixture
) -> None:
    between = relay(serve(token=TOKEN).port)

    async def story() -> None:
        async with await rpcnb.connect_async(between.address, token=TOKEN) as session:
            function = await session.get_function("rpc.test.addone")
            assert await function(1) == 2
            array = np.arange(1 << 18)
            assert ((await (await session.array(array)).numpy()) == array).all()
        with pytest.raises(rpcnb.KeyMismatch, match="wrong key or token"):
            await rpcnb.connect_async(between.address, token="wrong" + TOKEN)

    asyncio.run(story())
    assert TOKEN.encode() not in b"".join(between.heard)
    caplog.clear()


# -- what a stranger gets --------------------------------------------------------------------------------------------


def answer_to(client: RawClient, text: str) -> str:
    client.send(hello(text))
    return client.greeted().decode()


def look_up(name: str) -> bytes:
    return packet(Syscall(Code.GET_GLOBAL_FUNC, (name,)))


@pytest.mark.parametrize(
    "behind",
    [
        lambda proof: INIT + look_up(proof.name[:-1] + "0"),
        lambda proof: INIT + look_up("rpc.test.addone"),
        lambda proof: INIT + INIT + look_up(proof.name),
        lambda proof: INIT + look_up(Proof("wrong", "", "").name),
        lambda proof: packet(Syscall(Code.GET_GLOBAL_FUNC, ("rpc.test.addone",))) * 2,
    ],
    ids=["wrong", "a call", "a second init", "another token's", "no init"],
)
def test_nothing_is_served_before_a_proof(
    serve: Serve, behind: Callable[[Proof], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(token=TOKEN)
    with RawClient((server.host, server.port)) as client:
        answer = answer_to(client, OFFER)
        client.send(behind(Proof("wrong", OFFER, answer)))
        said = client.packet()
        assert b"wrong key or token" in said or b"Need to call InitRemoteSession" in said
        assert client.is_closed()
    assert server.sessions == 0
    caplog.clear()


def test_a_proof_is_awaited_as_long_as_a_handshake_and_takes_no_place(serve: Serve) -> None:
    server = serve(token=TOKEN, max_sessions=1, limits=rpcnb.Limits(handshake_timeout=0.3))
    with RawClient((server.host, server.port)) as client:
        answer_to(client, OFFER)
        client.send(INIT)
        with rpcnb.connect(server.address, token=TOKEN) as session:
            assert session.call("rpc.test.addone", 1) == 2
        assert client.is_closed()
    eventually(lambda: not server._connections, "nothing that is left of it")


@pytest.mark.parametrize("isolate", [False, True], ids=["shared", "isolated"])
@pytest.mark.parametrize("behind", [b"", INIT[:9], INIT, INIT + look_up("rpcnb.prove.wrong")])
def test_who_proves_nothing_leaves_nothing(
    serve: Serve, isolated: Callable[[], Any], isolate: bool, behind: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The ends of sessions are remembered, of so many; strangers must not fill that."""
    server = isolated() if isolate else serve(token=TOKEN)
    for _ in range(5):
        with RawClient((server.host, server.port)) as client:
            answer_to(client, OFFER)
            client.send(behind)
    eventually(lambda: not server._connections, "their end")
    assert not server.lanes._ended
    assert not server.lanes._sessions
    caplog.clear()


def test_behind_a_proxy_who_proves_nothing_does_not_keep_the_board(serve: Serve) -> None:
    with rpcnb.Proxy(port=0, silent=True) as proxy:
        limits = rpcnb.Limits(handshake_timeout=0.3)
        server = serve(host="127.0.0.1", port=proxy.port, key="x", is_proxy=True, token=TOKEN, limits=limits)
        eventually(lambda: server.registered, "the server's wait")
        with RawClient(("127.0.0.1", proxy.port)) as client:
            client.send(hello("client:x -rpcnb=1.0 -nonce=n"))
            client.greeted()
            client.send(INIT)
            eventually(lambda: server.registered and proxy.waiting == 1, "its next wait")
            with rpcnb.connect("127.0.0.1", proxy.port, "x", token=TOKEN) as session:
                assert session.call("rpc.test.addone", 1) == 2
        server.close()


def test_a_proof_that_was_heard_is_of_no_use_again(
    serve: Serve, relay: Callable[..., Relay], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(token=TOKEN)
    between = relay(server.port)
    with rpcnb.connect(between.address, token=TOKEN, lanes=0):
        pass
    said, *behind = between.heard_of_client
    with RawClient((server.host, server.port)) as client:
        client.send(said)
        client.greeted()
        client.send(b"".join(behind))
        assert b"wrong key or token" in client.packet()
    caplog.clear()


def test_a_proof_cannot_be_passed_on_to_another_server(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """The other has the same token; it is another conversation all the same."""
    other = serve(token=TOKEN, key="other")
    got: list[bytes] = []

    def script(sock: socket.socket) -> None:
        client_says = sock.recv(4096)
        with RawClient((other.host, other.port)) as onward:
            onward.send(client_says.replace(b"client:mine ", b"client:other "))
            with contextlib.suppress(EOFError):
                answer = onward.greeted()
                sock.sendall(hello(answer.replace(b"server:other", b"server:mine")))
                onward.send(sock.recv(4096))
                got.append(onward.packet())

    with FakeServer(script) as fake, pytest.raises(errors.RpcError):
        rpcnb.connect(fake.address, key="mine", token=TOKEN)
    assert not got or b"wrong key or token" in got[0]
    assert other.sessions == 0
    caplog.clear()


def without(option: bytes) -> Callable[[bytes, bool], bytes]:
    """Take an option out of both key texts, their lengths adapted."""

    def change(data: bytes, _: bool) -> bytes:
        if data[4:5] and data[8:15] in (b"client:", b"server:"):
            text = re.sub(rb" ?" + option + rb"[^ ]*", b"", data[8:])
            return hello(text)
        return data

    return change


@pytest.mark.parametrize("option", [b"-nonce=", b"-rpcnb=", b",lanes", b"-session="])
def test_who_takes_something_away_on_the_way_gets_nothing(
    serve: Serve, relay: Callable[..., Relay], option: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    between = relay(serve(token=TOKEN).port, without(option))
    with pytest.raises(rpcnb.KeyMismatch):
        rpcnb.connect(between.address, token=TOKEN)
    assert TOKEN.encode() not in b"".join(between.heard)
    caplog.clear()


@pytest.mark.parametrize("answer", ["server:", "server: -rpcnb=1.0,lanes -session=a.b", "server: -rpcnb=1.0 -nonce=x"])
def test_a_server_that_does_not_prove_itself_gets_nothing(answer: str) -> None:
    heard: list[bytes] = []

    def script(sock: socket.socket) -> None:
        heard.append(sock.recv(4096))
        sock.sendall(hello(answer))
        heard.append(sock.recv(4096))
        sock.sendall(packet(Return()))
        sock.sendall(packet(Return(("0" * 64,))))
        heard.append(sock.recv(4096))

    with FakeServer(script) as fake, pytest.raises(rpcnb.KeyMismatch, match=r"prove|does not know it"):
        rpcnb.connect(fake.address, token=TOKEN)
    assert TOKEN.encode() not in b"".join(heard)


def test_a_token_in_clear_is_asked_for(serve: Serve, relay: Callable[..., Relay]) -> None:
    between = relay(serve(token=TOKEN).port)
    with rpcnb.connect(between.address, token=TOKEN, plain_token=True) as session:
        assert session.call("rpc.test.addone", 1) == 2
    assert TOKEN.encode() in b"".join(between.heard)
    with pytest.raises(ValueError, match="plain_token=True"):
        rpcnb.connect(between.address, token=TOKEN, extensions=False)
    with rpcnb.connect(between.address, token=TOKEN, extensions=False, plain_token=True) as session:
        assert session.call("rpc.test.addone", 1) == 2
    with pytest.raises(ValueError, match="would get the token"):
        rpcnb.connect("tracker://127.0.0.1:1/rpi", token=TOKEN, plain_token=True)


# -- lanes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "-session={id} -lane=1",
        "-session={id}.{secret} -lane=1",
        "-session={id} -lane=1 -nonce=x",
        "-session={id} -ended=",
        "-session={id}.{secret} -ended=",
        "-session={id} -ended=wrong",
    ],
)
def test_a_ticket_that_was_heard_opens_nothing(serve: Serve, text: str, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(token=TOKEN)
    with rpcnb.connect(server.address, token=TOKEN) as session:
        name, _, _ = session._lanes.ticket
        with RawClient((server.host, server.port)) as client:
            client.send(hello("client: -rpcnb=1.0 " + text.format(id=name, secret="heard")))
            client.send(INIT + look_up("rpcnb.prove."))
            if "-nonce" in text:
                client.greeted()
                assert b"wrong key or token" in client.packet()
            assert client.is_closed()
        assert session.submit(session.fn.rpc.test.addone, 1).result(10) == 2
    with RawClient((server.host, server.port)) as client:  # nor after its end
        client.send(hello("client: -rpcnb=1.0 " + text.format(id=name, secret="heard")))
        assert client.is_closed()
    caplog.clear()


def test_a_session_that_was_lost_says_why_to_who_can_prove_it(
    isolated: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    server = isolated()
    with rpcnb.connect(server.address, token=TOKEN) as session, pytest.raises(errors.SessionCrashed):
        session.call("b.crash", "segfault")
    caplog.clear()


def test_reconnecting_proves_anew(serve: Serve) -> None:
    server = serve(token=TOKEN)
    with rpcnb.connect(server.address, token=TOKEN) as session:
        before = session._lanes.ticket
        session._link.wire.sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(errors.SessionLost):
            session.call("rpc.test.addone", 1)
        session.reconnect()
        assert session.call("rpc.test.addone", 1) == 2
        assert session._lanes.ticket != before
        assert TOKEN not in repr(session._dialer.key)
