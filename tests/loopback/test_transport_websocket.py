"""WebSockets: the codec over socket pairs, servers and sessions over ``ws://`` and ``wss://``, what pages may do."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tornado.websocket
import trustme
from conftest import eventually
from hypothesis import given, settings
from hypothesis import strategies as st

import rpcnb
from rpcnb.protocol.codes import Limits
from rpcnb.runtime.registry import Registry
from rpcnb.server import web
from rpcnb.transport import websocket
from rpcnb.transport.websocket import WebSocket, accept_key

Pair = tuple[WebSocket, WebSocket, socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A client, a server, and the sockets below them."""
    one, two = socket.socketpair()
    one.settimeout(10)
    two.settimeout(10)
    client, server = WebSocket(one, client=True), WebSocket(two, client=False)
    yield client, server, one, two
    client.close()
    server.close()


def receive(sock: WebSocket, count: int, size: int = 1 << 16) -> bytes:
    data = bytearray()
    buffer = bytearray(size)
    while len(data) < count:
        try:
            got = sock.recv_into(buffer, min(size, count - len(data)))
        except BlockingIOError:  # a header alone
            continue
        if not got:
            break
        data += buffer[:got]
    return bytes(data)


def send_in_background(sock: WebSocket, data: bytes) -> threading.Thread:
    def run() -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[sock.send(left) :]
            except BlockingIOError:  # noqa: PERF203  # part of a frame has left
                continue

    thread = threading.Thread(target=run)
    thread.start()
    return thread


# -- the codec -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 125, 126, 1023, 1024, 1025, 65535, 65536, 1_000_003, 5_000_000])
@pytest.mark.parametrize("from_client", [True, False], ids=["up", "down"])
def test_bytes_of_every_size_arrive(pair: Pair, size: int, from_client: bool) -> None:
    source, target = (pair[0], pair[1]) if from_client else (pair[1], pair[0])
    data = np.random.default_rng(size).bytes(size)
    thread = send_in_background(source, data)
    assert receive(target, size) == data
    thread.join()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=2000), min_size=1, max_size=6), st.integers(1, 300), st.booleans())
def test_the_stream_survives_any_cut(messages: list[bytes], size: int, from_client: bool) -> None:
    one, two = socket.socketpair()
    with one, two:
        client, server = WebSocket(one, client=True), WebSocket(two, client=False)
        source, target = (client, server) if from_client else (server, client)
        for message in messages:
            assert source.sendmsg([message[:3], message[3:]]) == len(message)
        assert receive(target, sum(map(len, messages)), size) == b"".join(messages)


def frame(opcode: int, payload: bytes, *, fin: bool = True, key: bytes = b"") -> bytes:
    masked = bytes(letter ^ key[index % 4] for index, letter in enumerate(payload)) if key else payload
    return struct.pack("BB", (0x80 if fin else 0) | opcode, (0x80 if key else 0) | len(payload)) + key + masked


def test_pings_are_answered_and_fragments_joined(pair: Pair) -> None:
    client, _, _, below = pair
    below.sendall(frame(2, b"ab", fin=False) + frame(9, b"hello") + frame(0, b"cd") + frame(10, b"") + frame(9, b""))
    assert receive(client, 4) == b"abcd"
    pongs = below.recv(100)
    assert (pongs[0], pongs[1]) == (0x8A, 0x80 | 5)
    assert bytes(letter ^ pongs[2 + index % 4] for index, letter in enumerate(pongs[6:11])) == b"hello"


def test_a_close_frame_ends_the_stream_and_is_answered(pair: Pair) -> None:
    client, _, _, below = pair
    below.sendall(frame(2, b"ab") + frame(8, struct.pack(">H", 1000)) + frame(2, b"never"))
    assert receive(client, 10) == b"ab"
    assert client.recv(10) == b""
    assert below.recv(100)[0] == 0x88


