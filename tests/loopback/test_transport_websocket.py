"""WebSockets: the codec over socket pairs, servers and sessions over ``ws://`` and ``wss://``, what pages may do."""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tornado.websocket
import trustme
from conftest import eventually
from hypothesis import given, settings
from hypothesis import strategies as st

import rpcnb
from rpcnb.runtime.registry import Registry
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


def test_a_session_over_tls(secured: tuple[int, trustme.CA], monkeypatch: pytest.MonkeyPatch) -> None:
    port, authority = secured
    url = f"wss://localhost:{port}/ws"
    with pytest.raises(rpcnb.ConnectFailed, match=r"TLS failed: .*certificate"):
        rpcnb.connect(url, key="web", token="secret-token")
    make = ssl.create_default_context

    def trusting(*args: Any, **options: Any) -> ssl.SSLContext:
        context = make(*args, **options)
        authority.configure_trust(context)
        return context

    monkeypatch.setattr(ssl, "create_default_context", trusting)
    with rpcnb.connect(url, key="web", token="secret-token") as session:
        assert session.call("add", 1, 2) == 3
        array = np.arange(3_000_000, dtype="float32")
        assert (session.array(array).numpy() == array).all()

    async def story() -> None:
        async with await rpcnb.connect_async(url, key="web", token="secret-token") as session:
            assert await session.call("add", 1, 2) == 3

    asyncio.run(story())
    with pytest.raises(rpcnb.ConnectFailed, match="TLS failed"):
        rpcnb.connect(f"wss://127.0.0.1:{port}/ws", key="web", token="secret-token")


def test_a_plain_port_is_no_tls(server: Any) -> None:
    with pytest.raises(rpcnb.ConnectFailed, match=r"does not answer|TLS failed"):
        rpcnb.connect(f"wss://127.0.0.1:{server.web_port}/ws", timeout=0.5)