@pytest.mark.parametrize("from_client", [True, False], ids=["client", "server"])
def test_a_quiet_end_sends_a_ping_between_frames(pair: Pair, from_client: bool) -> None:
    source, target = (pair[0], pair[1]) if from_client else (pair[1], pair[0])
    below = pair[3] if from_client else pair[2]  # the target
    pair[2].setblocking(False)
    pair[3].setblocking(False)
    head = bytes([0x89, 0x80 if from_client else 0])
    pings: list[bytes] = []

    def look(now: float) -> int:
        """Let both look; returns how many pings have come, and lets the other end answer them."""
        source.keep_alive(now)
        try:
            data = below.recv(100, socket.MSG_PEEK)
        except BlockingIOError:
            return len(pings)
        assert data[:2] == head
        pings.append(data)
        with pytest.raises(BlockingIOError, match="only frames' headers have come"):
            target.recv_into(bytearray(100))
        with pytest.raises(BlockingIOError, match="only frames' headers have come"):
            source.recv_into(bytearray(100))  # the pong
        return len(pings)

    assert [look(now) for now in (100.0, 119.9, 120.0, 139.9, 140.0)] == [0, 0, 1, 1, 2]
    assert source.send(b"x") == 1
    assert receive(target, 1) == b"x"
    assert [look(now) for now in (150.0, 169.9, 170.0)] == [2, 2, 3], "what is sent counts as well"


def test_a_ping_never_gets_into_a_frame_and_a_pong_need_not_wait_for_the_next(pair: Pair) -> None:
    client, server, one, two = pair
    two.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    two.setblocking(False)
    data = memoryview(bytes(1 << 20))
    sent = server.send(data)
    assert sent < len(data)
    one.sendall(frame(0x9, b"are you there", key=b"abcd"))
    with pytest.raises(BlockingIOError):
        server.recv_into(bytearray(100))
    server.keep_alive(100.0)
    server.keep_alive(200.0)
    received = bytearray()

    def drain() -> None:
        while len(received) < 1 << 20:
            received.extend(receive(client, (1 << 20) - len(received)))

    reader = threading.Thread(target=drain)
    reader.start()
    while sent < 1 << 20:
        with contextlib.suppress(BlockingIOError):
            sent += server.send(data[sent:])
    reader.join()
    server.keep_alive(201.0)
    assert one.recv(100) == frame(0xA, b"are you there")


def test_what_does_not_take_a_ping_is_left_alone(pair: Pair) -> None:
    client, server, one, two = pair
    two.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while two.send(bytes(1 << 16)):
            """Nobody reads."""
    for now in range(100, 1000, 10):
        server.keep_alive(float(now))
    assert len(server._unsent) == 2, "one ping, that waits"
    client.close()
    client.keep_alive(1000.0)
    assert one.fileno() == -1


def test_our_own_end_is_told(pair: Pair) -> None:
    client, server, _, _ = pair
    server.close()
    assert receive(client, 1) == b""


BAD = {
    "text": frame(1, b"x"),
    "reserved bits": b"\xc2\x01x",
    "reserved opcode": frame(3, b"x"),
    "masked by a server": frame(2, b"x", key=b"abcd"),
    "long ping": b"\x89\x7e\x00\x80",
    "cut ping": frame(9, b"x", fin=False),
}


@pytest.mark.parametrize("name", BAD)
def test_frames_that_break_the_rules_end_the_connection(pair: Pair, name: str) -> None:
    client, _, _, below = pair
    below.sendall(BAD[name])
    with pytest.raises(ConnectionError, match="expected binary"):
        receive(client, 1)


def test_a_client_must_mask(pair: Pair) -> None:
    _, server, below, _ = pair
    below.sendall(frame(2, b"x"))
    with pytest.raises(ConnectionError):
        receive(server, 1)


def test_the_accept_key_is_the_standards_example() -> None:
    assert accept_key("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


# -- servers and sessions ------------------------------------------------------------------------------------------


@pytest.fixture
def server(registry: Registry, serve: Callable[..., Any]) -> Any:
    registry.register("add", lambda a, b: a + b)
    registry.register("later", _later)
    return serve(web_port=0, token="secret-token", key="web")


async def _later(value: Any) -> Any:
    await asyncio.sleep(0.02)
    return value


def test_a_session_over_a_websocket_does_everything(server: Any) -> None:
    with rpcnb.connect(f"ws://127.0.0.1:{server.web_port}/ws", key="web", token="secret-token") as session:
        assert session.is_rpcnb
        assert session.peer == f"ws://127.0.0.1:{server.web_port}/ws"
        assert session.call("add", 1, 2) == 3
        add = session.get_function("add")
        assert list(add.map(range(500), range(500))) == [2 * one for one in range(500)]
        later = session.get_function("later")
        assert [one.result() for one in [later.submit(one) for one in range(20)]] == list(range(20))
        array = np.random.default_rng(0).random(5_000_000)
        remote = session.array(array)
        moving = session.submit(remote.numpy)
        assert add(1, 1) == 2
        assert (moving.result() == array).all()
        session.reconnect()
        assert session.call("add", "a", "b") == "ab"
    eventually(lambda: server.sessions == 0, "its end")


def test_the_awaited_twin_works_over_a_websocket(server: Any) -> None:
    async def story() -> None:
        url = f"ws://127.0.0.1:{server.web_port}"
        async with await rpcnb.connect_async(url, key="web", token="secret-token") as session:
            assert await session.call("add", 1, 2) == 3
            array = np.arange(2_000_000, dtype="float32")
            remote = await session.array(array)
            assert (await remote.numpy() == array).all()
            later = await session.get_function("later")
            assert await asyncio.gather(*[later(one) for one in range(10)]) == list(range(10))

    asyncio.run(story())


@pytest.mark.parametrize("token", [None, "wrong"])
def test_s5_the_token_is_asked_for_on_the_web_port_too(
    server: Any, token: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(rpcnb.KeyMismatch, match="wrong key or token"):
        rpcnb.connect(f"ws://127.0.0.1:{server.web_port}", key="web", token=token)
    caplog.clear()


def test_tornados_own_client_may_be_at_the_other_end(server: Any) -> None:
    async def story() -> bytes:
        other = await tornado.websocket.websocket_connect(f"ws://127.0.0.1:{server.web_port}/ws")
        text = b"client:web -token=secret-token"
        await other.write_message(struct.pack("<ii", 0xFF271, len(text)) + text, binary=True)
        answer = await other.read_message()
        other.close()
        assert await other.read_message() is None, "the server's close frame"
        return bytes(answer)

    assert asyncio.run(story()) == struct.pack("<ii", 0xFF271, 10) + b"server:web"


def test_a_connection_that_says_nothing_is_ended(serve: Callable[..., Any]) -> None:
    from dataclasses import replace

    from rpcnb.protocol.codes import Limits

    server = serve(web_port=0, limits=replace(Limits(), handshake_timeout=0.1))
    with socket.create_connection(("127.0.0.1", server.web_port), 10) as sock:
        request = "GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        sock.sendall(f"{request}Sec-WebSocket-Key: AAAA\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        data = b""
        while more := sock.recv(1000):
            data += more
    assert b"101 Switching" in data


# -- what pages may do: S6 -----------------------------------------------------------------------------------------

UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "keep-alive, Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}
CASES: dict[str, tuple[str, str, dict[str, str], int]] = {
    "no browser": ("GET", "/ws", UPGRADE, 101),
    "our own page": ("GET", "/ws", {**UPGRADE, "Origin": "http://{host}"}, 101),
    "a foreign page": ("GET", "/ws", {**UPGRADE, "Origin": "http://evil.example"}, 403),
    "another port's page": ("GET", "/ws", {**UPGRADE, "Origin": "http://127.0.0.1:1"}, 403),
    "no origin to speak of": ("GET", "/ws", {**UPGRADE, "Origin": "null"}, 403),
    "a broken origin": ("GET", "/ws", {**UPGRADE, "Origin": "http://[::1"}, 403),
    "an evil host": ("GET", "/ws", {**UPGRADE, "Host": "evil.example"}, 403),
    "a rebound name": ("GET", "/ws", {**UPGRADE, "Host": "evil.example", "Origin": "http://evil.example"}, 403),
    "no host": ("GET", "/ws", {**UPGRADE, "Host": ""}, 403),
    "a broken host": ("GET", "/ws", {**UPGRADE, "Host": "[::1"}, 403),
    "localhost": ("GET", "/ws", {**UPGRADE, "Host": "localhost:80"}, 101),
    "another number": ("GET", "/ws", {**UPGRADE, "Host": "[::1]:80"}, 101),
    "an allowed hub": ("GET", "/ws", {**UPGRADE, "Host": "hub.example", "Origin": "https://hub.example"}, 101),
    "across sites": ("GET", "/ws", {**UPGRADE, "Sec-Fetch-Site": "cross-site"}, 403),
    "a page's form": ("POST", "/ws", {"Origin": "http://evil.example", "Content-Type": "text/plain"}, 403),
    "a bare form": ("POST", "/ws", {"Content-Type": "text/plain"}, 405),
    "no upgrade": ("GET", "/ws", {}, 400),
    "an old version": ("GET", "/ws", {**UPGRADE, "Sec-WebSocket-Version": "8"}, 426),
    "another path": ("GET", "/other?token=secret-token", {}, 404),
}


@pytest.mark.parametrize("name", CASES)
def test_s6_what_a_page_may_send(serve: Callable[..., Any], name: str, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(web_port=0, token="secret-token", allow_origin=["hub.example"])
    method, path, headers, expected = CASES[name]
    caplog.set_level(logging.DEBUG)
    connection = http.client.HTTPConnection("127.0.0.1", server.web_port, timeout=10)
    host = f"127.0.0.1:{server.web_port}"
    connection.putrequest(method, path, skip_host=True)
    for header, value in {"Host": host, **headers}.items():
        connection.putheader(header, value.replace("{host}", host))
    connection.endheaders()
    assert connection.getresponse().status == expected
    connection.close()
    assert "secret-token" not in caplog.text
    caplog.clear()


# -- what a client says of other answers ---------------------------------------------------------------------------

ANSWERS: dict[str, tuple[bytes, type[Exception], str]] = {
    "forbidden": (b"HTTP/1.1 403 Forbidden\r\n\r\n", rpcnb.KeyMismatch, "HTTP 403: it refuses us"),
    "login": (b"HTTP/1.1 302 Found\r\nLocation: /hub/login?next=\r\n\r\n", rpcnb.KeyMismatch, "wants a login"),
    "nothing there": (b"HTTP/1.1 404 Not Found\r\n\r\n", rpcnb.ConnectFailed, "404 Not Found; is the path right"),
    "not ours": (
        b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: x\r\n\r\n",
        rpcnb.NotAnRpcServer,
        "does not belong",
    ),
    "no http": (b"SSH-2.0-OpenSSH\r\n\r\n", rpcnb.NotAnRpcServer, "expected an HTTP answer"),
    "no end": (b"HTTP/1.1 200 OK\r\n" + b"x" * 20_000, rpcnb.NotAnRpcServer, "does not end"),
    "hangs up": (b"HTTP/1.1", rpcnb.NotAnRpcServer, "without an HTTP answer|reset"),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("twin", ["sync", "async"])
def test_other_answers_are_explained(name: str, twin: str) -> None:
    data, kind, text = ANSWERS[name]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(4096)
                for start in range(0, len(data), 7000):
                    sock.sendall(data[start : start + 7000])
                sock.shutdown(socket.SHUT_WR)
                sock.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}/x?token=secret"
        with pytest.raises(kind, match=text) as caught:
            rpcnb.connect(url) if twin == "sync" else asyncio.run(rpcnb.connect_async(url))
        assert "secret" not in str(caught.value)
        thread.join()


class Balancer:
    """Cuts a connection on which nothing has moved for a while, as nginx does after a minute."""

    def __init__(self, port: int, patience: float) -> None:
        self.cuts = self.passed = 0
        self._target, self._patience = port, patience
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            thread = threading.Thread(target=self._relay, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _relay(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            while ready := select.select([client, server], [], [], self._patience)[0]:
                for one in ready:
                    try:
                        data = one.recv(1 << 16)
                        (server if one is client else client).sendall(data)
                    except OSError:
                        return
                    if not data:
                        return
                    self.passed += 1
            self.cuts += 1

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Balancer]]:
    """Put balancers before ports, with pings often enough for them."""
    monkeypatch.setattr(websocket, "PING_EVERY", 0.2)
    balancers: list[Balancer] = []

    def start(port: int) -> Balancer:
        balancers.append(Balancer(port, 1.0))
        return balancers[-1]

    yield start
    for balancer in balancers:
        balancer.close()


def waited(balancer: Balancer, seconds: float = 2.0) -> bool:
    """Tell whether a balancer's patience has been tried for so long."""
    start = time.monotonic()
    eventually(lambda: time.monotonic() - start > seconds or balancer.cuts, "some quiet seconds")
    return not balancer.cuts


def test_a_quiet_session_survives_a_balancer(
    registry: Registry, serve: Callable[..., Any], impatient: Callable[[int], Balancer]
) -> None:
    registry.register("add", lambda a, b: a + b)
    registry.register("slow", time.sleep)
    server = serve(web_port=0)
    balancer = impatient(server.web_port)
    with rpcnb.connect(f"ws://127.0.0.1:{balancer.port}/ws", lanes=0) as session:
        assert session.call("add", 1, 2) == 3
        assert waited(balancer)
        assert session.call("slow", 2.0) is None, "a long call is as quiet"
        assert session.call("add", 1, 2) == 3

    async def story() -> int:
        async with await rpcnb.connect_async(f"ws://127.0.0.1:{balancer.port}/ws", lanes=0) as session:
            await session.call("slow", 2.0)
            result: int = await session.call("add", 1, 2)
            return result

    assert asyncio.run(story()) == 3
    assert not balancer.cuts


def test_a_server_pings_a_client_that_does_not(serve: Callable[..., Any], impatient: Callable[[int], Balancer]) -> None:
    server = serve(web_port=0)
    balancer = impatient(server.web_port)

    async def story() -> bool:
        url = f"ws://127.0.0.1:{balancer.port}/ws"
        client = await tornado.websocket.websocket_connect(url)
        key = b"client:"
        await client.write_message(struct.pack("<ii", 0xFF271, len(key)) + key, binary=True)
        assert await client.read_message()
        found = await asyncio.to_thread(waited, balancer)
        client.close()
        while await client.read_message() is not None:
            pass  # until the other side has closed too
        return found

    assert asyncio.run(story())


def test_who_waits_at_a_proxy_survives_a_balancer(
    registry: Registry, serve: Callable[..., Any], impatient: Callable[[int], Balancer]
) -> None:
    registry.register("add", lambda a, b: a + b)
    with rpcnb.Proxy(port=0, web_port=0, silent=True) as proxy:
        balancer = impatient(proxy.web_port or 0)
        server = serve(host=f"ws://127.0.0.1:{balancer.port}", port=balancer.port, key="x", is_proxy=True)
        eventually(lambda: server.registered and proxy.waiting, "the server's wait")
        assert waited(balancer)
        with rpcnb.connect(f"ws://127.0.0.1:{balancer.port}/ws", key="x") as session:
            assert session.call("add", 1, 2) == 3
            assert waited(balancer)
            assert session.call("add", 1, 2) == 3
        server.close()


# -- connections that never become a WebSocket -----------------------------------------------------------------------


def is_over(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return not sock.recv(1000)
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_h10_of_too_many_idle_http_connections_the_oldest_go(serve: Callable[..., Any]) -> None:
    server = serve(web_port=0, limits=Limits(half_open=8))
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", server.web_port), 10)) for _ in range(12)]
        eventually(lambda: all(map(is_over, held[:4])), "the end of the oldest")
        assert not any(map(is_over, held[4:]))
        with rpcnb.connect(f"ws://127.0.0.1:{server.web_port}/ws") as session:
            assert session.call("rpc.test.addone", 1) == 2
    eventually(lambda: not len(server._web._streams), "none is counted any more")


def test_h10_one_address_may_hold_so_many_http_connections(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(web_port=0, limits=Limits(exempt_loopback=False, half_open_per_address=3))
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", server.web_port), 10)) for _ in range(6)]
        eventually(lambda: all(map(is_over, held[3:])), "the end of those too many")
        assert not any(map(is_over, held[:3]))
    assert [record.getMessage() for record in caplog.records] == [
        "server: refused 127.0.0.1: too many HTTP connections"
    ]
    caplog.clear()


@pytest.mark.parametrize(
    "said", [b"", b"GET /ws HT", b"POST /ws HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"]
)
def test_a_request_must_come_in_time(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(web, "_REQUEST", 0.1)
    server = serve(web_port=0)
    with socket.create_connection(("127.0.0.1", server.web_port), 10) as sock:
        sock.sendall(said)
        while sock.recv(1000):
            pass


def test_an_answer_that_fails_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with rpcnb.Proxy(port=0, web_port=0, index_page="/nowhere/index.html", silent=True) as proxy:
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", proxy.web_port, timeout=10)
            connection.request("GET", "/?token=secret-token")
            assert connection.getresponse().status == 500
            connection.close()
    (record,) = caplog.records
    assert record.getMessage().startswith("proxy: an answer to 127.0.0.1 failed: FileNotFoundError: ")
    assert "secret-token" not in caplog.text
    caplog.clear()


@pytest.mark.parametrize("headers", [{"A": "b\r\nEvil: yes"}, {"A:": "b"}, {"ü": "b"}])
def test_headers_cannot_break_out_of_their_lines(server: Any, headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="is not one"):
        rpcnb.connect(f"ws://127.0.0.1:{server.web_port}", headers=headers)


def test_addresses_of_websockets_are_read() -> None:
    for bad in ("ws://", "ws://host/ä", "ws://host/a b", "ws://host:99999"):
        with pytest.raises(ValueError, match="address"):
            rpcnb.connect(bad)
    with pytest.raises(ValueError, match="headers="):
        rpcnb.connect("host:1", headers={"A": "b"})


# -- TLS -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def secured(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, trustme.CA]]:
    """A port that speaks TLS in front of the server's WebSocket, as a hub does."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    loop = server.io_loop.asyncio_loop
    relays: list[asyncio.Task[Any]] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relays.append(asyncio.current_task())  # type: ignore[arg-type]  # there is one
        onward_reader, onward = await asyncio.open_connection("127.0.0.1", server.web_port)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(1 << 16):
                    target.write(data)
                    await target.drain()
            finally:
                target.close()

        await asyncio.gather(pump(reader, onward), pump(onward_reader, writer), return_exceptions=True)

    async def start() -> Any:
        return await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)

    front = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield front.sockets[0].getsockname()[1], authority

    async def stop() -> None:
        front.close()
        for relay in relays:
            relay.cancel()
        await asyncio.gather(*relays, return_exceptions=True)
        await asyncio.sleep(0)

    asyncio.run_coroutine_threadsafe(stop(), loop).result(10)


def test_a_session_over_tls(secured: tuple[int, trustme.CA], tmp_path: Path) -> None:
    port, authority = secured
    url = f"wss://localhost:{port}/ws"
    with pytest.raises(rpcnb.ConnectFailed, match=r"its certificate is not trusted: "):
        rpcnb.connect(url, key="web", token="secret-token")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = rpcnb.Tls(ca=str(tmp_path / "ca.pem"))
    with rpcnb.connect(url, key="web", token="secret-token", tls=tls) as session:
        assert session.call("add", 1, 2) == 3
        array = np.arange(3_000_000, dtype="float32")
        assert (session.array(array).numpy() == array).all()

    async def story() -> None:
        async with await rpcnb.connect_async(url, key="web", token="secret-token", tls=tls) as session:
            assert await session.call("add", 1, 2) == 3

    asyncio.run(story())
    with pytest.raises(rpcnb.errors.CertificateUnknown, match="IP address mismatch"):
        rpcnb.connect(f"wss://127.0.0.1:{port}/ws", key="web", token="secret-token", tls=tls)


def test_a_plain_port_is_no_tls(server: Any) -> None:
    with pytest.raises(rpcnb.ConnectFailed, match=r"does not answer|TLS failed"):
        rpcnb.connect(f"wss://127.0.0.1:{server.web_port}/ws", timeout=0.5)
